"""JSON without Python's leniencies: no duplicate keys, NaN, bad UTF-8, lone surrogates or deep nesting."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

MAX_NESTING: Final = 64
MAX_CONFIG_VALUES: Final = 500_000  # in a configuration; real ones have thousands
MAX_DIGITS: Final = 1000  # tokenizer configs really hold 10^30; many more digits cost quadratic time
_LONG_DIGITS: Final = b"0" * MAX_DIGITS
_DIGITS_AS_ZERO: Final = bytes(0x30 if 0x30 <= byte <= 0x39 else 0x20 for byte in range(256))

# One escape sequence: simple, a surrogate pair, a plain \uXXXX, or (the group) half a pair or malformed.
_ESCAPE: Final = re.compile(
    r"\\(?:[^u]|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|(u))",
    re.DOTALL,
)


def parse_json(
    data: bytes, *, limit_nesting: bool = True, allow_infinity: bool = False, most_values: int | None = None
) -> Any:
    """The value of a JSON text (RFC 8259, UTF-8, no byte order mark).

    Args:
        limit_nesting: refuse more than MAX_NESTING levels. Without it the interpreter's recursion limit
            is the bound, and the caller checks the shape of what it gets.
        allow_infinity: take Infinity and -Infinity, which Python writes and config.json of some state-space
            models holds (time_step_limit). NaN is refused all the same: no setting can mean it.
        most_values: refuse texts with more commas, colons and brackets, before they become objects, which may
            take thirty times the memory of the text.

    Raises:
        ValueError: with a short reason; the caller adds the file's name.
    """
    if most_values is not None and sum(data.count(mark) for mark in b",:[{") > most_values:
        raise ValueError(f"more than {most_values} commas, colons and brackets")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    if _LONG_DIGITS in data.translate(_DIGITS_AS_ZERO):
        raise ValueError(f"a number of {MAX_DIGITS} digits or more")
    if "\\u" in text and any(match.group(1) for match in _ESCAPE.finditer(text)):
        raise ValueError("not JSON: half a surrogate pair in a \\u escape")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_infinity if allow_infinity else _no_constant,
            parse_int=_signed_zero if "-0" in text else None,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_NESTING} levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at character {error.pos}: {error.msg.lower()}") from None
    if limit_nesting:
        check_nesting(value)
    return value


def parse_object(
    data: bytes, *, allow_infinity: bool = False, most_values: int | None = None
) -> dict[str, Any]:
    """`parse_json` of a text that must be an object."""
    value = parse_json(data, allow_infinity=allow_infinity, most_values=most_values)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def check_nesting(value: Any) -> None:
    """Raise ValueError where lists and objects are nested deeper than MAX_NESTING; without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_NESTING):
        if not level:
            return
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    if level:
        raise ValueError(f"nested deeper than {MAX_NESTING} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {ascii(key)[:120]} appears twice in one object")
            seen.add(key)
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _infinity(text: str) -> float:
    return _no_constant(text) if text == "NaN" else float(text)


def _signed_zero(text: str) -> int | float:
    """-0 as other parsers have it: a float, as no unsigned number is -0."""
    return -0.0 if text == "-0" else int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:40]} is out of range")
    return value
