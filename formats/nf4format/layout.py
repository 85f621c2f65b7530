"""Where everything of a .nf4 file lies, from names, shapes and sizes alone, before any data is read.

    0            u64 header length, JSON, spaces                       [data_start, a multiple of 4096]
    data_start   codes of the packed weights, in execution order       (U8, shape [ceil(n / 2), 1])
                 __pad__.0, zeros up to a multiple of 64, if needed
                 constants, kept tensors, absmax, quant_state          (see `_tail_order`)
                 __file__/<name>                                       (U8)
    sums_begin   __nf4__.sums                                          (U8, last)                [file_bytes]

The names, shapes and dtypes of a packed weight's six tensors are those of a bitsandbytes checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from .blocks import Dtype
from .codebook import BLOCK, NESTED_BLOCK
from .dtypes import SAFETENSORS_NAME
from .embedded import CONFIG_FILE, EMBEDDED_FILES, FILE_PREFIX
from .errors import FormatError
from .header import PREFIX_BYTES, TensorEntry, encode_header, header_json, tensor_bytes, valid_name
from .sums import SUMS_NAME, sums_bytes

VERSION: Final = "1"
PAGE: Final = 4096  # data starts on a page: direct I/O and GPUDirect need it
TAIL_ALIGNMENT: Final = 64  # a cache line, and the widest vector load
PAD_PREFIX: Final = "__pad__."
RESERVED: Final = (FILE_PREFIX, PAD_PREFIX, "__nf4__", "__metadata__")

QUANT_STATE: Final = ".quant_state.bitsandbytes__nf4"
COMPANIONS: Final = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", QUANT_STATE)
QUANT_STATE_STEP: Final = 64  # reserved sizes are multiples of it, so that what follows stays aligned
_RENAME: Final = "rename the tensor in the checkpoint"
_LONGEST_FLOAT: Final = 24  # characters of the longest repr of a double

# Metadata that version 1 fixes. The first two come first in the header, so that bytes 8.. tell what it is.
FIXED_METADATA: Final[dict[str, str]] = {
    "format": "pt",
    "nf4.version": VERSION,
    "nf4.align": str(PAGE),
    "nf4.blocksize": str(BLOCK),
    "nf4.double_quant": "1",
    "nf4.nested_blocksize": str(NESTED_BLOCK),
}


OTHER_LEVELS: Final = "nf4.levels"
"""Metadata key of a file whose codes stand for other levels than NF4's; its value names them."""


