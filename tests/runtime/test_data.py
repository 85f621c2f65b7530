"""Files -> examples -> batches: windows, labels, order, split, and every message about bad data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nf4.errors import TrainError
from nf4.training.data import (
    IGNORED,
    Dataset,
    Example,
    example_order,
    load_dataset,
    make_batch,
    split_dataset,
)

BOS, EOS = 1, 2


class WordTokenizer:
    """One id a word; spaces stay with the word behind them. As many real ones, it puts BOS before a text."""

    bos_id: int | None = BOS
    eos_ids: tuple[int, ...] = (EOS,)

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def encode(self, text: str, special: bool = True) -> list[int]:
        pieces = text.replace(" ", "\0 ").split("\0")
        ids = [self.words.setdefault(piece, len(self.words) + 3) for piece in pieces if piece]
        return [BOS, *ids] if special and self.bos_id is not None else ids


class NoBos(WordTokenizer):
    bos_id = None


Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def rows(*pairs: tuple[str, str]) -> str:
    return "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs)


def test_text_becomes_windows_of_the_perplexity_protocol(write: Write) -> None:
    path = write("a.txt", "a b c d\n<|doc|>\ne f g h i j")
    dataset = load_dataset([path], WordTokenizer(), 5)
    # Tokens laid end to end: BOS a b c d BOS e f g h i j; windows of four behind a BOS, the rest left out.
    a, b, c, d, e, f, g, h, i, j = range(3, 13)
    del j
    expected = [[BOS, BOS, a, b, c], [BOS, d, BOS, e, f], [BOS, g, h, i, 12]]
    assert [example.ids.tolist() for example in dataset.examples] == expected
    assert {example.first_label for example in dataset.examples} == {1}
    assert dataset.num_labels == 12


def test_text_without_bos_and_text_shorter_than_a_window(write: Write) -> None:
    path = write("a.txt", "a b c d e f g")
    windows = load_dataset([path], NoBos(), 3).examples
    assert [example.ids.tolist() for example in windows] == [[3, 4, 5], [6, 7, 8]]
    (short,) = load_dataset([path], WordTokenizer(), 512).examples
    assert short.ids.tolist() == [BOS, BOS, 3, 4, 5, 6, 7, 8, 9]


def test_several_files_and_a_byte_order_mark(write: Write) -> None:
    text = write("a.txt", b"\xef\xbb\xbfa b")
    table = write("b.jsonl", rows(("a", " b")))
    examples = load_dataset([text, table], WordTokenizer(), 8).examples
    assert [example.ids.tolist() for example in examples] == [[BOS, BOS, 3, 4], [BOS, 3, 4, EOS]]


def test_completion_carries_the_loss_and_the_end_token(write: Write) -> None:
    path = write("a.jsonl", rows(("q r", " s t"), ("", "u")) + "\n \n")
    first, second = load_dataset([path], WordTokenizer(), 16).examples
    assert (first.ids.tolist(), first.first_label) == ([BOS, 3, 4, 5, 6, EOS], 3)
    assert (second.ids.tolist(), second.first_label) == ([BOS, 7, EOS], 1)


def test_border_inside_a_token_is_encoded_apart(write: Write) -> None:
    tokenizer = WordTokenizer()
    (example,) = load_dataset([write("a.jsonl", rows(("foo", "bar")))], tokenizer, 16).examples
    words = {number: word for word, number in tokenizer.words.items()}
    assert [words.get(int(i), int(i)) for i in example.ids] == [BOS, "foo", "bar", EOS]
    assert example.first_label == 2


def test_truncation_is_counted_and_rows_without_labels_dropped(write: Write) -> None:
    path = write("a.jsonl", rows(("a b", " c d e f"), ("a b c d e", " f"), ("a", " b")))
    dataset = load_dataset([path], WordTokenizer(), 5)
    assert (dataset.truncated, dataset.dropped, len(dataset.examples)) == (2, 1, 2)
    assert dataset.examples[0].ids.tolist() == [BOS, 3, 4, 5, 6]
    assert dataset.num_labels == 2 + 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a"',
            r"x.jsonl:2: malformed JSON: Expecting ',' delimiter",
        ),
        (
            '{"question": "a", "answer": "b"}',
            r"x.jsonl:1: bad row, expected .* prompt and completion, got 'answer', ",
        ),
        (
            '\n{"prompt": "a", "completion": "b", "id": 1}',
            r"x.jsonl:2: bad row, .* got 'completion', 'id', 'prompt'",
        ),
        ('["a", "b"]', r"x.jsonl:1: bad row, .* got list"),
        ('{"prompt": "a", "completion": 3}', r"x.jsonl:1: bad completion, expected text, got int"),
        ('{"prompt": "\\ud800", "completion": ""}', r"x.jsonl:1: bad prompt, expected valid Unicode"),
        ("[" * 100000, r"x.jsonl:1: malformed JSON"),
        ("\n\n", r"x.jsonl: no rows"),
        (
            rows(("a b c d e f g h", " i")),
            r"x.jsonl: every label is masked: all 1 prompts fill .* of 8; raise",
        ),
    ],
)
def test_bad_rows_are_told_with_their_line(content: str, message: str, write: Write) -> None:
    with pytest.raises(TrainError, match=message):
        load_dataset([write("x.jsonl", content)], WordTokenizer(), 8)


def test_bad_bytes_are_told_with_their_line(write: Write) -> None:
    for name in ("x.txt", "x.jsonl"):
        content = rows(("a", "b")).encode() + b"\n\xff\n"
        with pytest.raises(TrainError, match=rf"{name}:3: not UTF-8, got byte 0xff"):
            load_dataset([write(name, content)], WordTokenizer(), 8)


def test_other_problems_with_data_are_told(write: Write) -> None:
    with pytest.raises(
        TrainError, match=r"x.parquet: unsupported kind of data, expected plain text or .jsonl"
    ):
        load_dataset([write("x.parquet", "")], WordTokenizer(), 8)
    for text in ("", " \n", "\n<|doc|>\n"):
        with pytest.raises(TrainError, match="no text to train on"):
            load_dataset([write("x.txt", text)], WordTokenizer(), 8)
    with pytest.raises(TrainError, match="sequence length, expected at least 2 tokens, got 1"):
        load_dataset([write("x.txt", "a b")], WordTokenizer(), 1)
    endless = WordTokenizer()
    endless.eos_ids = ()
    with pytest.raises(TrainError, match="names no end token"):
        load_dataset([write("x.jsonl", rows(("a", "b")))], endless, 8)


def numbered(count: int) -> Dataset:
    return Dataset([Example(np.array([BOS, 10 + i], dtype=np.int32), 1) for i in range(count)])


def test_split_is_given_by_the_seed_and_loses_nothing() -> None:
    def ids(dataset: Dataset) -> list[int]:
        return [int(example.ids[1]) for example in dataset.examples]

    train, held = split_dataset(numbered(50), 0.1, seed=3)
    assert len(ids(held)) == 5
    assert sorted(ids(train) + ids(held)) == list(range(10, 60))
    assert ids(split_dataset(numbered(50), 0.1, seed=3)[1]) == ids(held)
    assert ids(split_dataset(numbered(50), 0.1, seed=4)[1]) != ids(held)
    assert len(split_dataset(numbered(2), 0.01, seed=0)[1].examples) == 1
    for count, fraction in ((1, 0.5), (10, 0.99), (10, 0.0), (10, 1.0)):
        with pytest.raises(TrainError, match="cannot hold out"):
            split_dataset(numbered(count), fraction, seed=0)


def test_order_is_a_permutation_an_epoch_and_given_by_the_seed() -> None:
    taken = list(itertools.islice(example_order(7, 5), 21))
    epochs = [taken[:7], taken[7:14], taken[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert taken == list(itertools.islice(example_order(7, 5), 21))
    assert taken != list(itertools.islice(example_order(7, 6), 21))


def test_batches_are_padded_on_the_right_with_mask_and_no_loss() -> None:
    examples = [Example(np.array([1, 5, 6, 7], np.int32), 2), Example(np.array([1, 8], np.int32), 1)]
    batch = make_batch(examples)
    assert batch.input_ids.tolist() == [[1, 5, 6, 7], [1, 8, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 6, 7], [IGNORED, 8, IGNORED, IGNORED]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.num_labels == 3
    assert make_batch(examples[:1]).attention_mask is None
