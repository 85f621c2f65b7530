"""The layer around the CUDA encoder, with the CPU's encoder behind it: slots, order, errors; and no GPU."""

from __future__ import annotations

import ctypes
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from encode_cases import DTYPES, Source, encoded, same

import nf4format
from nf4format import blocks, encode_cuda
from nf4format.blocks import ARRAY_DTYPES, Dtype, NonFinite
from nf4format.codebook import NF4_LEVELS
from nf4format.encode import ENCODERS
from nf4format.encode_cuda import CudaEncoder, DeviceError
from nf4format.levels import LEVELS

CHUNK_BYTES = 65536 * 2


class CudaError(RuntimeError):
    pass


class FakeChunks:
    """What _cuda_encode.ChunkEncoder promises, by the CPU: a slot's bytes live until its next start."""

    fail_at = -1
    most_started = 0

    def __init__(  # noqa: PLR0917 - as the module has it
        self, device: int, levels: int, thresholds: int, searched: bool, chunk_bytes: int, slots: int
    ) -> None:
        self.searched, self.slots, self.started = searched, slots, 0
        self.levels = np.ctypeslib.as_array(ctypes.cast(levels, ctypes.POINTER(ctypes.c_float)), (16,)).copy()
        self.held: dict[int, list[bytearray]] = {}
        self.working: dict[int, tuple[np.ndarray, Dtype]] = {}
        self.lock = threading.Lock()
        self.memories = [bytearray(chunk_bytes) for _ in range(slots)]

    def memory(self, slot: int) -> memoryview:
        assert slot not in self.working
        return memoryview(self.memories[slot])

    def start(self, slot: int, values: int, dtype: int, n: int) -> None:
        assert 0 <= slot < self.slots
        assert slot not in self.working, "started twice"
        with self.lock:
            self.started += 1
            if self.started == self.fail_at:
                raise CudaError("cudaMemcpyAsync: gone")
        name = DTYPES[dtype]
        item = ARRAY_DTYPES[name].itemsize
        data = ctypes.string_at(values, n * item)
        self.working[slot] = np.frombuffer(data, ARRAY_DTYPES[name]), name
        FakeChunks.most_started = max(FakeChunks.most_started, len(self.working))
        for part in self.held.pop(slot, []):  # what was handed out is overwritten
            part[:] = b"\xee" * len(part)

    def finish(self, slot: int) -> tuple[int, memoryview, memoryview, memoryview]:
        values, dtype = self.working.pop(slot)
        encode = blocks.quantize_search if self.searched else blocks.quantize_codes
        try:
            arrays = encode(values, dtype, levels=self.levels)
            bad = -1
        except NonFinite as error:
            arrays, bad = (np.empty(0, np.uint8),) * 3, error.index
        self.held[slot] = [bytearray(array.tobytes()) for array in arrays]
        codes, scales, nested = (*map(memoryview, self.held[slot]), memoryview(b""))[:3]
        return bad, codes, scales, nested


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeChunks]:
    chunks = type("Chunks", (FakeChunks,), {})
    FakeChunks.most_started = 0
    module = SimpleNamespace(ChunkEncoder=chunks, CudaError=CudaError)
    monkeypatch.setattr(encode_cuda, "_load", lambda device: module)
    return chunks


def random_values(size: int, dtype: Dtype, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)


