"""Mutators that know the formats: most of what they make is nearly right, so that it reaches the deep checks.

    container(seed, rng)   a .nf4 file: its tensors, constants, metadata, header text, sums or bytes changed
    source(seed, rng)      a safetensors file of a checkpoint: the same without sums and profile
    document(seed, rng)    a JSON text: index or config

Each takes a good file and a `random.Random`, and gives the bytes of a changed one. The same seed file and
random state give the same bytes.
"""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

import numpy as np

from nf4format.container import config_sha256
from nf4format.header import Header, TensorEntry
from nf4format.layout import QUANT_STATE
from nf4format.sums import CHUNK_BYTES, SUMS_NAME, encode_sums, sums_bytes, xxh3

RawTensor = tuple[str, list[Any], bytes]

_PAGE = 4096
_DTYPES = ["F32", "BF16", "F16", "F64", "U8", "I8", "I64", "BOOL", "F4", "F8_E4M3", "C64", "f32", "", "NF4"]
_NUMBERS = [
    0, 1, 2, 3, 7, 8, 16, 63, 64, 65, 255, 256, 4095, 4096, -1, -64, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 40,
    1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30,
]  # fmt: skip
_VALUES: list[Any] = [
    *_NUMBERS,
    0.0,
    -0.0,
    1.0,
    64.0,
    0.5,
    1e300,
    5e-324,
    True,
    False,
    None,
    "",
    "64",
    "nf4",
    [],
    {},
]
_FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 3.4e38, math.inf, -math.inf, math.nan, 2.0]
_NAMES = [
    "", "a", "a b", "../x", "/x", "x/../../y", "x\0y", "\u202ex", "__metadata__", "__file__/config.json",
    "__file__/../x", "__file__/tokenizer.json", "__pad__.0", "__pad__.7", "__nf4__.sums", "__nf4__.x",
    "x" * 256,
]  # fmt: skip
_PIECES = [
    b" ", b"\n", b"\t", b"0", b"1", b"-", b".", b"e9", b",", b":", b'"', b"\\", b"\\u0061", b"\\ud800", b"{}",
    b"[]",     b"{",
    b"}", b"[", b"]", b"null", b"true", b"NaN", b"Infinity", b"\0", b"\xff", b"\xef\xbb\xbf", b"/**/",
    b"1e999",     b"\xed\xa0\x80", b"[" * 70, b"9" * 40,
]  # fmt: skip


def container(seed: bytes, rng: random.Random) -> bytes:
    """A changed .nf4 file; about two thirds have sums that fit what was changed."""
    if rng.random() < 0.15:
        return _damaged(seed, rng)
    draft = _Draft(seed)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        (rng.choice(_EDITS) if draft.tensors else _metadata)(draft, rng)
    data = draft.encode(fresh_sums=rng.random() < 0.8, change=_text_change(rng))
    return _damaged(data, rng) if rng.random() < 0.1 else data


def source(seed: bytes, rng: random.Random) -> bytes:
    """A changed safetensors file."""
    if rng.random() < 0.15:
        return _damaged(seed, rng)
    draft = _Draft(seed)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        (rng.choice(_SOURCE_EDITS) if draft.tensors else _metadata)(draft, rng)
    draft.page = rng.choice([8, 8, 8, 1])
    data = draft.encode(fresh_sums=False, change=_text_change(rng))
    return _damaged(data, rng) if rng.random() < 0.15 else data


def document(seed: bytes, rng: random.Random) -> bytes:
    """A changed JSON text."""
    value = json.loads(seed)
    for _ in range(rng.choice([0, 1, 1, 2])):
        value = _changed_value(value, rng)
    text = json.dumps(value, indent=rng.choice([None, None, 1]), allow_nan=True).encode()
    for _ in range(rng.choice([0, 0, 1, 2])):
        text = _changed_text(text, rng)
    return text


