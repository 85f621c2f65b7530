"""Examples in a file: written in one pass, memory-mapped, and believed only after a look at every byte.

All numbers little endian; `item` is 2 or 4 bytes, as the largest id allows:

    0        records, one an example: ids, item x n; labels, a bit a token (most significant first);
             zeros up to a multiple of 4
    data     i64 x (N + 1)   where each record begins, and where the last ends
             i32 x N         tokens of each
             i32 x N         labelled tokens of each
             the report, JSON
             u64 x ceil(data / 4 MiB)   XXH3-64 of each 4 MiB of records
             footer          magic, item, data, N, bytes of JSON, largest id, XXH3-64 of all from `data` on
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import time
from array import array
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from nf4format import _native
from nf4format.atomic import AtomicFile
from nf4format.errors import Nf4Error
from nf4format.files import open_regular, pread_exactly
from nf4format.strictjson import parse_object
from nf4format.sums import xxh3

from ..errors import TrainError
from .dataset import DataReport, Dataset, Example, FileReport

VERSION: Final = 1  # to be raised whenever the same file and options would be encoded otherwise
_MAGIC: Final = b"NF4TOKS1"
_CHUNK: Final = 4 << 20
_FOOTER: Final = struct.Struct("<8s6Q")
_MAX_REPORT: Final = 1 << 20
_LOCK_TRIES: Final = 100
_LOCK_SECONDS: Final = 0.01


class StoreWriter:
    """Writes examples into an open AtomicFile.

    Args:
        wide: whether ids may be 65536 or more.
    """

    def __init__(self, file: AtomicFile, wide: bool) -> None:
        self._file = file
        self._dtype = np.dtype("<u4" if wide else "<u2")
        self._buffer = bytearray()
        self._flushed = 0
        self._sums = array("Q")
        self._offsets, self._lengths, self._counts = array("q", [0]), array("i"), array("i")
        self._max_id = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, example: Example) -> None:
        """Append an example. ValueError where an id needs a wide store."""
        ids, labelled = example
        largest = int(ids.max())
        if largest > np.iinfo(self._dtype).max:
            raise ValueError(f"id {largest} does not fit")
        record = ids.astype(self._dtype).tobytes() + np.packbits(labelled).tobytes()
        self._buffer += record + bytes(-len(record) % 4)
        self._offsets.append(self._flushed + len(self._buffer))
        self._lengths.append(len(ids))
        self._counts.append(int(np.count_nonzero(labelled)))
        self._max_id = max(self._max_id, largest)
        while len(self._buffer) >= _CHUNK:
            self._flush(_CHUNK)

    @property
    def tokens(self) -> int:
        return sum(self._lengths)

    @property
    def labelled(self) -> int:
        return sum(self._counts)

    def finish(self, key: str, report: FileReport) -> None:
        """Write what follows the records. `key` says of what the store was made."""
        if self._buffer:
            self._flush(len(self._buffer))
        text = json.dumps({"key": key, "report": asdict(report)}).encode()
        index = b"".join(
            np.array(values, dtype).tobytes()
            for values, dtype in ((self._offsets, "<i8"), (self._lengths, "<i4"), (self._counts, "<i4"))
        )
        fields = (_MAGIC, self._dtype.itemsize, self._flushed, len(self), len(text), self._max_id)
        tail = index + text + np.array(self._sums, "<u8").tobytes() + _FOOTER.pack(*fields, 0)[:-8]
        self._file.pwrite(tail + struct.pack("<Q", xxh3(tail)), self._flushed)

    def _flush(self, size: int) -> None:
        chunk = bytes(self._buffer[:size])
        self._sums.append(xxh3(chunk))
        self._file.pwrite(chunk, self._flushed)
        self._flushed += size
        del self._buffer[:size]


class TokenStore(Dataset):
    """The examples of a store's file, mapped. Made by `open_store`."""

    def __init__(self, descriptor: int, path: Path, key: str, seq_len: int, threads: int) -> None:
        """Raises ValueError or Nf4Error where anything about the file is not as it should be."""
        size = os.fstat(descriptor).st_size
        if size < _FOOTER.size:
            raise ValueError("too short")
        footer = pread_exactly(descriptor, _FOOTER.size, size - _FOOTER.size, path)
        magic, item, data, count, text_bytes, max_id, tail_sum = _FOOTER.unpack(footer)
        chunks = -(-data // _CHUNK)
        index_bytes = 8 * (count + 1) + 4 * count + 4 * count
        if magic != _MAGIC or item not in (2, 4) or not count or text_bytes > _MAX_REPORT:
            raise ValueError("no store")
        if data + index_bytes + text_bytes + 8 * chunks + _FOOTER.size != size:
            raise ValueError("sizes do not add up")
        tail = pread_exactly(descriptor, size - data, data, path)
        if xxh3(memoryview(tail)[:-8]) != tail_sum:
            raise ValueError("the index is damaged")
        sums = np.frombuffer(tail, "<u8", chunks, index_bytes + text_bytes)
        ranges = [(begin, min(begin + _CHUNK, data)) for begin in range(0, data, _CHUNK)]
        found, failure = _native.hash_ranges(descriptor, ranges, threads, None)
        if failure is not None or found != sums.tolist():
            raise ValueError("records are damaged")
        text = parse_object(tail[index_bytes : index_bytes + text_bytes])
        if text.get("key") != key:
            raise ValueError("a store of something else")
        self.report = DataReport((_parse_report(text.get("report")),))
        self._dtype = np.dtype("<u2" if item == 2 else "<u4")
        self._offsets = np.frombuffer(tail, "<i8", count + 1)
        self.lengths = np.frombuffer(tail, "<i4", count, 8 * (count + 1))
        self.label_counts = np.frombuffer(tail, "<i4", count, 8 * (count + 1) + 4 * count)
        self._max_id, self._key = max_id, key
        self._check(data, seq_len)
        self._map = mmap.mmap(descriptor, data, access=mmap.ACCESS_READ)
        self._path = path

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin, length = int(self._offsets[index]), int(self.lengths[index])
        ids = np.frombuffer(self._map, self._dtype, length, begin).astype(np.int32)
        bits = np.frombuffer(self._map, np.uint8, -(-length // 8), begin + length * self._dtype.itemsize)
        if int(ids.max()) > self._max_id:
            remedy = "remove it; it is made again"
            raise TrainError(self._path, "tokenized data changed while in use", remedy=remedy)
        return Example(ids, np.unpackbits(bits, count=length).view(bool))

    @property
    def max_token_id(self) -> int:
        return self._max_id

    @property
    def fingerprint(self) -> str:
        return self._key

    def with_path(self, path: Path) -> TokenStore:
        """The same store, its report under the name that the user gave: it may have been made of a copy."""
        self.report = DataReport(tuple(replace(file, path=str(path)) for file in self.report.files))
        return self

    def _check(self, data: int, seq_len: int) -> None:
        lengths = self.lengths.astype(np.int64)
        if lengths.min() < 2 or lengths.max() > seq_len or self._max_id > np.iinfo(np.int32).max:
            raise ValueError("examples of an impossible length")
        sizes = lengths * self._dtype.itemsize + (lengths + 7) // 8
        sizes += -sizes % 4
        if self._offsets[0] != 0 or self._offsets[-1] != data or (np.diff(self._offsets) != sizes).any():
            raise ValueError("records do not lie one behind the other")
        if self.label_counts.min() < 1 or (self.label_counts >= lengths).any():
            raise ValueError("impossible numbers of labels")


def open_store(path: Path, key: str, seq_len: int, *, threads: int = 2) -> TokenStore | None:
    """The store in a file, every sum checked; None where there is none, or one that cannot be trusted: torn,
    damaged, made of something else, someone else's, a link.

    While it is in use the file is locked (flock, shared), where the file system has locks.
    """
    try:
        descriptor = open_regular(path, follow=False)
    except Nf4Error:
        return None
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            return None
        _lock(descriptor)
        return TokenStore(descriptor, path, key, seq_len, threads)
    except (ValueError, OSError, MemoryError, OverflowError):
        return None
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock an open store (flock, shared), for as long as the descriptor or a mapping made of it lives."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_LOCK_SECONDS)  # who has just written it, or removes it, lets go at once
        except OSError:
            return  # no locks here


def _parse_report(value: Any) -> FileReport:
    if not isinstance(value, dict) or value.keys() != FileReport.__dataclass_fields__.keys():
        raise ValueError("not a report")
    notes = value.pop("notes")
    path = value.pop("path")
    if not isinstance(path, str) or not isinstance(notes, list):
        raise ValueError("not a report")
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in value.values()):
        raise ValueError("not a report")
    return FileReport(path=path, notes=tuple(map(str, notes)), **value)
