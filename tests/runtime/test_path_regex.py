"""The bounded matcher against Python's `re`, as PEFT uses it."""

from __future__ import annotations

import random
import re
import time

import pytest

from nf4.lora.path_regex import PathRegex

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "model.layers.1.mlp.down_proj",
    "lm_head",
    "q_proj",
    "a",
    "aab.b",
]
KEYS = [
    "q_proj",
    r"^model\.layers\.0\.self_attn\.q_proj",
    "^q_proj$",
    r"layers\.(0|1)\..*_proj",
    r"layers.\d+.mlp.(?:up|down)_proj",
    r".*\.[qkv]_proj",
    r"[^q]_proj",
    r"[\w.]+",
    r"layers\.[0-9]{2}\..*",
    r"(a|ab)*b{0,1}",
    r"a{2,}b\.b?",
    r"(^model|lm)_?.*",
    r"[]a-]+|\S*?head",
    "",
    "up_proj|q_proj|",
    r"a+?b|x",
    r"()a()",
]


def expected(key: str, path: str) -> bool:
    """As peft.utils.other.get_pattern_key."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


@pytest.mark.parametrize("key", KEYS)
def test_finds_what_peft_finds(key: str) -> None:
    regex = PathRegex(key)
    assert [regex.matches(path) for path in PATHS] == [expected(key, path) for path in PATHS]


def test_finds_what_peft_finds_for_random_keys() -> None:
    draw = random.Random(0)
    parts = [
        "a",
        "b",
        ".",
        r"\.",
        "(",
        ")",
        "|",
        "*",
        "+",
        "?",
        "[ab]",
        "[^a]",
        "{1,2}",
        "{2}",
        "^",
        "$",
        "(?:",
    ]
    compared = 0
    while compared < 2000:
        key = "".join(draw.choices(parts, k=draw.randint(1, 8)))
        try:
            re.compile(f"({key})")
            regex = PathRegex(key)
        except (re.error, ValueError):
            continue
        for _ in range(5):
            path = "".join(draw.choices("ab.", k=draw.randint(0, 6)))
            assert regex.matches(path) == expected(key, path), (key, path)
        compared += 1


def test_time_is_bounded_where_backtracking_explodes() -> None:
    start = time.monotonic()
    assert not PathRegex("(a+)+b").matches("a" * 2000)
    assert not PathRegex("(a|a|aa)*" * 10).matches("a" * 500 + "b")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("(a", "missing"),
        ("a)", "unbalanced"),
        ("*a", "nothing to repeat"),
        ("a**", "repetition of a repetition"),
        ("a{3,2}", "bad"),
        ("a{x}", "bad"),
        ("a{", "bad"),
        ("[a", "too early"),
        ("[b-a]", "bad range"),
        ("[a-\\d]", "bad range"),
        ("a\\", "too early"),
        (r"(a)\1", "not supported"),
        (r"\bq", "not supported"),
        ("(?i)a", "not supported"),
        ("(?=a)", "not supported"),
        ("(" * 60 + ")" * 60, "too deep"),
        ("(((a{99}){99}){99})", "too large"),
        ("a" * 2000, "too large"),
    ],
)
def test_what_is_wrong_or_not_supported_is_told(key: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PathRegex(key)
