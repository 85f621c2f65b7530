"""Every single-bit flip of a packed model, and every page lost, zeroed, swapped or cut, is detected.

Opening and verifying a file takes a millisecond, and a small model has half a million bits. So what the
verdict rests on is repeated here: a file is accepted only where its bytes have the sums of its table. For
each flip that is one hash; a sample, and all that decides where sums are, goes through the real reader.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_inputs.kit import good

from nf4format.container import Nf4File
from nf4format.errors import FormatError
from nf4format.header import Header, read_header
from nf4format.sums import CHUNK_BYTES, SUMS_NAME, xxh3

PAGE = 4096


@pytest.fixture(scope="module")
def model() -> bytes:
    """A whole Llama of one layer: every kind of tensor, embedded files; about 40 KB."""
    content = good()
    assert 20_000 < len(content) < 80_000
    return content


@pytest.fixture
def fd() -> Iterator[int]:
    descriptor = os.memfd_create("model")
    yield descriptor
    os.close(descriptor)


def is_detected(fd: int, content: bytes | bytearray) -> bool:
    """What a user sees: opening is refused, or verifying finds damage."""
    os.ftruncate(fd, len(content))
    os.pwrite(fd, content, 0)
    try:
        with Nf4File.from_descriptor(fd, "model.nf4") as file:
            return bool(file.verify(threads=1))
    except FormatError:
        return True


def parts(model: bytes, fd: int) -> tuple[Header, int]:
    os.pwrite(fd, model, 0)
    header = read_header(fd, strict=True)
    return header, header.entries[SUMS_NAME].begin


def test_every_bit_changes_its_sum(model: bytes, fd: int) -> None:
    header, table = parts(model, fd)
    assert table - header.data_start <= CHUNK_BYTES  # one chunk, whose sum is the first in the table
    stored = struct.unpack_from("<8s5QQ", model, table)
    for begin, end, expected in [
        (0, header.data_start, stored[5]),
        (header.data_start, table, stored[6]),
        (table, len(model) - 8, struct.unpack("<Q", model[-8:])[0]),
    ]:
        data = bytearray(model[begin:end])
        view = memoryview(data)
        assert xxh3(view) == expected
        for offset in range(len(data)):
            for bit in range(8):
                data[offset] ^= 1 << bit
                if xxh3(view) == expected:
                    pytest.fail(f"bit {bit} of byte {begin + offset}")
                data[offset] ^= 1 << bit


def test_flips_through_the_reader(model: bytes, fd: int) -> None:
    """All bits of the length, of the table of sums and of its entry, and some of everything else."""
    _, table = parts(model, fd)
    rng = random.Random(0)
    entry = model.index(f'"{SUMS_NAME}"'.encode())
    offsets = [*range(8), *range(entry, entry + 80), *range(table, len(model))]
    chosen = [(offset, bit) for offset in offsets for bit in range(8)]
    chosen += [(rng.randrange(len(model)), rng.randrange(8)) for _ in range(500)]
    content = bytearray(model)
    for offset, bit in chosen:
        content[offset] ^= 1 << bit
        assert is_detected(fd, content), (offset, bit)
        content[offset] ^= 1 << bit
    assert not is_detected(fd, content)


@pytest.mark.skipif(not os.environ.get("NF4_EVERY_BIT"), reason="minutes; set NF4_EVERY_BIT=1")
def test_every_flip_through_the_reader(model: bytes, fd: int) -> None:
    content = bytearray(model)
    for offset in range(len(content)):
        for bit in range(8):
            content[offset] ^= 1 << bit
            assert is_detected(fd, content), (offset, bit)
            content[offset] ^= 1 << bit


def test_every_page_lost_zeroed_swapped_or_cut(model: bytes, fd: int) -> None:
    pages = [model[at : at + PAGE] for at in range(0, len(model), PAGE)]
    for index, page in enumerate(pages):
        before, behind = b"".join(pages[:index]), b"".join(pages[index + 1 :])
        damaged = [before, before + bytes(len(page)) + behind, before + bytes(len(page) + len(behind))]
        damaged += [before + behind, before + page + page + behind]
        for other in range(index):
            swapped = [*pages]
            swapped[index], swapped[other] = pages[other], page
            damaged.append(b"".join(swapped))
        for content in damaged:
            assert content == model or is_detected(fd, content), index


def test_damage_on_the_disk_names_tensors(model: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.nf4"
    content = bytearray(model)
    path.write_bytes(content)
    with Nf4File.open(path) as file:
        entry = file.header.entries["model.norm.weight"]
    content[entry.begin] ^= 1
    path.write_bytes(content)
    with Nf4File.open(path) as file:
        (damage,) = file.verify()
    assert "model.norm.weight" in damage.names
