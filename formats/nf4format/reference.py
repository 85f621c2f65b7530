"""The block codec in plain numpy: slow and plainly right, the measure of the native kernels.

`nf4format.blocks` has the same functions, natively and with threads; tests hold the two to equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from .blocks import Dtype, NonFinite, PackedTensor
from .codebook import BLOCK, NESTED_BLOCK, NESTED_MAP, NF4_LEVELS
from .levels import thresholds_of

_LARGEST = np.float32(np.finfo(np.float32).max)
_NESTED_THRESHOLDS = (NESTED_MAP[:-1] + NESTED_MAP[1:]) / np.float32(2)


def to_float32(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Widen to float32; exact. bfloat16 comes as uint16 bits."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def from_float32(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Round float32 to nearest, ties to even. bfloat16 goes as uint16 bits, with 0x7fc0 for every NaN."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def first_nonfinite(values: np.ndarray, dtype: Dtype, *, nan_only: bool = False) -> int | None:
    """Flat index of the first NaN or infinity (NaN only, if so asked), or None."""
    wide = to_float32(values.reshape(-1), dtype)
    bad = np.flatnonzero(np.isnan(wide) if nan_only else ~np.isfinite(wide))
    return int(bad[0]) if bad.size else None


def _scale_and_reciprocal(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest magnitude of each row, and its reciprocal held to finite values (see `quantize_codes`)."""
    absmax = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore", over="ignore"):
        return absmax, np.minimum(np.float32(1) / absmax, _LARGEST)


