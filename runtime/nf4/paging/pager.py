"""Fixed-size pages of optimizer state: a pool under a byte budget, with slower memory behind it.

How it works::

    page number      0    1    2    3    4    5   ...          (num_pages, page_bytes each)
    pool slots     [ 4 ][ 2 ][ 3 ]                              at most budget_bytes
    store          | 0 | 1 | 2 | 3 | 4 | 5 | ...                room for every page

A page in use is pinned. When a page that is not in the pool is wanted, the least recently used page
that is not pinned leaves its slot: written to the store if it changed, then the wanted one is read
(a page never stored yet is zeros). All transfers run in order on one worker thread, so that
`prefetch` overlaps them with the caller's arithmetic and a page evicted and wanted again at once is
read after it was written. With no budget every page has a slot, and there is no store and no thread.

What lies behind the pool is any `PageStore` (`nf4.paging.stores`), a file unless said otherwise. State
on a GPU has a pager of its own, `nf4.paging.cuda_pager`, because there streams and events do what the
worker thread does here.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import TrainError
from .stores import FileStore, PageStore

PAGES_AHEAD = 2  # arriving while a page is in use: a transfer that takes long is made up for by a short one


@dataclass
class PagerStats:
    """Counters since the pager was made. A hit is a page found in the pool, prefetched ones included; the
    stall time is what the arithmetic waited for pages on their way."""

    hits: int = 0
    misses: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    stall_seconds: float = 0.0


@dataclass
class _Resident:
    slot: int
    pins: int = 0
    dirty: bool = False
    arrival: Future[None] | None = field(default=None)


def slots_within(num_pages: int, page_bytes: int, budget_bytes: int | None) -> int:
    """How many pages a pool of that budget holds; None holds all.

    Raises:
        TrainError: not one.
    """
    if budget_bytes is not None and budget_bytes < page_bytes:
        raise TrainError(
            "",
            "page budget is smaller than one page",
            expected=f"at least {page_bytes} bytes",
            got=budget_bytes,
            remedy="raise the budget or make pages smaller",
        )
    return num_pages if budget_bytes is None else min(num_pages, budget_bytes // page_bytes)


class Pager:
    """Pages 0 .. num_pages - 1, zero at first, at most `budget_bytes` of them in the pool at a time.

    Used from one thread. After an error of the store the page concerned stays lost: using it raises
    the same error again.

    Args:
        num_pages: how many pages there are.
        page_bytes: bytes in a page.
        budget_bytes: the most the pool may hold; None keeps every page resident.
        backing: where the file behind the pool is (see `FileStore`); None takes a temporary file.
        make_store: makes what stands behind the pool instead of a file; called only where not all pages fit.

    Raises:
        TrainError: the budget is smaller than one page, there is no memory for the pool, or the file cannot
            be made.
    """

    def __init__(
        self,
        num_pages: int,
        page_bytes: int,
        *,
        budget_bytes: int | None = None,
        backing: str | os.PathLike[str] | None = None,
        make_store: Callable[[], PageStore] | None = None,
    ) -> None:
        slots = slots_within(num_pages, page_bytes, budget_bytes)
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.stats = PagerStats()
        try:
            self._pool = torch.zeros(slots, page_bytes, dtype=torch.uint8)
        except RuntimeError:
            wanted = f"{slots * page_bytes} bytes of memory"
            remedy = "set a page budget, or lower it"
            raise TrainError("", "no room for optimizer state", expected=wanted, remedy=remedy) from None
        self._free = list(range(slots))
        self._table: OrderedDict[int, _Resident] = OrderedDict()  # least recently used first
        self._stored: set[int] = set()
        self._store: PageStore | None = None
        self._worker: ThreadPoolExecutor | None = None
        if slots < num_pages:
            self._store = make_store() if make_store else FileStore(num_pages, page_bytes, backing)
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pager")
        self._finalizer = weakref.finalize(self, _close, self._worker, self._store)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the pages in the pool now."""
        return len(self._table) * self.page_bytes

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the pool: the most `resident_bytes` can be."""
        return self._pool.shape[0] * self.page_bytes

    @contextmanager
    def page(self, index: int, *, write: bool = True) -> Iterator[Tensor]:
        """The page's bytes, uint8 [page_bytes], pinned in the pool until the block ends.

        Args:
            index: page number.
            write: whether the block changes the page.

        Raises:
            TrainError: the store failed for this page.
        """
        if index in self._table:
            self.stats.hits += 1
        else:
            self.stats.misses += 1
            if not self._admit(index):
                raise RuntimeError(f"page {index} does not fit: all {self._pool.shape[0]} slots are pinned")
        entry = self._table[index]
        self._table.move_to_end(index)
        if entry.arrival is not None:
            began = time.perf_counter()
            entry.arrival.result()
            entry.arrival = None
            self.stats.stall_seconds += time.perf_counter() - began
        entry.pins += 1
        entry.dirty |= write
        try:
            yield self._pool[entry.slot]
        finally:
            entry.pins -= 1

    def prefetch(self, index: int) -> None:
        """Start bringing a page in, without waiting; does nothing where every slot is pinned."""
        if index in self._table:
            self._table.move_to_end(index)  # it stays until it is used
        else:
            self._admit(index)

    def sweep(self, order: Sequence[int], *, write: bool = True) -> Iterator[list[tuple[int, Tensor]]]:
        """The pages in this order, one at a time, while the next arrive: [(number, uint8 [page_bytes])].

        Args:
            order: page numbers.
            write: whether the caller changes the pages.

        Raises:
            TrainError: the store failed.
        """
        ahead = min(PAGES_AHEAD, self._pool.shape[0] - 1)
        for position, index in enumerate(order):
            with self.page(index, write=write) as page:
                for coming in order[position + 1 : position + 1 + ahead]:
                    self.prefetch(coming)
                yield [(index, page)]

    def close(self) -> None:
        """Finish transfers and remove the file; the pages are gone."""
        self._finalizer()

    def _admit(self, index: int) -> bool:
        """Give the page a slot and start filling it; False where every slot is pinned."""
        leaving: int | None = None
        if self._free:
            slot = self._free.pop(0)
        else:
            victim = next((page for page, entry in self._table.items() if entry.pins == 0), None)
            if victim is None:
                return False
            entry = self._table.pop(victim)
            slot = entry.slot
            leaving = victim if entry.dirty else None
        arriving = index if index in self._stored else None
        arrival = None
        if self._worker is not None and self._store is not None:
            arrival = self._worker.submit(_exchange, self._store, self._pool[slot], leaving, arriving)
        if leaving is not None:
            self._stored.add(leaving)
            self.stats.bytes_out += self.page_bytes
        if arriving is not None:
            self.stats.bytes_in += self.page_bytes
        self._table[index] = _Resident(slot, arrival=arrival)
        return True


def _exchange(store: PageStore, slot: Tensor, leaving: int | None, arriving: int | None) -> None:
    """Empty a slot into the store, then fill it: from the store, or with zeros."""
    if leaving is not None:
        store.write(leaving, slot)
    if arriving is not None:
        store.read(arriving, slot)
    else:
        slot.zero_()


def _close(worker: ThreadPoolExecutor | None, store: PageStore | None) -> None:
    if worker is not None:
        worker.shutdown(wait=True)
    if store is not None:
        store.close()
