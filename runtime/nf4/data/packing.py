"""Best-fit-decreasing bin packing of whole examples (Johnson et al., SIAM J. Comput. 3 (1974) 299).

Longest first, each example goes into the fullest bin that still has room for it. Bins that are equally full
are interchangeable, and so are examples of one length: whole groups of them are placed at once, so that a
million examples take a fraction of a second.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """Which examples share a bin.

    items: int32 [N], a permutation of the examples, bin after bin, each from its longest to its shortest.
    bounds: int64 [bins + 1], where each bin begins in `items`, and N.
    """

    items: np.ndarray
    bounds: np.ndarray


def best_fit(lengths: np.ndarray, capacity: int) -> Packing:
    """Pack sequences into bins; where lengths are equal, the earlier one is placed first.

    Args:
        lengths: integers [N], each from 1 to `capacity`, fewer than 2**31.

    Raises:
        ValueError: a length out of range.
    """
    count = len(lengths)
    if count and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths: expected 1 to {capacity}, got {lengths.min()} to {lengths.max()}")
    longest_first = np.argsort(-lengths.astype(np.int32), kind="stable").astype(np.int32)
    bin_of = np.empty(count, dtype=np.int32)  # of longest_first[i]
    levels = _Levels()
    bins = placed = 0
    # Lengths from the longest, with how many have each.
    totals = np.bincount(lengths, minlength=1) if count else np.zeros(1, dtype=np.int64)
    for length in np.flatnonzero(totals)[::-1].tolist():
        stop = placed + int(totals[length])
        while placed < stop:
            room = levels.smallest(length)
            fits = (room or capacity) // length  # the bin stays the fullest until no more fit
            wanted = -(-(stop - placed) // fits)
            if room is None:
                chosen = np.arange(bins, bins + wanted, dtype=np.int32)
                bins, room = bins + wanted, capacity
            else:
                chosen = levels.take(room, wanted)
            taken = min(len(chosen) * fits, stop - placed)
            full, rest = divmod(taken, fits)
            bin_of[placed : placed + full * fits].reshape(full, fits)[:] = chosen[:full, None]
            levels.put(room - fits * length, chosen[:full])
            if rest:  # the last of this length
                bin_of[placed + full * fits : stop] = chosen[full]
                levels.put(room - rest * length, chosen[full:])
            placed += taken
    order = np.argsort(bin_of, kind="stable")
    bounds = np.zeros(bins + 1, dtype=np.int64)
    np.cumsum(np.bincount(bin_of, minlength=bins), out=bounds[1:])
    return Packing(longest_first[order], bounds)


class _Levels:
    """Open bins by the room that is left in them."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # ascending, those in _bins
        self._bins: dict[int, list[np.ndarray]] = {}  # room -> chunks of bins, none empty

    def smallest(self, least: int) -> int | None:
        """The least room of at least this; None where no bin has it."""
        at = bisect_left(self._rooms, least)
        return self._rooms[at] if at < len(self._rooms) else None

    def take(self, room: int, most: int) -> np.ndarray:
        """Some bins with this room, at most so many, at least one."""
        chunks = self._bins[room]
        chunk = chunks.pop()
        if len(chunk) > most:
            chunks.append(chunk[most:])
        if not chunks:
            del self._bins[room]
            del self._rooms[bisect_left(self._rooms, room)]
        return chunk[:most]

    def put(self, room: int, bins: np.ndarray) -> None:
        if room and len(bins):
            if room not in self._bins:
                insort(self._rooms, room)
            self._bins.setdefault(room, []).append(bins)
