"""The header's JSON against its grammar: texts that must be refused, and texts that no reader agrees on.

Cases are made from RFC 8259, production by production: each is one rule broken, or one that the RFC leaves
open. They stand as a whole header, as a value of metadata, and as a value of an unknown field of an entry.
The oracle is the grammar, and safetensors' reader: what it refuses, we refuse.
"""

from __future__ import annotations

import json
import os
import struct

import pytest
import safetensors
from bad_inputs.headers import A, B

from nf4format.errors import FormatError
from nf4format.header import read_header
from nf4format.strictjson import parse_json

# By production. A list is of values that break it.
BROKEN: dict[str, list[bytes]] = {
    "literals": [
        b"tru", b"True", b"TRUE", b"nul", b"nulll", b"fals e", b"undefined", b"None", b"N", b"t", b"nan",
        b"NaN",
        b"-NaN", b"Infinity", b"-Infinity", b"+Infinity", b"inf", b"-inf", b"1#INF",
    ],
    "integers": [
        b"+1", b"01", b"-01", b"00", b"-", b"--1", b"- 1", b"1 2", b"1_000", b"0x1F", b"0b1", b"0o7",
        b"1L", b"\xc2\xb2",
        b"\xef\xbc\x91", b"1,000", b"'1'", b"1a", b"-a", b"+", b"++1", b"1-", b"2 .5",
    ],
    "fractions": [
        b".5", b"1.", b"1..5", b"1.5.", b"-.5", b"1.e1", b".e1", b"1.5.5", b"1,5", b"0.1.2", b".", b"-.",
    ],
    "exponents": [
        b"1e", b"1e+", b"1e-", b"1E", b"1ee1", b"1e1.5", b"e1", b"1e 1", b"1e++1", b"0e", b"1.0e",
        b"1ea",
    ],
    "strings": [
        b'"', b'"a', b"a", b"'a'", b'"a\'', b'"\n"', b'"\r"', b'"\t"', b'"\0"', b'"\x1f"', b'"\\"',
        b'"\\a"', b'"\\x41"',
        b'"\\u"', b'"\\u1"', b'"\\u12"', b'"\\u123"', b'"\\u123g"', b'"\\U0041"', b'"\\ "', b'"\\\n"',
        b'"\\0"', b'"\\\'"',
        b'"a""b"', b'"a" "b"', b'"a"b', b"\xe2\x80\x9ca\xe2\x80\x9d", b"`a`", b'"\\u{41}"', b'"\\u-123"',
        b'"\\u 123"',
    ],
    "surrogates": [
        b'"\\ud800"', b'"\\udc00"', b'"\\ud800a"', b'"\\ud800\\n"', b'"\\ud800\\u0041"',
        b'"\\udc00\\ud800"',
        b'"\\ud800\\ud800"', b'"\\ud800\\ud800\\udc00"', b'"a\\udbff"', b'"\\\\\\ud800"', b'"\\uDFFF"',
        b'"\\ud800\\"',
    ],
    "UTF-8": [
        b'"\xff"', b'"\xfe"', b'"\x80"', b'"\xbf"', b'"\xc0\xaf"', b'"\xc1\x81"', b'"\xe0\x80\xaf"',
        b'"\xf0\x80\x80\xaf"',
        b'"\xed\xa0\x80"', b'"\xed\xbf\xbf"', b'"\xf4\x90\x80\x80"', b'"\xf8\x88\x80\x80\x80"',
        b'"\xe2\x82"', b'"\xc3"',
        b'"\xe9"', b'"\xfc\x80\x80\x80\x80\x80"', b"\xff", b"\xe9",
    ],
    "arrays": [
        b"[", b"]", b"[1", b"[1,", b"[1,]", b"[,1]", b"[,]", b"[1,,2]", b"[1 2]", b"[1;2]", b"[1]]",
        b"[[1]", b"[1}", b"(1)",
        b"[1:2]", b"[a]", b"[1,\n", b"[\"a\",", b"[-]", b"[1] x", b"[1] []", b"[...]", b"[1,..]", b"<1>",
    ],
    "objects": [
        b"{", b"}", b"{1:1}", b"{a:1}", b"{'a':1}", b'{"a"}', b'{"a":}', b'{"a"::1}', b'{"a" 1}',
        b'{"a",1}', b'{"a":1,}',
        b'{,"a":1}', b'{"a":1,,"b":2}', b'{"a":1 "b":2}', b'{"a":1;"b":2}', b'{"a":1', b'{"a":1]',
        b'{"a":1}}', b'{"a":1}{}',
        b'{null:1}', b"{true:1}", b"{[1]:1}", b'{"a":"b"', b'{"a":1,"b"', b'{"a":1,"b":', b'{"a"=1}',
        b"{:1}", b'{"a":1 //\n}',
        b'{"a":1 /* */}', b'{"a":1}#', b"{...}", b'{"\\ud800":1}', b'{"\xff":1}',
    ],
    "spaces": [
        b"\x0c1", b"\x0b1", b"\xc2\xa01", b"\xe2\x80\x8b1", b"\xe2\x81\xa01", b"\xef\xbb\xbf1", b"1\0",
        b"1\x1a", b"\x001",
    ],
    "comments": [b"/**/1", b"1/**/", b"//\n1", b"1//", b"#\n1", b"1;", b"/1/", b"<!-- -->1"],
    "nothing": [b"", b" ", b"\n"],
    "duplicate keys": [b'{"a":1,"a":1}', b'{"a":1,"\\u0061":2}', b'{"":1,"":1}', b'[{"a":{"b":1,"b":1}}]'],
    "depth": [b"[" * 65 + b"]" * 65, b'{"a":' * 65 + b"1" + b"}" * 65, b"[" * 100_000, b'[{"a":' * 50_000],
    "range": [
        b"1e309", b"-1e309", b"1" + b"0" * 400 + b".0", b"1e99999999999", b"9" * 1000,
        b"0." + b"9" * 1000,
    ],
}  # fmt: skip