class _Draft:
    """A file taken apart, with the offsets of its header to be made anew or overridden."""

    def __init__(self, data: bytes) -> None:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        self.metadata: Any = header.pop("__metadata__", {})
        self.tensors: list[tuple[str, RawTensor]] = []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            raw = data[8 + length + begin : 8 + length + end]
            self.tensors.append((name, (entry["dtype"], entry["shape"], raw)))
        self.page = _PAGE
        self.offsets: dict[int, list[Any]] = {}  # index of a tensor -> data_offsets to claim
        self.extra: dict[int, tuple[str, Any]] = {}  # index of a tensor -> one more field

    def names(self) -> list[str]:
        return [name for name, _ in self.tensors]

    def put(self, index: int, *, name: str | None = None, tensor: RawTensor | None = None) -> None:
        old_name, old = self.tensors[index]
        self.tensors[index] = (old_name if name is None else name, old if tensor is None else tensor)

    def encode(self, *, fresh_sums: bool, change: Any = None) -> bytes:
        if fresh_sums and self.names()[-1:] == [SUMS_NAME]:
            covered = sum(len(raw) for _, (_, _, raw) in self.tensors[:-1])
            files = sum(name.startswith("__file__/") for name in self.names())
            size = sums_bytes(covered, files)
            self.tensors[-1] = (SUMS_NAME, ("U8", [size], bytes(size)))
        parts = (
            [f'"__metadata__":{json.dumps(self.metadata, separators=(",", ":"))}']
            if self.metadata is not None
            else []
        )
        position = 0
        for index, (name, (dtype, shape, raw)) in enumerate(self.tensors):
            fields: dict[str, Any] = {"dtype": dtype, "shape": shape}
            fields["data_offsets"] = self.offsets.get(index, [position, position + len(raw)])
            if index in self.extra:
                key, value = self.extra[index]
                fields[key] = value
            parts.append(f"{json.dumps(name)}:{json.dumps(fields, separators=(',', ':'))}")
            position += len(raw)
        text = ("{" + ",".join(parts) + "}").encode()
        if change is not None:
            text = change(text)
        text += b" " * (-(8 + len(text)) % self.page)
        head = struct.pack("<Q", len(text)) + text
        data = [raw for _, (_, _, raw) in self.tensors]
        if fresh_sums and self.names()[-1:] == [SUMS_NAME]:
            data[-1] = _sums(head, self.names(), data)
        return head + b"".join(data)


def _sums(head: bytes, names: list[str], data: list[bytes]) -> bytes:
    """The table for these tensors, as the format has it."""
    entries, position = {}, len(head)
    for index, (name, raw) in enumerate(zip(names, data, strict=True)):
        key = name if index == len(names) - 1 or name.startswith("__file__/") else str(index)
        entries[f"{key}"] = TensorEntry(name, "U8", (len(raw),), position, position + len(raw))
        position += len(raw)
    region = b"".join(data[:-1])
    numbers = [xxh3(region[at : at + CHUNK_BYTES]) for at in range(0, len(region), CHUNK_BYTES)]
    files = [entry for entry in entries.values() if entry.name.startswith("__file__/")]
    numbers += [xxh3(region[entry.begin - len(head) : entry.end - len(head)]) for entry in files]
    try:
        return encode_sums(Header(entries, {}, len(head), position), head, numbers)
    except ValueError:  # two files of one name: any table will do
        return data[-1]


# --- changes of tensors


def _rename(draft: _Draft, rng: random.Random) -> None:
    index = rng.randrange(len(draft.tensors))
    name = draft.tensors[index][0]
    names = draft.names()
    choices = [*_NAMES, rng.choice(names), name + ".absmax", name + QUANT_STATE, name.upper(), name[:-1]]
    draft.put(index, name=rng.choice(choices))


def _drop(draft: _Draft, rng: random.Random) -> None:
    if len(draft.tensors) > 1:
        del draft.tensors[rng.randrange(len(draft.tensors))]


def _double(draft: _Draft, rng: random.Random) -> None:
    index = rng.randrange(len(draft.tensors))
    name, tensor = draft.tensors[index]
    draft.tensors.insert(rng.randrange(len(draft.tensors)), (rng.choice([name, name + "2"]), tensor))


def _swap(draft: _Draft, rng: random.Random) -> None:
    one, other = rng.randrange(len(draft.tensors)), rng.randrange(len(draft.tensors))
    draft.tensors[one], draft.tensors[other] = draft.tensors[other], draft.tensors[one]


