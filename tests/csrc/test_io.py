"""Reading and hashing of files: the sums of the xxhash package; every failure told; Ctrl-C obeyed."""

from __future__ import annotations

import errno
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash

from nf4format import _native

CONTENT = np.random.default_rng(7).integers(0, 256, 3_000_000, np.uint8).tobytes()


@pytest.fixture
def file(tmp_path: Path):
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_xxh3_of_every_short_length_and_of_many_long_ones() -> None:
    rng = np.random.default_rng(1)
    lengths = [*range(1300), *rng.integers(1300, 200_000, 200), 1 << 16, (1 << 16) + 1, (1 << 16) - 1]
    for length in lengths:
        start = int(rng.integers(0, 64))  # any alignment
        data = memoryview(CONTENT)[start : start + int(length)]
        expected = xxhash.xxh3_64_intdigest(data)
        for piece_bytes in (1024, 4096, 1 << 20):
            assert _native.xxh3(data, piece_bytes) == expected, (length, piece_bytes)


def test_pieces_are_whole_blocks() -> None:
    with pytest.raises(ValueError, match="piece_bytes: expected a multiple of 1024, got 1000"):
        _native.xxh3(b"", 1000)


@pytest.mark.parametrize("threads", [1, 2, 9])
def test_ranges_of_a_file(file: int, threads: int) -> None:
    ranges = [(0, 0), (5, 6), (100, 400), (0, 3_000_000), (262_143, 786_433), (2_999_999, 3_000_000)]
    done: list[int] = []
    sums, failure = _native.hash_ranges(file, ranges, threads, done.append)
    assert failure is None
    assert sums == [xxhash.xxh3_64_intdigest(CONTENT[begin:end]) for begin, end in ranges]
    assert sum(done) == sum(end - begin for begin, end in ranges)
    assert _native.hash_ranges(file, [], threads) == ([], None)


def test_numbers_out_of_range_are_refused(file: int) -> None:
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        _native.hash_ranges(file, [(0, 1)], 0)
    for begin, end in ((-1, 5), (6, 5)):
        with pytest.raises(ValueError, match=f"ranges: expected 0 <= begin <= end, got {begin} to {end}"):
            _native.hash_ranges(file, [(begin, end)], 1)


@pytest.mark.parametrize("threads", [1, 4])
def test_chunks_into_memory(file: int, threads: int) -> None:
    begin, end, chunk = 100, 2_900_000, 1 << 20
    memory = np.zeros(end - begin + 64, np.uint8)
    cuts = [*range(begin, end, chunk), end]
    sums = [xxhash.xxh3_64_intdigest(CONTENT[a:b]) for a, b in pairwise(cuts)]
    table = np.array(sums, np.uint64).tobytes()
    for given in (table, b""):
        memory[:] = 0
        address = memory.ctypes.data
        assert _native.read_chunks(file, begin, end, chunk, given, address, threads) is None
        assert memory[: end - begin].tobytes() == CONTENT[begin:end]
        assert not memory[end - begin :].any()
    wrong = table[:8] + bytes(8) + table[16:]
    failure = _native.read_chunks(file, begin, end, chunk, wrong, memory.ctypes.data, threads)
    assert failure == ("damaged", 1, 0)
    failure = _native.read_chunks(file, begin, begin, chunk, b"", 0, threads)
    assert failure is None
    big = np.zeros(4_000_000, np.uint8)
    failure = _native.read_chunks(file, 0, 4_000_000, 4_000_000, b"", big.ctypes.data, threads)
    assert failure == ("ended", 0, 3_000_000)
    for arguments, message in [
        ((file, 5, 4, chunk, b"", 0, 1), "range: expected 0 <= begin <= end"),
        ((file, 0, 4, 0, b"", 0, 1), "in chunks of at least 1 byte"),
        ((file, 0, 4, 4, b"1234567", 0, 1), "sums: expected none or 8 bytes, got 7"),
        ((file, 0, 4, 4, bytes(16), 0, 1), "sums: expected none or 8 bytes, got 16"),
        ((file, 0, 4, 4, b"", 0, 0), "threads: expected at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            _native.read_chunks(*arguments)


def test_a_file_that_ends_early(file: int) -> None:
    for threads in (1, 4):
        _, failure = _native.hash_ranges(file, [(0, 1000), (1000, 3_000_001), (0, 10)], threads)
        assert failure == ("ended", 1, 3_000_000)


def test_a_read_that_fails(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        assert _native.hash_ranges(directory, [(0, 10)], 1)[1] == ("system", 0, errno.EISDIR)
    finally:
        os.close(directory)
    assert _native.hash_ranges(directory, [(0, 10)], 1)[1] == ("system", 0, errno.EBADF)


@pytest.fixture
def endless(tmp_path: Path):
    """A hole that takes minutes to hash."""
    path = tmp_path / "hole"
    with path.open("wb") as file:
        file.truncate(1 << 42)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_a_signal_ends_it(endless: int) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    started = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            _native.hash_ranges(endless, [(0, 1 << 41), (1 << 41, 1 << 42)], 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 30


def test_an_exception_of_progress_ends_it(endless: int) -> None:
    def refuse(done: int) -> None:
        raise RuntimeError(f"enough after {done}")

    with pytest.raises(RuntimeError, match="enough after"):
        _native.hash_ranges(endless, [(0, 1 << 42)], 1, refuse)


def test_an_upload_to_no_device(file: int) -> None:
    cuda = pytest.importorskip("nf4._cuda", reason="built without nvcc")
    arguments = {
        "begin": 0,
        "end": len(CONTENT),
        "chunk_bytes": 1 << 20,
        "sums": b"",
        "memory": 0,
        "bytes": len(CONTENT),
        "device": 99,
        "after": 0,
        "readers": 4,
        "piece_bytes": 1 << 16,
        "slots": 2,
    }
    upload = cuda.Upload(file, **arguments)
    what, index, code = upload.wait()
    assert what == "destination"
    assert cuda.error_text(code).startswith("cudaError")
    upload.cancel()
    assert upload.wait() == (what, index, code)
    for change, message in (
        ({"end": -1}, "end: expected at least begin, got -1"),
        ({"sums": bytes(8)}, "sums: expected none, or 8 bytes a chunk, got 8"),
        ({"piece_bytes": 1000}, "piece_bytes: expected a multiple of 1024, got 1000"),
        ({"readers": 0}, "readers: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.Upload(file, **{**arguments, **change})
    with pytest.raises(RuntimeError, match="cannot duplicate a descriptor"):
        cuda.Upload(-1, **arguments)
