"""Every native kernel against its numpy reference: equal bits for the codec, float64 for products.

`test_isas` runs this file once more for each instruction set, so it stays quick and imports no torch.
"""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf4format import _native, blocks, reference
from nf4format.blocks import ARRAY_DTYPES, Dtype, PackedTensor
from nf4format.codebook import NESTED_MAP, NF4_LEVELS, NF4_THRESHOLDS
from nf4format.levels import LEVELS

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
GUARD = 64  # bytes before and after an output, to catch stray writes


def random_packed(shape: tuple[int, ...], seed: int = 0) -> PackedTensor:
    """Any bytes are a valid tensor: random codes and scales, of both signs."""
    rng = np.random.default_rng(seed)
    n = int(np.prod(shape))
    nb = -(-n // 64)
    return PackedTensor(
        shape,
        "bfloat16",
        rng.integers(0, 256, -(-n // 2), np.uint8),
        rng.integers(0, 256, nb, np.uint8),
        NF4_LEVELS,
        rng.random(-(-nb // 256), dtype=np.float32) * np.float32(0.1),
        NESTED_MAP,
        float(np.float32(0.03)),
    )


def addresses(packed: PackedTensor) -> tuple[int, int, int, int, int, float]:
    arrays = (packed.codes, packed.absmax, packed.quant_map, packed.nested_absmax, packed.nested_quant_map)
    codes, absmax, quant_map, nested_absmax, nested_quant_map = (array.ctypes.data for array in arrays)
    return codes, absmax, quant_map, nested_absmax, nested_quant_map, packed.nested_offset


class Guarded:
    """A poisoned output of `size` items, at an odd alignment, between guards that must stay as they are."""

    def __init__(self, size: int, dtype: Dtype) -> None:
        item = ARRAY_DTYPES[dtype]
        self.memory = np.full(2 * GUARD + size * item.itemsize, 0xA5, np.uint8)
        self.array = self.memory[GUARD : GUARD + size * item.itemsize].view(item)

    def check(self) -> np.ndarray:
        assert (self.memory[:GUARD] == 0xA5).all(), "wrote before the output"
        assert (self.memory[len(self.memory) - GUARD :] == 0xA5).all(), "wrote past the output"
        return self.array


def test_the_instruction_set_is_the_one_asked_for() -> None:
    info = _native.build_info()
    assert info["isa"] in info["isas"]
    assert info["isa"] == (os.environ.get("NF4_CPU_ISA") or info["isa"])
    assert "portable" in info["isas"]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    n=st.one_of(st.integers(1, 400), st.integers(1, 40_000)),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-40, 15),
    seed=st.integers(0, 1000),
)
def test_quantize_equals_the_reference(n: int, dtype: Dtype, exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    wide = rng.standard_normal(n, dtype=np.float32) * np.float32(2.0**exponent)
    wide[rng.random(n) < 0.1] = 0
    values = reference.from_float32(np.clip(wide, -60000, 60000), dtype)
    ours, expected = blocks.quantize(values, dtype), reference.quantize(values, dtype)
    for name in ("codes", "absmax", "nested_absmax"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), err_msg=name)
    assert ours.nested_offset == expected.nested_offset


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantize_of_all_bit_patterns(dtype: Dtype) -> None:
    """Every 16-bit value (or float32 with such upper bits) in blocks of like magnitude, subnormals too."""
    patterns = np.arange(1 << 15, dtype=np.uint16)
    signed = np.stack([patterns, patterns | 0x8000], axis=1).reshape(-1)
    if dtype == "float32":
        values = (signed.astype(np.uint32) << 16 | 0x1234).view(np.float32)
        values = values[np.isfinite(values)]
    else:
        values = signed[np.isfinite(reference.to_float32(signed.view(ARRAY_DTYPES[dtype]), dtype))]
        values = values.view(ARRAY_DTYPES[dtype])
    codes, absmax = blocks.quantize_codes(values, dtype)
    expected_codes, expected_absmax = reference.quantize_codes(values, dtype)
    np.testing.assert_array_equal(absmax.view(np.uint32), expected_absmax.view(np.uint32))
    np.testing.assert_array_equal(codes, expected_codes)


def uneven(n: int, dtype: Dtype, exponent: int, seed: int) -> np.ndarray:
    """Blocks of zeros, of tiny and of large values among ordinary ones, and single outliers."""
    rng = np.random.default_rng(seed)
    wide = rng.standard_normal((-(-n // 64), 64), dtype=np.float32) * np.float32(2.0**exponent)
    wide[rng.random(len(wide)) < 0.05] = 0
    wide[rng.random(len(wide)) < 0.05] *= np.float32(1e-30)
    wide[rng.random(len(wide)) < 0.02] *= np.float32(1e-42)  # subnormal
    wide[rng.random(len(wide)) < 0.05] *= np.float32(1e8)
    wide[rng.random(wide.shape) < 0.002] *= np.float32(100)
    limit = 60000 if dtype == "float16" else 3.4e38
    return reference.from_float32(np.clip(wide.reshape(-1)[:n], -limit, limit), dtype)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    n=st.one_of(st.integers(1, 400), st.integers(1, 40_000)),
    dtype=st.sampled_from(DTYPES),
    levels=st.sampled_from(list(LEVELS)),
    exponent=st.integers(-120, 90),
    seed=st.integers(0, 1000),
)
def test_search_equals_the_reference(n: int, dtype: Dtype, levels: str, exponent: int, seed: int) -> None:
    values = uneven(n, dtype, exponent, seed)
    codes = Guarded((n + 3) // 4 * 2, "bfloat16").array.view(np.uint8)[: -(-n // 2)]
    ours = blocks.quantize_search(values, dtype, levels=LEVELS[levels], codes=codes, threads=2)
    expected = reference.quantize_search(values, dtype, levels=LEVELS[levels])
    for name, one, other in zip(("codes", "absmax", "nested_absmax"), ours, expected, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    n=st.one_of(st.integers(1, 400), st.integers(1, 40_000)),
    period=st.integers(1, 500),
    levels=st.sampled_from(list(LEVELS)),
    exponent=st.integers(-120, 90),
    seed=st.integers(0, 1000),
)
def test_weighted_search_equals_the_reference(
    n: int, period: int, levels: str, exponent: int, seed: int
) -> None:
    values = uneven(n, "float32", exponent, seed)
    weights = np.random.default_rng(seed).random(period, dtype=np.float32) ** 4
    ours = blocks.scale_search(values, weights, levels=LEVELS[levels], threads=2)
    expected = reference.scale_search(values, weights, levels=LEVELS[levels])
    for name, one, other in zip(("absmax", "nested_absmax"), ours, expected, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    n=st.integers(1, 10_000),
    dtype=st.sampled_from(DTYPES),
    levels=st.sampled_from(list(LEVELS)),
    seed=st.integers(0, 1000),
)
def test_quantize_onto_other_levels_equals_the_reference(
    n: int, dtype: Dtype, levels: str, seed: int
) -> None:
    values = uneven(n, dtype, 0, seed)
    table = LEVELS[levels].copy()  # a copy of NF4's takes the way of the others
    for ours, expected in zip(
        blocks.quantize_codes(values, dtype, levels=table),
        reference.quantize_codes(values, dtype, levels=table),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, expected)


def test_search_errors_stay_within_32_bits() -> None:
    """The largest error of fixed-point arithmetic: all values at the border, levels that end at a half."""
    levels = np.linspace(-0.5, 0.5, 16, dtype=np.float32)
    values = np.ones(64 * 40, np.float32) * np.float32(3)
    for sign in (1, -1):
        ours = blocks.quantize_search(values * np.float32(sign), "float32", levels=levels)
        expected = reference.quantize_search(values * np.float32(sign), "float32", levels=levels)
        for one, other in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_ties_take_the_lower_code() -> None:
    above = np.nextafter(NF4_THRESHOLDS, np.float32(2))
    below = np.nextafter(NF4_THRESHOLDS, np.float32(-2))
    values = np.zeros(64, np.float32)
    values[:45] = np.concatenate([NF4_THRESHOLDS, above, below])
    values[63] = 1.0  # the scale
    codes, _ = blocks.quantize_codes(values, "float32")
    code = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)
    assert code[:15].tolist() == code[30:45].tolist() == list(range(15))
    assert code[15:30].tolist() == list(range(1, 16))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    n=st.integers(1, 3000),
    exponent=st.integers(-60, 60),
    spread=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_second_level_equals_the_reference(n: int, exponent: int, spread: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scales = np.exp2(exponent + spread * rng.random(n, dtype=np.float32)).astype(np.float32)
    ours, expected = blocks.quantize_absmax(scales), reference.quantize_absmax(scales)
    np.testing.assert_array_equal(ours[0], expected[0])
    np.testing.assert_array_equal(ours[1], expected[1])
    assert ours[2] == expected[2]


def test_second_level_near_every_midpoint() -> None:
    """Scales whose scaled difference from the mean is a midpoint of the map, or an ulp to its side."""
    midpoints = (NESTED_MAP[:-1] + NESTED_MAP[1:]) / np.float32(2)
    for step in (-1, 0, 1):
        wanted = (midpoints.view(np.int32) + step).view(np.float32)
        # With their negatives and +-1 the mean of each block is 0, and so is the offset.
        for half in (wanted[:127], wanted[127:254], wanted[-1:]):
            scales = np.concatenate([half, -half, np.array([1, -1], np.float32)])
            codes, nested, offset = blocks.quantize_absmax(scales)
            assert (offset, nested.tolist()) == (0.0, [1.0])
            np.testing.assert_array_equal(codes, reference.quantize_absmax(scales)[0])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    n=st.one_of(st.integers(1, 300), st.integers(1, 100_000)),
    dtype=st.sampled_from(DTYPES),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 1000),
)
def test_dequantize_of_any_range_equals_the_reference(
    n: int, dtype: Dtype, cut: tuple[float, float], seed: int
) -> None:
    packed = random_packed((n,), seed)
    start, stop = sorted(int(part * n) for part in cut)
    out = Guarded(stop - start, dtype)
    _native.dequantize(*addresses(packed), start, stop, out.array.ctypes.data, CODES[dtype], 1)
    expected = reference.dequantize(packed, dtype, start=start, stop=stop)
    unsigned = np.uint32 if dtype == "float32" else np.uint16
    np.testing.assert_array_equal(out.check().view(unsigned), expected.view(unsigned))


@pytest.mark.parametrize("start", [0, 64 * 7, 64 * 250 + 3])
def test_dequantize_of_many_blocks_equals_the_reference(start: int) -> None:
    """Enough blocks for every entry of the map of scales, and for kernels that make tables for it first."""
    packed = random_packed((64 * 6000 + 5,), 11)
    ours = blocks.dequantize(packed, "float32", start=start)
    expected = reference.dequantize(packed, "float32", start=start)
    np.testing.assert_array_equal(ours.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_overflow_subnormals_and_nan(dtype: Dtype) -> None:
    for scale in (3e38, 65504.0, 65519.0, 65521.0, 1e-5, 6e-8, 2e-8, 1e-38, 1e-40, np.nan, np.inf):
        packed = random_packed((4096,), 3)
        levels = np.linspace(-1, 1, 16, dtype=np.float32)
        packed = PackedTensor(
            packed.shape, dtype, packed.codes, packed.absmax, levels, packed.nested_absmax,
            np.zeros(256, np.float32), float(np.float32(scale)),
        )  # fmt: skip
        ours = reference.to_float32(blocks.dequantize(packed, dtype), dtype)
        expected = reference.to_float32(reference.dequantize(packed, dtype), dtype)
        np.testing.assert_array_equal(ours, expected, err_msg=str(scale))


def product_error(y: np.ndarray, x: np.ndarray, packed: PackedTensor, dtype: Dtype) -> float:
    """Norm of the difference from the float64 product over the product's norm."""
    exact = reference.linear(reference.to_float32(x, dtype), packed)
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k"),
    [(1, 64), (5, 128), (33, 192), (17, 1024), (16, 4096), (50, 4160), (40, 172), (9, 33), (3, 1), (0, 64)],
)
def test_linear_against_float64(n: int, k: int, dtype: Dtype) -> None:
    packed = random_packed((n, k), n)
    for m in range(1, 9):
        x = reference.from_float32(np.random.default_rng(m).standard_normal((m, k), dtype=np.float32), dtype)
        out = Guarded(m * n, "float32")
        _native.linear(x.ctypes.data, CODES[dtype], m, *addresses(packed), n, k, out.array.ctypes.data, 0, 1)
        y = out.check().reshape(m, n)
        if n == 0:
            continue
        # Measured: 2e-7 for float32 arithmetic, 5e-5 to 7e-5 for the 16-bit integer products.
        bound = 1e-6 if dtype == "float32" or k % 64 else 1.5e-4
        assert product_error(y, x, packed, dtype) < bound
        if m == 3:
            rounded = blocks.linear(x, dtype, packed)
            np.testing.assert_array_equal(rounded, reference.from_float32(y, dtype))


def test_linear_with_outliers_and_wide_ranges() -> None:
    """A scale of x for each 64 elements keeps the error small although the row spans many magnitudes."""
    packed = random_packed((24, 1024), 7)
    x = np.random.default_rng(0).standard_normal((2, 1024), dtype=np.float32)
    x[:, :64] *= 1e4
    x[0, 100] = 1e3
    x[1, 512:] *= 1e-6
    x[1, 640:704] = 0
    bits = reference.from_float32(x, "bfloat16")
    y = blocks.linear(bits, "bfloat16", packed, "float32")
    assert product_error(y, bits, packed, "bfloat16") < 1.5e-4


def test_linear_passes_on_nonfinite_and_tiny_values() -> None:
    packed = random_packed((8, 256), 1)
    for dtype in ("bfloat16", "float16"):
        x = np.zeros((2, 256), np.float32)
        assert not blocks.linear(reference.from_float32(x, dtype), dtype, packed, "float32").any()
        x[0, 3] = np.nan
        y = blocks.linear(reference.from_float32(x, dtype), dtype, packed, "float32")
        assert np.isnan(y[0]).all()
        assert not y[1].any()
    tiny = reference.from_float32(np.full((1, 256), 1e-39, np.float32), "bfloat16")
    assert abs(blocks.linear(tiny, "bfloat16", packed, "float32")).max() < 1e-36


def test_linear_with_other_levels() -> None:
    """The map of levels is the file's: larger than 1, tiny, or all zero must work as well."""
    base = random_packed((16, 256), 2)
    x = reference.from_float32(
        np.random.default_rng(0).standard_normal((2, 256), dtype=np.float32), "bfloat16"
    )
    for factor in (7.5, 1e-20, 0.0):
        levels = NF4_LEVELS * np.float32(factor)
        packed = PackedTensor(
            base.shape, "bfloat16", base.codes, base.absmax, levels, base.nested_absmax,
            base.nested_quant_map, base.nested_offset,
        )  # fmt: skip
        y = blocks.linear(x, "bfloat16", packed, "float32")
        if factor:
            assert product_error(y, x, packed, "bfloat16") < 1.5e-4
        else:
            assert not y.any()


def test_arguments_out_of_range_are_refused() -> None:
    packed = random_packed((64,), 0)
    out = np.empty(64, np.float32)
    with pytest.raises(ValueError, match=r"out_dtype: expected 0 .* got 3"):
        _native.dequantize(*addresses(packed), 0, 64, out.ctypes.data, 3, 1)
    with pytest.raises(ValueError, match="start: expected at least 0, got -1"):
        _native.dequantize(*addresses(packed), -1, 64, out.ctypes.data, 0, 1)
    with pytest.raises(ValueError, match="n: expected at least 0, got -5"):
        _native.quantize_codes(0, 0, -5, 0, 0, 1)
