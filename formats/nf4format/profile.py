"""The profile of a .nf4 file: what its tensors and metadata mean; all that kernels trust is checked."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np

from .blocks import Dtype
from .codebook import BLOCK, NESTED_BLOCK, NESTED_MAP, NF4_LEVELS
from .dtypes import SAFETENSORS_NAME
from .embedded import CONFIG_FILE, FILE_LIMITS, FILE_PREFIX
from .errors import FormatError
from .files import pread_exactly
from .header import Header, TensorEntry, tensor_bytes, valid_name
from .layout import (
    COMPANIONS,
    FIXED_METADATA,
    OTHER_LEVELS,
    PAD_PREFIX,
    PAGE,
    QUANT_STATE,
    RESERVED,
    companion_shapes,
)
from .levels import check_levels
from .strictjson import MAX_CONFIG_VALUES, parse_object
from .sums import SUMS_NAME

MAX_PAD_BYTES: Final = PAGE
MAX_QUANT_STATE_BYTES: Final = 4096
_REMEDY: Final = "the file is damaged or was not written by qcompile; compile it again"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_RUN_BYTES: Final = 4 << 20
_RUN_GAP: Final = 64 << 10
_QUANT_STATE_KEYS: Final = (
    "quant_type",
    "blocksize",
    "dtype",
    "shape",
    "nested_blocksize",
    "nested_dtype",
    "nested_offset",
)


@dataclass(frozen=True, slots=True)
class PackedState:
    """What a packed weight's quant_state says: shape, decoded dtype, nested_offset (an fp32 value)."""

    shape: tuple[int, ...]
    dtype: Dtype
    nested_offset: float


@dataclass(frozen=True)
class Profile:
    """The meaning of a file's tensors; names in file order. other_levels: weights with levels not NF4's."""

    packed: dict[str, PackedState]
    kept: tuple[str, ...]
    kept_set: frozenset[str]
    files: tuple[str, ...]
    aliases: dict[str, str]
    config: dict[str, Any]
    other_levels: frozenset[str]


def check_profile(
    fd: int, header: Header, name: str | os.PathLike[str], *, allow_maps: bool = False
) -> Profile:
    """Check a strict header against the profile, and the constants in the file.

    Reads quant maps, nested_absmax, quant_states, pads and config.json; never codes, absmax bytes or kept
    tensors.

    Args:
        allow_maps: accept any level tables and nested maps, as long as they are finite.

    Raises:
        FormatError: with the tensor's name and the values.
    """
    refuse = _refuser(name)
    entries = header.entries
    if header.data_start % PAGE:
        refuse("the data region is misaligned", expected=f"a multiple of {PAGE}", got=header.data_start)
    packed_names = [key.removesuffix(QUANT_STATE) for key in entries if key.endswith(QUANT_STATE)]
    companions = {weight + suffix for weight in packed_names for suffix in COMPANIONS}
    for weight in packed_names:
        _check_present(weight, entries, refuse)
    special = [key for key in entries if key.startswith(RESERVED)]
    files = _check_special(special, entries, refuse)
    packed_set = set(packed_names)
    kept = tuple(
        key
        for key in entries
        if key not in companions and key not in packed_set and not key.startswith(RESERVED)
    )
    constants = [entries[weight + s] for weight in packed_names for s in COMPANIONS if s != ".absmax"]
    pads = [entries[key] for key in special if key.startswith(PAD_PREFIX)]
    contents = _read_runs(fd, [*constants, *pads], name)
    declared_levels = OTHER_LEVELS in header.metadata
    packed, other_levels = _check_constants(contents, entries, allow_maps, declared_levels, refuse)
    in_order = {key: packed[key] for key in entries if key in packed}
    stored = frozenset(kept) | packed_set
    config = _check_config(fd, header, name, refuse)
    aliases = _check_aliases(header.metadata, stored, entries, refuse)
    return Profile(in_order, kept, frozenset(kept), files, aliases, config, other_levels)


