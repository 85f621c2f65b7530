"""XXH3-64 sums over all of a .nf4 file: its header, each 4 MiB of data, each embedded file, the table itself.

The table is the last tensor, `__nf4__.sums`; all numbers little endian:

    0     8 bytes   magic "NF4SUMS1"
    8     u64       chunk_bytes = 4194304
    16    u64       data_bytes  = length of the data region before the table
    24    u64       num_chunks  = ceil(data_bytes / chunk_bytes)
    32    u64       num_files
    40    u64       sum of bytes 0 .. data_start of the file (length field, JSON, padding)
    48    u64 x num_chunks   sum of each chunk of the data region, the last may be shorter
          u64 x num_files    sum of each `__file__/` tensor, in offset order
          u64                sum of all bytes of the table before this field

Sums are XXH3-64 with seed 0. They find damage, not forgery.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import xxhash

from . import _native
from .embedded import FILE_PREFIX
from .errors import FormatError
from .files import pread_exactly, read_failure
from .header import TensorEntry

SUMS_NAME: Final = "__nf4__.sums"
MAGIC: Final = b"NF4SUMS1"
CHUNK_BYTES: Final = 4 << 20  # large enough for full speed, small enough to name the damage
REMEDY: Final = "fetch the file again or compile it again"
_FIXED: Final = struct.Struct("<8s5Q")
_SUM: Final = struct.Struct("<Q")

Progress = Callable[[int], None]
"""Called now and then, by the thread that waits, with the number of bytes done since."""


class HasEntries(Protocol):
    """What sums need to know of a file: a Layout or a Header."""

    @property
    def entries(self) -> dict[str, TensorEntry]: ...
    @property
    def data_start(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...


@dataclass(frozen=True)
class Damage:
    """A byte range of the file whose sum does not match, and what lies in it.

    Attributes:
        kind: "header", "data" (one chunk of the data region), "file" (an embedded file) or "sums".
        names: the tensors with bytes in the range, or the one embedded file; empty for "header".
        begin, end: absolute file offsets.
    """

    kind: Literal["header", "data", "file", "sums"]
    names: tuple[str, ...]
    begin: int
    end: int

    def __str__(self) -> str:
        where = f"bytes {self.begin} to {self.end}"
        if self.kind == "header":
            return f"the header is damaged ({where})"
        if self.kind == "sums":
            return f"the table of sums is damaged ({where})"
        if self.kind == "file":
            return f"embedded file {self.names[0]} is damaged ({where})"
        shown = ", ".join(self.names[:4]) + (
            f" and {len(self.names) - 4} more" if len(self.names) > 4 else ""
        )
        return f"data is damaged ({where}), which hold {shown}"


def sums_bytes(data_bytes: int, num_files: int) -> int:
    """Size of the table for a data region of `data_bytes` before it."""
    return _FIXED.size + _SUM.size * (-(-data_bytes // CHUNK_BYTES) + num_files + 1)


def xxh3(data: bytes | memoryview) -> int:
    """XXH3-64, seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def compute_sums(
    fd: int,
    layout: HasEntries,
    threads: int = 1,
    *,
    header: bytes | None = None,
    progress: Progress | None = None,
) -> bytes:
    """The table for a file whose data region is written.

    Args:
        header: the bytes 0..data_start where they are not in the file yet; else they are read.

    Raises:
        FormatError: the file is shorter than the layout says, or cannot be read.
    """
    begin = _sums_begin(layout)
    chunks, files = _ranges(layout, begin)
    if header is None:
        header = pread_exactly(fd, layout.data_start, 0, "")
    return encode_sums(layout, header, _hash_ranges(fd, [*chunks, *files], threads, "", progress))


def encode_sums(layout: HasEntries, header: bytes, numbers: Sequence[int]) -> bytes:
    """The table from the sums of the chunks and then of the embedded files.

    Raises:
        ValueError: not as many sums as the layout has chunks and files.
    """
    begin = _sums_begin(layout)
    chunks, files = _ranges(layout, begin)
    if len(numbers) != len(chunks) + len(files):
        raise ValueError(f"expected {len(chunks) + len(files)} sums, got {len(numbers)}")
    fixed = _FIXED.pack(MAGIC, CHUNK_BYTES, begin - layout.data_start, len(chunks), len(files), xxh3(header))
    body = fixed + struct.pack(f"<{len(numbers)}Q", *numbers)
    return body + _SUM.pack(xxh3(body))


def read_sums(fd: int, layout: HasEntries, name: str | os.PathLike[str]) -> bytes:
    """The table of a file, with its own sum and its counts checked.

    Raises:
        FormatError: the table is damaged or belongs to another layout.
    """
    tensor = next(reversed(layout.entries), "")
    if tensor != SUMS_NAME:
        problem = "the last tensor is not the table of sums"
        raise FormatError(name, problem, expected=SUMS_NAME, got=ascii(tensor)[:120], remedy=REMEDY)
    begin = _sums_begin(layout)
    chunks, files = _ranges(layout, begin)
    expected = sums_bytes(begin - layout.data_start, len(files))
    if layout.file_bytes - begin != expected:
        problem = "the table of sums has a wrong size"
        raise FormatError(
            name, problem, tensor=tensor, expected=expected, got=layout.file_bytes - begin, remedy=REMEDY
        )
    table = pread_exactly(fd, expected, begin, name)
    fields = _FIXED.unpack_from(table)
    counts = (MAGIC, CHUNK_BYTES, begin - layout.data_start, len(chunks), len(files))
    if fields[0] != MAGIC or xxh3(table[: -_SUM.size]) != _SUM.unpack(table[-_SUM.size :])[0]:
        damage = Damage("sums", (tensor,), begin, layout.file_bytes)
        raise FormatError(name, str(damage), remedy=REMEDY)
    if fields[:5] != counts:
        problem = "the table of sums belongs to another file"
        raise FormatError(name, problem, tensor=tensor, expected=counts[1:], got=fields[1:5], remedy=REMEDY)
    return table


