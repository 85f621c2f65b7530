"""Whether constants and codes make sense: what can be told of a whole file without its checkpoint.

Sums say that bytes are those that were written. This says that an encoder can have written them: every
weight decodes to finite numbers, unused bits are what they must be, kept tensors hold no NaN, and at level 0,
where a scale is its block's largest magnitude, every block and every group of scales reaches the end of its
range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from .blocks import Dtype, PackedTensor, first_nonfinite
from .codebook import BLOCK, NESTED_BLOCK, NESTED_MAP
from .container import Nf4File
from .dtypes import DTYPE_OF_SAFETENSORS
from .errors import FormatError
from .levels import thresholds_of
from .strictjson import parse_json, parse_object
from .sums import Progress

SEGMENT: Final = 64 * NESTED_BLOCK  # blocks looked at together
MAX_PARSED_BYTES: Final = 16 << 20  # larger embedded files are not parsed

# Farthest that a scale may be from the one its 8-bit code stands for, in nested scales.
SCALE_ERROR: Final = max(float(np.diff(NESTED_MAP).max()) / 2, 1 + float(NESTED_MAP[0]))
# Below this magnitude the reciprocal of a float32 is no float32: codes need not reach the end then.
_TINY: Final = 2.0**-126
_LARGEST: Final[dict[Dtype, float]] = {
    "float32": float(np.finfo(np.float32).max),
    "bfloat16": 3.3961775292304601e38,  # what still rounds to the largest of them
    "float16": 65519.99,
}
_ZERO_CODE: Final = 7
_REACHES_END: Final = np.array([byte >> 4 in (0, 15) or byte & 15 in (0, 15) for byte in range(256)])
_ZEROS: Final = _ZERO_CODE << 4 | _ZERO_CODE


@dataclass(frozen=True)
class Finding:
    """Something that is wrong: with a tensor, or with the file where `tensor` is None."""

    tensor: str | None
    problem: str

    def __str__(self) -> str:
        return self.problem if self.tensor is None else f"tensor {self.tensor!a}: {self.problem}"


def stated_level(file: Nf4File) -> int | None:
    """The optimisation level in the file's options, or None where it states none.

    Raises:
        FormatError: the options are not JSON, or the level is no number.
    """
    try:
        level = parse_object(file.metadata.get("nf4.options", "{}").encode()).get("level")
    except ValueError as error:
        raise FormatError(
            file.path, f"metadata nf4.options: {error}", remedy="compile the checkpoint again"
        ) from error
    if level is not None and type(level) is not int:
        problem, remedy = "metadata nf4.options: level", "compile the checkpoint again"
        raise FormatError(file.path, problem, expected="an integer", got=ascii(level)[:80], remedy=remedy)
    return level


def audit(file: Nf4File, progress: Progress | None = None) -> Iterator[Finding]:
    """Everything that does not make sense, at most one finding of a kind for each tensor.

    Args:
        progress: called with the numbers of bytes looked at; in all about those of the weights.

    Raises:
        FormatError: the file cannot be read, or states no level that can be read.
    """
    is_absmax = stated_level(file) == 0
    for name in file.packed_names:
        packed = file.packed(name)
        yield from (Finding(name, problem) for problem in _packed(packed, is_absmax))
        if progress:
            progress(packed.codes.size + packed.absmax.size)
    for name in file.kept_names:
        data, dtype, _ = file.kept(name)
        problem = _kept(data, dtype)
        if problem:
            yield Finding(name, problem)
        if progress:
            progress(data.size)
    for name in file.file_names:
        entry = file.header.entries[f"__file__/{name}"]
        if name.endswith(".json") and entry.end - entry.begin <= MAX_PARSED_BYTES:
            try:
                parse_json(file.file(name), limit_nesting=False, allow_infinity=True)
            except ValueError as error:
                yield Finding(None, f"embedded file {name}: {error}")


def _packed(packed: PackedTensor, is_absmax: bool) -> Iterator[str]:
    spare, zero = packed.codes[-1] & 15, int(np.searchsorted(thresholds_of(packed.quant_map), np.float32(0)))
    if packed.size % 2 and spare != zero:
        yield f"the spare half of the last byte of codes is {spare}, expected {zero}"
    found: dict[str, str] = {}
    total, num_blocks = 0.0, packed.absmax.size
    for first in range(0, num_blocks, SEGMENT):
        scales, errors = _scales(packed, first, min(first + SEGMENT, num_blocks))
        total += float(scales.sum(dtype=np.float64))
        for kind, problem in _segment(packed, first, scales, errors, is_absmax):
            found.setdefault(kind, problem)
    if is_absmax:
        # The offset is the mean of the scales; also of those that their codes stand for, up to their errors.
        mean = total / num_blocks
        allowed = SCALE_ERROR * float(packed.nested_absmax.max()) + 1e-6 * abs(packed.nested_offset) + _TINY
        if abs(mean - packed.nested_offset) > allowed:
            found["mean"] = f"nested_offset is {packed.nested_offset}, and the mean of the scales {mean}"
    yield from found.values()


def _scales(packed: PackedTensor, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales of the blocks [first, stop), first a multiple of NESTED_BLOCK, and how far each may be off."""
    nested = packed.nested_absmax[first // NESTED_BLOCK : math.ceil(stop / NESTED_BLOCK)]
    repeated = np.repeat(nested, NESTED_BLOCK)[: stop - first]
    scales = packed.nested_quant_map[packed.absmax[first:stop]] * repeated + np.float32(packed.nested_offset)
    return scales, repeated * np.float32(SCALE_ERROR)


def _segment(
    packed: PackedTensor, first: int, scales: np.ndarray, errors: np.ndarray, is_absmax: bool
) -> Iterator[tuple[str, str]]:
    """(kind, problem) of the blocks from `first`."""
    largest = _LARGEST[packed.dtype]
    bad = np.flatnonzero(~(np.abs(scales) <= largest))
    if bad.size:
        got = scales[bad[0]]
        yield "scale", f"the scale of block {first + bad[0]} is {got}: it decodes to infinite {packed.dtype}"
    if not is_absmax:
        return
    bad = np.flatnonzero(scales < -(errors * np.float32(1.01) + np.float32(_TINY)))
    if bad.size:
        yield (
            "sign",
            f"the scale of block {first + bad[0]} is {scales[bad[0]]}, and magnitudes are not negative",
        )
    begin, end = first * BLOCK // 2, min((first + scales.size) * BLOCK // 2, packed.codes.size)
    codes = packed.codes[begin:end]
    padded = np.full(scales.size * BLOCK // 2, _ZEROS, np.uint8)
    padded[: codes.size] = codes
    reaches = _REACHES_END[padded].reshape(scales.size, BLOCK // 2).any(axis=1)
    # Not reaching the end is right for a block of zeros, and near the smallest numbers.
    bad = np.flatnonzero(~reaches & (np.abs(scales) > errors * np.float32(1.01) + np.float32(_TINY)))
    if bad.size:
        got = scales[bad[0]]
        yield "codes", f"no code of block {first + bad[0]} reaches the end of the range, at a scale of {got}"
    for group in range(math.ceil(scales.size / NESTED_BLOCK)):
        bytes_ = packed.absmax[first + group * NESTED_BLOCK :][:NESTED_BLOCK]
        nested = packed.nested_absmax[first // NESTED_BLOCK + group]
        low, high = int(bytes_.min()), int(bytes_.max())
        if nested == 0 and (low, high) != (127, 127):
            yield (
                "absmax",
                f"nested_absmax[{first // NESTED_BLOCK + group}] is 0, and its absmax are not all 127",
            )
        elif nested >= _TINY and low != 0 and high != 255:
            where = first // NESTED_BLOCK + group
            yield "absmax", f"no absmax of group {where} reaches the end of the range: {low} to {high}"


def _kept(data: np.ndarray, dtype: str) -> str | None:
    if dtype in DTYPE_OF_SAFETENSORS and data.size:
        codec = DTYPE_OF_SAFETENSORS[dtype]
        values = data.view(np.uint16 if codec == "bfloat16" else codec)
        index = first_nonfinite(values, codec, nan_only=True)
        return None if index is None else f"NaN at index {index} (flat)"
    if dtype == "F64" and np.isnan(data.view(np.float64)).any():
        return "NaN in it"
    if dtype == "BOOL" and data.size and data.max() > 1:
        return f"a boolean of {data.max()}"
    return None