def check_metadata(header: Header, name: str | os.PathLike[str]) -> None:
    """Check the metadata that say what the file is: the version first, then the values that version 1 fixes.

    Raises:
        FormatError: not a .nf4 file, a newer version, or a value that version 1 does not have.
    """
    refuse = _refuser(name)
    metadata = header.metadata
    version = metadata.get("nf4.version")
    if version is None:
        refuse(
            "no nf4.version in the metadata: an ordinary safetensors file",
            remedy="compile the checkpoint first",
        )
    if version != FIXED_METADATA["nf4.version"]:
        refuse(
            "a version this reader does not know",
            expected=repr(FIXED_METADATA["nf4.version"]),
            got=ascii(version)[:40],
            remedy="the file needs a newer reader; upgrade nf4",
        )
    for key, value in FIXED_METADATA.items():
        if metadata.get(key) != value:
            refuse(f"metadata {key}", expected=repr(value), got=ascii(metadata.get(key))[:80])
    if list(metadata)[:2] != ["format", "nf4.version"] or list(metadata)[2:] != sorted(list(metadata)[2:]):
        refuse("the metadata keys are out of order", expected="format, nf4.version, then sorted")
    for key in ("nf4.source_sha256", "nf4.config_sha256"):
        if not _SHA256.fullmatch(metadata.get(key, "")):
            refuse(f"metadata {key}", expected="64 hex digits", got=ascii(metadata.get(key))[:80])


def _refuser(name: str | os.PathLike[str]) -> Callable[..., NoReturn]:
    def refuse(problem: str = "", **details: Any) -> NoReturn:
        raise FormatError(name, problem, **{"remedy": _REMEDY, **details})

    return refuse


def _check_present(weight: str, entries: dict[str, TensorEntry], refuse: Callable[..., NoReturn]) -> None:
    """The codes and every companion are there, with dtypes and shapes that fit each other."""
    for key in (weight, *(weight + suffix for suffix in COMPANIONS)):
        if key not in entries:
            refuse(f"its companion {ascii(key)[:200]} is missing", tensor=weight)
    codes = entries[weight].shape
    if entries[weight].dtype != "U8" or len(codes) != 2 or codes[0] == 0 or codes[1] != 1:
        got = f"{entries[weight].dtype} {list(codes)}"
        refuse("not the codes of a weight", tensor=weight, expected="U8 [bytes, 1]", got=got)
    # An odd number of elements fills the same number of blocks as the even one above it.
    for suffix, (dtype, shape) in companion_shapes(2 * codes[0]).items():
        entry = entries[weight + suffix]
        if (entry.dtype, entry.shape) != (dtype, shape):
            got = f"{entry.dtype} {list(entry.shape)}"
            refuse("does not fit the codes", tensor=entry.name, expected=f"{dtype} {list(shape)}", got=got)
    state = entries[weight + QUANT_STATE]
    if state.dtype != "U8" or len(state.shape) != 1 or state.shape[0] > MAX_QUANT_STATE_BYTES:
        limit = f"U8 of at most {MAX_QUANT_STATE_BYTES} bytes"
        refuse(tensor=state.name, expected=limit, got=f"{state.dtype} {list(state.shape)}")


def _check_special(
    special: list[str], entries: dict[str, TensorEntry], refuse: Callable[..., NoReturn]
) -> tuple[str, ...]:
    """Reserved names: embedded files, pads and the sums; returns the names of the files."""
    files = []
    for key in special:
        entry = entries[key]
        size = entry.end - entry.begin
        if entry.dtype != "U8" or len(entry.shape) != 1:
            refuse(tensor=key, expected="one dimension of U8", got=f"{entry.dtype} {list(entry.shape)}")
        if key.startswith(FILE_PREFIX):
            file = key.removeprefix(FILE_PREFIX)
            if file not in FILE_LIMITS:
                refuse("not a file that may be embedded", tensor=key, expected=", ".join(FILE_LIMITS))
            if size > FILE_LIMITS[file]:
                refuse("too large", tensor=key, expected=f"at most {FILE_LIMITS[file]} bytes", got=size)
            files.append(file)
        elif key.startswith(PAD_PREFIX):
            if not key.removeprefix(PAD_PREFIX).isdecimal() or not 0 < size < MAX_PAD_BYTES:
                refuse("not a pad", tensor=key, expected=f"1 to {MAX_PAD_BYTES - 1} bytes", got=size)
        elif key != SUMS_NAME:
            refuse("a reserved name that version 1 does not have", tensor=key)
    return tuple(files)


