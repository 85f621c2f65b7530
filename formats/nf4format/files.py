"""Reading files that may be anything: regular files only, exact reads, capped sizes, likely causes named."""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from .errors import FormatError

_REMEDIES: Final[dict[int, str]] = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EACCES: "check the permissions",
    errno.ELOOP: "it is a symbolic link that may not be followed; copy the file itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "shorten the path",
}

# First bytes of what people hand over by mistake -> what it is and what to do about it.
_CAUSES: Final[tuple[tuple[bytes, str], ...]] = (
    (b"version https://git-lfs", "this is a git-lfs pointer, not the file; run `git lfs pull`"),
    (b"<!doctype", "this is an HTML page, not the file; download it again"),
    (b"<html", "this is an HTML page, not the file; download it again"),
    (b"\x1f\x8b", "this is gzip data; unpack it first"),
    (b"gguf", "this is a GGUF file; start from the safetensors checkpoint"),
    (b"pk\x03\x04", "this is a zip archive, perhaps a PyTorch pickle; convert it to safetensors"),
    (b"\x80\x02", "this is a Python pickle, which is never loaded; convert it to safetensors"),
    (b"\x80\x04", "this is a Python pickle, which is never loaded; convert it to safetensors"),
    (b"\x89hdf", "this is an HDF5 file; convert it to safetensors"),
    (b"\x93numpy", "this is a NumPy file; convert it to safetensors"),
    (b"{", "this is bare JSON, not a tensor file; check the download"),
    (b"\0\0\0\0\0\0\0\0", "the file was never completed; write or download it again"),
)


def likely_cause(head: bytes) -> str | None:
    """What a file that is not safetensors probably is, from its first bytes, and what to do; or None."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower() if not head.startswith(b"\0") else head
    return next((cause for magic, cause in _CAUSES if text.startswith(magic)), None)


def open_regular(path: str | os.PathLike[str], *, follow: bool = True) -> int:
    """Open a regular file for reading and return its descriptor; the caller closes it.

    Opened with O_NONBLOCK and then checked, so that a FIFO or device can neither block nor be read.

    Raises:
        FormatError: missing, no permission, a directory, FIFO, socket or device, or (with follow=False)
            a symbolic link.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise os_error(path, error) from error
    except ValueError as error:  # a NUL byte inside the path
        raise FormatError(path, f"cannot be opened: {error}", remedy="check the path") from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a directory" if stat.S_ISDIR(mode) else "a FIFO, socket or device"
        raise FormatError(path, expected="a regular file", got=kind, remedy="check the path")
    return fd


def os_error(path: str | os.PathLike[str], error: OSError) -> FormatError:
    """The FormatError that tells of a failed system call on a file being read."""
    reason = error.strerror or str(error)
    return FormatError(
        path,
        reason[:1].lower() + reason[1:],
        remedy=_REMEDIES.get(error.errno or 0, "check the file and the disk it is on"),
    )


def read_failure(name: str | os.PathLike[str], what: str, span: tuple[int, int], code: int) -> FormatError:
    """The FormatError that tells why the bytes [begin, end) could not be read.

    Args:
        what: "ended", `code` being the size of the file, or "system", `code` being an errno.
    """
    if what == "system":
        return os_error(name, OSError(code, os.strerror(code)))
    return FormatError(
        name,
        f"the file ends while bytes {span[0]} to {span[1]} are read",
        got=f"{code} bytes in all",
        remedy="it was cut short while in use; fetch or write it again",
    )


def pread_exactly(fd: int, size: int, offset: int, name: str | os.PathLike[str]) -> bytes:
    """`size` bytes from `offset`. FormatError if the file ends before, OSErrors told with the file's name."""
    buffer = bytearray(size)
    pread_into(fd, memoryview(buffer), offset, name)
    return bytes(buffer)


def pread_into(fd: int, buffer: memoryview, offset: int, name: str | os.PathLike[str]) -> None:
    """Fill a writable byte buffer from `offset` of the file; FormatError if the file ends before."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise os_error(name, error) from error
        if count == 0:
            raise read_failure(name, "ended", (offset, offset + len(buffer)), os.fstat(fd).st_size)
        done += count


def read_capped(fd: int, max_bytes: int, name: str | os.PathLike[str]) -> bytes:
    """The whole of an open regular file, refused before reading when it is larger than `max_bytes`."""
    size = os.fstat(fd).st_size
    if size > max_bytes:
        limit = f"at most {max_bytes} bytes"
        remedy = "no model needs so large a file of this name; download it again"
        raise FormatError(name, "the file is too large", expected=limit, got=size, remedy=remedy)
    return pread_exactly(fd, size, 0, name)


def read_file(path: str | os.PathLike[str], max_bytes: int, *, follow: bool = True) -> bytes:
    """The whole of a regular file of at most `max_bytes`.

    Raises:
        FormatError: it cannot be opened (see `open_regular`), is too large, or cannot be read.
    """
    fd = open_regular(path, follow=follow)
    try:
        return read_capped(fd, max_bytes, path)
    finally:
        os.close(fd)
