"""The block codec: tensor values to NF4 codes with double-quantized scales, and back.

How it works. A tensor of n elements is read flat, in row-major order, in blocks of 64 (the last may be
shorter; blocks run across rows). Each block keeps the largest magnitude among its elements, absmax, and each
element the nearest of 16 levels of [-1, 1] times absmax:

    codes          uint8 [ceil(n / 2)]     two elements a byte, the first one in the high nibble
    absmax         uint8 [ceil(n / 64)]    index into a 256-entry map, relative to the two constants below
    nested_absmax  float32 [ceil(ceil(n / 64) / 256)]
    nested_offset  float32

    scale[b]  = round(round(nested_quant_map[absmax[b]] * nested_absmax[b / 256]) + nested_offset)
    weight[i] = round(quant_map[code[i]] * scale[i / 64])

in float32; a 16-bit weight is that float32 rounded once more. This is QLoRA's code (arXiv 2305.14314,
section 3) in the byte layout of bitsandbytes, and it decodes to the same bits. `nf4format.reference` says the
same in plain numpy; here the work is done by native kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from . import _native
from .codebook import BLOCK, NESTED_BLOCK, NESTED_MAP, NF4_LEVELS
from .levels import check_levels, thresholds_of

Dtype = Literal["float32", "bfloat16", "float16"]
"""Names of the three value types. numpy has no bfloat16: such arrays travel as uint16 bit patterns."""

ARRAY_DTYPES: dict[Dtype, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
}
"""What an array of each type is in numpy."""

_DTYPE_CODES: dict[Dtype, int] = {"float32": 0, "bfloat16": 1, "float16": 2}  # of _native


_LINE_BYTES = 64
_HUGE_PAGE_BYTES = 2 << 20  # of x86-64, and of most others
_LARGE_BYTES = 4 << 20  # from here on numpy asks for huge pages


class NonFinite(ValueError):
    """A NaN or an infinity among values to be quantized; `index` is its flat position, the first one's."""

    def __init__(self, index: int) -> None:
        self.index = index
        super().__init__(f"value {index} (flat index) is NaN or infinite, expected finite values")


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """One NF4 weight with double-quantized scales; all arrays flat and contiguous, views or owned.

    Attributes:
        shape: of the weight; n is the product.
        dtype: what it decodes to unless told otherwise.
        codes: uint8 [ceil(n / 2)].
        absmax: uint8 [ceil(n / 64)].
        quant_map: float32 [16].
        nested_absmax: float32 [ceil(absmax.size / 256)].
        nested_quant_map: float32 [256].
        nested_offset: a float32 value.

    Raises:
        ValueError: an array has another dtype or size, or is not contiguous.
    """

    shape: tuple[int, ...]
    dtype: Dtype
    codes: np.ndarray
    absmax: np.ndarray
    quant_map: np.ndarray
    nested_absmax: np.ndarray
    nested_quant_map: np.ndarray
    nested_offset: float

    def __post_init__(self) -> None:
        """Hold every array to its size, once: the kernels trust them."""
        num_blocks = math.ceil(self.size / BLOCK)
        _check_array("codes", self.codes, np.uint8, math.ceil(self.size / 2))
        _check_array("absmax", self.absmax, np.uint8, num_blocks)
        _check_array("quant_map", self.quant_map, np.float32, 16)
        _check_array("nested_absmax", self.nested_absmax, np.float32, math.ceil(num_blocks / NESTED_BLOCK))
        _check_array("nested_quant_map", self.nested_quant_map, np.float32, 256)

    @property
    def size(self) -> int:
        """Number of elements of the weight."""
        return math.prod(self.shape)