def chunk_sums(table: bytes) -> bytes:
    """The part of a checked table with the sums of the chunks, in file order."""
    num_chunks = _FIXED.unpack_from(table)[3]
    return table[_FIXED.size : _FIXED.size + _SUM.size * num_chunks]


def find_table(fd: int, header: bytes, file_bytes: int, *, most_files: int) -> tuple[int, bytes] | None:
    """Where the table begins, and its sums of the chunks, without the header's word for it.

    A table's size follows from the data region's and the number of embedded files, of which there are few.
    None where no number of files gives a table that is undamaged and holds the sum of `header`, the bytes
    before the data region.
    """
    for num_files in range(most_files + 1):
        # data_bytes + 8 * ceil(data_bytes / CHUNK_BYTES) is this.
        rest = file_bytes - len(header) - _FIXED.size - _SUM.size * (num_files + 1)
        num_chunks = -(-rest // (CHUNK_BYTES + _SUM.size))
        data_bytes = rest - _SUM.size * num_chunks
        if rest < 0 or -(-data_bytes // CHUNK_BYTES) != num_chunks:
            continue
        begin = len(header) + data_bytes
        fixed = pread_exactly(fd, _FIXED.size, begin, "")
        if (
            fixed[: -_SUM.size]
            != _FIXED.pack(MAGIC, CHUNK_BYTES, data_bytes, num_chunks, num_files, 0)[: -_SUM.size]
        ):
            continue
        table = pread_exactly(fd, file_bytes - begin, begin, "")
        is_whole = xxh3(table[: -_SUM.size]) == _SUM.unpack(table[-_SUM.size :])[0]
        return (begin, chunk_sums(table)) if is_whole and xxh3(header) == _FIXED.unpack(fixed)[5] else None
    return None


def check_header_sum(
    fd: int, layout: HasEntries, table: bytes, name: str | os.PathLike[str]
) -> Damage | None:
    """Damage if the bytes before the data region differ from the table's sum."""
    stored = _FIXED.unpack_from(table)[5]
    if xxh3(pread_exactly(fd, layout.data_start, 0, name)) == stored:
        return None
    return Damage("header", (), 0, layout.data_start)


def damage_in(layout: HasEntries, begin: int, end: int) -> Damage:
    """Damage of the data between two offsets, with the tensors that lie there."""
    return Damage("data", tuple(_Overlaps(layout.entries).between(begin, end)), begin, end)


def check_sums(
    fd: int,
    layout: HasEntries,
    table: bytes,
    name: str | os.PathLike[str],
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> Iterator[Damage]:
    """Compare every sum of a checked table with the file; yields what differs, in file order.

    Raises:
        FormatError: the file cannot be read or has become shorter.
    """
    damage = check_header_sum(fd, layout, table, name)
    if damage:
        yield damage
    begin = _sums_begin(layout)
    chunks, files = _ranges(layout, begin)
    stored = struct.unpack_from(f"<{len(chunks) + len(files)}Q", table, _FIXED.size)
    good_files = set()
    damaged_files = []
    for (file_name, (start, stop)), expected, actual in zip(
        _file_ranges(layout).items(),
        stored[len(chunks) :],
        _hash_ranges(fd, files, threads, name, None),
        strict=True,
    ):
        if actual == expected:
            good_files.add(FILE_PREFIX + file_name)
        else:
            damaged_files.append(Damage("file", (file_name,), start, stop))
    names = _Overlaps(layout.entries)
    for (start, stop), expected, actual in zip(
        chunks, stored, _hash_ranges(fd, chunks, threads, name, progress), strict=False
    ):
        if actual != expected:
            hurt = tuple(tensor for tensor in names.between(start, stop) if tensor not in good_files)
            yield Damage("data", hurt, start, stop)
    yield from damaged_files


class _Overlaps:
    """Names of the tensors with bytes in a range; ranges are asked for in ascending order."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self._entries = [entry for entry in entries.values() if entry.end > entry.begin]
        self._first = 0

    def between(self, begin: int, end: int) -> Iterator[str]:
        while self._entries[self._first].end <= begin:
            self._first += 1
        for entry in self._entries[self._first :]:
            if entry.begin >= end:
                return
            yield entry.name


def _sums_begin(layout: HasEntries) -> int:
    return next(reversed(layout.entries.values())).begin


def _file_ranges(layout: HasEntries) -> dict[str, tuple[int, int]]:
    return {
        entry.name.removeprefix(FILE_PREFIX): (entry.begin, entry.end)
        for entry in layout.entries.values()
        if entry.name.startswith(FILE_PREFIX)
    }


def _ranges(layout: HasEntries, sums_begin: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Absolute ranges of the chunks and of the embedded files."""
    starts = range(layout.data_start, sums_begin, CHUNK_BYTES)
    chunks = [(start, min(start + CHUNK_BYTES, sums_begin)) for start in starts]
    return chunks, list(_file_ranges(layout).values())


def _hash_ranges(
    fd: int,
    ranges: Sequence[tuple[int, int]],
    threads: int,
    name: str | os.PathLike[str],
    progress: Progress | None,
) -> list[int]:
    """XXH3 of each range, in order."""
    sums, failure = _native.hash_ranges(fd, ranges, max(1, threads), progress)
    if failure is not None:
        what, index, code = failure
        raise read_failure(name, what, ranges[index] if index >= 0 else (0, 0), code)
    return sums
