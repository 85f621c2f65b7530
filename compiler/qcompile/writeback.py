"""Starts writing dirty pages to disk while a file is still being filled, so that the final fsync is short."""

from __future__ import annotations

import ctypes
import os
import threading
from types import TracebackType

_SYNC_FILE_RANGE_WRITE = 2  # <fcntl.h>: start writing out dirty pages, do not wait for those under way
_PERIOD_S = 0.5  # more often, writes become small and cost more of the kernel's time than they save


class Writeback:
    """Context manager: a thread asks the kernel again and again to start writing what is dirty in a file.

    A hint and nothing more: durability comes from the fsync that follows, and an error that occurs here is
    reported by that fsync. Does nothing where the C library has no sync_file_range (other than Linux).
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writeback", daemon=True)

    def __enter__(self) -> Writeback:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        sync_file_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
        if sync_file_range is None:
            return
        sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        while not self._done.wait(_PERIOD_S):
            if sync_file_range(self._fd, 0, os.fstat(self._fd).st_size, _SYNC_FILE_RANGE_WRITE):
                return
