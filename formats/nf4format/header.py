"""The safetensors header: one validator for .nf4 files (strict) and for source and adapter files (relaxed).

    byte 0      u64, little endian: N, the length of the header
    byte 8      N bytes of JSON: {"__metadata__": {...}, "name": {"dtype", "shape", "data_offsets"}, ...}
    byte 8 + N  the data region; data_offsets count from here

Nothing is believed before it is checked: the length before it sizes a buffer, counts before parsing, sizes
before they are multiplied. What is accepted here, safetensors' own reader accepts with the same tensors.
Byte-level rules, and which of them source files are spared: SPEC.md.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, NoReturn

from .dtypes import DTYPE_BITS, element_bytes
from .errors import FormatError
from .files import likely_cause, open_regular, os_error, pread_exactly
from .strictjson import check_nesting, parse_json

METADATA_KEY: Final = "__metadata__"
PREFIX_BYTES: Final = 8

MAX_HEADER_BYTES: Final = 16 << 20  # 200,000 tensors fit; a larger header is a bomb, or wants experts fused
MAX_TENSORS: Final = 200_000
MAX_GENERAL_TENSORS: Final = 50_000  # in a header that is JSON, but not as compact as writers write it
MAX_RANK: Final = 8
MAX_NAME_BYTES: Final = 255  # a file name's limit too, though a name is never used as one
MAX_DIM: Final = 1 << 40
MAX_ELEMENTS: Final = 1 << 56  # times 64 bits stays below 2^63
MAX_METADATA_ENTRIES: Final = 1000
MAX_METADATA_VALUE_BYTES: Final = 1 << 20

# Printable ASCII without space, quotes, backslash and markup characters: what module paths are made of.
_NAME: Final = re.compile(r"(?!/)(?!.*\.\.)[A-Za-z0-9_.\-/:+@#=\[\](),$~%!*]{1,255}")
_DIM: Final = rb"(?:0|[1-9][0-9]{0,18})"
# An entry without a space, an escape or a field more, and what follows it.
_ENTRY: Final = re.compile(
    rb'"([A-Za-z0-9_.\-/:+@#=\[\](),$~%!*]{1,255})":\{"dtype":"([A-Z0-9_]{1,16})","shape":\[('
    + _DIM
    + rb"(?:,"
    + _DIM
    + rb'){0,7})?\],"data_offsets":\[('
    + _DIM
    + rb"),("
    + _DIM
    + rb")\]\}[,}]"
)
_STRING: Final = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_METADATA: Final = re.compile(
    rb'\{"__metadata__":(\{(?:' + _STRING + rb":" + _STRING + rb",?)*\})[,}]", re.DOTALL
)
_MOST_METADATA: Final = 256 << 10  # bytes; longer ones are rare, and take the regular expression much memory
_NONE: Final = object()  # no metadata, which is not the same as null
_FIELDS: Final = {"dtype", "shape", "data_offsets"}
_RECOMPILE: Final = "the file is damaged or was not written by qcompile; compile it again"
_REDOWNLOAD: Final = "download the file again"


class _NotCompact(Exception):
    """The header is not as compact as writers write it."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `begin` and `end` are absolute file offsets, dtype is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header; `entries` in offset order, which fill data_start..file_bytes without a gap."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