def _resize(draft: _Draft, rng: random.Random) -> None:
    """Other bytes, with or without a shape to fit."""
    index = rng.randrange(len(draft.tensors))
    dtype, shape, raw = draft.tensors[index][1]
    raw = raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.5 else raw + bytes(rng.choice([1, 4, 64]))
    if shape and rng.random() < 0.7:
        shape = [len(raw)] if dtype == "U8" and len(shape) == 1 else [len(raw) // 4, *shape[1:]]
    draft.put(index, tensor=(dtype, shape, raw))


def _retype(draft: _Draft, rng: random.Random) -> None:
    index = rng.randrange(len(draft.tensors))
    _, shape, raw = draft.tensors[index][1]
    draft.put(index, tensor=(rng.choice(_DTYPES), shape, raw))


def _reshape(draft: _Draft, rng: random.Random) -> None:
    index = rng.randrange(len(draft.tensors))
    dtype, shape, raw = draft.tensors[index][1]
    shape = list(shape)
    change = rng.randrange(4)
    if change == 0 and shape:
        shape[rng.randrange(len(shape))] = rng.choice(_VALUES)
    elif change == 1:
        shape = [*shape, 1]
    elif change == 2:
        shape = [1] * rng.choice([1, 8, 9, 100]) + shape
    else:
        rng.shuffle(shape)
    draft.put(index, tensor=(dtype, shape, raw))


def _offset(draft: _Draft, rng: random.Random) -> None:
    index = rng.randrange(len(draft.tensors))
    begin = sum(len(raw) for _, (_, _, raw) in draft.tensors[:index])
    claimed: list[Any] = [begin, begin + len(draft.tensors[index][1][2])]
    at = rng.randrange(2)
    claimed[at] = rng.choice([rng.choice(_VALUES), claimed[at] + rng.choice([-64, -1, 1, 64])])
    draft.offsets[index] = (
        claimed if rng.random() < 0.9 else rng.choice([[], [begin], [*claimed, 0], None, "0"])
    )


def _field(draft: _Draft, rng: random.Random) -> None:
    draft.extra[rng.randrange(len(draft.tensors))] = (
        rng.choice(["x", "shape", "Dtype"]),
        rng.choice(_VALUES),
    )


def _content(draft: _Draft, rng: random.Random) -> None:
    index = rng.randrange(len(draft.tensors))
    dtype, shape, raw = draft.tensors[index][1]
    if raw:
        changed = bytearray(raw)
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        draft.put(index, tensor=(dtype, shape, bytes(changed)))


def _metadata(draft: _Draft, rng: random.Random) -> None:
    if not isinstance(draft.metadata, dict) or rng.random() < 0.05:
        draft.metadata = rng.choice([None, {}, [], "x", {"format": "pt"}])
        return
    key = rng.choice([*draft.metadata, "nf4.new", ""])
    change = rng.randrange(4)
    if change == 0:
        draft.metadata.pop(key, None)
    elif change == 1:
        draft.metadata[key] = rng.choice(["", "0", "1", "2", "64", "{}", "\ud800", "\x1b[2J", "x" * 999])
    elif change == 2:
        draft.metadata[key] = rng.choice(_VALUES)
    else:
        items = list(draft.metadata.items())
        rng.shuffle(items)
        draft.metadata = dict(items)


# --- changes of what only .nf4 files have


def _float(draft: _Draft, rng: random.Random) -> None:
    """A constant of a packed weight: a scale, a level, an entry of a map."""
    indices = [
        i for i, (name, tensor) in enumerate(draft.tensors) if tensor[0] == "F32" and len(tensor[2]) >= 4
    ]
    if indices:
        index = rng.choice(indices)
        dtype, shape, raw = draft.tensors[index][1]
        values = np.frombuffer(raw[: len(raw) // 4 * 4], np.float32).copy()
        values[rng.randrange(values.size)] = rng.choice(_FLOATS)
        draft.put(index, tensor=(dtype, shape, values.tobytes()))


def _embedded_json(draft: _Draft, rng: random.Random) -> None:
    """A quant_state, config.json or tokenizer file, changed as JSON; honest about config.json's hash."""
    indices = [
        i for i, (name, tensor) in enumerate(draft.tensors)
        if name.endswith(QUANT_STATE) or (name.startswith("__file__/") and tensor[2][:1] == b"{")
    ]  # fmt: skip
    if not indices:
        return
    index = rng.choice(indices)
    name, (dtype, _, raw) = draft.tensors[index]
    try:
        text = document(raw, rng)
    except ValueError:  # changed before
        return
    if name.endswith(QUANT_STATE) and rng.random() < 0.8:
        text = text.ljust(len(raw), b" ")
    draft.put(index, tensor=(dtype, [len(text)], text))
    if name == "__file__/config.json" and isinstance(draft.metadata, dict) and rng.random() < 0.9:
        draft.metadata["nf4.config_sha256"] = config_sha256(text)


def _aliases(draft: _Draft, rng: random.Random) -> None:
    if isinstance(draft.metadata, dict):
        names = [*draft.names(), *_NAMES, "alias"]
        aliases = {rng.choice(names): rng.choice([rng.choice(names), rng.choice(_VALUES)]) for _ in range(2)}
        draft.metadata["nf4.aliases"] = json.dumps(aliases)


_SOURCE_EDITS = [
    _rename,
    _drop,
    _double,
    _swap,
    _resize,
    _retype,
    _reshape,
    _offset,
    _field,
    _content,
    _metadata,
]
_EDITS = [*_SOURCE_EDITS, _float, _float, _embedded_json, _embedded_json, _embedded_json, _aliases, _content]


# --- changes of texts and bytes


def _text_change(rng: random.Random) -> Any:
    if rng.random() < 0.8:
        return None
    return lambda text: _changed_text(text, rng)


def _changed_text(text: bytes, rng: random.Random) -> bytes:
    """A JSON text with a piece put in, taken out, doubled or exchanged."""
    at = rng.randrange(len(text) + 1)
    change = rng.randrange(5)
    if change == 0:
        return text[:at] + rng.choice(_PIECES) + text[at:]
    if change == 1:
        return text[:at] + text[at + rng.randrange(1, 9) :]
    if change == 2:
        return text[:at] + text[at : at + rng.randrange(1, 60)] + text[at:]
    if change == 3:
        piece = rng.choice(_PIECES)
        return text[:at] + piece + text[at + len(piece) :]
    number = str(rng.choice(_NUMBERS)).encode()
    digits = [i for i, byte in enumerate(text) if 0x30 <= byte <= 0x39]
    if not digits:
        return text
    at = rng.choice(digits)
    return text[:at] + number + text[at + 1 :]


def _damaged(data: bytes, rng: random.Random) -> bytes:  # noqa: PLR0911 - one for each kind
    """Bytes as disks and networks hurt them, and lies about the header's length."""
    change = rng.randrange(7)
    at = rng.randrange(len(data))
    if change == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if change == 1:
        return data[:at]
    if change == 2:
        return data + rng.choice([b"\0", bytes(4096), b"PK\x03\x04", data])
    if change == 3:
        end = at + rng.randrange(1, 5000)
        return data[:at] + bytes(len(data[at:end])) + data[end:]
    if change == 4:
        other = rng.randrange(len(data))
        size = rng.randrange(1, 65)
        return data[:at] + data[other : other + size] + data[at + size :]
    if change == 5:
        return data[:at] + data[at + rng.randrange(1, 65) :]
    (length,) = struct.unpack_from("<Q", data.ljust(8, b"\0"))
    lie = rng.choice([0, 1, length - 1, length + 1, length + 4096, *(abs(n) for n in _NUMBERS)])
    return struct.pack("<Q", lie & (1 << 64) - 1) + data[8:]


def _changed_value(value: Any, rng: random.Random) -> Any:  # noqa: PLR0911 - one for each kind
    """A JSON value with one node changed: replaced, removed, renamed or wrapped."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        change = rng.randrange(6)
        if change < 3:
            return {**value, key: _changed_value(value[key], rng)}
        if change == 3:
            return {name: item for name, item in value.items() if name != key}
        name = rng.choice([*_NAMES, *value, "auto_map", "quantization_config", "../" + key])
        return (
            {**value, name: value[key]}
            if change == 4
            else {name if k == key else k: v for k, v in value.items()}
        )
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], _changed_value(value[at], rng), *value[at + 1 :]]
    if isinstance(value, str) and rng.random() < 0.6:
        return rng.choice(
            [*_NAMES, value + "\0", "../" + value, "/" + value, value.upper(), value[1:], "\\" + value]
        )
    if rng.random() < 0.05:
        for _ in range(rng.choice([3, 65, 150])):
            value = [value]
        return value
    return rng.choice([*_VALUES, math.nan, math.inf, 1e309])
