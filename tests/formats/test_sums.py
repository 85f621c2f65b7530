"""The table of sums against its byte-level description, read here with struct and xxhash alone."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from nf4format.header import read_header
from nf4format.layout import KeptSpec
from nf4format.sums import compute_sums, encode_sums, sums_bytes, xxh3

CHUNK = 4 * 1024 * 1024


@pytest.fixture
def content(pack: Callable[..., Path]) -> tuple[Path, bytes]:
    path = pack(kept=[KeptSpec("big", "U8", (2 * CHUNK + 12345,))], aliases={})
    return path, path.read_bytes()


def test_bytes_of_the_table(content: tuple[Path, bytes]) -> None:
    path, data = content
    header = read_header(path, strict=True)
    (length,) = struct.unpack_from("<Q", data)
    start = 8 + length
    begin = header.entries["__nf4__.sums"].begin
    table = data[begin:]
    magic, chunk_bytes, data_bytes, num_chunks, num_files, header_sum = struct.unpack_from("<8s5Q", table)
    assert (magic, chunk_bytes, data_bytes) == (b"NF4SUMS1", CHUNK, begin - start)
    assert (num_chunks, num_files) == (3, 2)
    assert len(table) == 48 + 8 * (3 + 2 + 1) == sums_bytes(data_bytes, 2)
    assert header_sum == xxhash.xxh3_64_intdigest(data[:start])
    stored = struct.unpack_from("<6Q", table, 48)
    chunks = [data[at : min(at + CHUNK, begin)] for at in range(start, begin, CHUNK)]
    files = [header.entries[f"__file__/{name}"] for name in ("config.json", "tokenizer.json")]
    pieces = [*chunks, *(data[entry.begin : entry.end] for entry in files), table[:-8]]
    assert list(stored) == [xxhash.xxh3_64_intdigest(piece) for piece in pieces]


def test_hash_is_xxh3_64_with_seed_0() -> None:
    assert xxh3(b"") == 0x2D06800538D394C2  # published test vector


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_number_of_threads_does_not_show(content: tuple[Path, bytes], threads: int) -> None:
    path, data = content
    header = read_header(path, strict=True)
    fd = os.open(path, os.O_RDONLY)
    try:
        seen: list[int] = []
        table = compute_sums(fd, header, threads, progress=seen.append)
        assert table == data[header.entries["__nf4__.sums"].begin :]
        end = header.entries["__nf4__.sums"].begin
        files = sum(e.end - e.begin for n, e in header.entries.items() if n.startswith("__file__/"))
        assert sum(seen) == end - header.data_start + files
        given = compute_sums(fd, header, threads, header=data[: header.data_start])
        assert given == table
        assert compute_sums(fd, header, threads, header=b"another") != table
    finally:
        os.close(fd)


def test_as_many_sums_as_ranges(content: tuple[Path, bytes]) -> None:
    header = read_header(content[0], strict=True)
    with pytest.raises(ValueError, match="expected 5 sums, got 4"):
        encode_sums(header, b"", [0] * 4)
