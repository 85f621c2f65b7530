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

The host must start copies faster than the link finishes them. So pages that leave or arrive together get
slots in the order of their numbers, and those that are neighbours both here and there go in one copy.

The pool is made of slabs of a few pages, each an allocation of its own. Under memory pressure `shrink` gives
all but one back; the pool stays small from then on. Only plain allocations: memory that the driver migrates
by itself can stall a GPU once its memory is full.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, cuda

from ..errors import TrainError
from .pager import PagerStats, slots_within
from .pinned_arena import PinnedArena

SLAB_PAGES = 8  # what stays under pressure: with four the link idles now and then, with eight hardly
GROUPS = 4  # of pages in the pool: one in use, one leaving, one arriving, one in reserve
MOST_COPY_BYTES = 16 << 20  # of one copy: what follows must wait for all of it


@dataclass
class _Slot:
    """Room for a page: one row of a slab, uint8 [pages, page_bytes]."""

    slab: Tensor
    row: int
    vacant: cuda.Event | None = None  # what must have happened before the slot is filled

    @property
    def memory(self) -> Tensor:
        return self.slab[self.row]


@dataclass
class _Resident:
    slot: _Slot
    dirty: bool = False
    used: cuda.Event | None = None  # in the caller's stream: the last kernel over the page is done
    arrival: cuda.Event | None = None  # in the stream of copies in; None once a kernel has waited for it


@dataclass
class _Run:
    """Pages `first` .. `first` + len(slots) - 1 and slots that follow each other in a slab."""

    first: int
    slots: list[_Slot]

    def on_device(self) -> Tensor:
        """uint8 [pages, page_bytes]"""
        return self.slots[0].slab.narrow(0, self.slots[0].row, len(self.slots))

    def on_host(self, arena: Any) -> Tensor:
        """uint8 [pages, page_bytes]"""
        return arena.pages.narrow(0, self.first, len(self.slots))


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
            self._mark_used(entries, compute)
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
            self._mark_used(list(self._table.values()), compute)
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
        return [_Slot(memory, row) for row in range(pages)]

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
        outward, waits = self._copies.outward, _Waits(self._copies.outward)
        entries = {page: self._table.pop(page) for page in pages}
        for entry in entries.values():
            # Where nobody used it since it arrived: what follows is in the stream of its arrival.
            entry.slot.vacant = entry.used if entry.arrival is None else None
        dirty = {page: entry.slot for page, entry in entries.items() if entry.dirty}
        with cuda.stream(outward):
            for run in self._runs(list(dirty), list(dirty.values())):
                for page in range(run.first, run.first + len(run.slots)):
                    waits.wait(entries[page].used)
                    self._stored.add(page)
                _copy(run.on_host(self._copies.arena), run.on_device())
                left = cuda.Event()
                left.record(outward)
                for slot in run.slots:
                    slot.vacant = left
                self._stats.bytes_out += len(run.slots) * self.page_bytes
        return [entry.slot for entry in entries.values()]

    def _fill(self, pages: list[int], slots: list[_Slot]) -> None:
        """Bring pages into slots that are vacant, or will be."""
        assert self._copies is not None
        inward, waits = self._copies.inward, _Waits(self._copies.inward)
        slots = sorted(slots, key=lambda slot: (slot.slab.data_ptr(), slot.row))
        by_page = dict(zip(sorted(pages), slots, strict=True))
        with cuda.stream(inward):
            for run in self._runs(pages, [by_page[page] for page in pages], self._stored.__contains__):
                for slot in run.slots:
                    waits.wait(slot.vacant)
                if run.first in self._stored:
                    # They left before the slots that they left were filled, by earlier copies in this stream.
                    _copy(run.on_device(), run.on_host(self._copies.arena))
                    self._stats.bytes_in += len(run.slots) * self.page_bytes
                else:
                    _clear(run.on_device())
                arrival = cuda.Event()
                arrival.record(inward)
                for page, slot in enumerate(run.slots, run.first):
                    self._table[page] = _Resident(slot, arrival=arrival)

    def _runs(
        self, pages: list[int], slots: list[_Slot], kind: Callable[[int], object] = lambda page: None
    ) -> list[_Run]:
        """Pages of one kind that are neighbours, in slots that are too: few runs, of bounded size.

        They come in the order of `pages`, where that is up or down.
        """
        runs: list[_Run] = []
        most = max(1, MOST_COPY_BYTES // self.page_bytes)
        for page, slot in sorted(zip(pages, slots, strict=True), key=lambda pair: pair[0]):
            if runs:
                run = runs[-1]
                before, length = run.slots[-1], len(run.slots)
                follows = before.slab is slot.slab and before.row + 1 == slot.row
                is_next = run.first + length == page and kind(page) == kind(run.first)
                if follows and is_next and length < most:
                    run.slots.append(slot)
                    continue
            runs.append(_Run(page, [slot]))
        return runs[::-1] if pages and pages[0] > pages[-1] else runs

    def _mark_used(self, entries: list[_Resident], compute: cuda.Stream) -> None:
        """The caller's work on these pages so far is what must end before they leave."""
        if self._copies is not None:
            used = cuda.Event()
            used.record(compute)
            for entry in entries:
                entry.used = used

    def _await_arrival(self, entries: list[_Resident], compute: cuda.Stream) -> None:
        """Let the caller's stream wait for pages that are on their way, and note how long it does."""
        arriving = [entry for entry in entries if entry.arrival is not None]
        if not arriving:
            return
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        begin.record(compute)
        waits = _Waits(compute)
        for entry in arriving:
            waits.wait(entry.arrival)
            entry.arrival = None
        end.record(compute)
        self._stalls.append((begin, end))


class _Waits:
    """Lets a stream wait for events, once for those that come several times in a row."""

    def __init__(self, stream: cuda.Stream) -> None:
        self._stream = stream
        self._last: cuda.Event | None = None

    def wait(self, event: cuda.Event | None) -> None:
        if event is not None and event is not self._last:
            self._stream.wait_event(event)
            self._last = event


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _clear(target: Tensor) -> None:
    target.zero_()
