"""Which examples an epoch shows, and in which order: functions of seed and epoch, and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

GROUP_BATCHES = 64  # micro-batches among which examples of similar length are looked for


class Stream(IntEnum):
    """Keeps the random streams of one seed apart."""

    SPLIT = 1
    ORDER = 2
    MEMBERS = 3
    ROWS = 4


def generator(seed: int, stream: Stream, *path: int) -> np.random.Generator:
    """Random numbers for one purpose; `path` says for which epoch, source and so on."""
    return np.random.default_rng([seed, stream, *path])


def shown_before(epoch: int, size: int, weight: float) -> int:
    """Examples of a source that the epochs before this one show, repeated ones counted again."""
    return round(epoch * weight * size)


def members(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """Indices of the examples that an epoch shows, int32, source after source, each as often as it is shown.

    A source goes round its examples again and again, in an epoch by `weight` times their number, and takes
    those of a round that two epochs share in the order of a permutation of the round: so no example is shown
    more than once more often than another, however small the weight. Indices count on through all sources.
    """
    chosen = []
    first = 0
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        at, stop = (shown_before(e, size, weight) for e in (epoch, epoch + 1))
        while at < stop:
            turn, begin = divmod(at, size)
            end = min(begin + stop - at, size)
            part = np.arange(first, first + size, dtype=np.int32)
            if end - begin < size:
                generator(seed, Stream.MEMBERS, source, turn).shuffle(part)
            chosen.append(part[begin:end])
            at += end - begin
        first += size
    if len(chosen) == 1:
        return chosen[0]
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int32)


def grouped_by_length(
    order: np.ndarray, lengths: np.ndarray, batch: int, *, lead: int, seed: int, epoch: int
) -> np.ndarray:
    """The order changed so that the examples of a micro-batch are of similar length.

    Only within windows of many micro-batches, whose order stays random, so that steps see all lengths.

    Args:
        lengths: of the examples in `order`.
        batch: examples of a micro-batch.
        lead: how many of the first examples complete a micro-batch of the epoch before; they stay.
    """
    stop = lead + max(0, len(order) - lead) // batch * batch  # what is left begins a micro-batch, and stays
    groups = []
    for first in range(lead, stop, batch * GROUP_BATCHES):
        window = slice(first, min(first + batch * GROUP_BATCHES, stop))
        groups.append(order[window][np.argsort(-lengths[window], kind="stable")])
    if not groups:
        return order
    batches = np.concatenate(groups).reshape(-1, batch)
    mixed = batches[generator(seed, Stream.ROWS, epoch).permutation(len(batches))]
    return np.concatenate((order[:lead], mixed.reshape(-1), order[stop:]))