def quantize_codes(
    values: np.ndarray,
    dtype: Dtype,
    *,
    levels: np.ndarray = NF4_LEVELS,
    codes: np.ndarray | None = None,
    absmax: np.ndarray | None = None,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """First stage, see `nf4format.blocks.quantize_codes`; `threads` has no effect here."""
    blocks = _blocks(values, dtype)
    scale, reciprocal = _scale_and_reciprocal(blocks)
    packed = _packed_codes(blocks * reciprocal[:, None], levels, values.size)
    if codes is None:
        codes = np.empty(packed.size, np.uint8)
    if absmax is None:
        absmax = np.empty(scale.size, np.float32)
    codes[:], absmax[:] = packed, scale
    return codes, absmax


def _blocks(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """float32 [blocks, 64], the last filled up with zeros."""
    index = first_nonfinite(values, dtype)
    if index is not None:
        raise NonFinite(index)
    padded = np.zeros((math.ceil(values.size / BLOCK), BLOCK), np.float32)
    padded.reshape(-1)[: values.size] = to_float32(values, dtype)
    return padded


def _packed_codes(scaled: np.ndarray, levels: np.ndarray, n: int) -> np.ndarray:
    """Codes of n scaled values: a value's code is the number of thresholds below it.

    The padding is 0.0, whose code (7 for NF4) is also what the missing low nibble of an odd tensor holds.
    """
    code = np.searchsorted(thresholds_of(levels), scaled.reshape(-1), side="left").astype(np.uint8)
    return ((code[0::2] << 4) | code[1::2])[: math.ceil(n / 2)]


def quantize_absmax(absmax_f32: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Second stage, see `nf4format.blocks.quantize_absmax`."""
    num_blocks = absmax_f32.size
    if num_blocks == 0:
        return np.empty(0, np.uint8), np.empty(0, np.float32), 0.0
    lanes = np.zeros((math.ceil(num_blocks / 8), 8), np.float64)
    lanes.reshape(-1)[:num_blocks] = absmax_f32
    total = 0.0
    for lane in np.cumsum(lanes, axis=0)[-1]:  # cumsum adds from first to last, sum() promises no order
        total += float(lane)
    offset = np.float32(total / num_blocks)

    centred = absmax_f32 - offset
    num_nested = math.ceil(num_blocks / NESTED_BLOCK)
    padded = np.zeros((num_nested, NESTED_BLOCK), np.float32)
    padded.reshape(-1)[:num_blocks] = centred
    nested_absmax, reciprocal = _scale_and_reciprocal(padded)
    scaled = (padded * reciprocal[:, None]).reshape(-1)[:num_blocks]
    return (
        np.searchsorted(_NESTED_THRESHOLDS, scaled, side="left").astype(np.uint8),
        nested_absmax,
        float(offset),
    )


def quantize(values: np.ndarray, dtype: Dtype, *, threads: int = 1) -> PackedTensor:
    """Both stages, see `nf4format.blocks.quantize`."""
    codes, absmax = quantize_codes(values.reshape(-1), dtype, threads=threads)
    absmax_u8, nested_absmax, nested_offset = quantize_absmax(absmax)
    return PackedTensor(
        values.shape, dtype, codes, absmax_u8, NF4_LEVELS, nested_absmax, NESTED_MAP, nested_offset
    )


MULTIPLIERS = np.arange(14, 27).astype(np.float32) / np.float32(20)
"""float32 [13]: 0.70, 0.75 ... 1.30."""

GRID_SHIFTS = np.array([*(1 + np.arange(9) / 64), 2.5, 2.75, 3, 3.375, 3.75, 4.125, 4.5, 5], np.float32)
"""float32 [17]: what nested_absmax is multiplied by to shift a grid on which some block loses too much."""

_UNIT = 5632  # 1.0 in the search's fixed point: csrc/cpu/search.h
_COARSE_UNIT = 89
_LARGEST_INVERSE = 8191
_MOST_EXCESS = np.float32(1.03)  # error over that of the scale absmax from which a grid is to be shifted

# float32 [blocks] from the arguments of _fixed_error.
_Error = Callable[[np.ndarray, np.ndarray, np.ndarray | bool], np.ndarray]


def quantize_search(
    values: np.ndarray,
    dtype: Dtype,
    *,
    levels: np.ndarray = NF4_LEVELS,
    codes: np.ndarray | None = None,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both stages at once, see `nf4format.blocks.quantize_search`; `threads` has no effect here."""
    blocks = _blocks(values, dtype)
    search = _Search(blocks, partial(_fixed_error, levels=levels), np.float32(1))
    inverses = np.rint(_COARSE_UNIT / MULTIPLIERS.astype(np.float64)).astype(np.int32)
    multipliers = np.float32(_COARSE_UNIT) / inverses.astype(np.float32)
    coarse_error = partial(_fixed_error, levels=levels, unit=_COARSE_UNIT)
    wanted = search.wanted(2, inverses, multipliers, coarse_error)
    nested_absmax = base = search.nested_absmax(wanted[0])
    entry, error = search.entries(wanted, nested_absmax)
    excess = search.excess(error)
    wanted = np.concatenate([wanted, search.absmax[None]])
    for shift in GRID_SHIFTS:
        with np.errstate(over="ignore"):
            shifted = np.minimum(base * shift, _LARGEST)
        shifted_entry, error = search.entries(wanted, shifted)
        shifted_excess = search.excess(error)
        better = shifted_excess < excess  # never if there is none to lose: the first grid to end it is kept
        excess = np.where(better, shifted_excess, excess)
        nested_absmax = np.where(better, shifted, nested_absmax)
        entry = np.where(_of_blocks(better, entry.size), shifted_entry, entry)
    # Codes for the scales as they will be decoded.
    with np.errstate(divide="ignore", over="ignore"):
        scale = NESTED_MAP[entry] * _of_blocks(nested_absmax, entry.size)
        factor = np.where(scale == 0, np.float32(0), np.clip(np.float32(1) / scale, -_LARGEST, _LARGEST))
        packed = _packed_codes(blocks * factor[:, None], levels, values.size)
    if codes is None:
        codes = np.empty(packed.size, np.uint8)
    codes[:] = packed
    return codes, entry, nested_absmax


def scale_search(
    values: np.ndarray, weights: np.ndarray, *, levels: np.ndarray = NF4_LEVELS, threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Scales for weighted errors, see `nf4format.blocks.scale_search`; `threads` has no effect here."""
    blocks = _blocks(values, "float32")
    importance = np.zeros_like(blocks)
    importance.reshape(-1)[: values.size] = np.resize(weights, values.size)
    error_of = partial(_weighted_error, levels=levels, importance=importance)
    search = _Search(blocks, error_of, np.float32(1e-30))
    inverses = np.rint(_UNIT / MULTIPLIERS.astype(np.float64)).astype(np.int32)
    wanted = search.wanted(1, inverses, MULTIPLIERS, error_of)
    nested_absmax = search.nested_absmax(wanted[0])
    return search.entries(wanted, nested_absmax)[0], nested_absmax


def _of_blocks(of_groups: np.ndarray, num_blocks: int) -> np.ndarray:
    """What each group of 256 blocks has, for each block."""
    return np.repeat(of_groups, NESTED_BLOCK)[:num_blocks]


class _Search:
    """Scales of blocks that lose least, for an offset of 0; see csrc/cpu/search.h."""

    def __init__(self, blocks: np.ndarray, error_of: _Error, above_zero: np.float32) -> None:
        """`above_zero`: added to errors on the grid, so that none times infinity is a NaN."""
        self._error_of, self._above_zero = error_of, above_zero
        self.absmax = np.abs(blocks).max(axis=1)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            reciprocal = np.minimum(np.float32(32767) / self.absmax, _LARGEST)
            self._fixed = np.rint(blocks * reciprocal[:, None]).astype(np.int32)

    def wanted(
        self, count: int, inverses: np.ndarray, multipliers: np.ndarray, error_of: _Error
    ) -> np.ndarray:
        """Of multiples of absmax and the same with a minus, those with the least errors, best first.

        Args:
            inverses: int32 [any], the multipliers' in the fixed point of `error_of`.

        Returns:
            float32 [count, blocks].
        """
        candidates, errors = [], []
        for sign in (np.float32(1), np.float32(-1)):
            for inverse, multiplier in zip(inverses, multipliers, strict=True):
                error = error_of(self._fixed, np.full(self.absmax.shape, inverse), bool(sign < 0))
                errors.append(error * (multiplier * multiplier))
                with np.errstate(over="ignore"):
                    scale = sign * np.minimum(self.absmax * multiplier, _LARGEST)
                candidates.append(np.where(np.isfinite(errors[-1]), scale, np.float32(0)))
        best = np.argsort(np.stack(errors), axis=0, kind="stable")[:count]
        return np.take_along_axis(np.stack(candidates), best, axis=0)

    def nested_absmax(self, wanted: np.ndarray) -> np.ndarray:
        """The largest magnitude in each group of 256 blocks, float32 [ceil(blocks / 256)]."""
        return _scale_and_reciprocal(_groups(wanted))[0]

    def entries(self, wanted: np.ndarray, nested_absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the three entries of the map next to each wanted scale, the best.

        Args:
            wanted: float32 [any, blocks].

        Returns:
            absmax uint8 [blocks]; errors float32 [blocks], in units that are the block's own.
        """
        num_blocks = self.absmax.size
        nested = _of_blocks(nested_absmax, num_blocks)
        chosen, least = np.zeros(num_blocks, np.int64), np.full(num_blocks, np.inf, np.float32)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            for index, scale in enumerate(wanted):
                relative = scale * np.minimum(np.float32(1) / nested, _LARGEST)
                nearest = np.searchsorted(_NESTED_THRESHOLDS, relative, side="left")
                chosen = chosen if index else nearest
                for entry in (nearest, np.maximum(nearest - 1, 0), np.minimum(nearest + 1, 255)):
                    ratio = self.absmax / (NESTED_MAP[entry] * nested)
                    compared = abs(ratio * np.float32(_UNIT)) <= _LARGEST_INVERSE
                    inverse = np.where(compared, np.rint(ratio * np.float32(_UNIT)), 0).astype(np.int32)
                    weight = np.where(compared, np.float32(1) / (ratio * ratio), np.float32(np.inf))
                    error = self._error_of(self._fixed, abs(inverse), inverse < 0) + self._above_zero
                    error = error * weight
                    chosen, least = np.where(error < least, entry, chosen), np.minimum(error, least)
        return chosen.astype(np.uint8), least

    def excess(self, error: np.ndarray) -> np.ndarray:
        """By how much blocks have more error than with a scale of absmax: int64 [ceil(blocks / 256)].

        Sums over groups of squares, in units of 1 / 1024 of that error; up to 3% count as none.
        """
        plain = self._error_of(self._fixed, np.full(error.shape, _UNIT, np.int32), False) + self._above_zero
        units = np.clip((error / plain - _MOST_EXCESS) * np.float32(1024), np.float32(0), np.float32(1024))
        units = np.where(self.absmax == 0, np.float32(0), units)
        return np.square(np.rint(_groups(units)).astype(np.int64)).sum(axis=1)


def _groups(of_blocks: np.ndarray) -> np.ndarray:
    """float32 [blocks] as [groups, 256], the last filled up with zeros."""
    padded = np.zeros((math.ceil(of_blocks.size / NESTED_BLOCK), NESTED_BLOCK), np.float32)
    padded.reshape(-1)[: of_blocks.size] = of_blocks
    return padded


def _distances(
    fixed: np.ndarray, inverse: np.ndarray, negative: np.ndarray | bool, levels: np.ndarray, unit: int
) -> np.ndarray:
    """Distances from the nearest levels, int64 [blocks, 64].

    Args:
        fixed: int32 [blocks, 64], values in units of absmax / 32767.
        inverse: int32 [blocks], unit * absmax / magnitude of the scale.
        negative: whether the scale is below zero.
        unit: 1.0 in fixed point.
    """
    scaled = (fixed * inverse[:, None] + (1 << 14)) >> 15
    scaled = np.where(np.reshape(negative, (-1, 1)), -scaled, scaled)
    step = 2 if unit == _UNIT else 1
    fixed_levels = step * np.rint(levels.astype(np.float64) * (unit // step)).astype(np.int64)
    code = np.searchsorted((fixed_levels[:-1] + fixed_levels[1:]) // 2, scaled, side="left")
    return scaled - fixed_levels[code]


def _fixed_error(
    fixed: np.ndarray,
    inverse: np.ndarray,
    negative: np.ndarray | bool,
    levels: np.ndarray,
    unit: int = _UNIT,
) -> np.ndarray:
    """Sum over each block of the squared distance, in integers, as float32 [blocks]; see `_distances`."""
    return np.square(_distances(fixed, inverse, negative, levels, unit)).sum(axis=1).astype(np.float32)


def _weighted_error(
    fixed: np.ndarray,
    inverse: np.ndarray,
    negative: np.ndarray | bool,
    levels: np.ndarray,
    importance: np.ndarray,
) -> np.ndarray:
    """The same with each squared distance times its importance, in float32 and in 16 lanes: [blocks]."""
    distance = _distances(fixed, inverse, negative, levels, _UNIT).astype(np.float32)
    terms = (distance * distance * importance).reshape(-1, 4, 16)
    lanes = ((terms[:, 0] + terms[:, 1]) + terms[:, 2]) + terms[:, 3]
    for width in (8, 4, 2, 1):
        lanes = lanes[:, :width] + lanes[:, width : 2 * width]
    return lanes[:, 0]


def decode_absmax(packed: PackedTensor) -> np.ndarray:
    """Block scales float32 [ceil(n / 64)]: map[q] * nested_absmax, then + offset, each rounded to float32."""
    nested = np.repeat(packed.nested_absmax, NESTED_BLOCK)[: packed.absmax.size]
    with np.errstate(over="ignore", invalid="ignore"):
        product = packed.nested_quant_map[packed.absmax] * nested
        return product + np.float32(packed.nested_offset)


def dequantize(
    packed: PackedTensor,
    dtype: Dtype | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    threads: int = 1,
) -> np.ndarray:
    """Elements [start, stop), see `nf4format.blocks.dequantize`; `threads` has no effect here."""
    code = np.stack([packed.codes >> 4, packed.codes & 15], axis=1).reshape(-1)[: packed.size]
    scale = np.repeat(decode_absmax(packed), BLOCK)[: packed.size]
    with np.errstate(over="ignore", invalid="ignore"):
        values = packed.quant_map[code] * scale
    return from_float32(values[start:stop], dtype or packed.dtype)


def linear(x: np.ndarray, packed: PackedTensor) -> np.ndarray:
    """Exact product, float64 [m, n]: x float64 [m, k] times the transpose of the float32 weight [n, k]."""
    weight = dequantize(packed, "float32").reshape(packed.shape)
    return x.astype(np.float64) @ weight.astype(np.float64).T
