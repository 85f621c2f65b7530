"""The CUDA encoder on a GPU: its bytes are those of the CPU's, in one tensor and in many at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from encode_cases import DTYPES, LEVEL_TABLES, Source, cases, encoded, same

from nf4format import reference
from nf4format.blocks import Dtype, NonFinite
from nf4format.codebook import NF4_LEVELS
from nf4format.encode import ENCODERS
from nf4format.encode_cuda import LEVELS, CudaEncoder

pytest.importorskip("nf4format._cuda_encode", reason="built without GPU kernels")
pytestmark = pytest.mark.cuda

CHUNK_BYTES = 1 << 20


@pytest.mark.parametrize("table", LEVEL_TABLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_bytes_are_the_cpu_encoders(level: int, dtype: Dtype, table: str) -> None:
    levels = LEVEL_TABLES[table]
    with CudaEncoder(level, levels, chunk_bytes=CHUNK_BYTES, tensors=1) as encoder:
        for case, values in cases(dtype):
            source = Source(values, dtype, CHUNK_BYTES)
            assert same(encoded(encoder, source, levels), encoded(ENCODERS[level], source, levels)), case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_many_tensors_of_many_chunks_at_once(level: int, dtype: Dtype) -> None:
    rng = np.random.default_rng(11)
    tensors = []
    for size in (5_000_001, 64, 1_000_000, 3_333_333, 17, 2_097_152, 700_000, 4_194_304):
        values = rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)
        packed = reference.from_float32(values, dtype)
        tensors.append(Source(packed, dtype, CHUNK_BYTES, uses_room=len(tensors) % 2 == 0))
    with (
        CudaEncoder(level, NF4_LEVELS, chunk_bytes=CHUNK_BYTES, tensors=4) as encoder,
        ThreadPoolExecutor(6) as pool,
    ):
        got = list(pool.map(lambda source: encoded(encoder, source, NF4_LEVELS), tensors))
    for source, one in zip(tensors, got, strict=True):
        assert same(one, encoded(ENCODERS[level], source, NF4_LEVELS, threads=4)), source.num_values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_nonfinite_values_are_found(level: int, dtype: Dtype, value: float) -> None:
    good = np.random.default_rng(2).standard_normal(1_500_000, dtype=np.float32)
    with CudaEncoder(level, NF4_LEVELS, chunk_bytes=CHUNK_BYTES, tensors=1) as encoder:
        for positions in ([0], [1_499_999], [700_003, 700_001, 1_200_000], [64 * 256, 64 * 256 * 3]):
            bad = good.copy()
            bad[positions] = value
            with pytest.raises(NonFinite) as caught:
                encoded(encoder, Source(reference.from_float32(bad, dtype), dtype, CHUNK_BYTES), NF4_LEVELS)
            assert caught.value.index == min(positions)
        source = Source(reference.from_float32(good, dtype), dtype, CHUNK_BYTES)
        assert same(encoded(encoder, source, NF4_LEVELS), encoded(ENCODERS[level], source, NF4_LEVELS))


@pytest.mark.parametrize("level", LEVELS)
def test_a_checkpoint_compiles_to_the_same_file(tmp_path: Path, level: int) -> None:
    import torch
    from safetensors.torch import save_file

    from qcompile.options import CompileOptions
    from qcompile.pipeline import compile_checkpoint

    generator = torch.Generator().manual_seed(0)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    shapes = {"q_proj": (700, 1001), "up_proj": (4096, 1024), "down_proj": (1024, 4096)}
    weights = {
        f"model.layers.{layer}.x.{name}.weight": (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        for layer in range(4)
        for name, shape in shapes.items()
    }
    save_file(weights, model / "model.safetensors")
    files = []
    for device in ("cpu", "cuda", "auto"):
        out = tmp_path / f"{device}.nf4"
        told: list[str] = []
        options = CompileOptions(level=level, device=device, jobs=4, verify=True)
        summary = compile_checkpoint(model, out, options, tell=told.append)
        assert summary.num_packed == len(weights)
        assert not told
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]