@dataclass(frozen=True)
class PackedSpec:
    """A weight to be stored as NF4: its name, logical shape and the dtype it decodes to."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class KeptSpec:
    """A tensor stored as it is; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The plan of one file; `entries` in offset order, with absolute offsets."""

    entries: dict[str, TensorEntry]
    data_start: int
    sums_begin: int
    file_bytes: int
    packed: tuple[PackedSpec, ...]
    kept: tuple[KeptSpec, ...]
    files: dict[str, int]
    metadata: dict[str, str] = field(default_factory=dict)

    def header_bytes(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """Bytes 0 to data_start. `metadata` replaces planned values by others of the same length.

        Raises:
            ValueError: a key that was not planned, or a value of another length.
        """
        values = dict(self.metadata)
        for key, value in (metadata or {}).items():
            if len(values.get(key, "")) != len(value) or key not in values:
                planned = len(values[key]) if key in values else "no such key"
                raise ValueError(f"metadata {key!r}: planned {planned}, got {len(value)} characters")
            values[key] = value
        return encode_header(values, self.entries.values(), self.data_start)


def plan_layout(
    packed: Sequence[PackedSpec],
    kept: Sequence[KeptSpec],
    files: Mapping[str, int],
    metadata: Mapping[str, str],
) -> Layout:
    """Lay out a file.

    Args:
        packed, kept: in execution order, which decides the order in the file.
        files: embedded file name -> bytes; names from EMBEDDED_FILES, config.json among them.
        metadata: `nf4.*` keys beside FIXED_METADATA; ASCII values whose lengths will not change.

    Raises:
        FormatError: a name is not allowed, reserved, or used twice; a shape or dtype out of bounds; an empty
            packed weight. The file's name is "", as there is none yet.
    """
    codes: list[tuple[str, str, tuple[int, ...]]] = []
    tail: list[tuple[str, str, tuple[int, ...]]] = []
    for spec in packed:
        codes.append((spec.name, "U8", ((_packed_elements(spec) + 1) // 2, 1)))
        tail += _companions(spec)
    tail += [(spec.name, spec.dtype, spec.shape) for spec in kept]
    for name, _, _ in (*codes, *tail):
        _check_name(name)
    for name in files:
        if name not in EMBEDDED_FILES:
            raise FormatError("", f"file {name!a} cannot be embedded", expected=", ".join(EMBEDDED_FILES))
    if CONFIG_FILE not in files:
        raise FormatError(
            "", f"no {CONFIG_FILE} among the embedded files", remedy="every .nf4 file carries one"
        )
    embedded = [(FILE_PREFIX + name, "U8", (files[name],)) for name in EMBEDDED_FILES if name in files]

    placed = _Placed()
    for item in codes:
        placed.add(*item)
    if placed.end % TAIL_ALIGNMENT:
        placed.add(f"{PAD_PREFIX}0", "U8", (-placed.end % TAIL_ALIGNMENT,))
    for item in (*sorted(tail, key=_tail_order), *embedded):
        placed.add(*item)
    sums_begin = placed.end
    placed.add(SUMS_NAME, "U8", (sums_bytes(sums_begin, len(embedded)),))

    ordered_metadata = _ordered_metadata(metadata)
    data_start = (
        -(-(PREFIX_BYTES + len(header_json(ordered_metadata, placed.entries.values(), 0))) // PAGE) * PAGE
    )
    entries = {
        entry.name: TensorEntry(
            entry.name, entry.dtype, entry.shape, entry.begin + data_start, entry.end + data_start
        )
        for entry in placed.entries.values()
    }
    return Layout(
        entries=entries,
        data_start=data_start,
        sums_begin=data_start + sums_begin,
        file_bytes=data_start + placed.end,
        packed=tuple(packed),
        kept=tuple(kept),
        files={name: files[name] for name in EMBEDDED_FILES if name in files},
        metadata=ordered_metadata,
    )


class _Placed:
    """Tensors one behind the other: `entries` with offsets from 0, `end` behind the last."""

    def __init__(self) -> None:
        self.entries: dict[str, TensorEntry] = {}
        self.end = 0

    def add(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        if name in self.entries:
            remedy = "rename one of the two in the checkpoint"
            raise FormatError("", "the name is used twice", tensor=name, remedy=remedy)
        begin, self.end = self.end, self.end + _checked_bytes(name, dtype, shape)
        self.entries[name] = TensorEntry(name, dtype, shape, begin, self.end)


def quant_state_size(spec: PackedSpec) -> int:
    """Bytes reserved for a weight's quant_state JSON, whatever its nested_offset turns out to be."""
    longest = len(_quant_state_text(spec, "0" * _LONGEST_FLOAT))
    return -(-longest // QUANT_STATE_STEP) * QUANT_STATE_STEP


def quant_state_json(spec: PackedSpec, nested_offset: float, size: int) -> bytes:
    """The quant_state tensor's `size` bytes: JSON in bitsandbytes' key order, then spaces.

    `nested_offset` is printed as the shortest text of its double value, so that reading gives the same fp32.

    Raises:
        ValueError: the offset is not finite or not an fp32 value, or the text does not fit.
    """
    if not math.isfinite(nested_offset) or float(np.float32(nested_offset)) != nested_offset:
        raise ValueError(f"expected a finite fp32 value as nested_offset, got {nested_offset!r}")
    text = _quant_state_text(spec, repr(float(nested_offset)))
    if len(text) > size:
        raise ValueError(f"a quant_state of {len(text)} bytes does not fit into {size}")
    return text.ljust(size, b" ")


def companion_shapes(num_elements: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of the companions of a weight of n elements whose sizes n decides."""
    num_blocks = -(-num_elements // BLOCK)
    return {
        ".quant_map": ("F32", (16,)),
        ".nested_quant_map": ("F32", (256,)),
        ".nested_absmax": ("F32", (-(-num_blocks // NESTED_BLOCK),)),
        ".absmax": ("U8", (num_blocks,)),
    }


def _companions(spec: PackedSpec) -> list[tuple[str, str, tuple[int, ...]]]:
    sized = companion_shapes(spec.num_elements)
    companions = [(spec.name + suffix, dtype, shape) for suffix, (dtype, shape) in sized.items()]
    return [*companions, (spec.name + QUANT_STATE, "U8", (quant_state_size(spec),))]


# Constants before kept tensors before bytes, and equal kinds together.
_KINDS: Final = (".quant_map", ".nested_quant_map", ".nested_absmax", "", ".absmax", QUANT_STATE)


def _tail_order(item: tuple[str, str, tuple[int, ...]]) -> tuple[int, int]:
    """Sort key behind the codes; sorting is stable, so execution order decides among equals.

    Sizes that are multiples of 64 come first, then of 32, 16, ... So every tensor begins at a multiple of the
    largest power of two (up to 64) that divides its size, which its element size does: no pads between.
    """
    name, dtype, shape = item
    size = _checked_bytes(name, dtype, shape)
    alignment = math.gcd(size, TAIL_ALIGNMENT) if size else TAIL_ALIGNMENT
    suffix = next((kind for kind in _KINDS if kind and name.endswith(kind)), "")
    return -alignment, _KINDS.index(suffix)


def _quant_state_text(spec: PackedSpec, nested_offset: str) -> bytes:
    fields: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
    }
    return f'{json.dumps(fields)[:-1]}, "nested_offset": {nested_offset}}}'.encode("ascii")


def _packed_elements(spec: PackedSpec) -> int:
    if spec.dtype not in SAFETENSORS_NAME:
        raise FormatError("", tensor=spec.name, expected=" or ".join(SAFETENSORS_NAME), got=spec.dtype)
    _checked_bytes(spec.name, SAFETENSORS_NAME[spec.dtype], spec.shape)
    if spec.num_elements == 0:
        problem, remedy = "an empty tensor cannot be packed", "keep it as it is, with --exclude"
        raise FormatError("", problem, tensor=spec.name, got=list(spec.shape), remedy=remedy)
    return spec.num_elements


def _checked_bytes(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    try:
        return tensor_bytes(dtype, shape)
    except ValueError as error:
        raise FormatError("", str(error), tensor=name, remedy="convert it in the checkpoint") from error


def _check_name(name: str) -> None:
    if not valid_name(name):
        problem = "not a tensor name, expected 1 to 255 plain ASCII characters"
        raise FormatError("", problem, tensor=name, remedy=_RENAME)
    if name.startswith(RESERVED):
        raise FormatError("", "the name is reserved", tensor=name, remedy=_RENAME)


def _ordered_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if FIXED_METADATA.get(key, value) != value:
            raise ValueError(
                f"metadata {key!r}: version {VERSION} has {FIXED_METADATA[key]!r}, got {value!r}"
            )
    first = {key: FIXED_METADATA[key] for key in ("format", "nf4.version")}
    rest = {**FIXED_METADATA, **metadata}
    return first | {key: rest[key] for key in sorted(rest) if key not in first}
