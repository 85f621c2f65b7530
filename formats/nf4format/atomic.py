"""Output that is complete or absent: a temporary sibling is filled, synced, and renamed over the destination.

Whatever interrupts the work before the rename (an exception, Ctrl-C, a full disk, a kill, a power cut), the
destination is as it was. Exceptions also remove the temporary; a kill leaves one `.<name>.<hex>.partial`.
Work of hours, which should go on where it stopped: `nf4format.resumable`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn

from .errors import Nf4Error, WriteError

_RENAME_NOREPLACE: Final = 1
_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
# O_EXCL and O_NOFOLLOW: never through a link that someone else put there.
NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_MAX_NAME_BYTES: Final = 255

_REMEDIES: Final[dict[int, str]] = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "your quota is used up; free some space or choose another place",
    errno.EFBIG: "the file system or a limit (ulimit -f) does not allow files of this size",
    errno.EACCES: "choose a place you may write to",
    errno.EPERM: "choose a place you may write to",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the device reports an error; choose another place",
}


class AtomicFile:
    """A file written under a temporary name and renamed at the end of the `with` block.

    Attributes:
        path: the destination.
        fd: open for reading and writing, inside the block.

    Raises:
        WriteError: the directory is missing or not writable, the destination is a directory or a device
            (or exists and `overwrite` is False), the name is too long, the disk is full, a write or sync
            fails.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
        self.path = Path(path)
        self.fd = -1
        self._overwrite = overwrite
        self._temporary = _temporary_beside(self.path)
        self._is_committed = False

    def __enter__(self) -> AtomicFile:
        _check_destination(self.path)
        if self.path.is_dir():
            _refuse(self.path, "is a directory", "give the name of a file")
        if self.path.exists() and not self.path.is_file():  # a rename would replace /dev/null itself
            _refuse(self.path, "is a device, pipe or socket", "give the name of a file")
        if not self._overwrite and os.path.lexists(self.path):
            _refuse_existing(self.path)
        try:
            with _told(self.path):
                self._open_temporary()
        except Nf4Error:
            raise
        except BaseException:  # Ctrl-C, between the file's creation and the `with` block
            surely(self._clean_up)
            raise
        return self

    def _open_temporary(self) -> None:
        self.fd = os.open(self._temporary, NEW_FILE, 0o666)  # less the umask, as any new file

    def preallocate(self, num_bytes: int) -> None:
        """Give the file its full size and claim the space now: a full disk shows before hours of work.

        The free space is looked at first, as a failing fallocate may fill the disk for a moment; on a file
        system without fallocate that look must do.
        """
        with _told(self.path):
            status = os.fstatvfs(self.fd)
            claimed = os.fstat(self.fd).st_blocks * 512  # by an earlier run
        free = status.f_bavail * status.f_frsize + claimed
        if num_bytes > free:
            raise WriteError(
                self.path,
                "not enough space on the disk",
                expected=f"{num_bytes} bytes free",
                got=free,
                remedy=_REMEDIES[errno.ENOSPC],
            )
        with _told(self.path):
            try:
                os.posix_fallocate(self.fd, 0, num_bytes)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
            os.ftruncate(self.fd, num_bytes)

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of a contiguous buffer at `offset`; threads may write different ranges at once."""
        view = memoryview(data).cast("B")
        with _told(self.path):
            while view:
                count = os.pwrite(self.fd, view, offset)
                view, offset = view[count:], offset + count

    def _commit(self) -> None:
        with _told(self.path):
            os.fsync(self.fd)  # a failure is final: after it the kernel may have dropped the pages
            fd, self.fd = self.fd, -1
            os.close(fd)
            if self._overwrite:
                self._temporary.replace(self.path)
            else:
                _rename_new(self._temporary, self.path)
            self._is_committed = True
            _sync_directory(self.path.parent)

    def _clean_up(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
            self.fd = -1
        with contextlib.suppress(OSError):
            self._temporary.unlink()  # gone already after a successful rename

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            surely(self._clean_up)


def write_bytes(
    path: str | os.PathLike[str], data: bytes | bytearray | memoryview, *, overwrite: bool = True
) -> None:
    """Write a whole file atomically. Raises WriteError."""
    with AtomicFile(path, overwrite=overwrite) as file:
        file.pwrite(data, 0)


class AtomicDirectory:
    """A directory filled under a temporary name and put in place at the end of the `with` block.

    The block receives the temporary directory's Path. An existing directory is replaced only with
    `replace=True` (or if it is empty), by an atomic exchange where the kernel has one. Entries that the new
    directory lacks are carried over, never deleted: files by hard link before the exchange, directories by a
    rename just after it.

    Raises:
        WriteError: as AtomicFile; the destination is a file; it holds files and `replace` is False.
    """

    def __init__(self, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow a link at the destination
        self._replace = replace
        self._removable = True
        self._temporary = _temporary_beside(self.path)

    def __enter__(self) -> Path:
        _check_destination(self.path)
        if os.path.lexists(self.path):
            if self.path.is_symlink() or not self.path.is_dir():
                _refuse(self.path, "exists and is not a directory", "choose another name or remove it")
            if not self._replace and any(self.path.iterdir()):
                _refuse(self.path, "the directory exists and is not empty", "choose another or remove it")
        try:
            with _told(self.path):
                self._temporary.mkdir()
        except Nf4Error:
            raise
        except BaseException:
            surely(self._clean_up)
            raise
        return self._temporary

    def _clean_up(self) -> None:
        for _ in range(2):  # a passing shortage of descriptors or memory leaves some of it
            if self._removable and os.path.lexists(self._temporary):
                with contextlib.suppress(OSError):
                    shutil.rmtree(self._temporary, ignore_errors=True)

    def _commit(self) -> None:
        with _told(self.path):
            exists = self.path.is_dir()
            if exists:
                _carry_files(self.path, self._temporary)
            _sync_tree(self._temporary)
            if not exists:
                self._temporary.rename(self.path)
            else:
                self._take_the_place()
            _sync_directory(self.path.parent)

    def _take_the_place(self) -> None:
        """Swap with the old directory and carry over its directories; if that fails, all is put back."""
        new = self._temporary.stat()
        carried: list[Path] = []
        self._removable = False  # what has the temporary name may be the old directory from here on
        try:
            _exchange(self._temporary, self.path)
            for child in list(self._temporary.iterdir()):
                if _is_directory(child) and not os.path.lexists(self.path / child.name):
                    carried.append(child)
                    child.rename(self.path / child.name)
        except BaseException:
            with contextlib.suppress(OSError):
                if os.path.samestat(self.path.stat(), new):
                    for child in carried:
                        if not os.path.lexists(child):
                            (self.path / child.name).rename(child)
                    _exchange(self._temporary, self.path)
                self._removable = True
            raise
        self._removable = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            surely(self._clean_up)
        if isinstance(error, OSError) and self._is_within(error):
            raise write_error(self.path, error) from error

    def _is_within(self, error: OSError) -> bool:
        """Whether a system call of the block failed at what it writes."""
        name = error.filename
        return not isinstance(name, str | os.PathLike) or self._temporary in Path(name).parents


def surely(action: Callable[[], None]) -> None:
    """Do it to its end, also if Ctrl-C or SIGTERM comes meanwhile. It must bear being begun again."""
    try:
        action()
    except (KeyboardInterrupt, MemoryError):
        action()
        raise


def hidden_beside(path: Path, suffix: str) -> Path:
    """A name in the same directory that begins with a dot; a legal name does not become too long by it."""
    stem = os.fsencode(path.name)[: _MAX_NAME_BYTES - len(suffix) - 1]
    return path.parent / f".{os.fsdecode(stem)}{suffix}"


def _temporary_beside(path: Path) -> Path:
    return hidden_beside(path, f".{secrets.token_hex(4)}.partial")


def _check_destination(path: Path) -> None:
    try:
        mode = path.parent.stat().st_mode
    except FileNotFoundError:
        _refuse(path, f"there is no directory {path.parent}", "create it first")
    except (OSError, ValueError) as error:
        raise write_error(path, error) from error
    if not stat.S_ISDIR(mode):
        _refuse(path, f"{path.parent} is not a directory", "choose another place")
    if path.name in ("", "..") or "\0" in path.name:
        _refuse(path, "is not the name of an output", "give a name")
    if len(os.fsencode(path.name)) > _MAX_NAME_BYTES:
        _refuse(path, f"the name is longer than {_MAX_NAME_BYTES} bytes", "choose a shorter name")


def _refuse(path: Path, problem: str, remedy: str) -> NoReturn:
    raise WriteError(path, problem, remedy=remedy)


def _refuse_existing(path: Path) -> NoReturn:
    _refuse(path, "exists already", "choose another name, remove it, or allow overwriting")


def write_error(path: Path, error: OSError | ValueError) -> WriteError:
    """The WriteError that tells of a failed system call on an output."""
    if not isinstance(error, OSError):
        return WriteError(path, f"cannot be written: {error}")
    reason = error.strerror or str(error)
    return WriteError(path, f"cannot be written: {reason.lower()}", remedy=_REMEDIES.get(error.errno or 0))


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn a failed system call into a WriteError about the destination."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(fd)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            file = Path(folder, name)
            if file.is_symlink():
                continue
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        _sync_directory(Path(folder))


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _carry_files(old: Path, new: Path) -> None:
    """Link what the old directory has and the new one lacks, directories excepted; copy where links fail."""
    for child in old.iterdir():
        target = new / child.name
        if _is_directory(child) or os.path.lexists(target):
            continue
        try:
            os.link(child, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(child, target, follow_symlinks=False)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux's rename with flags; False where the kernel or the file system lacks it."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(target))


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories; without kernel support by renames, between which `old` is briefly absent."""
    if _renameat2(new, old, _RENAME_EXCHANGE):
        return
    aside = new.with_name(f"{new.name}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


def _rename_new(source: Path, target: Path) -> None:
    """Rename, refusing an existing target."""
    try:
        if _renameat2(source, target, _RENAME_NOREPLACE):
            return
        os.link(source, target)  # fails on an existing name too; the temporary name is removed afterwards
    except FileExistsError:
        _refuse_existing(target)
