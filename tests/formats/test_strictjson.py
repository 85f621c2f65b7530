"""JSON as strict as other parsers have it: Rust's, through safetensors' reader, is the oracle."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors

from nf4format.strictjson import MAX_NESTING, parse_json, parse_object

# What JSON test suites call invalid and lenient parsers let through; as a value.
INVALID = [
    b"'x'",
    b'"\\x41"',
    b'"\\u12"',
    b'"\\"',
    b'"\x1f"',
    b'"a" "b"',
    b'"\\ud83d"',
    b'"\\ud83d\\u0041"',
    b'"\\udc00\\ud800"',
    b'"\\\\\\ud800"',
    b'"\xed\xa0\x80"',
    b'"\xf4\x90\x80\x80"',
    b'"\xc0\xaf"',
    b'"',
    b"",
    b"tru",
    b"+1",
    b".5",
    b"0x10",
    b"01",
    b"1.",
    b"1e",
    b"-",
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"[1,]",
    b'{"a":1,}',
    b"{a:1}",
    b"[1]]",
    b"/**/1",
    b"1\0",
    b"\xef\xbb\xbf1",
]


@pytest.mark.parametrize("value", INVALID)
def test_invalid(value: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(value)
    text = b'{"__metadata__":{"x":' + value + b"}}"
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize(
    "value",
    [
        b' {"a": [1, -2, 0.5, 1e3, true, false, null, "x"], "b": {}} ',
        b'"\\ud83d\\ude00 \\\\ud800 \\u00e9 \xc3\xa9 \\" \\/ \\b"',
        b'"\\u0000"',
        b"1000000000000000019884624838656",
        b"[" * MAX_NESTING + b"]" * MAX_NESTING,
    ],
)
def test_valid(value: bytes) -> None:
    assert parse_json(value) == json.loads(value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b'{"a": 1, "b": 2, "\\u0061": 1}', "key 'a' appears twice in one object"),
        (b'[{"a": {"x": 1, "x": 1}}]', "key 'x' appears twice"),
        (b"1e999", "number 1e999 is out of range"),
        (b"9" * 1000, "a number of 1000 digits or more"),
        (b"0." + b"1" * 1000, "a number of 1000 digits"),
        (b"[" * (MAX_NESTING + 1) + b"]" * (MAX_NESTING + 1), "nested deeper than 64"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper than 64"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (b"[1 2]", "not JSON at character 3"),
        (b'"\\ud800"', "half a surrogate pair"),
    ],
)
def test_reasons(value: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(value)


def test_minus_zero_is_no_integer() -> None:
    """Other parsers read it as a float; an offset of -0 must not pass here and fail there."""
    assert isinstance(parse_json(b'{"a": -0}')["a"], float)
    assert parse_json(b'[-0.5, -10, "-0"]') == [-0.5, -10, "-0"]


def test_parse_object() -> None:
    assert parse_object(b'{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        parse_object(b"[]")


def test_infinity_only_where_allowed() -> None:
    text = b'{"time_step_limit": [0.0, Infinity, -Infinity]}'
    assert parse_object(text, allow_infinity=True) == {"time_step_limit": [0.0, float("inf"), float("-inf")]}
    with pytest.raises(ValueError, match="Infinity is not JSON"):
        parse_object(text)
    with pytest.raises(ValueError, match="NaN is not JSON"):
        parse_object(b'{"a": NaN}', allow_infinity=True)
