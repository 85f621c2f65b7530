"""The data region: as the open file knows it, and as a glance finds it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from nf4format.container import Nf4File
from nf4format.layout import KeptSpec
from nf4format.region import DataRegion, glance
from nf4format.sums import CHUNK_BYTES

Pack = Callable[..., Path]


def glance_at(path: Path) -> DataRegion | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        return glance(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("num_bytes", [0, 5, CHUNK_BYTES, 2 * CHUNK_BYTES + 12345])
def test_the_region_of_a_file(pack: Pack, num_bytes: int) -> None:
    path = pack(kept=[KeptSpec("big", "U8", (num_bytes,))], aliases={})
    data = path.read_bytes()
    with Nf4File.open(path) as file:
        region, header = file.region, file.header
        assert os.pread(file.fileno(), 100, region.begin + 11) == data[region.begin + 11 :][:100]
    assert region.begin == header.data_start
    assert region.end == header.entries["__nf4__.sums"].begin
    assert region.weights_end == header.entries["__file__/config.json"].begin
    num_chunks = -(-(region.end - region.begin) // CHUNK_BYTES)
    spans = [region.chunk(index) for index in range(num_chunks)]
    assert [begin for begin, _ in spans] + [region.end] == [region.begin] + [end for _, end in spans]
    expected = [xxhash.xxh3_64_intdigest(data[begin:end]) for begin, end in spans]
    assert list(struct.unpack(f"<{num_chunks}Q", region.sums)) == expected
    assert glance_at(path) == region


def test_every_size_around_the_edge_of_a_chunk(pack: Pack) -> None:
    with Nf4File.open(pack(kept=[KeptSpec("big", "U8", (0,))], aliases={})) as file:
        fixed = file.region.end - file.region.begin
    for more in (-65, -64, -1, 0, 1, 7, 8, 9, 64):
        path = pack(kept=[KeptSpec("big", "U8", (CHUNK_BYTES - fixed + more,))], aliases={})
        with Nf4File.open(path) as file:
            assert glance_at(path) == file.region


def test_a_file_without_embedded_tokenizer(pack: Pack) -> None:
    path = pack(files={"config.json": b'{"model_type":"x"}'}, kept=[], aliases={})
    with Nf4File.open(path) as file:
        assert glance_at(path) == file.region


def test_damage_and_other_files_give_none(pack: Pack, tmp_path: Path) -> None:
    whole = pack().read_bytes()
    (length,) = struct.unpack_from("<Q", whole)
    path = tmp_path / "damaged"
    for at in (0, 7, 9, 8 + length - 1, len(whole) - 1, len(whole) - 9, len(whole) - 70):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        assert glance_at(path) is None, at
    for other in (b"", b"short", bytes(100), whole[:-1], whole + b"\0", whole[: 8 + length], b"\xff" * 4096):
        path.write_bytes(other)
        assert glance_at(path) is None