@pytest.mark.parametrize("level", encode_cuda.LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 77, CHUNK_BYTES // 2, 9 * CHUNK_BYTES // 2 + 1001])
def test_tensors_of_any_size(fake: type[FakeChunks], level: int, dtype: Dtype, size: int) -> None:
    values = random_values(size, dtype)
    with CudaEncoder(level, NF4_LEVELS, chunk_bytes=CHUNK_BYTES, tensors=1) as encoder:
        sources = [Source(values, dtype, CHUNK_BYTES, uses_room=uses_room) for uses_room in (False, True)]
        got = [encoded(encoder, source, NF4_LEVELS) for source in sources]
    want = encoded(ENCODERS[level], Source(values, dtype, CHUNK_BYTES), NF4_LEVELS)
    assert same(got[0], want)
    assert same(got[1], want)
    if size > 4 * CHUNK_BYTES:
        assert FakeChunks.most_started == 3  # several chunks at once, of one tensor


def test_more_tensors_than_lanes(fake: type[FakeChunks]) -> None:
    tensors = [random_values(40_000 * (i % 5 + 1), "float32", seed=i) for i in range(12)]
    with (
        CudaEncoder(1, LEVELS["int4"], chunk_bytes=CHUNK_BYTES, tensors=2) as encoder,
        ThreadPoolExecutor(6) as pool,
    ):
        got = list(
            pool.map(
                lambda values: encoded(encoder, Source(values, "float32", CHUNK_BYTES), LEVELS["int4"]),
                tensors,
            )
        )
    for values, one in zip(tensors, got, strict=True):
        assert same(one, encoded(ENCODERS[1], Source(values, "float32", CHUNK_BYTES), LEVELS["int4"]))
    assert FakeChunks.most_started <= 6


@pytest.mark.parametrize("level", encode_cuda.LEVELS)
def test_the_first_nonfinite_value_is_named_and_the_slots_stay_usable(
    fake: type[FakeChunks], level: int
) -> None:
    good = random_values(6 * CHUNK_BYTES // 4, "float32")
    bad = good.copy()
    bad[[70_001, 150_000]] = np.nan, np.inf
    with CudaEncoder(level, NF4_LEVELS, chunk_bytes=CHUNK_BYTES, tensors=1) as encoder:
        with pytest.raises(NonFinite) as caught:
            encoded(encoder, Source(bad, "float32", CHUNK_BYTES), NF4_LEVELS)
        assert caught.value.index == 70_001
        want = encoded(ENCODERS[level], Source(good, "float32", CHUNK_BYTES), NF4_LEVELS)
        assert same(encoded(encoder, Source(good, "float32", CHUNK_BYTES), NF4_LEVELS), want)


def test_a_failure_of_the_gpu_is_told_with_what_to_do(fake: type[FakeChunks]) -> None:
    fake.fail_at = 3
    with (
        CudaEncoder(1, NF4_LEVELS, chunk_bytes=CHUNK_BYTES, tensors=1) as encoder,
        pytest.raises(DeviceError, match=r"cudaMemcpyAsync: gone.*fewer --jobs, or encode on the CPU"),
    ):
        encoded(
            encoder,
            Source(random_values(6 * CHUNK_BYTES // 4, "float32"), "float32", CHUNK_BYTES),
            NF4_LEVELS,
        )


def test_other_levels_than_the_encoder_was_made_for(fake: type[FakeChunks]) -> None:
    with (
        CudaEncoder(1, NF4_LEVELS, chunk_bytes=CHUNK_BYTES, tensors=1) as encoder,
        pytest.raises(ValueError, match="was made for"),
    ):
        encoded(encoder, Source(random_values(64, "float32"), "float32", CHUNK_BYTES), LEVELS["fp4"])


def test_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(nf4format, "_cuda_encode", raising=False)
    monkeypatch.setitem(sys.modules, "nf4format._cuda_encode", None)
    with pytest.raises(DeviceError, match=r"no CUDA encoder; install the CUDA toolkit"):
        CudaEncoder(1, NF4_LEVELS, chunk_bytes=CHUNK_BYTES, tensors=1)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([75], "8.0 or higher, got 7.5"),
        ([], "got no GPU"),
        (CudaError("no driver"), r"can be used \(no driver\)"),
    ],
)
def test_without_a_gpu_that_serves(monkeypatch: pytest.MonkeyPatch, found: object, message: str) -> None:
    def devices() -> object:
        if isinstance(found, Exception):
            raise found
        return found

    module = SimpleNamespace(devices=devices, CudaError=CudaError, ChunkEncoder=FakeChunks)
    monkeypatch.setitem(sys.modules, "nf4format._cuda_encode", module)
    monkeypatch.setattr(nf4format, "_cuda_encode", module, raising=False)
    with pytest.raises(DeviceError, match=message):
        CudaEncoder(1, NF4_LEVELS, chunk_bytes=CHUNK_BYTES, tensors=1)
