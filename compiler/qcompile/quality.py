"""How far the packed weights are from the original ones: squared errors, by layer group."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nf4format.blocks import Dtype, PackedTensor, dequantize, quantize
from nf4format.codebook import BLOCK, NESTED_BLOCK, NESTED_MAP
from nf4format.encode import Constants

# Values decoded at a time: whole nested blocks, so that a segment is a packed tensor of its own.
SEGMENT = 4 * BLOCK * NESTED_BLOCK
# Segments measured in one tensor, evenly spaced. Half a million values put the error's error below 0.2%.
SAMPLED_SEGMENTS = 8


@dataclass(frozen=True)
class TensorError:
    """Squared error of one tensor, over the values that were measured.

    Attributes:
        num_values: values of the tensor.
        measured: how many of them were measured.
        squared_error: sum of (decoded - original)^2 over these.
        plain_error: the same for -O0, each measured segment quantized by itself (a whole tensor has another
            offset, which is of no account).
        squared_weight: sum of original^2 over these.
    """

    num_values: int
    measured: int
    squared_error: float
    plain_error: float
    squared_weight: float


@dataclass(frozen=True)
class GroupError:
    """Error of a layer group.

    Attributes:
        group: its name, such as "q_proj".
        tensors: how many tensors it has.
        num_values: their values.
        relative_rms: root of mean squared error over mean squared weight.
        plain_ratio: squared error over that of -O0.
    """

    group: str
    tensors: int
    num_values: int
    relative_rms: float
    plain_ratio: float


def sampled_segments(num_values: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the segments to measure: all of a small tensor, evenly spaced ones of a large one."""
    num_segments = -(-num_values // SEGMENT)
    count = min(num_segments, SAMPLED_SEGMENTS)
    for position in range(count):
        start = position * num_segments // count * SEGMENT
        yield start, min(start + SEGMENT, num_values)


def all_segments(num_values: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of every segment."""
    for start in range(0, num_values, SEGMENT):
        yield start, min(start + SEGMENT, num_values)


def measure(
    num_values: int,
    dtype: Dtype,
    segments: Iterable[tuple[int, int]],
    read_values: Callable[[int, int], np.ndarray],
    decode: Callable[[int, int], np.ndarray],
) -> TensorError:
    """Squared error over some segments of a tensor.

    Args:
        read_values: original values [start, stop) in the array type of `dtype`.
        decode: decoded values [start, stop) as float32.
    """
    measured, squared_error, plain_error, squared_weight = 0, 0.0, 0.0, 0.0
    for start, stop in segments:
        values = read_values(start, stop)
        original = to_float32(values, dtype)
        measured += stop - start
        squared_error += _sum_of_squares(decode(start, stop) - original)
        plain_error += _sum_of_squares(to_float32(dequantize(quantize(values, dtype)), dtype) - original)
        squared_weight += _sum_of_squares(original)
    return TensorError(num_values, measured, squared_error, plain_error, squared_weight)


def decode_segment(
    codes: np.ndarray, constants: Constants, start: int, stop: int, dtype: Dtype, *, levels: np.ndarray
) -> np.ndarray:
    """Decode [start, stop) of a tensor from the codes of that segment alone, as float32 on `dtype`'s grid.

    Args:
        codes: uint8 [ceil((stop - start) / 2)].
        constants: the whole tensor's.
        start, stop: a segment: start is a multiple of SEGMENT.
        levels: what codes stand for, float32 [16].
    """
    blocks = slice(start // BLOCK, -(-stop // BLOCK))
    packed = PackedTensor(
        (stop - start,),
        dtype,
        codes,
        constants.absmax[blocks],
        levels,
        constants.nested_absmax[blocks.start // NESTED_BLOCK : -(-blocks.stop // NESTED_BLOCK)],
        NESTED_MAP,
        constants.nested_offset,
    )
    return to_float32(dequantize(packed), dtype)


def group_errors(errors: Iterable[tuple[str, TensorError]]) -> tuple[GroupError, ...]:
    """Sum up (group, error) pairs, in order of appearance; a sampled tensor counts with its full size."""
    tensors: dict[str, list[TensorError]] = defaultdict(list)
    for group, error in errors:
        if error.measured:
            tensors[group].append(error)
    return tuple(
        GroupError(
            group,
            len(members),
            sum(member.num_values for member in members),
            relative_rms(members),
            plain_ratio(members),
        )
        for group, members in tensors.items()
    )


def to_float32(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Values of any of the three types as float32, exactly."""
    if dtype == "bfloat16":
        wide = values.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return values.astype(np.float32, copy=False)


def relative_rms(members: Sequence[TensorError]) -> float:
    """Root of squared error over squared weight; 0 for weights of zeros."""
    weight = _total(members, "squared_weight")
    return math.sqrt(_total(members, "squared_error") / weight) if weight else 0.0


def plain_ratio(members: Sequence[TensorError]) -> float:
    """Squared error over that of -O0; 1 where -O0 has none."""
    plain = _total(members, "plain_error")
    return _total(members, "squared_error") / plain if plain else 1.0


def _total(members: Sequence[TensorError], field: str) -> float:
    """Sum over all values, the measured ones standing for the others of their tensor."""
    return sum(
        getattr(member, field) * (member.num_values / member.measured)
        for member in members
        if member.measured
    )


def _sum_of_squares(values: np.ndarray) -> float:
    # Rows of 4096 in float32, their sums in float64: as exact as needed, without a float64 copy.
    whole = values.size // 4096 * 4096
    rows = values[:whole].reshape(-1, 4096)
    rest = values[whole:].astype(np.float64)
    return float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64) + rest @ rest)
