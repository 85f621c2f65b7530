"""Pages of optimizer state on a GPU: a pool under a byte budget, with pinned host memory behind it.

How it works. Three streams: the caller's, one for copies to the GPU, one for copies from it::

    compute   | update 0 |  update 1 |  update 2 |  update 3 | ...
    out                  |  page 0 to the host   |  page 1 to the host   | ...
    in                                           |  page 4 into that slot |  page 5 ...

Events order them and the host never waits: a page leaves after the kernel that used it, its slot is filled
after it has left, the kernel over the new page starts when that has arrived. A sweep knows the order in
which pages will be wanted, so as soon as a page has been used its slot goes to the next one that is missing,
as far ahead as there are slots. Where all pages fit the budget nothing ever moves, and there are neither
streams nor host memory.

The pool is made of slabs of a few pages, each an allocation of its own. Under memory pressure `shrink` gives
all but one back; the pool stays small from then on. Only plain allocations: memory that the driver migrates
by itself can stall a GPU once its memory is full.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, cuda

from ..errors import TrainError
from .pager import PagerStats, slots_within

SLAB_PAGES = 8  # what stays under pressure: with four the link idles now and then, with eight hardly
GROUPS = 4  # of pages in the pool: one in use, one leaving, one arriving, one in reserve


class PinnedArena:
    """Host memory for every page, pinned, in one allocation.

    Attributes:
        pages: uint8 [num_pages, page_bytes].

    Raises:
        TrainError: there is not enough memory, or it cannot be pinned.
    """

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        wanted = num_pages * page_bytes
        remedy = "free host memory, raise its limit (ulimit -l), or raise the page budget"
        try:
            # Pinned here and not by torch, whose allocator for pinned memory rounds up to a power of two.
            self.pages = torch.empty(num_pages, page_bytes, dtype=torch.uint8)
        except RuntimeError:
            raise TrainError("", f"no host memory for {wanted} bytes of pages", remedy=remedy) from None
        runtime = cuda.cudart()
        code = runtime.cudaHostRegister(self.pages.data_ptr(), wanted, 0)
        if code != runtime.cudaError.success:
            reason = runtime.cudaGetErrorString(code)
            raise TrainError("", f"cannot pin {wanted} bytes of pages: {reason}", remedy=remedy)
        self._finalizer = weakref.finalize(self, runtime.cudaHostUnregister, self.pages.data_ptr())

    def close(self) -> None:
        """Unpin; no copy may be under way."""
        self._finalizer()


@dataclass
class _Slot:
    """Room for a page. The events are used again and again; a wait refers to the record before it."""

    memory: Tensor
    arrival: cuda.Event  # in the stream of copies in: the page is there
    used: cuda.Event  # in the caller's stream: the last kernel over the page is done
    left: cuda.Event  # in the stream of copies out: the host has the page
    vacant: cuda.Event | None = None  # which of them must have happened before the slot is filled


@dataclass
class _Resident:
    slot: _Slot
    dirty: bool = False
    is_arriving: bool = False  # no kernel has waited for it yet


@dataclass
class _Copies:
    """What paging needs beyond the pool; made when the first page has to leave."""

    arena: Any
    inward: cuda.Stream
    outward: cuda.Stream

    def close(self) -> None:
        self.inward.synchronize()
        self.outward.synchronize()
        self.arena.close()


class CudaPager:
    """Pages 0 .. num_pages - 1, zero at first, at most `budget_bytes` of them on the GPU at a time.

    Used from one thread, with one current stream at a time. Where the GPU has less free memory than the
    budget, the pool takes what there is.

    Args:
        num_pages: how many pages there are.
        page_bytes: bytes in a page.
        budget_bytes: the most the pool may hold; None keeps every page on the GPU.
        device: the GPU.

    Raises:
        TrainError: the budget is smaller than one page, or there is no memory for a few pages.
    """

    def __init__(
        self, num_pages: int, page_bytes: int, *, budget_bytes: int | None = None, device: torch.device
    ) -> None:
        slots = slots_within(num_pages, page_bytes, budget_bytes)
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self._device = device
        self._stats = PagerStats()
        self._stalls: deque[tuple[cuda.Event, cuda.Event]] = deque()
        self._slabs: list[list[_Slot]] = []
        self._copies: _Copies | None = None
        while (have := sum(map(len, self._slabs))) < slots:
            try:
                self._slabs.append(self._slab(min(SLAB_PAGES, slots - have)))
            except torch.OutOfMemoryError:
                if not self._slabs:
                    wanted = f"{min(SLAB_PAGES, slots) * page_bytes} bytes of GPU memory"
                    raise TrainError("", "no room for optimizer state", expected=wanted) from None
                break
        everywhere = [slot for slab in self._slabs for slot in slab]
        self._table = OrderedDict((k, _Resident(slot)) for k, slot in enumerate(everywhere[:num_pages]))
        self._stored: set[int] = set()  # the others are zeros when they come in
        if len(everywhere) < num_pages:
            self._start_paging()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the pages on the GPU now."""
        return len(self._table) * self.page_bytes

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the pool: the most `resident_bytes` can be."""
        return sum(map(len, self._slabs)) * self.page_bytes

    @property
    def stats(self) -> PagerStats:
        """Counters; the stall time covers what the GPU is known to have finished, without waiting for it."""
        while self._stalls and self._stalls[0][1].query():
            begin, end = self._stalls.popleft()
            self._stats.stall_seconds += begin.elapsed_time(end) / 1000
        return self._stats

    def sweep(self, order: Sequence[int], *, write: bool = True) -> Iterator[list[tuple[int, Tensor]]]:
        """The pages in this order, in groups: (number, uint8 [page_bytes] on the GPU).

        What the caller does with a group must be in the current stream before it asks for the next one.

        Args:
            order: page numbers, each once.
            write: whether the caller changes the pages.
        """
        compute = cuda.current_stream(self._device)
        self.stats  # noqa: B018 -- collects the times of the sweep before
        position = {page: i for i, page in enumerate(order)}
        missing = deque(page for page in order if page not in self._table)
        # Pages to give up, best first: those not in the sweep, then those it is done with, the oldest first,
        # because the next sweep, in the opposite order, wants them last.
        done = deque(page for page in self._table if page not in position)
        self._exchange(done, missing)
        size = max(1, self.capacity_bytes // self.page_bytes // GROUPS) if missing else len(order)
        for start in range(0, len(order), max(1, size)):
            group = order[start : start + size]
            for page in group:
                if page in self._table:
                    self._stats.hits += 1
                    continue
                self._stats.misses += 1
                if not done:  # take the slot of the page that is wanted last
                    victim = max(self._table, key=lambda k: position.get(k, 0))
                    self._exchange(deque([victim]), deque([page]))
                    missing = deque(k for k in order[start:] if k not in self._table)
                else:
                    self._exchange(done, missing)
            entries = [self._table[page] for page in group]
            self._await_arrival(entries, compute)
            yield [(page, entry.slot.memory) for page, entry in zip(group, entries, strict=True)]
            for page, entry in zip(group, entries, strict=True):
                entry.dirty |= write
                self._table.move_to_end(page)
                if self._copies is not None:
                    entry.slot.used.record(compute)
            done.extend(group)
            self._exchange(done, missing)

    def shrink(self) -> int:
        """Give back the memory of all but a few pages, for good; waits for the GPU.

        Returns:
            The bytes that went back to the allocator.

        Raises:
            TrainError: the host has no memory for the pages.
        """
        given = self._slabs[1:]
        if not given:
            return 0
        compute = cuda.current_stream(self._device)
        if self._copies is None:
            self._start_paging()
            for entry in self._table.values():
                entry.slot.used.record(compute)
        assert self._copies is not None
        leaving = {id(slot) for slab in given for slot in slab}
        self._evict([page for page, entry in self._table.items() if id(entry.slot) in leaving])
        self._copies.inward.synchronize()
        self._copies.outward.synchronize()
        size = sum(map(len, given)) * self.page_bytes
        del self._slabs[1:]
        return size

    def close(self) -> None:
        """Finish copies and give all memory back; the pages are gone."""
        self._table.clear()
        if self._copies is not None:
            self._finalizer()
        self._slabs.clear()

    def _slab(self, pages: int) -> list[_Slot]:
        memory = torch.zeros(pages, self.page_bytes, dtype=torch.uint8, device=self._device)
        return [_Slot(page, cuda.Event(), cuda.Event(), cuda.Event()) for page in memory]

    def _start_paging(self) -> None:
        arena = PinnedArena(self.num_pages, self.page_bytes)
        copies = _Copies(arena, cuda.Stream(self._device), cuda.Stream(self._device))
        self._finalizer = weakref.finalize(self, copies.close)
        self._copies = copies
        # The pool's memory is the caller's stream's: its first zeros come before any copy.
        current = cuda.current_stream(self._device)
        copies.inward.wait_stream(current)
        copies.outward.wait_stream(current)

    def _exchange(self, leaving: deque[int], arriving: deque[int]) -> None:
        """Give the slots of the first to the second, as many as there are of both."""
        count = min(len(leaving), len(arriving))
        if count:
            slots = self._evict([leaving.popleft() for _ in range(count)])
            self._fill([arriving.popleft() for _ in range(count)], slots)

    def _evict(self, pages: list[int]) -> list[_Slot]:
        """Send pages to the host, but not those that have not changed; their slots, to be filled again."""
        assert self._copies is not None
        outward, slots = self._copies.outward, []
        with cuda.stream(outward):
            for page in pages:
                entry = self._table.pop(page)
                slot = entry.slot
                slots.append(slot)
                if entry.dirty:
                    outward.wait_event(slot.used)
                    _copy(self._copies.arena.pages[page], slot.memory)
                    slot.left.record(outward)
                    slot.vacant = slot.left
                    self._stored.add(page)
                    self._stats.bytes_out += self.page_bytes
                else:
                    # Where nobody used it since it arrived: what follows is in the stream of its arrival.
                    slot.vacant = None if entry.is_arriving else slot.used
        return slots

    def _fill(self, pages: list[int], slots: list[_Slot]) -> None:
        """Bring pages into slots that are vacant, or will be."""
        assert self._copies is not None
        inward = self._copies.inward
        with cuda.stream(inward):
            for page, slot in zip(pages, slots, strict=True):
                if slot.vacant is not None:
                    inward.wait_event(slot.vacant)
                if page in self._stored:
                    # It left before the slot that it left was filled, by an earlier copy in this stream.
                    _copy(slot.memory, self._copies.arena.pages[page])
                    self._stats.bytes_in += self.page_bytes
                else:
                    _clear(slot.memory)
                slot.arrival.record(inward)
                self._table[page] = _Resident(slot, is_arriving=True)

    def _await_arrival(self, entries: list[_Resident], compute: cuda.Stream) -> None:
        """Let the caller's stream wait for pages that are on their way, and note how long it does."""
        arriving = [entry for entry in entries if entry.is_arriving]
        if not arriving:
            return
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        begin.record(compute)
        for entry in arriving:
            compute.wait_event(entry.slot.arrival)
            entry.is_arriving = False
        end.record(compute)
        self._stalls.append((begin, end))


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _clear(target: Tensor) -> None:
    target.zero_()
