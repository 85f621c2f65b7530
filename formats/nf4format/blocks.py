"""The block codec: tensor values to NF4 codes with double-quantized scales, and back.

How it works. A tensor of n elements is read flat, in row-major order, in blocks of 64 (the last may be shorter;
blocks run across rows). Each block keeps the largest magnitude among its elements, absmax, and each
element the nearest of 16 levels of [-1, 1] times absmax:

    codes      uint8 [ceil(n / 2)]     two elements a byte, the first one in the high nibble
    absmax     uint8 [ceil(n / 64)]    index into a 256-entry map, relative to the two constants below
    nested_absmax  float32 [ceil(ceil(n / 64) / 256)], nested_offset  float32

    scale[b]  = round(round(nested_quant_map[absmax[b]] * nested_absmax[b / 256]) + nested_offset)    in float32
    weight[i] = round(quant_map[code[i]] * scale[i / 64])      in float32, then once to bfloat16 or float16

That is QLoRA's code (arXiv 2305.14314, section 3) in the byte layout of bitsandbytes, whose results are the same
to the bit. `nf4format.reference` says the same in plain numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .codebook import BLOCK, NESTED_BLOCK, NESTED_MAP, NF4_LEVELS

Dtype = Literal["float32", "bfloat16", "float16"]
"""Names of the three value types. numpy has no bfloat16: such arrays travel as uint16 bit patterns."""

ARRAY_DTYPES: dict[Dtype, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
}


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
    codes: np.ndarray | None = None,
    absmax: np.ndarray | None = None,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """First stage: 4-bit codes and float32 block scales of a flat contiguous array.

    absmax is the largest magnitude in the block; each value is multiplied by float32(1 / absmax), computed once a
    block and held to the largest finite float32 (that only matters below absmax = 2**-128), and takes the nearest
    level by NF4_THRESHOLDS. A block of zeros has absmax 0 and code 7, the level 0.0. Consecutive chunks, each a
    multiple of 64 elements but the last, give the same bytes as one call on the whole.

    Args:
        values: [n], the array type of `dtype`.
        codes: where to write, uint8 [ceil(n / 2)]; a new array by default.
        absmax: where to write, float32 [ceil(n / 64)]; a new array by default.
        threads: the most threads to use; the result does not depend on it.

    Raises:
        NonFinite: there is a NaN or an infinity; what was written is then of no use.
    """
    from . import reference

    return reference.quantize_codes(values, dtype, codes=codes, absmax=absmax, threads=threads)


def quantize_absmax(absmax_f32: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Second stage ("double quantization"): block scales float32 [nb] to 8 bits.

    offset = their mean: eight float64 sums of every eighth scale in rising order, added from the first to the
    eighth, divided by nb, rounded once to float32. Then scale - offset, in blocks of 256, is divided by the
    block's largest magnitude (by reciprocal, as in the first stage) and takes the nearest entry of NESTED_MAP; a
    tie takes the lower one.

    Returns:
        absmax uint8 [nb], nested_absmax float32 [ceil(nb / 256)], nested_offset (a float32 value).
    """
    from . import reference

    return reference.quantize_absmax(absmax_f32)


def quantize(values: np.ndarray, dtype: Dtype, *, threads: int = 1) -> PackedTensor:
    """Both stages, for a contiguous array of any shape and the type of `dtype`.

    Raises:
        NonFinite: there is a NaN or an infinity.
    """
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
    threads: int = 1,
) -> np.ndarray:
    """Decode the flat elements [start, stop) to `dtype` (the tensor's own by default).

    Returns:
        [stop - start] of the array type of the dtype; the same bits whatever the number of threads.
    """
    from . import reference

    return reference.dequantize(packed, dtype, start=start, stop=stop, threads=threads)


def first_nonfinite(values: np.ndarray, dtype: Dtype, *, nan_only: bool = False) -> int | None:
    """Flat index of the first NaN or infinity (NaN only, if so asked) of a contiguous array, or None."""
    from . import reference

    return reference.first_nonfinite(values, dtype, nan_only=nan_only)


def _check_array(name: str, array: np.ndarray, dtype: np.typing.DTypeLike, size: int) -> None:
    if array.dtype != dtype or array.shape != (size,) or not array.flags.c_contiguous:
        raise ValueError(
            f"{name}: expected a contiguous {np.dtype(dtype)} array of {size}, got {array.dtype} {list(array.shape)}"
        )