GOOD = [
    b"0", b"-0", b"-1", b"0.5", b"1e5", b"1E+5", b"1e-5", b"-0.0", b"123456789012345678901234567890",
    b"1e-400", b'""',
    b'"\\"\\\\\\/\\b\\f\\n\\r\\t"', b'"\\u0000"', b'"\\ud83d\\ude00"', b'"\xf0\x9f\x98\x80"', b'"\x7f"',
    b'"\\uFFFF"', b'"/"',
    b"true", b"false", b"null", b"[]", b"{}", b"[[]]", b'{"":""}', b' [ 1 , 2 ] ', b"\t\n\r 1",
    b'{"a":{"a":1}}',
    b"[" * 64 + b"]" * 64, b'"' + b"x" * 10_000 + b'"',
]  # fmt: skip
CASES = [(rule, value) for rule, values in BROKEN.items() for value in values]


def accepted_by_safetensors(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


def accepted(content: bytes, *, strict: bool) -> bool:
    fd = os.memfd_create("x")
    try:
        os.pwrite(fd, content, 0)
        read_header(fd, strict=strict, name="x")
    except FormatError as error:
        assert str(error).isprintable()
        return False
    finally:
        os.close(fd)
    return True


def placed(value: bytes) -> dict[str, bytes]:
    """Files with the value as the header, in the metadata, and as a field of an entry."""
    a, b = (json.dumps(entry).encode() for entry in (A, B))
    texts = {
        "header": value,
        "metadata": b'{"__metadata__":{"x":' + value + b'},"a":' + a + b',"b":' + b + b"}",
        "field": b'{"a":' + a + b',"b":' + b[:-1] + b',"x":' + value + b"}}",
        "entry": b'{"a":' + a + b',"b":' + b + b',"x":' + value + b"}",
    }
    return {place: struct.pack("<Q", len(text)) + text + bytes(19) for place, text in texts.items()}


@pytest.mark.parametrize("rule", BROKEN)
def test_what_breaks_the_grammar_is_refused(rule: str) -> None:
    for value in BROKEN[rule]:
        with pytest.raises(ValueError):
            parse_json(value)
        for place, content in placed(value).items():
            for strict in (True, False):
                assert not accepted(content, strict=strict), (place, value[:80])


def test_no_laxer_than_safetensors() -> None:
    """Of all cases, good ones too, in every place."""
    both = 0
    for value in [*(value for _, value in CASES), *GOOD]:
        for place, content in placed(value).items():
            if accepted(content, strict=False):
                assert accepted_by_safetensors(content), (place, value[:80])
                both += 1
    assert both > 20
    assert len(CASES) > 200


@pytest.mark.parametrize("value", GOOD)
def test_what_follows_the_grammar_is_accepted(value: bytes) -> None:
    assert parse_json(value) == json.loads(value)
    # As a field that is ignored; safetensors' own reader has no numbers as large, nor such depths.
    content = placed(value)["field"]
    if accepted_by_safetensors(content) and value[:2] != b"[[":
        assert accepted(content, strict=False)