def _check_constants(
    contents: Iterable[tuple[TensorEntry, memoryview]],
    entries: dict[str, TensorEntry],
    allow_maps: bool,
    declared_levels: bool,
    refuse: Callable[..., NoReturn],
) -> tuple[dict[str, PackedState], frozenset[str]]:
    """The packed weights' states, and which of them have other levels than NF4's."""
    states: dict[str, PackedState] = {}
    other_levels: set[str] = set()
    largest: dict[str, float] = {}
    maps = {".nested_quant_map": NESTED_MAP.tobytes(), ".quant_map": NF4_LEVELS.tobytes()}
    for entry, data in contents:
        key = entry.name
        if key.startswith(PAD_PREFIX):
            if any(data):
                refuse("a pad holds bytes other than zero", tensor=key)
        elif key.endswith(QUANT_STATE):
            weight = key.removesuffix(QUANT_STATE)
            states[weight] = _check_quant_state(weight, bytes(data), entries, refuse)
        elif key.endswith(".nested_absmax"):
            weight = key.removesuffix(".nested_absmax")
            largest[weight] = max(largest.get(weight, 0.0), _check_nested_absmax(key, data, refuse))
        else:
            suffix = ".nested_quant_map" if key.endswith(".nested_quant_map") else ".quant_map"
            if data == maps[suffix]:
                continue
            if suffix == ".quant_map" and declared_levels and not allow_maps:
                _check_other_levels(key, data, refuse)
            elif not (allow_maps and _all_finite(data)):
                refuse(f"not the {suffix[1:]} of NF4", tensor=key, got=_first_difference(data, maps[suffix]))
            if suffix == ".quant_map":
                other_levels.add(key.removesuffix(suffix))
    for weight, state in states.items():
        bound = largest[weight] * float(np.abs(NESTED_MAP).max()) + abs(state.nested_offset)
        if bound > float(np.finfo(np.float32).max):
            refuse("its scales overflow fp32", tensor=weight, got=bound)
    return states, frozenset(other_levels)


def _check_other_levels(key: str, data: memoryview, refuse: Callable[..., NoReturn]) -> None:
    try:
        check_levels(np.frombuffer(data, np.float32))
    except ValueError as error:
        refuse(f"not a table of levels: {error}", tensor=key)