def quantize_codes(
    values: np.ndarray,
    dtype: Dtype,
    *,
    levels: np.ndarray = NF4_LEVELS,
    codes: np.ndarray | None = None,
    absmax: np.ndarray | None = None,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """First stage: 4-bit codes and float32 block scales of a flat contiguous array.

    absmax is the largest magnitude in the block; each value is multiplied by float32(1 / absmax), computed
    once a block and held to the largest finite float32 (that only matters below absmax = 2**-128), and takes
    the nearest level by `thresholds_of(levels)`. A block of zeros has absmax 0 and the code of 0.0 (NF4: 7);
    so has the missing low nibble when n is odd. Consecutive chunks, each a multiple of 64 elements but the
    last, give the same bytes as one call on the whole.

    Args:
        values: [n], the array type of `dtype`.
        levels: float32 [16], as `check_levels` wants them.
        codes: where to write, uint8 [ceil(n / 2)]; a new array by default.
        absmax: where to write, float32 [ceil(n / 64)]; a new array by default.
        threads: the most threads to use; the result does not depend on it.

    Raises:
        NonFinite: there is a NaN or an infinity; what was written is then of no use.
        ValueError: an array has another dtype or size, or is not contiguous.
    """
    n = values.size
    _check_array("values", values, ARRAY_DTYPES[dtype], n)
    codes = _output("codes", codes, np.uint8, math.ceil(n / 2))
    absmax = _output("absmax", absmax, np.float32, math.ceil(n / BLOCK))
    arguments = (values.ctypes.data, _DTYPE_CODES[dtype], n, codes.ctypes.data, absmax.ctypes.data, threads)
    if levels is NF4_LEVELS:
        index = _native.quantize_codes(*arguments)
    else:
        check_levels(levels)
        thresholds = thresholds_of(levels)
        index = _native.quantize_codes_onto(levels.ctypes.data, thresholds.ctypes.data, *arguments)
    if index >= 0:
        raise NonFinite(index)
    return codes, absmax


def quantize_search(
    values: np.ndarray,
    dtype: Dtype,
    *,
    levels: np.ndarray = NF4_LEVELS,
    codes: np.ndarray | None = None,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both stages at once, with scales that are searched for: less error for the same decoder.

    Decoding multiplies a level by its block's scale, so a scale may be negative (levels are not symmetric),
    and need not be the largest magnitude. For each block, about 0.70, 0.75 ... 1.30 times absmax and the same
    with a minus are tried, coarsely. nested_offset is 0, nested_absmax the largest magnitude of the best
    scales of 256 blocks; among the three entries of NESTED_MAP next to the best scale and the three next to
    the second best, the one with the least error is kept, and codes are the nearest levels for what it
    decodes to. If then a block has over 3% more error than with absmax itself, entries next to absmax are
    tried, too, and up to 16 larger nested_absmax: the first with which there is no such block, or else that
    with the least excess.

    Errors are computed in integers: every instruction set and any number of threads give the same bytes, as
    `nf4format.reference` spells them out. Consecutive chunks, each a multiple of 64 * 256 elements but the
    last, give the same bytes as one call on the whole.

    Args:
        values: [n], the array type of `dtype`.
        levels: float32 [16], as `check_levels` wants them.
        codes: where to write, uint8 [ceil(n / 2)]; a new array by default.
        threads: the most threads to use.

    Returns:
        codes; absmax uint8 [ceil(n / 64)]; nested_absmax float32 [ceil(absmax.size / 256)].

    Raises:
        NonFinite: there is a NaN or an infinity; what was written is then of no use.
        ValueError: an array has another dtype or size, or is not contiguous, or levels do not serve.
    """
    n = values.size
    _check_array("values", values, ARRAY_DTYPES[dtype], n)
    check_levels(levels)
    codes = _output("codes", codes, np.uint8, math.ceil(n / 2))
    absmax = np.empty(math.ceil(n / BLOCK), np.uint8)
    nested_absmax = np.empty(math.ceil(absmax.size / NESTED_BLOCK), np.float32)
    thresholds = thresholds_of(levels)  # must outlive the call
    index = _native.quantize_search(
        levels.ctypes.data, thresholds.ctypes.data, values.ctypes.data, _DTYPE_CODES[dtype], n,
        codes.ctypes.data, absmax.ctypes.data, nested_absmax.ctypes.data, threads,
    )  # fmt: skip
    if index >= 0:
        raise NonFinite(index)
    return codes, absmax, nested_absmax


def scale_search(
    values: np.ndarray, weights: np.ndarray, *, levels: np.ndarray = NF4_LEVELS, threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Scales as in `quantize_search`, where errors of some values matter more than those of others.

    Of 26 multiples of absmax the best is taken, and of the three entries of NESTED_MAP next to it the best;
    nested_absmax is the largest magnitude of the scales found.

    Args:
        values: float32 [n], finite.
        weights: float32 [period], not negative: the error of value i counts weights[i % period] times. For a
            matrix [n / period, period] these are weights of its columns.
        levels: float32 [16], as `check_levels` wants them.
        threads: the most threads to use; the result does not depend on it.

    Returns:
        absmax uint8 [ceil(n / 64)], nested_absmax float32 [ceil(absmax.size / 256)]; the offset is 0.

    Raises:
        ValueError: an array has another dtype or is not contiguous, or levels do not serve.
    """
    _check_array("values", values, np.float32, values.size)
    _check_array("weights", weights, np.float32, weights.size)
    check_levels(levels)
    absmax = np.empty(math.ceil(values.size / BLOCK), np.uint8)
    nested_absmax = np.empty(math.ceil(absmax.size / NESTED_BLOCK), np.float32)
    thresholds = thresholds_of(levels)  # must outlive the call
    _native.scale_search(
        levels.ctypes.data, thresholds.ctypes.data, values.ctypes.data, values.size,
        weights.ctypes.data, weights.size, absmax.ctypes.data, nested_absmax.ctypes.data, threads,
    )  # fmt: skip
    return absmax, nested_absmax


def quantize_absmax(absmax_f32: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Second stage ("double quantization"): block scales float32 [nb] to 8 bits.

    offset = their mean: eight float64 sums of every eighth scale in rising order, added from the first to the
    eighth, divided by nb, rounded once to float32. Then scale - offset, in blocks of 256, is divided by the
    block's largest magnitude (by reciprocal, as in the first stage) and takes the nearest entry of
    NESTED_MAP, by the float32 midpoints; a tie takes the lower one.

    Returns:
        absmax uint8 [nb], nested_absmax float32 [ceil(nb / 256)], nested_offset (a float32 value).
    """
    num_blocks = absmax_f32.size
    _check_array("absmax_f32", absmax_f32, np.float32, num_blocks)
    absmax = np.empty(num_blocks, np.uint8)
    nested_absmax = np.empty(math.ceil(num_blocks / NESTED_BLOCK), np.float32)
    nested_offset = _native.quantize_absmax(
        absmax_f32.ctypes.data, num_blocks, absmax.ctypes.data, nested_absmax.ctypes.data
    )
    return absmax, nested_absmax, nested_offset


def quantize(values: np.ndarray, dtype: Dtype, *, threads: int = 1) -> PackedTensor:
    """Both stages, for a contiguous array of any shape and the type of `dtype`.

    Raises:
        NonFinite: there is a NaN or an infinity.
        ValueError: the array is not contiguous, or not of the type of `dtype`.
    """
    _check_array("values", values, ARRAY_DTYPES[dtype], *values.shape)
    codes, absmax = quantize_codes(values.reshape(-1), dtype, threads=threads)
    absmax_u8, nested_absmax, nested_offset = quantize_absmax(absmax)
    return PackedTensor(
        values.shape, dtype, codes, absmax_u8, NF4_LEVELS, nested_absmax, NESTED_MAP, nested_offset
    )


def dequantize(
    packed: PackedTensor,
    dtype: Dtype | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    out: np.ndarray | None = None,
    threads: int = 1,
) -> np.ndarray:
    """Decode the flat elements [start, stop), any part of the tensor, to `dtype` (by default its own).

    Args:
        out: where to write, [stop - start] of the array type of the dtype; a new array by default.
        threads: the most threads to use; the result does not depend on it.

    Raises:
        ValueError: the range lies outside the tensor, or `out` does not fit.
    """
    dtype = packed.dtype if dtype is None else dtype
    stop = packed.size if stop is None else stop
    if not 0 <= start <= stop <= packed.size:
        raise ValueError(f"range: expected 0 <= start <= stop <= {packed.size}, got [{start}, {stop})")
    out = _output("out", out, ARRAY_DTYPES[dtype], stop - start)
    _native.dequantize(*_addresses(packed), start, stop, out.ctypes.data, _DTYPE_CODES[dtype], threads)
    return out


def linear(
    x: np.ndarray, x_dtype: Dtype, packed: PackedTensor, out_dtype: Dtype | None = None, *, threads: int = 1
) -> np.ndarray:
    """x [m, k] times the transpose of the packed weight [n, k], m = 1 to 8, straight from the codes.

    float32 x is multiplied in float32. 16-bit x is held as 16-bit integers with a float32 scale for each 64
    elements, an error of the order of 1e-4 of the result's norm, below the rounding of a 16-bit result.

    Returns:
        [m, n] of the array type of `out_dtype` (x's by default).

    Raises:
        ValueError: the shapes do not fit, or m is not 1 to 8.
    """
    out_dtype = x_dtype if out_dtype is None else out_dtype
    if x.ndim != 2 or len(packed.shape) != 2 or x.shape[1] != packed.shape[1]:
        raise ValueError(
            f"x: expected [m, k] for a weight [n, k] of {list(packed.shape)}, got {list(x.shape)}"
        )
    _check_array("x", x, ARRAY_DTYPES[x_dtype], *x.shape)
    m, (n, k) = x.shape[0], packed.shape
    out = np.empty((m, n), ARRAY_DTYPES[out_dtype])
    _native.linear(
        x.ctypes.data, _DTYPE_CODES[x_dtype], m, *_addresses(packed), n, k, out.ctypes.data,
        _DTYPE_CODES[out_dtype], threads,
    )  # fmt: skip
    return out


def empty(size: int, dtype: npt.DTypeLike) -> np.ndarray:
    """Uninitialised [size], beginning at a cache line, or if large at a huge page.

    The first write to new memory waits for the system to find and clear each page, which with pages of 4 KiB
    takes several times as long as decoding into them. numpy asks the system (Linux, `madvise`) for huge pages
    in arrays of 4 MiB or more; what remains is to begin where such a page does. The slack is never touched.
    """
    num_bytes = size * np.dtype(dtype).itemsize
    alignment = _LINE_BYTES if num_bytes < _LARGE_BYTES else _HUGE_PAGE_BYTES
    memory = np.empty(num_bytes + alignment, np.uint8)
    begin = -memory.ctypes.data % alignment
    return memory[begin : begin + num_bytes].view(dtype)


def first_nonfinite(
    values: np.ndarray, dtype: Dtype, *, nan_only: bool = False, threads: int = 1
) -> int | None:
    """Flat index of the first NaN or infinity (NaN only, if so asked) of a contiguous array, or None."""
    _check_array("values", values, ARRAY_DTYPES[dtype], *values.shape)
    index = _native.first_nonfinite(values.ctypes.data, _DTYPE_CODES[dtype], values.size, nan_only, threads)
    return None if index < 0 else index


def _addresses(packed: PackedTensor) -> tuple[int, int, int, int, int, float]:
    return (
        packed.codes.ctypes.data,
        packed.absmax.ctypes.data,
        packed.quant_map.ctypes.data,
        packed.nested_absmax.ctypes.data,
        packed.nested_quant_map.ctypes.data,
        packed.nested_offset,
    )


def _output(name: str, array: np.ndarray | None, dtype: npt.DTypeLike, size: int) -> np.ndarray:
    """The given array, held to dtype and size, or a new one."""
    if array is None:
        return empty(size, dtype)
    _check_array(name, array, dtype, size)
    if not array.flags.writeable:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    return array


def _check_array(name: str, array: np.ndarray, dtype: npt.DTypeLike, *shape: int) -> None:
    if array.dtype == dtype and array.shape == shape and array.flags.c_contiguous:
        return
    raise ValueError(
        f"{name}: expected a contiguous {np.dtype(dtype)} array {list(shape)}, "
        f"got {'' if array.flags.c_contiguous else 'non-contiguous '}{array.dtype} {list(array.shape)}"
    )