def read_header(
    fd_or_path: int | str | os.PathLike[str],
    *,
    strict: bool,
    name: str | os.PathLike[str] = "",
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> Header:
    """Read and check the header of a safetensors file, by pread; the data region is not touched.

    Args:
        strict: the rules of .nf4; otherwise those for files that others wrote (SPEC.md, section 2).
        name: the name to use in messages when a descriptor is given.
        max_header_bytes: refuse longer headers; at most 100,000,000, safetensors' own limit.

    Raises:
        FormatError: with the file's name, the tensor's, the values, and the likely cause when it is known.
    """
    if not isinstance(fd_or_path, int):
        fd = open_regular(fd_or_path)
        try:
            return read_header(fd, strict=strict, name=fd_or_path, max_header_bytes=max_header_bytes)
        finally:
            os.close(fd)
    try:
        file_bytes = os.fstat(fd_or_path).st_size
    except OSError as error:
        raise os_error(name, error) from error
    head = pread_exactly(fd_or_path, min(512, file_bytes), 0, name)
    remedy = likely_cause(head) or (_RECOMPILE if strict else _REDOWNLOAD)
    if file_bytes < PREFIX_BYTES:
        raise FormatError(name, "too short for a header", expected="8 bytes", got=file_bytes, remedy=remedy)
    (length,) = struct.unpack("<Q", head[:PREFIX_BYTES])
    limit = min(max_header_bytes, 100_000_000)
    if not 2 <= length <= limit:
        raise FormatError(
            name, "header length out of range", expected=f"2 to {limit} bytes", got=length, remedy=remedy
        )
    if length > file_bytes - PREFIX_BYTES:
        problem = "the file is cut short inside its header"
        raise FormatError(
            name, problem, expected=PREFIX_BYTES + length, got=f"{file_bytes} bytes", remedy=remedy
        )
    text = pread_exactly(fd_or_path, length, PREFIX_BYTES, name)
    return _parse(text, file_bytes, strict, name, remedy)


def encode_header(metadata: Mapping[str, str], entries: Iterable[TensorEntry], data_start: int) -> bytes:
    """The bytes from 0 to `data_start`: length, compact ASCII JSON in the order given, spaces.

    Raises:
        ValueError: the JSON does not fit before `data_start`.
    """
    body = header_json(metadata, entries, data_start)
    if PREFIX_BYTES + len(body) > data_start:
        raise ValueError(f"a header of {len(body)} bytes does not fit before byte {data_start}")
    body = body.ljust(data_start - PREFIX_BYTES, b" ")
    return struct.pack("<Q", len(body)) + body


def header_json(metadata: Mapping[str, str], entries: Iterable[TensorEntry], data_start: int) -> bytes:
    """The header's JSON without padding; entries' offsets are absolute and `data_start` is taken off."""
    parts = [f'"{METADATA_KEY}":{json.dumps(dict(metadata), separators=(",", ":"))}']
    parts += [
        f'{json.dumps(entry.name)}:{{"dtype":"{entry.dtype}","shape":[{",".join(map(str, entry.shape))}],'
        f'"data_offsets":[{entry.begin - data_start},{entry.end - data_start}]}}'
        for entry in entries
    ]
    return ("{" + ",".join(parts) + "}").encode("ascii")


def valid_name(name: str) -> bool:
    """Whether `name` may name a tensor: 1 to 255 of some ASCII characters, no `..`, no `/` first."""
    return _NAME.fullmatch(name) is not None


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor.

    Raises:
        ValueError: unknown dtype, rank, dimension or product out of bounds (whatever the order of the
            dimensions and even beside a 0), or a sub-byte type that does not fill whole bytes.
    """
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {ascii(dtype)[:40]}, expected one of {' '.join(DTYPE_BITS)}")
    if len(shape) > MAX_RANK:
        raise ValueError(f"expected at most {MAX_RANK} dimensions, got {len(shape)}")
    product, empty = 1, False
    for dim in shape:
        if not 0 <= dim <= MAX_DIM:
            raise ValueError(f"expected dimensions from 0 to {MAX_DIM}, got {dim}")
        empty = empty or dim == 0
        product *= dim or 1
        if product > MAX_ELEMENTS:
            raise ValueError(f"expected at most {MAX_ELEMENTS} elements, got shape {list(shape)}")
    bits = 0 if empty else product * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"expected whole bytes, got {bits} bits of {dtype}")
    return bits // 8


def _parse(text: bytes, file_bytes: int, strict: bool, name: str | os.PathLike[str], remedy: str) -> Header:
    """Header from its JSON text; every rule but those that need the data region."""

    def refuse(problem: str, **details: Any) -> NoReturn:
        raise FormatError(name, problem, remedy=remedy, **details)

    data_start = PREFIX_BYTES + len(text)

    def checked(items: Iterable[tuple[str, Any]]) -> dict[str, TensorEntry]:
        entries: dict[str, TensorEntry] = {}
        for count, (tensor, value) in enumerate(items):
            if count == MAX_TENSORS:
                refuse("too many tensors", expected=f"at most {MAX_TENSORS}", got=f"{count + 1} or more")
            if tensor in entries:
                raise _NotCompact
            try:
                entries[tensor] = _entry(tensor, value, data_start, strict)
            except ValueError as error:
                refuse(str(error), tensor=tensor)
        return entries

    try:
        items: Iterable[tuple[str, Any]]
        try:
            metadata, items = _compact(text)
            entries = checked(items)
        except _NotCompact:
            metadata, items = _general(text, strict)
            entries = checked(items)
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        refuse(f"the header is {error}" if str(error).startswith("not ") else f"in the header: {error}")
    if strict and metadata is _NONE:
        refuse(f"the header has no {METADATA_KEY}")
    strings = _metadata({} if metadata is _NONE else metadata, refuse)
    listed_order = entries.values()
    if any(later.begin < entry.begin or later.end < entry.end for entry, later in pairwise(listed_order)):
        ordered = sorted(listed_order, key=lambda entry: (entry.begin, entry.end))
        entries = {entry.name: entry for entry in ordered}
    position = data_start
    for entry, listed in zip(entries.values(), listed_order, strict=True):
        if entry.begin != position:
            problem = (
                "its data leaves a gap" if entry.begin > position else "its data overlaps another tensor's"
            )
            got = entry.begin - data_start
            refuse(problem, tensor=entry.name, expected=f"begin {position - data_start}", got=got)
        if strict and entry is not listed:
            refuse("the header does not list tensors in the order of their data", tensor=listed.name)
        position = entry.end
    if position != file_bytes:
        what = "the file is cut short" if position > file_bytes else "there are bytes after the last tensor"
        refuse(what, expected=f"{position} bytes", got=file_bytes)
    return Header(entries, strings, data_start, file_bytes)


def _compact(text: bytes) -> tuple[Any, Iterator[tuple[str, Any]]]:
    """Metadata (or _NONE) and the entries of a header as every writer writes it, one at a time.

    A header of 200,000 tensors is 16 MiB of text, and ten times as much as JSON objects. Read entry by entry
    it never becomes those: values are tuples of dtype, shape, begin and end. Raises _NotCompact, the iterator
    too, at whatever is not exactly of this form: then `_general` reads it, and finds what is wrong with it,
    if anything is.
    """
    count = text.count(b'":{"dtype":"')
    if count > MAX_TENSORS:
        raise ValueError(f"too many tensors, expected at most {MAX_TENSORS}, got {count}")
    begin = _METADATA.match(text, 0, _MOST_METADATA)
    if begin is None:
        if not text.startswith(b'{"'):
            raise _NotCompact
        return _NONE, _compact_entries(text, 1)
    metadata = parse_json(begin[1], limit_nesting=False)
    return metadata, _compact_entries(text, begin.end())


def _compact_entries(text: bytes, position: int) -> Iterator[tuple[str, Any]]:
    while text[position - 1 : position] != b"}":
        entry = _ENTRY.match(text, position)
        if entry is None:
            raise _NotCompact
        name, dtype, shape, first, end = entry.groups()
        tensor = name.decode("ascii")
        if tensor == METADATA_KEY:
            raise _NotCompact
        yield tensor, (*_dtype_and_shape(dtype, shape), int(first), int(end))
        position = entry.end()
    if text[position:].strip(b" "):
        raise _NotCompact


@lru_cache(maxsize=1024)
def _dtype_and_shape(dtype: bytes, shape: bytes | None) -> tuple[str, tuple[int, ...]]:
    """From their texts; equal ones share their memory, of which a model has few."""
    return dtype.decode("ascii"), tuple(int(dim) for dim in shape.split(b",")) if shape else ()


def _general(text: bytes, strict: bool) -> tuple[Any, Iterable[tuple[str, Any]]]:
    """As `_compact`, of any JSON; ValueError with the problem."""
    if strict and not text.startswith(b"{"):
        raise ValueError(f"expected '{{' first, got {text[:1].decode('latin-1')!a}")
    if strict and not text.rstrip(b" ").endswith(b"}"):
        raise ValueError(f"expected '}}' and spaces last, got {text[-1:].decode('latin-1')!a}")
    # Counted in the text, so that a header bomb is refused before it becomes objects: a tensor has one brace,
    # two brackets and at most rank + 4 commas; metadata may hold as many again in JSON texts of its own.
    most = MAX_GENERAL_TENSORS
    for character, limit in {b"{": 2 * most, b"[": 3 * most, b",": (MAX_RANK + 5) * most}.items():
        if text.count(character) > limit:
            raise ValueError(
                f"too many tensors, expected at most {most} in a header that is not compact JSON"
            )
    fields = parse_json(text, limit_nesting=False)
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object, got {type(fields).__name__}")
    return fields.pop(METADATA_KEY, _NONE), fields.items()


def _metadata(value: Any, refuse: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        refuse(f"{METADATA_KEY} is not an object", got=type(value).__name__)
    if len(value) > MAX_METADATA_ENTRIES:
        refuse(f"too many keys in {METADATA_KEY}", expected=f"at most {MAX_METADATA_ENTRIES}", got=len(value))
    for key, text in value.items():
        if not isinstance(text, str):
            refuse(f"{METADATA_KEY} {ascii(key)[:120]}", expected="a string", got=type(text).__name__)
        if len(text) > MAX_METADATA_VALUE_BYTES or len(key) > MAX_NAME_BYTES:
            limit = f"at most {MAX_METADATA_VALUE_BYTES} characters"
            refuse(f"{METADATA_KEY} {ascii(key)[:120]} is too long", expected=limit, got=len(text))
    return value


def _entry(tensor: str, value: Any, data_start: int, strict: bool) -> TensorEntry:
    """One checked entry; ValueError with the problem."""
    if not valid_name(tensor):
        expected = f"expected 1 to {MAX_NAME_BYTES} plain ASCII characters without '..'"
        raise ValueError(f"not a tensor name, {expected}")
    dtype, shape, begin, end = value if type(value) is tuple else _of_object(value, strict)
    size = _tensor_bytes(dtype, shape)
    if not 0 <= begin <= end < 1 << 62:
        raise ValueError(f"data_offsets out of range, got [{begin}, {end}]")
    if end - begin != size:
        raise ValueError(f"expected {size} bytes for {dtype} {list(shape)}, got {end - begin}")
    begin, end = data_start + begin, data_start + end
    if strict and begin % element_bytes(dtype):
        raise ValueError(f"misaligned, expected a multiple of {element_bytes(dtype)}, got {begin}")
    return TensorEntry(tensor, dtype, shape, begin, end)


def _of_object(value: Any, strict: bool) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, begin and end as an entry's object has them: of the right types, but not checked."""
    if type(value) is not dict:
        raise ValueError(f"expected an object, got {type(value).__name__}")
    if value.keys() != _FIELDS:
        _check_fields(value, strict)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if type(dtype) is not str:
        raise ValueError(f"expected dtype to be a string, got {type(dtype).__name__}")
    if type(shape) is not list or len(shape) > MAX_RANK or not _integers(shape):
        raise ValueError(f"expected shape to be a list of up to {MAX_RANK} integers, got {_short(shape)}")
    if type(offsets) is not list or len(offsets) != 2 or not _integers(offsets):
        raise ValueError(f"expected data_offsets to be two integers, got {_short(offsets)}")
    return dtype, tuple(shape), offsets[0], offsets[1]


_tensor_bytes = lru_cache(maxsize=1024)(tensor_bytes)


def _check_fields(value: dict[str, Any], strict: bool) -> None:
    """The fields of an entry are not just the three: unknown ones pass in source files only."""
    missing, unknown = _FIELDS - value.keys(), value.keys() - _FIELDS
    if missing:
        raise ValueError(f"no {min(missing)} in its entry")
    if strict:
        raise ValueError(f"unknown field {_short(min(unknown))} in its entry")
    for field in unknown:
        check_nesting(value[field])


def _integers(values: list[Any]) -> bool:
    return set(map(type, values)) <= {int}  # bool is a subclass, not the type


def _short(value: Any) -> str:
    return ascii(value)[:80]