def _check_quant_state(
    weight: str, data: bytes, entries: dict[str, TensorEntry], refuse: Callable[..., NoReturn]
) -> PackedState:
    key = weight + QUANT_STATE
    try:
        state = parse_object(data)
    except ValueError as error:
        refuse(str(error), tensor=key)
    if tuple(state) != _QUANT_STATE_KEYS:
        refuse(
            "its keys", tensor=key, expected=", ".join(_QUANT_STATE_KEYS), got=ascii(", ".join(state))[:200]
        )
    fixed = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
    }
    for field, value in fixed.items():
        if state[field] != value or type(state[field]) is not type(value):
            refuse(field, tensor=key, expected=repr(value), got=ascii(state[field])[:80])
    dtype, shape, offset = state["dtype"], state["shape"], state["nested_offset"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_NAME:
        refuse("dtype", tensor=key, expected=" or ".join(SAFETENSORS_NAME), got=ascii(dtype)[:80])
    if not isinstance(shape, list) or not all(type(dim) is int for dim in shape):
        refuse("shape", tensor=key, expected="a list of integers", got=ascii(shape)[:80])
    try:
        size = tensor_bytes(SAFETENSORS_NAME[dtype], tuple(shape))
    except ValueError as error:
        refuse(str(error), tensor=key)
    if size == 0:
        refuse("an empty weight", tensor=key, got=shape)
    if type(offset) is not float or not math.isfinite(offset) or _as_float32(offset) != offset:
        refuse("nested_offset", tensor=key, expected="a finite fp32 value", got=ascii(offset)[:80])
    code_bytes = entries[weight].shape[0]
    if (math.prod(shape) + 1) // 2 != code_bytes:
        refuse(f"shape {shape} does not fit {code_bytes} bytes of codes", tensor=key)
    return PackedState(tuple(shape), dtype, offset)


def _check_nested_absmax(key: str, data: memoryview, refuse: Callable[..., NoReturn]) -> float:
    """The largest of these values, which must all be finite and not negative."""
    values = np.frombuffer(data, np.float32)
    bad = np.flatnonzero(~((values >= 0) & np.isfinite(values)))
    if bad.size:
        refuse("not a scale", tensor=key, expected="finite values that are not negative", got=values[bad[0]])
    return float(values.max(initial=0.0))


def _check_config(
    fd: int, header: Header, name: str | os.PathLike[str], refuse: Callable[..., NoReturn]
) -> dict[str, Any]:
    entry = header.entries.get(FILE_PREFIX + CONFIG_FILE)
    if entry is None:
        refuse(f"no embedded {CONFIG_FILE}")
    data = pread_exactly(fd, entry.end - entry.begin, entry.begin, name)
    digest = hashlib.sha256(data).hexdigest()
    if digest != header.metadata["nf4.config_sha256"]:
        problem = "does not match nf4.config_sha256 of the metadata"
        refuse(problem, tensor=entry.name, expected=header.metadata["nf4.config_sha256"], got=digest)
    try:
        return parse_object(data, allow_infinity=True, most_values=MAX_CONFIG_VALUES)
    except ValueError as error:
        refuse(str(error), tensor=entry.name)


def _check_aliases(
    metadata: dict[str, str],
    stored: frozenset[str],
    entries: dict[str, TensorEntry],
    refuse: Callable[..., NoReturn],
) -> dict[str, str]:
    try:
        aliases = parse_object(metadata.get("nf4.aliases", "{}").encode("utf-8", "surrogatepass"))
    except ValueError as error:
        refuse(f"metadata nf4.aliases: {error}")
    for alias, target in aliases.items():
        if not valid_name(alias) or alias.startswith(RESERVED) or alias in entries:
            refuse("metadata nf4.aliases: not a free name", tensor=alias)
        if not isinstance(target, str) or target not in stored:
            refuse("metadata nf4.aliases: no such tensor to share", tensor=alias, got=ascii(target)[:120])
    return aliases


def _read_runs(
    fd: int, wanted: list[TensorEntry], name: str | os.PathLike[str]
) -> Iterator[tuple[TensorEntry, memoryview]]:
    """Each entry with its bytes, in file order; neighbours share one read, and long ones come in pieces.

    Reads are of at most _RUN_BYTES, a multiple of every element size, so memory is bounded whatever the file.
    """
    ordered = sorted(wanted, key=lambda entry: entry.begin)
    start = 0
    while start < len(ordered):
        begin, stop = ordered[start].begin, start + 1
        while (
            stop < len(ordered)
            and ordered[stop].begin - ordered[stop - 1].end <= _RUN_GAP
            and ordered[stop].end - begin <= _RUN_BYTES
        ):
            stop += 1
        end = ordered[stop - 1].end
        if stop - start == 1:
            for piece in range(begin, end, _RUN_BYTES):
                data = pread_exactly(fd, min(_RUN_BYTES, end - piece), piece, name)
                yield ordered[start], memoryview(data)
        else:
            run = memoryview(pread_exactly(fd, end - begin, begin, name))
            for entry in ordered[start:stop]:
                yield entry, run[entry.begin - begin : entry.end - begin]
        start = stop


def _all_finite(data: memoryview) -> bool:
    return bool(np.isfinite(np.frombuffer(data, np.float32)).all())


def _first_difference(data: memoryview, expected: bytes) -> str:
    values, wanted = np.frombuffer(data, np.float32), np.frombuffer(expected, np.float32)
    index = int(np.flatnonzero(values.view(np.uint32) != wanted.view(np.uint32))[0])
    return f"{values[index]} at {index} instead of {wanted[index]}"


def _as_float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))
