"""Headers of tensor files: JSON text, entries, metadata; refused in any file, or in a .nf4 file only."""

from __future__ import annotations

import json
from typing import Any

from nf4format.header import MAX_DIM

META = {"format": "pt"}
A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "U8", "shape": [3], "data_offsets": [16, 19]}
GOOD = {"__metadata__": META, "a": A, "b": B}
DATA = bytes(range(19))


def text(header: Any) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def with_a(**changes: Any) -> bytes:
    return text({**GOOD, "a": {**A, **changes}})


# id -> (header text, what the message must say); refused whatever the mode.
REFUSED: dict[str, tuple[bytes, str]] = {
    "array": (b"[]", "not a JSON object|'{' first"),
    "string": (b'""', "not a JSON object|'{' first"),
    "number": (b"12", "not a JSON object|'{' first"),
    "null": (b"null", "not a JSON object|'{' first"),
    "two objects": (text(GOOD) + b"{}", "not JSON"),
    "trailing comma": (text(GOOD)[:-1] + b",}", "not JSON"),
    "comment": (b"/**/" + text(GOOD), "'{'|not JSON"),
    "byte order mark": (b"\xef\xbb\xbf" + text(GOOD), "'{'|not JSON"),
    "NUL padding": (text(GOOD) + b"\0\0", "'}'|not JSON"),
    "UTF-16": (text(GOOD).decode().encode("utf-16-le"), "not JSON|'}'"),
    "invalid UTF-8": (text(GOOD).replace(b'"b"', b'"\xff"'), "not UTF-8"),
    "surrogate, raw": (text(GOOD).replace(b'"pt"', b'"\xed\xa0\x80"'), "not UTF-8"),
    "surrogate, escaped": (text(GOOD).replace(b'"pt"', b'"\\ud800"'), "surrogate"),
    "surrogate, low first": (text(GOOD).replace(b'"pt"', b'"\\udc00\\ud800"'), "surrogate"),
    "surrogate behind a backslash pair": (text(GOOD).replace(b'"pt"', b'"\\\\\\ud800"'), "surrogate"),
    "control character": (text(GOOD).replace(b'"pt"', b'"p\tt"'), "not JSON"),
    "name empty": (text({**GOOD, "": {**B, "data_offsets": [19, 19], "shape": [0]}}), "not a tensor name"),
    "name with NUL": (text(GOOD).replace(b'"b"', b'"b\\u0000c"'), "not a tensor name"),
    "name as path": (text(GOOD).replace(b'"b"', b'"../../etc/passwd"'), "not a tensor name"),
    "name absolute": (text(GOOD).replace(b'"b"', b'"/etc/passwd"'), "not a tensor name"),
    "name of 1 MB": (text(GOOD).replace(b'"b"', b'"' + b"x" * 1_000_000 + b'"'), "not a tensor name"),
    "name of 256": (text(GOOD).replace(b'"b"', b'"' + b"x" * 256 + b'"'), "not a tensor name"),
    "name right to left": (text(GOOD).replace(b'"b"', b'"\\u202eb"'), "not a tensor name"),
    "name with newline": (text(GOOD).replace(b'"b"', b'"b\\n"'), "not a tensor name"),
    "duplicate name, same range": (text(GOOD)[:-1] + b',"b":' + text(B) + b"}", "'b' appears twice"),
    "duplicate name, escaped": (text(GOOD)[:-1] + b',"\\u0062":' + text(B) + b"}", "'b' appears twice"),
    "duplicate name, other range": (
        text(GOOD)[:-1] + b',"a":' + text({**B, "data_offsets": [19, 22]}) + b"}",
        "'a' appears twice",
    ),
    "duplicate field": (text(GOOD).replace(b'"dtype":"U8"', b'"dtype":"U8","dtype":"I8"'), "'dtype' appears"),
    "duplicate __metadata__": (text(GOOD)[:-1] + b',"__metadata__":{}}', "'__metadata__' appears twice"),
    "duplicate metadata key": (
        text(GOOD).replace(b'"format":', b'"format":"x","format":'),
        "'format' appears",
    ),
    "metadata number": (text({**GOOD, "__metadata__": {"x": 1}}), "expected a string, got int"),
    "metadata nested": (text({**GOOD, "__metadata__": {"x": {}}}), "expected a string, got dict"),
    "metadata null": (text({**GOOD, "__metadata__": None}), "__metadata__ is not an object"),
    "metadata list": (text({**GOOD, "__metadata__": []}), "__metadata__ is not an object"),
    "metadata of 10 MB": (text({**GOOD, "__metadata__": {"x": "y" * 10_000_000}}), "too long"),
    "metadata of many keys": (text({**GOOD, "__metadata__": {str(i): "" for i in range(2000)}}), "too many"),
    "entry not an object": (text({**GOOD, "b": 3}), "expected an object, got int"),
    "entry without dtype": (text({**GOOD, "b": {"shape": [3], "data_offsets": [16, 19]}}), "no dtype"),
    "offsets negative": (with_a(data_offsets=[-16, 0]), "out of range"),
    "offset minus zero": (text(GOOD).replace(b"[0,16]", b"[-0,16]"), "two integers"),
    "offsets float": (with_a(data_offsets=[0.0, 16.0]), "two integers"),
    "offset exponent": (text(GOOD).replace(b"[0,16]", b"[0,16e0]"), "two integers"),
    "offset above u64": (with_a(data_offsets=[0, 1 << 64]), "out of range"),
    "offset near u64": (with_a(data_offsets=[(1 << 64) - 16, (1 << 64) - 1]), "out of range"),
    "offset of 10^5 digits": (text(GOOD).replace(b"[0,16]", b"[0,1" + b"0" * 100_000 + b"]"), "digits"),
    "offsets bool": (with_a(data_offsets=[False, 16]), "two integers"),
    "three offsets": (with_a(data_offsets=[0, 16, 16]), "two integers"),
    "end before begin": (with_a(data_offsets=[16, 0]), "out of range"),
    "hole": (text({**GOOD, "b": {**B, "data_offsets": [17, 20]}}), "leaves a gap"),
    "hole at the start": (
        text({**GOOD, "a": {**A, "data_offsets": [4, 20]}, "b": {**B, "data_offsets": [20, 23]}}),
        "leaves a gap",
    ),
    "overlap": (text({**GOOD, "b": {**B, "data_offsets": [15, 18]}}), "overlaps"),
    "same range twice": (text({**GOOD, "c": B}), "overlaps"),
    "past the end": (text({**GOOD, "b": {**B, "shape": [4], "data_offsets": [16, 20]}}), "cut short"),
    "bytes behind": (text({"__metadata__": META, "a": A}), "bytes after the last tensor"),
    "shape overflow": (with_a(shape=[MAX_DIM, MAX_DIM, MAX_DIM]), "at most .* elements"),
    "shape overflow beside 0": (
        text({**GOOD, "b": {"dtype": "U8", "shape": [0, MAX_DIM, MAX_DIM], "data_offsets": [16, 16]}}),
        "at most .* elements",
    ),
    "dimension 2^63": (with_a(shape=[1 << 63, 4, 0]), "expected dimensions"),
    "dimension negative": (with_a(shape=[-2, -2]), "expected dimensions"),
    "rank 10^5": (with_a(shape=[1] * 100_000), "up to 8 integers"),
    "rank 9": (with_a(shape=[2, 2, 1, 1, 1, 1, 1, 1, 1]), "up to 8 integers"),
    "shape of NaN": (text(GOOD).replace(b"[2,2]", b"[NaN]"), "NaN is not JSON"),
    "shape of Infinity": (text(GOOD).replace(b"[2,2]", b"[-Infinity]"), "-Infinity is not JSON"),
    "shape of strings": (with_a(shape=["2", "2"]), "integers"),
    "shape of bools": (with_a(shape=[True, 4]), "integers"),
    "shape a number": (with_a(shape=4), "integers"),
    "dtype unknown": (with_a(dtype="F7"), "unknown dtype 'F7'"),
    "dtype lower case": (with_a(dtype="f32"), "unknown dtype 'f32'"),
    "dtype a list": (with_a(dtype=["F32"]), "dtype to be a string"),
    "F4 of an odd count": (text({**GOOD, "b": {**B, "dtype": "F4", "shape": [5]}}), "whole bytes"),
    "size wrong by one": (text({**GOOD, "b": {**B, "shape": [4]}}), "expected 4 bytes .* got 3"),
    "nesting 200": (text({**GOOD, "b": {**B, "x": json.loads("[" * 200 + "]" * 200)}}), "unknown|deeper"),
    "nesting 100k": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeper"),
    "nesting 1M": (b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", "too many|deeper"),
    "10^6 objects": (b'{"a":[' + b"{}," * 1_000_000 + b"{}]}", "too many tensors"),
    "lists of nothing": (b'{"a":[' + b"[]," * 4_000_000 + b"[]]}", "too many tensors"),
}

# Refused in a .nf4 file, accepted in a source file.
RELAXED: dict[str, tuple[bytes, str]] = {
    "leading spaces": (b"  " + text(GOOD), "expected '{' first"),
    "newline padding": (text(GOOD) + b"\n\n", "expected '}' and spaces last"),
    "no metadata": (text({"a": A, "b": B}), "no __metadata__"),
    "unknown field": (text({**GOOD, "b": {**B, "note": "x"}}), "unknown field 'note'"),
    "misaligned": (
        text({"__metadata__": META, "b": {**B, "data_offsets": [0, 3]}, "a": {**A, "data_offsets": [3, 19]}}),
        "misaligned",
    ),
    "listed out of order": (
        text({"__metadata__": META, "b": B, "a": A}),
        "does not list tensors in the order",
    ),
}
