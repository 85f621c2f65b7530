"""The JSONL files that a run writes while it goes, cut back to where a checkpoint was made on resume."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import xxhash

from ..errors import TrainError

_READ_BYTES = 1 << 20


class LogPosition(NamedTuple):
    """How long a log is, and XXH3-64 of these bytes in hexadecimal digits."""

    num_bytes: int
    sum: str


class RunLog:
    """A JSONL file, one record a line; a number that is not finite is null. No line is ever half there.

    The file is made with the first record: a run that fails before it leaves nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._size = 0
        self._sum = xxhash.xxh3_64()

    def resume(self, position: LogPosition) -> None:
        """Go on after the records up to a position; those behind it are cut off.

        Raises:
            TrainError: the file does not begin with what was written up to that position.
        """
        if position.num_bytes == 0:
            return
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise self._other(f"cannot be opened: {error.strerror}") from error
        try:
            self._take(fd)
            at = 0
            while at < position.num_bytes:
                data = os.pread(fd, min(_READ_BYTES, position.num_bytes - at), at)
                if not data:
                    raise self._other("is shorter than it was when the checkpoint was made")
                self._sum.update(data)
                at += len(data)
            if self._sum.hexdigest() != position.sum:
                raise self._other("is not the one that the checkpoint belongs to")
            os.ftruncate(fd, position.num_bytes)
        except BaseException:
            os.close(fd)
            self._sum = xxhash.xxh3_64()
            raise
        self._fd, self._size = fd, position.num_bytes

    def check_free(self) -> None:
        """Raise TrainError if another run is writing this log; call it before removing what a run left."""
        if not self.path.is_file():
            return
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # told when it is to be written
            return
        try:
            self._take(fd)
        finally:
            os.close(fd)

    def _take(self, fd: int) -> None:
        """Lock the file for this run, where the file system has locks; they end with the process."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "wait for its end, or choose another name"
            raise TrainError(self.path, "another run is writing it", remedy=remedy) from error
        except OSError:
            pass

    def _other(self, problem: str) -> TrainError:
        remedy = "put the log of that run there, or pass --force to begin a new one"
        return TrainError(self.path, f"the log {problem}", remedy=remedy)

    def position(self) -> LogPosition:
        """Where the log is now; what stands before it is on the disk when this returns.

        Raises:
            TrainError: the disk reports an error.
        """
        if self._fd is not None:
            try:
                os.fsync(self._fd)
            except OSError as error:
                # Pipes and some devices cannot be synced, and cannot be resumed either.
                if error.errno not in (errno.EINVAL, errno.EROFS, errno.ENOTSUP):
                    raise TrainError(self.path, f"cannot write the log: {error.strerror}") from error
        return LogPosition(self._size, self._sum.hexdigest())

    def write(self, **record: Any) -> None:
        """Append one record.

        Raises:
            TrainError: the file cannot be written, or the disk is full.
        """
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        line = (json.dumps(finite) + "\n").encode()
        try:
            if self._fd is None:
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._fd = os.open(self.path, flags, 0o666)
                self._take(self._fd)
                if stat.S_ISREG(os.fstat(self._fd).st_mode):
                    os.ftruncate(self._fd, 0)
            if os.write(self._fd, line) != len(line):
                os.ftruncate(self._fd, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise TrainError(self.path, f"cannot write the log: {error.strerror}") from error
        self._size += len(line)
        self._sum.update(line)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
