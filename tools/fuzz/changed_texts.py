"""JSON texts, their values, and bytes of any kind, with something changed."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

NUMBERS = [
    0, 1, 2, 3, 7, 8, 16, 63, 64, 65, 255, 256, 4095, 4096, -1, -64, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 40,
    1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30,
]  # fmt: skip
VALUES: list[Any] = [
    *NUMBERS, 0.0, -0.0, 1.0, 64.0, 0.5, 1e300, 5e-324, True, False, None, "", "64", "nf4", [], {},
]  # fmt: skip
NAMES = [
    "", "a", "a b", "../x", "/x", "x/../../y", "x\0y", "\u202ex", "__metadata__", "__file__/config.json",
    "__file__/../x", "__file__/tokenizer.json", "__pad__.0", "__pad__.7", "__nf4__.sums", "__nf4__.x",
    "x" * 256,
]  # fmt: skip
_PIECES = [
    b" ", b"\n", b"\t", b"0", b"1", b"-", b".", b"e9", b",", b":", b'"', b"\\", b"\\u0061", b"\\ud800", b"{}",
    b"[]", b"{", b"}", b"[", b"]", b"null", b"true", b"NaN", b"Infinity", b"\0", b"\xff", b"\xef\xbb\xbf",
    b"/**/", b"1e999", b"\xed\xa0\x80", b"[" * 70, b"9" * 40,
]  # fmt: skip


def document(seed: bytes, rng: random.Random) -> bytes:
    """A changed JSON text."""
    value = json.loads(seed)
    for _ in range(rng.choice([0, 1, 1, 2])):
        value = _changed_value(value, rng)
    text = json.dumps(value, indent=rng.choice([None, None, 1]), allow_nan=True).encode()
    for _ in range(rng.choice([0, 0, 1, 2])):
        text = changed_text(text, rng)
    return text


def text_change(rng: random.Random) -> Callable[[bytes], bytes] | None:
    """What may happen to a header's text; mostly nothing."""
    if rng.random() < 0.8:
        return None
    return lambda text: changed_text(text, rng)


def changed_text(text: bytes, rng: random.Random) -> bytes:
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
    number = str(rng.choice(NUMBERS)).encode()
    digits = [i for i, byte in enumerate(text) if 0x30 <= byte <= 0x39]
    if not digits:
        return text
    at = rng.choice(digits)
    return text[:at] + number + text[at + 1 :]


def _changed_value(value: Any, rng: random.Random) -> Any:  # noqa: PLR0911 - one for each kind
    """A JSON value with one node changed: replaced, removed, renamed or wrapped."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        change = rng.randrange(6)
        if change < 3:
            return {**value, key: _changed_value(value[key], rng)}
        if change == 3:
            return {name: item for name, item in value.items() if name != key}
        name = rng.choice([*NAMES, *value, "auto_map", "quantization_config", "../" + key])
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
            [*NAMES, value + "\0", "../" + value, "/" + value, value.upper(), value[1:], "\\" + value]
        )
    if rng.random() < 0.05:
        for _ in range(rng.choice([3, 65, 150])):
            value = [value]
        return value
    return rng.choice([*VALUES, math.nan, math.inf, 1e309])


def damaged(data: bytes, rng: random.Random) -> bytes:  # noqa: PLR0911 - one for each kind
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
    lie = rng.choice([0, 1, length - 1, length + 1, length + 4096, *(abs(n) for n in NUMBERS)])
    return struct.pack("<Q", lie & (1 << 64) - 1) + data[8:]
