"""Memory behind a pool of pages on a CPU: a file that nobody else sees, or plain memory."""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nf4format.sums import xxh3

from ..errors import TrainError


class PageStore(Protocol):
    """Room for every page; called from one thread at a time."""

    def read(self, page: int, into: Tensor) -> None:
        """Fill `into` (uint8 [page_bytes]) with a page that was written before."""

    def write(self, page: int, source: Tensor) -> None:
        """Keep `source` (uint8 [page_bytes]) as the content of the page."""

    def close(self) -> None:
        """Give the memory back; more calls do nothing."""


class MemoryStore:
    """Pages in memory.

    Raises:
        TrainError: there is not enough.
    """

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        try:
            self._pages: Tensor | None = torch.empty(num_pages, page_bytes, dtype=torch.uint8)
        except RuntimeError:
            raise TrainError(
                "", f"no memory for {num_pages * page_bytes} bytes of pages", remedy="keep pages in a file"
            ) from None

    def read(self, page: int, into: Tensor) -> None:
        into.copy_(self._room[page])

    def write(self, page: int, source: Tensor) -> None:
        self._room[page].copy_(source)

    def close(self) -> None:
        self._pages = None

    @property
    def _room(self) -> Tensor:
        if self._pages is None:
            raise RuntimeError("the store is closed")
        return self._pages


class FileStore:
    """Pages in a file that has no name: whatever ends the process, nothing is left on the disk.

    The whole size is reserved at the start where the file system can, so that a disk without room shows
    before the first step. XXH3 sums of all pages stay in memory, and a page that comes back is held to its
    own: what the disk lost or mixed up is told, not trained with. A page whose writing failed has no sum.

    Args:
        num_pages, page_bytes: size of the file.
        path: a folder for the file, or a name that is free and gone again at once; None takes the folder for
            temporary files.

    Raises:
        TrainError: the file exists, cannot be made, or the disk has no room for it.
    """

    def __init__(self, num_pages: int, page_bytes: int, path: str | os.PathLike[str] | None = None) -> None:
        self.page_bytes = page_bytes
        self.name = str(path) if path is not None else f"temporary file in {tempfile.gettempdir()}"
        self._sums: dict[int, int] = {}
        try:
            if path is None or Path(path).is_dir():
                with tempfile.TemporaryFile(buffering=0, dir=path) as file:
                    self._fd = os.dup(file.fileno())
            else:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                self._fd = os.open(path, flags, 0o600)
                Path(path).unlink()
        except FileExistsError:
            raise TrainError(
                self.name, "page file exists", remedy="name a folder, or a file that does not exist"
            ) from None
        except OSError as error:
            raise self._failure("cannot create page file", error) from None
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, num_pages * page_bytes)
        except OSError as error:
            self.close()
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise self._failure(f"cannot reserve {num_pages * page_bytes} bytes", error) from None

    def read(self, page: int, into: Tensor) -> None:
        if page not in self._sums:
            raise TrainError(self.name, f"page {page} is lost: it could not be written", remedy=_RESUME)
        view = into.numpy().data
        done = 0
        while done < self.page_bytes:
            try:
                count = os.preadv(self._fd, [view[done:]], page * self.page_bytes + done)
            except OSError as error:
                raise self._failure(f"cannot read page {page}", error) from error
            if count == 0:
                expected = f"{self.page_bytes} bytes"
                raise TrainError(
                    self.name, f"page {page} is cut short", expected=expected, got=done, remedy=_RESUME
                )
            done += count
        if (found := xxh3(view)) != self._sums[page]:
            expected = f"XXH3 {self._sums[page]:016x}"
            raise TrainError(
                self.name,
                f"page {page} came back from the disk damaged",
                expected=expected,
                got=f"{found:016x}",
                remedy=_RESUME,
            )

    def write(self, page: int, source: Tensor) -> None:
        view = source.numpy().data
        self._sums.pop(page, None)
        done = 0
        while done < self.page_bytes:
            try:
                done += os.pwrite(self._fd, view[done:], page * self.page_bytes + done)
            except OSError as error:
                raise self._failure(f"cannot write page {page}", error) from error
        self._sums[page] = xxh3(view)

    def close(self) -> None:
        self._finalizer()

    def _failure(self, problem: str, error: OSError) -> TrainError:
        remedy = "free some space or raise the page budget" if error.errno == errno.ENOSPC else None
        return TrainError(self.name, f"{problem}: {error.strerror or error}", remedy=remedy)


_RESUME = "resume from the last checkpoint, with the page file on another disk or a larger page budget"
