"""What rows mean, by their keys or by a mapping; and every message about rows that mean nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nf4.data.schema import FIELDS, Chat, Completion, Sample, Schema, Text
from nf4.errors import TrainError

ALPACA = "Below is an instruction that describes a task"
SYSTEM, USER, ASSISTANT, TOOL = ("system", "user", "assistant", "tool")


def read(row: Any, *, as_chat: bool = False, system: str | None = None, **columns: str) -> Sample:
    schema = Schema.recognise(row, "x.jsonl:1", columns, as_chat=as_chat, system=system)
    return schema.read(row, "x.jsonl:1")


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat([{"role": role, "content": content} for role, content in turns])


@pytest.mark.parametrize(
    ("row", "plain", "as_chat"),
    [
        ({"text": "a", "id": 3}, Text("a"), None),
        ({"prompt": "a", "completion": "b", "source": None}, Completion("a", "b"), None),
        ({"input": "a", "output": "b"}, Completion("a", "b"), None),
        (
            {"instruction": "a", "output": "b"},
            Completion(
                f"{ALPACA}. Write a response that appropriately completes the request.\n\n"
                "### Instruction:\na\n\n### Response:\n",
                "b",
            ),
            chat((USER, "a"), (ASSISTANT, "b")),
        ),
        (
            {"instruction": "a", "input": "c", "output": "b"},
            Completion(
                f"{ALPACA}, paired with an input that provides further context. Write a response that"
                " appropriately completes the request.\n\n"
                "### Instruction:\na\n\n### Input:\nc\n\n### Response:\n",
                "b",
            ),
            chat((USER, "a\n\nc"), (ASSISTANT, "b")),
        ),
        (
            {"instruction": "a", "input": None, "output": "b", "system": "s"},
            Completion("s\n\n### Instruction:\na\n\n### Response:\n", "b"),
            chat((SYSTEM, "s"), (USER, "a"), (ASSISTANT, "b")),
        ),
        (
            {"question": "a", "answer": "b", "system": ""},
            Completion("Question: a\nAnswer:", " b"),
            chat((USER, "a"), (ASSISTANT, "b")),
        ),
        (
            {"question": "a", "answer": "b", "system": "s"},
            Completion("s\n\nQuestion: a\nAnswer:", " b"),
            chat((SYSTEM, "s"), (USER, "a"), (ASSISTANT, "b")),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "name": "x"},
                ]
            },
            chat((USER, "a"), (ASSISTANT, "b")),
            None,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]},
            chat((USER, "ab")),
            None,
        ),
        (
            {
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
                "system": "s",
            },
            chat((SYSTEM, "s"), (USER, "a"), (ASSISTANT, "b")),
            None,
        ),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "observation", "value": "a"}]},
            chat((SYSTEM, "s"), (TOOL, "a")),
            None,
        ),
        ({"conversations": [{"role": "user", "content": "a"}]}, chat((USER, "a")), None),
        ({"messages": '[{"role": "user", "content": "a"}]'}, chat((USER, "a")), None),
    ],
)
def test_rows_are_recognised_by_their_keys(row: Any, plain: Sample, as_chat: Sample | None) -> None:
    assert read(row) == plain
    assert read(row, as_chat=True) == (as_chat or plain)


def test_a_default_system_prompt_is_used_where_there_is_none() -> None:
    turns = [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}]
    assert read({"messages": turns}, system="s") == chat((SYSTEM, "own"), (USER, "a"))
    assert read({"messages": turns[1:]}, system="s") == chat((SYSTEM, "s"), (USER, "a"))
    assert read({"messages": turns[1:], "system": "row"}, system="s") == chat((SYSTEM, "row"), (USER, "a"))
    asked = read({"question": "a", "answer": "b"}, as_chat=True, system="s")
    assert asked == chat((SYSTEM, "s"), (USER, "a"), (ASSISTANT, "b"))


def test_columns_are_mapped_by_name() -> None:
    assert read({"frage": "a", "antwort": "b"}, prompt="frage", completion="antwort") == Completion("a", "b")
    assert read({"text": "t", "content": "c"}, text="content") == Text("c")
    assert read({"chat": [{"role": "user", "content": "a"}]}, messages="chat") == chat((USER, "a"))
    row = {"instruction": "a", "output": "b", "input": "c", "text": "t"}
    assert read(row, text="text") == Text("t")
    assert read(row, as_chat=True, instruction="instruction") == chat((USER, "a\n\nc"), (ASSISTANT, "b"))
    assert {"text", "prompt", "completion", "messages", "system"} < FIELDS


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            {},
            {},
            "x.jsonl:1: bad row: no known schema, expected the keys text or prompt/.*, got no keys",
        ),
        (
            {"promt": 1, "é": 2},
            {},
            r"got '\\xe9', 'promt'; rename the keys, .* --map prompt=COLUMN --map compl",
        ),
        ({"prompt": "a"}, {}, "no known schema"),
        (dict.fromkeys("abcdefghijklmnopqrstuvwxyz" * 9, 1) | {"k" * 500: 1}, {}, r"\.\.\.;"),
        (
            {"text": "t", "prompt": "a", "completion": "b"},
            {},
            "x.jsonl:1: the row fits several schemas, .* got text or prompt/.*; .* such as --map text=text",
        ),
        (
            {"input": "a", "output": "b", "text": "t"},
            {},
            "got text or input/output; choose one, such as --map text=text",
        ),
        ({"a": "b"}, {"prompt": "frage"}, "expected the keys frage/completion, got 'a'"),
        (
            {"a": "b"},
            {"text": "a", "prompt": "a"},
            "no schema has the fields prompt, text together; --map takes",
        ),
        ({"text": 3}, {}, "x.jsonl:1: bad text, expected text, got int"),
        ({"text": None}, {}, "bad text, expected text, got null"),
        ({"c": ["a"]}, {"text": "c"}, "bad c, expected text, got list"),
        ({"text": "a\ud800"}, {}, "bad text, expected valid Unicode, got half of a surrogate pair"),
        ({"instruction": "a", "output": "b", "input": 1}, {}, "bad input, expected text, got int"),
        ({"messages": []}, {}, "bad messages: an empty conversation; remove the row"),
        ({"messages": None}, {}, "bad messages, expected a list of messages, got null"),
        ({"messages": {"role": "user"}}, {}, "bad messages, expected a list of messages, got dict"),
        ({"messages": "hello"}, {}, "bad messages: not JSON at character 0"),
        ({"messages": "3"}, {}, "bad messages, expected a list of messages, got int"),
        (
            {"messages": ["a"]},
            {},
            r"bad messages\[0\], expected an object with the keys role and content, .* got str",
        ),
        ({"messages": [{"role": "user"}]}, {}, r"bad messages\[0\], expected an object .*, got 'role'"),
        (
            {"messages": [{"role": "human", "content": "a"}]},
            {},
            r"bad messages\[0\]: unknown role, expected one of system, user, assistant, tool, got 'human'",
        ),
        ({"messages": [{"role": 1, "content": "a"}]}, {}, r"bad messages\[0\]: unknown role, .* got int"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, {}, "unknown role, .* got list"),
        (
            {"messages": [{"role": "user", "content": None}]},
            {},
            r"bad messages\[0\], expected text, got null",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            {},
            r"bad messages\[0\], expected text, got parts that are not text",
        ),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, {}, r"messages\[0\], expected valid Unicode"),
        (
            {"conversations": [{"from": "alien", "value": "a"}]},
            {},
            r"conversations\[0\]: unknown role, .*'alien'",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}] * 10_001},
            {},
            "expected at most 10,000 messages, got 10,001",
        ),
        (
            {"prompt": "a" * (4 << 20), "completion": "b"},
            {},
            "a row is too long, expected at most 4,194,304 char",
        ),
    ],
)
def test_rows_that_mean_nothing_are_told(row: Any, columns: dict[str, str], message: str) -> None:
    with pytest.raises(TrainError, match=message) as raised:
        read(row, **columns)
    assert len(str(raised.value)) < 1000


def test_every_row_must_be_like_the_first() -> None:
    schema = Schema.recognise({"question": "a", "answer": "b"}, "x:1", {}, as_chat=False)
    expected = (
        "x:9: bad row, expected the keys question, answer, as in the first row, got 'answer', 'frage'; make"
    )
    with pytest.raises(TrainError, match=re.escape(expected)):
        schema.read({"frage": "a", "answer": "b"}, "x:9")
    assert schema.read({"question": "a", "answer": "b", "other": [1]}, "x:9") == Completion(
        "Question: a\nAnswer:", " b"
    )
