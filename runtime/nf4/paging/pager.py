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

What lies behind the pool is any `PageStore`; here that is a file. State on a GPU has a pager of its own,
`nf4.paging.cuda_pager`, because there streams and events do what the worker thread does here.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import TrainError


class PageStore(Protocol):
    """Memory behind the pool: room for every page; called from one thread at a time."""

    def read(self, page: int, into: Tensor) -> None:
        """Fill `into` (uint8 [page_bytes]) with a page that was written before."""

    def write(self, page: int, source: Tensor) -> None:
        """Keep `source` (uint8 [page_bytes]) as the content of the page."""

    def close(self) -> None:
        """Give the memory back; more calls do nothing."""


class FileStore:
    """Pages in a file that nobody else sees: a nameless temporary file, or a new file at `path`.

    The whole size is reserved at the start where the file system can, so that a disk without room
    shows before the first step. The file is removed on `close` and when the store is collected.

    Raises:
        TrainError: the file exists, cannot be made, or the disk has no room for it.
    """

    def __init__(self, num_pages: int, page_bytes: int, path: str | os.PathLike[str] | None = None) -> None:
        self.page_bytes = page_bytes
        self.name = str(path) if path is not None else f"temporary file in {tempfile.gettempdir()}"
        try:
            if path is None:
                with tempfile.TemporaryFile(buffering=0) as file:
                    self._fd = os.dup(file.fileno())
            else:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                self._fd = os.open(path, flags, 0o600)
        except FileExistsError:
            raise TrainError(
                self.name, "page file exists", remedy="remove it if no other run uses it, or name another"
            ) from None
        except OSError as error:
            raise self._failure("cannot create page file", error) from None
        self._finalizer = weakref.finalize(self, _remove, self._fd, None if path is None else Path(path))
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, num_pages * page_bytes)
        except OSError as error:
            self.close()
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise self._failure(f"cannot reserve {num_pages * page_bytes} bytes", error) from None

    def read(self, page: int, into: Tensor) -> None:
        view = into.numpy().data
        done = 0
        while done < self.page_bytes:
            try:
                count = os.preadv(self._fd, [view[done:]], page * self.page_bytes + done)
            except OSError as error:
                raise self._failure(f"cannot read page {page}", error) from error
            if count == 0:
                raise TrainError(
                    self.name, f"page {page} is cut short", expected=f"{self.page_bytes} bytes", got=done
                )
            done += count

    def write(self, page: int, source: Tensor) -> None:
        view = source.numpy().data
        done = 0
        while done < self.page_bytes:
            try:
                done += os.pwrite(self._fd, view[done:], page * self.page_bytes + done)
            except OSError as error:
                raise self._failure(f"cannot write page {page}", error) from error

    def close(self) -> None:
        self._finalizer()

    def _failure(self, problem: str, error: OSError) -> TrainError:
        remedy = "free some space or raise the page budget" if error.errno == errno.ENOSPC else None
        return TrainError(self.name, f"{problem}: {error.strerror or error}", remedy=remedy)


def _remove(fd: int, path: Path | None) -> None:
    os.close(fd)
    if path is not None:
        path.unlink(missing_ok=True)


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
        backing: path of the file behind the pool (see `FileStore`); None takes a temporary file.
        store: memory behind the pool, instead of a file; closed with the pager.

    Raises:
        TrainError: the budget is smaller than one page, or the file cannot be made.
    """

    def __init__(
        self,
        num_pages: int,
        page_bytes: int,
        *,
        budget_bytes: int | None = None,
        backing: str | os.PathLike[str] | None = None,
        store: PageStore | None = None,
    ) -> None:
        slots = slots_within(num_pages, page_bytes, budget_bytes)
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.stats = PagerStats()
        self._pool = torch.zeros(slots, page_bytes, dtype=torch.uint8)
        self._free = list(range(slots))
        self._table: OrderedDict[int, _Resident] = OrderedDict()  # least recently used first
        self._stored: set[int] = set()
        self._store: PageStore | None = None
        self._worker: ThreadPoolExecutor | None = None
        if slots < num_pages:
            self._store = store or FileStore(num_pages, page_bytes, backing)
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
        if index not in self._table:
            self._admit(index)

    def sweep(self, order: Sequence[int], *, write: bool = True) -> Iterator[list[tuple[int, Tensor]]]:
        """The pages in this order, one at a time, while the next one arrives: [(number, uint8 [page_bytes])].

        Args:
            order: page numbers.
            write: whether the caller changes the pages.

        Raises:
            TrainError: the store failed.
        """
        for position, index in enumerate(order):
            with self.page(index, write=write) as page:
                if position + 1 < len(order):
                    self.prefetch(order[position + 1])
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
