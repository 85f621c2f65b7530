"""An output that takes hours: made by one run at a time, and kept for a later run if that is wished.

    .<name>.partial           what is written so far, locked (flock) by the run that fills it
    .<name>.partial.journal   which parts of it are done: the caller's to write

Locks end with their process, whatever ends it. What a kill leaves is taken over by the next run to the same
output: it goes on from there or removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from pathlib import Path
from typing import Final, NoReturn

from .atomic import NEW_FILE, AtomicFile, hidden_beside, surely
from .errors import TakenError, WriteError

_PARTIAL: Final = ".partial"
JOURNAL_SUFFIX: Final = ".journal"
_LONGEST_STEM: Final = 200
_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_TRIES: Final = 100


class ResumableFile(AtomicFile):
    """An `AtomicFile` that excludes other runs to the same output and can take over what one left.

    Attributes:
        journal_path: where the caller may note what is done. It is removed with the temporary file.
        is_resumed: the file is what an earlier run left, its journal beside it; else it is new and empty.
        keep: whether the temporary file stays when the block ends by an exception. Settable.

    Raises:
        WriteError: as AtomicFile.
        TakenError: another run is writing the same output.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = True,
        resume: bool = False,
        keep: bool = False,
    ) -> None:
        """`resume`: go on with what an earlier run left, if it left something."""
        super().__init__(path, overwrite=overwrite)
        self._temporary = partial_path(self.path)
        self.journal_path = self._temporary.with_name(self._temporary.name + JOURNAL_SUFFIX)
        self.is_resumed = False
        self.keep = keep
        self._resume = resume
        self._lock = -1  # a duplicate of `fd`, open until all is renamed or removed

    def __enter__(self) -> ResumableFile:
        try:
            super().__enter__()
        except BaseException:
            surely(self._clean_up)
            raise
        return self

    def _open_temporary(self) -> None:
        for _ in range(_TRIES):
            try:
                fd = os.open(self._temporary, NEW_FILE, 0o666)  # less the umask, as any new file
                is_new = True
            except FileExistsError:
                fd, is_new = self._open_existing(), False
            if fd < 0:
                continue
            try:
                if self._adopt(fd, is_new):
                    return
            finally:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._refuse_other("other runs take it again and again", "let one run at a time write it")

    def _open_existing(self) -> int:
        """Descriptor of what another run left or is writing; -1 if it is gone."""
        try:
            return os.open(self._temporary, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return -1

    def _adopt(self, fd: int, is_new: bool) -> bool:
        """Make an open file this run's; False if another try is needed."""
        has_locks = self._take(fd)
        if not _is_at(fd, self._temporary):  # whoever held it has renamed or removed it meanwhile
            return False
        if not is_new and self._resume and _is_ours(fd) and self.journal_path.exists():
            self.is_resumed = True
        elif not is_new and has_locks:
            self._remove()
            return False
        elif not is_new:
            self._refuse_other("nothing tells whether another run is writing it", "remove {} if none is")
        try:
            if is_new:
                self.journal_path.unlink(missing_ok=True)
            self._lock = os.dup(fd)
            self.fd = os.dup(fd)
        except BaseException:
            if is_new:
                self._remove()
            raise
        return True

    def _remove(self) -> None:
        """What a kill between the two leaves is not taken for work that is done: the journal goes first."""
        self.journal_path.unlink(missing_ok=True)
        self._temporary.unlink(missing_ok=True)

    def _commit(self) -> None:
        if not _is_at(self._lock, self._temporary):  # someone removed it by hand, and perhaps began another
            self._refuse_other("{} was removed while it was written", "let it be, and run again")
        super()._commit()

    def _take(self, fd: int) -> bool:
        """Lock the file; False where the file system has no locks."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "wait for its end, or choose another name"
            raise TakenError(self.path, "another run is writing it", remedy=remedy) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        return True

    def _refuse_other(self, problem: str, remedy: str) -> NoReturn:
        raise WriteError(self.path, problem.format(self._temporary), remedy=remedy.format(self._temporary))

    def _clean_up(self) -> None:
        with contextlib.suppress(OSError):
            if self._lock >= 0 and _is_at(self._lock, self._temporary):  # else it is another run's by now
                if self._is_committed or not self.keep:
                    self._remove()
            elif self._is_committed:
                self.journal_path.unlink(missing_ok=True)
        if self._lock >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # a mapping may hold the file open still
        for fd in (self.fd, self._lock):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.fd = self._lock = -1


def partial_path(path: Path) -> Path:
    """Where an unfinished output lies."""
    name = os.fsencode(path.name)
    if len(name) <= _LONGEST_STEM:
        return hidden_beside(path, _PARTIAL)
    # Long names that begin alike must not share it.
    short = os.fsdecode(name[:_LONGEST_STEM])
    return hidden_beside(path.with_name(short), f".{hashlib.sha256(name).hexdigest()[:8]}{_PARTIAL}")


def remove_abandoned(partial: Path) -> None:
    """Remove what lies at `partial_path` of an output, and its journal, unless a run is writing it."""
    try:
        fd = os.open(partial, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_ours(fd) and _is_at(fd, partial):
            partial.with_name(partial.name + JOURNAL_SUFFIX).unlink(missing_ok=True)
            partial.unlink(missing_ok=True)
    except OSError:
        pass  # it is being written, or nothing tells whether it is
    finally:
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    """Only who holds the lock of what is there may rename or remove it."""
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def _is_ours(fd: int) -> bool:
    """A plain file that nobody else made or can reach by another name."""
    status = os.fstat(fd)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
