"""The directory in which tokenized data is kept: what is in use stays, what was used longest ago goes.

    <key>.tokens             a store, locked (flock, shared) by every process that has it mapped
    .<key>.tokens.partial    one that is being made, locked by the process that makes it

Locks end with their process, whatever ends it. A store's time of access says when it was last opened; it is
set here, as most file systems set it seldom or never.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nf4format.errors import Nf4Error
from nf4format.files import open_regular
from nf4format.resumable import ResumableFile, remove_abandoned

from ..errors import TrainError
from .options import NO_CACHE, DataOptions
from .store import TokenStore, open_store

# Nothing else in the directory is ever touched: `--cache` may name one with other files.
_STORE: Final = re.compile(r"[0-9a-f]{40}\.tokens")
_PARTIAL: Final = re.compile(r"\.[0-9a-f]{40}\.tokens\.partial")
# From a store's last byte to the lock of the process that opens it, with time to spare.
_SETTLING_SECONDS: Final = 60.0


class TokenCache:
    """Stores in a directory, by key: 40 hexadecimal digits.

    Attributes:
        folder: the directory.
        most_bytes: what all stores together may take.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes

    def find(self, key: str, seq_len: int) -> TokenStore | None:
        """The store of that key, checked (see `open_store`); None where there is none."""
        path = self._path(key)
        store = open_store(path, key, seq_len)
        if store is not None:
            with contextlib.suppress(OSError):
                times = (time.time_ns(), path.stat().st_mtime_ns)
                os.utime(path, ns=times, follow_symlinks=False)
        return store

    def new(self, key: str) -> ResumableFile:
        """The file of a new store; entering it raises TakenError where another process is making the same."""
        return ResumableFile(self._path(key))

    def remove_abandoned(self) -> None:
        """Remove what killed processes left unfinished."""
        for entry in self._entries(_PARTIAL):
            remove_abandoned(Path(entry))

    def evict(self) -> None:
        """Remove stores of this user that no process has open until the others take at most `most_bytes`,
        those first that were used longest ago. Where the file system has no locks, none is removed."""
        now = time.time()
        stores = []
        for entry in self._entries(_STORE):
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if status.st_uid == os.geteuid():
                    stores.append((status.st_atime, status.st_size, Path(entry)))
        total = sum(size for _, size, _ in stores)
        for used, size, path in sorted(stores):
            if total <= self.most_bytes:
                break
            if abs(now - used) > _SETTLING_SECONDS and _remove_unused(path):
                total -= size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.tokens"

    def _entries(self, names: re.Pattern[str]) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            yield from [entry for entry in entries if names.fullmatch(entry.name)]


def find_cache(options: DataOptions) -> TokenCache | None:
    """The cache that the options name, its directory made if need be; None: nothing is kept.

    Raises:
        TrainError: the directory cannot be made.
    """
    if options.cache is not None and str(options.cache) == NO_CACHE:
        return None
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "nf4")
    folder = Path(options.cache or default).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(
            folder,
            f"the cache cannot be made: {(error.strerror or str(error)).lower()}",
            remedy="name another directory with --cache, or none",
        ) from error
    return TokenCache(folder, options.cache_bytes)


def _remove_unused(path: Path) -> bool:
    """Remove a store unless some process has it open; whether it is gone."""
    try:
        descriptor = open_regular(path, follow=False)
    except Nf4Error:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
