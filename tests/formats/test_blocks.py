"""The block codec against bitsandbytes, and its own promises: checks, chunks, special values."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nf4format import blocks, reference
from nf4format.blocks import Dtype, NonFinite, PackedTensor
from nf4format.codebook import NESTED_MAP, NF4_LEVELS, NF4_THRESHOLDS, NF4_THRESHOLDS_CPU

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")


def gaussian(shape: tuple[int, ...], dtype: Dtype, seed: int = 0, scale: float = 0.05) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(scale)
    return reference.from_float32(values, dtype)


def to_torch(array: np.ndarray, dtype: Dtype) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def bitsandbytes_decode(packed: PackedTensor, dtype: Dtype) -> np.ndarray:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    nested = QuantState(
        absmax=torch.tensor(packed.nested_absmax),
        blocksize=256,
        code=torch.tensor(packed.nested_quant_map),
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.tensor(packed.absmax),
        shape=torch.Size(packed.shape),
        code=torch.tensor(packed.quant_map),
        blocksize=64,
        quant_type="nf4",
        dtype=getattr(torch, dtype),
        offset=torch.tensor(packed.nested_offset, dtype=torch.float32),
        state2=nested,
    )
    decoded = dequantize_4bit(torch.tensor(packed.codes).reshape(-1, 1), state)
    assert decoded.dtype == getattr(torch, dtype)
    return decoded.contiguous().view(torch.int16 if dtype != "float32" else torch.int32).numpy().reshape(-1)


def assert_decodes_like_bitsandbytes(packed: PackedTensor, dtype: Dtype) -> None:
    ours = blocks.dequantize(packed, dtype, threads=2)
    theirs = bitsandbytes_decode(packed, dtype)
    np.testing.assert_array_equal(ours.view(theirs.dtype), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(64, 64), (48, 172), (7, 98), (1, 1), (3, 5), (1, 63), (129, 130), (1000,), (5, 6, 34), (257, 64)],
)
def test_decodes_to_the_bits_of_bitsandbytes(shape: tuple[int, ...], dtype: Dtype) -> None:
    packed = blocks.quantize(gaussian(shape, "float32", seed=len(shape)), "float32")
    assert_decodes_like_bitsandbytes(packed, dtype)


def test_decodes_negative_scales_to_the_bits_of_bitsandbytes() -> None:
    rng = np.random.default_rng(5)
    packed = PackedTensor(
        (96, 128),
        "bfloat16",
        rng.integers(0, 256, 96 * 64, np.uint8),
        rng.integers(0, 256, 192, np.uint8),
        NF4_LEVELS,
        rng.random(1, dtype=np.float32),
        NESTED_MAP,
        0.0,
    )
    for dtype in DTYPES:
        assert_decodes_like_bitsandbytes(packed, dtype)


@pytest.mark.parametrize("model", ["wiki-llama-16m", "stories260K"])
def test_every_tensor_of_real_models_decodes_to_the_bits_of_bitsandbytes(model: str, shared: Path) -> None:
    from safetensors import safe_open

    count = 0
    for file in sorted((shared / "models" / model).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                values = tensors.get_tensor(name)
                assert values.dtype == torch.bfloat16
                packed = blocks.quantize(
                    values.view(torch.int16).numpy().view(np.uint16), "bfloat16", threads=2
                )
                assert_decodes_like_bitsandbytes(packed, "bfloat16")
                count += 1
    assert count > 40


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_bitsandbytes_but_for_ties(dtype: Dtype) -> None:
    from bitsandbytes.functional import quantize_4bit

    values = gaussian((1024, 4096), dtype)
    theirs, state = quantize_4bit(to_torch(values, dtype), quant_type="nf4", blocksize=64)
    codes, absmax = blocks.quantize_codes(values.reshape(-1), dtype, threads=2)
    assert absmax.tobytes() == state.absmax.numpy().tobytes()

    changed = codes ^ theirs.numpy().reshape(-1)
    index = np.flatnonzero(np.stack([changed >> 4, changed & 15], axis=1))
    assert index.size <= values.size / 1e6
    # Where they differ, the scaled value is at a threshold to within an ulp of its reciprocal and table.
    scaled = reference.to_float32(values.reshape(-1)[index], dtype) / absmax[index // 64]
    for value in scaled:
        assert min(abs(value - np.concatenate([NF4_THRESHOLDS, NF4_THRESHOLDS_CPU]))) < 2e-7


def test_second_level_follows_the_rule_of_bitsandbytes() -> None:
    from bitsandbytes.functional import quantize_4bit

    values = gaussian((512, 1000), "bfloat16", seed=3)
    _, state = quantize_4bit(to_torch(values, "bfloat16"), quant_type="nf4", compress_statistics=True)
    packed = blocks.quantize(values, "bfloat16")
    assert packed.nested_offset == pytest.approx(float(state.offset), rel=5e-7)
    np.testing.assert_allclose(packed.nested_absmax, state.state2.absmax.numpy(), rtol=1e-6)
    # bitsandbytes codes through an approximate table on a CPU, so a few neighbours are expected of it.
    steps = packed.absmax.astype(int) - state.absmax.numpy().reshape(-1).astype(int)
    assert abs(steps).max() <= 1
    assert (steps != 0).mean() < 0.01
    # Ours are the nearest entries, by exact arithmetic and a float32's width of doubt.
    _, scales = blocks.quantize_codes(values.reshape(-1), "bfloat16")
    nested = np.repeat(packed.nested_absmax, 256)[: scales.size].astype(np.float64)
    scaled = (scales - np.float32(packed.nested_offset)).astype(np.float64) / nested
    distance = abs(scaled - NESTED_MAP[packed.absmax])
    best = abs(scaled[:, None] - NESTED_MAP.astype(np.float64)).min(axis=1)
    assert (distance - best).max() < 1e-7


def test_error_on_gaussian_weights() -> None:
    """Mean absolute error 0.0728, relative 0.2033: the published figures for NF4 with blocks of 64."""
    values = gaussian((1024, 1024), "float32", scale=1.0)
    error = abs(blocks.dequantize(blocks.quantize(values, "float32")) - values.reshape(-1))
    assert error.mean() == pytest.approx(0.0728, abs=6e-4)
    assert (error / (abs(values.reshape(-1)) + 1e-8)).mean() == pytest.approx(0.2033, abs=2.4e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_equal_the_whole(dtype: Dtype) -> None:
    values = gaussian((10 * 64 + 37,), dtype)
    codes, absmax = blocks.quantize_codes(values, dtype)
    chunked_codes, chunked_absmax = np.full_like(codes, 0xAA), np.full_like(absmax, np.nan)
    for begin in range(0, values.size, 192):
        part = values[begin : begin + 192]
        blocks.quantize_codes(
            part,
            dtype,
            codes=chunked_codes[begin // 2 : begin // 2 + (part.size + 1) // 2],
            absmax=chunked_absmax[begin // 64 : begin // 64 + (part.size + 63) // 64],
        )
    assert chunked_codes.tobytes() == codes.tobytes()
    assert chunked_absmax.tobytes() == absmax.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_blocks_decode_to_zero(dtype: Dtype) -> None:
    values = gaussian((256,), dtype)
    values[64:128] = 0
    packed = blocks.quantize(values, dtype)
    assert (packed.codes[32:64] == 0x77).all()
    assert not blocks.dequantize(packed, "float32")[64:128].any()
    assert blocks.quantize_codes(values, dtype)[1][1] == 0.0


def test_a_missing_low_nibble_is_the_code_of_zero() -> None:
    assert blocks.quantize(np.ones(1, np.float32), "float32").codes.tolist() == [0xF7]


@pytest.mark.parametrize("smallest", [2.0**-149, 2.0**-130, 2.0**-128, 2.0**-127, 2.0**-126])
def test_subnormal_blocks_stay_sane(smallest: float) -> None:
    values = (np.linspace(-1, 1, 64, dtype=np.float64) * smallest).astype(np.float32)
    codes, absmax = blocks.quantize_codes(values, "float32")
    level = NF4_LEVELS[np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)]
    assert absmax[0] == np.float32(smallest)
    # Half the widest gap between levels and some. Below 2**-128 the reciprocal is held to the largest float32
    # and values come out nearer to zero, off by 2**-128 at most.
    error = abs(level.astype(np.float64) * smallest - values)
    assert error.max() <= (0.16 * smallest if smallest >= 2.0**-128 else 2.0**-128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_found(dtype: Dtype, value: float) -> None:
    for size, positions in ((64, [63]), (200_000, [150_001, 70_003]), (65, [64]), (3, [1, 2])):
        values = gaussian((size,), "float32")
        values[positions] = value
        array = reference.from_float32(values, dtype)
        with pytest.raises(NonFinite) as caught:
            blocks.quantize_codes(array, dtype, threads=2)
        assert caught.value.index == min(positions)
        assert str(min(positions)) in str(caught.value)
        assert blocks.first_nonfinite(array, dtype, threads=2) == min(positions)
        expected = min(positions) if np.isnan(value) else None
        assert blocks.first_nonfinite(array, dtype, nan_only=True) == expected


def test_largest_finite_values_are_no_error() -> None:
    for dtype, largest in (("float32", 0x7F7FFFFF), ("bfloat16", 0x7F7F), ("float16", 0x7BFF)):
        array = np.full(70, largest, np.uint32 if dtype == "float32" else np.uint16)
        values = array.view(blocks.ARRAY_DTYPES[dtype])
        assert blocks.first_nonfinite(values, dtype) is None
        codes, _ = blocks.quantize_codes(values, dtype)
        assert (codes == 0xFF).all()


def test_empty_tensors() -> None:
    packed = blocks.quantize(np.empty((0, 8), np.float32), "float32")
    assert packed.shape == (0, 8)
    assert blocks.dequantize(packed).size == 0


def test_packed_tensor_holds_arrays_to_their_sizes() -> None:
    good = blocks.quantize(gaussian((130,), "float32"), "float32")
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__}
    with pytest.raises(
        ValueError, match=r"codes: expected a contiguous uint8 array \[65\], got uint8 \[64\]"
    ):
        PackedTensor(**{**fields, "codes": good.codes[:-1]})
    with pytest.raises(ValueError, match=r"absmax: expected .* \[3\], got int8 \[3\]"):
        PackedTensor(**{**fields, "absmax": good.absmax.view(np.int8)})
    with pytest.raises(ValueError, match=r"nested_quant_map: .* got non-contiguous float32"):
        PackedTensor(**{**fields, "nested_quant_map": np.zeros(512, np.float32)[::2]})


def test_arguments_are_checked() -> None:
    values = gaussian((128,), "float32")
    packed = blocks.quantize(values, "float32")
    with pytest.raises(ValueError, match=r"values: expected a contiguous uint16"):
        blocks.quantize_codes(values, "bfloat16")
    with pytest.raises(ValueError, match="non-contiguous"):
        blocks.quantize_codes(values[::2], "float32")
    with pytest.raises(ValueError, match=r"codes: expected .* \[64\], got uint8 \[63\]"):
        blocks.quantize_codes(values, "float32", codes=np.empty(63, np.uint8))
    with pytest.raises(ValueError, match=r"range: expected 0 <= start <= stop <= 128, got \[5, 129\)"):
        blocks.dequantize(packed, start=5, stop=129)
    read_only = np.empty(128, np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        blocks.dequantize(packed, out=read_only)
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        blocks.dequantize(packed, threads=0)
    with pytest.raises(ValueError, match=r"x: expected \[m, k\]"):
        blocks.linear(values.reshape(1, -1), "float32", packed)
    with pytest.raises(ValueError, match="m: expected 1 to 8, got 9"):
        matrix = blocks.quantize(values.reshape(2, 64), "float32")
        blocks.linear(np.zeros((9, 64), np.float32), "float32", matrix)


@pytest.mark.parametrize("size", [0, 1, 1000, (4 << 20) - 1, 4 << 20, (9 << 20) + 3])
def test_new_outputs_begin_at_a_line_or_at_a_huge_page(size: int) -> None:
    array = blocks.empty(size, np.uint8)
    assert (array.shape, array.dtype, array.flags.c_contiguous) == ((size,), np.uint8, True)
    if size:
        assert array.ctypes.data % (64 if size < 4 << 20 else 2 << 20) == 0
    assert blocks.empty(7, np.float32).nbytes == 28
