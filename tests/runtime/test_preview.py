"""The look before a run: examples as tokens with labels, and the table."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from nf4.data.dataset import DataReport, Example, FileReport, ListDataset, Source
from nf4.data.plan import Batches, BatchOptions
from nf4.data.preview import expected_time, quoted, run_table, shown_example, shown_examples


def pieces(ids: Sequence[int]) -> list[str]:
    return ["<s>" if token == 1 else f" {token:x}" for token in ids]


def example(*ids: int, labelled: Sequence[int]) -> Example:
    marks = np.isin(np.arange(len(ids)), labelled)
    return Example(np.array(ids, dtype=np.int32), marks)


def batches(**options: object) -> Batches:
    examples = [example(1, *range(10, 10 + n), labelled=[n - 1, n]) for n in (5, 9, 2, 14)]
    files = (FileReport("a.jsonl", 5, 3, 1, 2, 19, 6), FileReport("b\x1b.txt", 1, 1, 0, 0, 15, 2))
    source = Source(ListDataset(examples, DataReport(files)), 1.0)
    return Batches([source], BatchOptions(**{"seq_len": 16, "batch": 2, "accumulate": 1, **options}), seed=0)  # type: ignore[arg-type]


def test_tokens_stand_with_ids_and_labels() -> None:
    shown = shown_example(example(1, 10, 11, 12, 13, labelled=[2, 3]), pieces, title="one")
    assert shown.splitlines() == [
        "one: 5 tokens, 2 with loss",
        '  -    "<s>":1 " a":10',
        '  loss " b":11 " c":12',
        '  -    " d":13',
    ]


def test_long_runs_are_wrapped_and_every_line_is_marked() -> None:
    count = 200
    labelled = range(50, 150)
    shown = shown_example(example(*range(2, 2 + count), labelled=list(labelled)), pieces, title="one")
    lines = shown.splitlines()[1:]
    assert max(map(len, lines)) <= 100
    assert {line[2:6] for line in lines} == {"loss", "-   "}
    found = [(line[2:6] == "loss", int(token)) for line in lines for token in re.findall(r":(\d+)", line)]
    assert found == [(i in labelled, i + 2) for i in range(count)]


def test_color_adds_to_the_marks() -> None:
    one = example(1, 10, labelled=[1])
    plain = shown_example(one, pieces, title="one")
    colored = shown_example(one, pieces, title="one", color=True)
    assert '\x1b[32m  loss " a":10\x1b[0m' in colored
    stripped = colored
    for code in ("\x1b[32m", "\x1b[2m", "\x1b[0m"):
        stripped = stripped.replace(code, "")
    assert stripped == plain


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" a\n\tb", r'" a\n\tb"'),
        ('say "hi" \\n', r'"say \"hi\" \\n"'),
        ("\x1b[31m\x9b\x00", r'"\x1b[31m\x9b\x00"'),
        ("\u202e\u2028\xa0\ud800", r'"\u202e\u2028\xa0\ud800"'),
        ("\u00e9\u6f22\U0001f600", '"\u00e9\u6f22\U0001f600"'),
    ],
)
def test_control_characters_are_escaped(text: str, expected: str) -> None:
    assert quoted(text) == expected


@pytest.mark.parametrize("packing", ["none", "best-fit"])
def test_examples_are_the_first_that_training_sees(packing: str) -> None:
    plan = batches(packing=packing)
    order = [index for step in range(plan.steps) for batch in plan.step(step) for index in batch.examples]
    for count in (1, 3, 9):
        shown = shown_examples(plan, count, pieces).split("\n\n")
        assert len(shown) == min(count, 4)
        for number, (text, index) in enumerate(zip(shown, order, strict=False), 1):
            place = plan.dataset.place(index).replace("\x1b", r"\x1b")
            tokens = plan.dataset.lengths[index]
            assert text.startswith(
                f"example {number} of {min(count, 4)}: {place}: {tokens} tokens, 2 with loss\n"
            )


def test_table_of_files_and_run() -> None:
    table = run_table(batches())
    assert table.splitlines() == [
        "data       rows  examples  tokens  median  95%  longest  cut  left out  masked",
        "a.jsonl       5         3      19       6   10       10    1         2   68.4%",
        r"b\x1b.txt     1         1      15      15   15       15    0         0   86.7%",
        "training      6         4      34      10   15       15    1         2   76.5%",
        "",
        "padding        4 examples, 19.0% of what is computed is padding",
        "steps          2 of 2 x 1 rows, 1 epochs",
        "tokens a step  about 17, 23.5% with loss",
        "tokens in all  about 34, 8 with loss",
        "expected time  known after the first steps",
    ]


def test_table_of_a_packed_run_with_evaluation() -> None:
    held = ListDataset(
        [example(1, 2, 3, labelled=[2])], DataReport((FileReport("held.txt", 1, 1, 0, 0, 3, 1),))
    )
    table = run_table(batches(packing="best-fit"), held, tokens_per_second=0.5).splitlines()
    assert "held.txt       1         1       3       3    3        3    0         0   66.7%" in table
    assert "evaluation     1         1       3       3    3        3    0         0   66.7%" in table
    assert "packing        4 examples in 3 rows of 16, 70.8% full" in table
    assert table[-1] == "expected time  about 68 s at 0 tokens/s"


def test_notes_of_files_stand_below_them() -> None:
    file = FileReport("a.jsonl", 1, 1, 0, 0, 3, 1, ("two answers are empty", "odd\x07"))
    data = ListDataset([example(1, 2, 3, labelled=[2])], DataReport((file,)))
    table = run_table(Batches([Source(data, 1.0)], BatchOptions(), seed=0)).splitlines()
    assert table[2:5] == ["a.jsonl: two answers are empty", r"a.jsonl: odd\x07", ""]


@pytest.mark.parametrize(
    ("tokens", "speed", "expected"),
    [
        (100, None, "known after the first steps"),
        (100, float("inf"), "known after the first steps"),
        (99_000, 1000.0, "about 99 s at 1,000 tokens/s"),
        (3_000_000, 1000.0, "about 50 min at 1,000 tokens/s"),
        (3_590_000, 1000.0, "about 1 h 0 min at 1,000 tokens/s"),
        (700_000_000, 1000.0, "about 8 d 2 h at 1,000 tokens/s"),
    ],
)
def test_expected_time(tokens: int, speed: float | None, expected: str) -> None:
    assert expected_time(tokens, speed) == expected
