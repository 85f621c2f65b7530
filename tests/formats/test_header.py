"""The header validator: what it refuses, what it spares source files; safetensors' own reader as oracle."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
from bad_inputs.headers import DATA, GOOD, text, with_a

from nf4format import header as header_module
from nf4format.errors import FormatError
from nf4format.header import TensorEntry, encode_header, read_header


def test_tensor_is_named(tensor_file: Callable[..., Path]) -> None:
    path = tensor_file(with_a(dtype="F7"), DATA)
    with pytest.raises(
        FormatError, match=r"tensor 'a': unknown dtype 'F7', expected one of BOOL .* U64"
    ) as caught:
        read_header(path, strict=False)
    assert caught.value.tensor == "a"
    assert caught.value.file == str(path)


@pytest.mark.parametrize(
    "length", [0, 1, 1 << 40, (1 << 64) - 1, (1 << 64) - 8, 100_000_001, 16 * 2**20 + 1, 300]
)
def test_length_field(tensor_file: Callable[..., Path], length: int) -> None:
    path = tensor_file(text(GOOD), DATA, length=length)
    with pytest.raises(FormatError, match=r"out of range|cut short"):
        read_header(path, strict=False)


def test_long_header_needs_the_override(tensor_file: Callable[..., Path]) -> None:
    path = tensor_file(text(GOOD) + b" " * (17 << 20), DATA)
    with pytest.raises(FormatError, match="header length out of range"):
        read_header(path, strict=False)
    assert list(read_header(path, strict=False, max_header_bytes=1 << 40).entries) == ["a", "b"]


@pytest.mark.parametrize("size", [0, 7, 8, 40, -1])
def test_cut_short(tensor_file: Callable[..., Path], size: int) -> None:
    path = tensor_file(text(GOOD), DATA)
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(FormatError, match=r"too short|cut short|never completed"):
        read_header(path, strict=False)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "git-lfs pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"\n <html lang=en>", "HTML page"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0", "gzip"),
        (b"GGUF\x03\0\0\0\0\0\0\0", "GGUF"),
        (b"PK\x03\x04\0\0\0\0\0\0", "zip archive, perhaps a PyTorch pickle"),
        (b"\x80\x02}q\0X\0\0\0\0", "pickle"),
        (b'{"error": "Repository not found"}', "bare JSON"),
        (b"\0" * 4096, "never completed"),
    ],
)
def test_likely_cause_is_named(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for strict in (True, False):
        with pytest.raises(FormatError, match=cause):
            read_header(path, strict=strict)


def test_only_regular_files(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        odd = [fifo, tmp_path, Path("/dev/zero"), loop, tmp_path / "socket", tmp_path / "missing", "a\0b"]
        for path in odd:
            with pytest.raises(FormatError) as caught:
                read_header(path, strict=False)
            assert str(path).replace("\0", r"\x00") in str(caught.value)


def test_memory_is_bounded_by_the_header(tensor_file: Callable[..., Path]) -> None:
    path = tensor_file(text(GOOD) + b" " * (-len(text(GOOD)) % 8), DATA)
    os.truncate(path, 1 << 40)  # sparse
    tracemalloc.start()
    with pytest.raises(FormatError, match="bytes after the last tensor"):
        read_header(path, strict=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_too_many_tensors(tensor_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_module, "MAX_TENSORS", 100)
    for count in (100, 101):
        header = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
        path = tensor_file(header)
        if count == 100:
            assert len(read_header(path, strict=False).entries) == 100
        else:
            with pytest.raises(FormatError, match="too many tensors, expected at most 100, got 101"):
                read_header(path, strict=False)


def test_encode_header_is_read_back(tmp_path: Path) -> None:
    entries = [
        TensorEntry("x.weight", "BF16", (2, 3), 4096, 4108),
        TensorEntry("scalar", "U8", (), 4108, 4109),
    ]
    metadata = {"format": "pt", "text": 'quotes " and \N{SNOWMAN}'}
    path = tmp_path / "x.nf4"
    path.write_bytes(encode_header(metadata, entries, 4096) + bytes(13))
    header = read_header(path, strict=True)
    assert list(header.entries.values()) == entries
    assert header.metadata == metadata
    assert (header.data_start, header.file_bytes) == (4096, 4109)
    with safetensors.safe_open(path, "np") as other:
        assert other.metadata() == metadata
    with pytest.raises(ValueError, match="does not fit"):
        encode_header(metadata, entries, 64)


NUMBERS = [0, 1, 2, 3, 4, 8, 12, 16, 19, 20, -1, 1 << 31, 1 << 40, 1 << 63, 1 << 64, 1.0, True, None, "3", []]
DTYPES = ["F32", "U8", "I8", "BF16", "F4", "F64", "BOOL", "F8_E4M3", "f32", "", None]
KEYS = ["a", "b", "c", "", "a b", "../a", "a\0", "\u00e9", "__metadata__", "dtype", "shape", "data_offsets"]
METADATA = [{}, {"x": "y"}, {"x": 1}, None, [], {"x": "\ud800"}]
PIECES = [b" ", b"0", b"1", b",", b'"', b"\n", b"\0", b"\\u0061", b"{}", b"-"]


def mutated_structure(rng: random.Random) -> dict[str, Any]:
    """A good header with 0 to 2 changes of names, fields, values or order."""
    header = json.loads(text(GOOD))
    header["z"] = {"dtype": "F16", "shape": [0, 5], "data_offsets": [16, 16]}
    header["b"] = header.pop("b")  # last again: data order
    for _ in range(rng.randrange(3)):
        name = rng.choice(["a", "b", "z"])
        entry = header.get(name)
        if not isinstance(entry, dict):
            continue
        change = rng.choice(
            ["dtype", "shape", "data_offsets", "rename", "drop", "extra", "metadata", "shuffle"]
        )
        if change == "dtype":
            entry["dtype"] = rng.choice(DTYPES)
        elif change in ("shape", "data_offsets") and isinstance(entry.get(change), list) and entry[change]:
            entry[change][rng.randrange(len(entry[change]))] = rng.choice(NUMBERS)
        elif change == "rename":
            header[rng.choice(KEYS)] = header.pop(name)
        elif change == "drop":
            entry.pop(rng.choice(list(entry)), None)
        elif change == "extra":
            entry[rng.choice(KEYS)] = rng.choice(NUMBERS)
        elif change == "metadata":
            header["__metadata__"] = rng.choice(METADATA)
        elif change == "shuffle":
            header = dict(rng.sample(list(header.items()), len(header)))
    return header


def mutants(seed: int, count: int) -> Iterator[bytes]:
    """Whole files: a good one, changed in its structure, its text, its length field or its data."""
    rng = random.Random(seed)
    for _ in range(count):
        body = bytearray(text(mutated_structure(rng)))
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            at = rng.randrange(len(body))
            change = rng.randrange(4)
            if change == 0:
                body[at] ^= 1 << rng.randrange(8)
            elif change == 1:
                del body[at : at + rng.randrange(1, 4)]
            else:
                body[at:at] = rng.choice(PIECES) if change == 2 else body[at : at + rng.randrange(40)]
        body += rng.choice([b" " * (-len(body) % 8)] * 6 + [b"", b"\n", b" \t"])
        data = DATA[: rng.choice([19, 19, 19, 19, 18, 16, 0])] + rng.choice([b"", b"", b"", b"", b"\0"])
        length = len(body) + rng.choice([0] * 20 + [1, -1, 8, 1 << 20, 1 << 63])
        yield struct.pack("<Q", length) + bytes(body) + data


@pytest.mark.parametrize("strict", [True, False])
def test_what_we_accept_safetensors_accepts_equally(strict: bool) -> None:
    fd = os.memfd_create("mutant")
    accepted = 0
    try:
        for mutant in mutants(seed=7, count=10_000):
            os.ftruncate(fd, 0)
            os.pwrite(fd, mutant, 0)
            try:
                header = read_header(fd, strict=strict, name="mutant")
            except FormatError:
                continue
            accepted += 1
            theirs = dict(safetensors.deserialize(mutant))
            assert theirs.keys() == header.entries.keys(), mutant
            for name, entry in header.entries.items():
                tensor = theirs[name]
                assert tensor["dtype"] == entry.dtype, mutant
                assert tensor["shape"] == list(entry.shape), mutant
                assert bytes(tensor["data"]) == mutant[entry.begin : entry.end], mutant
    finally:
        os.close(fd)
    assert accepted > (300 if strict else 1000)
