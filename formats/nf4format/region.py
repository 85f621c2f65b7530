"""The data region of a .nf4 file, and the sums of its chunks: all that a reader needs to fetch the weights.

An open `Nf4File` knows it. `glance` finds it in a fraction of a millisecond, for readers that start while the
header is still being parsed and checked.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from typing import Final

from .embedded import FILE_LIMITS
from .files import pread_exactly
from .header import MAX_HEADER_BYTES, PREFIX_BYTES
from .sums import CHUNK_BYTES, find_table

# The first tensor that is no weight: entries stand in the order of their data.
_FIRST_BEHIND: Final = re.compile(
    rb'[{,]"__(?:file__/|nf4__\.sums)[^"\\]*":\{[^{}]*"data_offsets":\[(\d{1,18}),\d{1,18}\]'
)


@dataclass(frozen=True)
class DataRegion:
    """Absolute offsets, and sums.

    Attributes:
        begin: where the data region begins.
        weights_end: behind the last byte of any weight; embedded files follow.
        end: where the table of sums begins.
        sums: XXH3-64 of each chunk of CHUNK_BYTES from `begin` to `end`, the last may be shorter; u64, little
            endian.
    """

    begin: int
    weights_end: int
    end: int
    sums: bytes

    def chunk(self, index: int) -> tuple[int, int]:
        """[begin, end) of a chunk."""
        begin = self.begin + index * CHUNK_BYTES
        return begin, min(begin + CHUNK_BYTES, self.end)


def glance(fd: int) -> DataRegion | None:
    """The data region by the file's first and last bytes, or None where they do not tell.

    Header and table of sums are then undamaged; but neither is checked otherwise, so that what is read by it
    may be used only once `Nf4File` has found the same region.

    Raises:
        FormatError: the file cannot be read.
    """
    file_bytes = os.fstat(fd).st_size
    if file_bytes < PREFIX_BYTES:
        return None
    (length,) = struct.unpack("<Q", pread_exactly(fd, PREFIX_BYTES, 0, ""))
    begin = PREFIX_BYTES + length
    if length > MAX_HEADER_BYTES or begin > file_bytes:
        return None
    header = pread_exactly(fd, begin, 0, "")
    found = find_table(fd, header, file_bytes, most_files=len(FILE_LIMITS))
    behind = _FIRST_BEHIND.search(header)
    if found is None or behind is None:
        return None
    end, sums = found
    weights_end = begin + int(behind[1])
    return DataRegion(begin, weights_end, end, sums) if weights_end <= end else None
