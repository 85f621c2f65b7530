"""Files -> examples: windows, labels, and every message about bad data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nf4.data.dataset import Example, FileReport
from nf4.data.encode import TextEncoder
from nf4.data.options import DataOptions
from nf4.data.reading import load_dataset
from nf4.errors import TrainError

BOS, EOS = 1, 2


class WordTokenizer(TextEncoder):
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


def first_label(example: Example) -> int:
    """Where the labels begin; behind it all tokens have one."""
    assert example.labelled.dtype == bool
    assert not example.labelled[0]
    first = int(example.labelled.argmax())
    assert example.labelled[first:].all()
    return first


def load(paths: list[Path], tokenizer: WordTokenizer, seq_len: int) -> list[Example]:
    return list(load_dataset(paths, tokenizer, DataOptions(seq_len=seq_len)))


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
    dataset = load_dataset([path], WordTokenizer(), DataOptions(seq_len=5))
    # Tokens laid end to end: BOS a b c d BOS e f g h i j; windows of four behind a BOS, the rest left out.
    a, b, c, d, e, f, g, h, i, j = range(3, 13)
    del j
    expected = [[BOS, BOS, a, b, c], [BOS, d, BOS, e, f], [BOS, g, h, i, 12]]
    assert [example.ids.tolist() for example in dataset] == expected
    assert {first_label(example) for example in dataset} == {1}
    assert dataset.num_labels == 12


def test_text_without_bos_and_text_shorter_than_a_window(write: Write) -> None:
    path = write("a.txt", "a b c d e f g")
    windows = load([path], NoBos(), 3)
    assert [example.ids.tolist() for example in windows] == [[3, 4, 5], [6, 7, 8]]
    (short,) = load([path], WordTokenizer(), 512)
    assert short.ids.tolist() == [BOS, BOS, 3, 4, 5, 6, 7, 8, 9]


def test_several_files_and_a_byte_order_mark(write: Write) -> None:
    text = write("a.txt", b"\xef\xbb\xbfa b")
    table = write("b.jsonl", rows(("a", " b")))
    examples = load([text, table], WordTokenizer(), 8)
    assert [example.ids.tolist() for example in examples] == [[BOS, BOS, 3, 4], [BOS, 3, 4, EOS]]


def test_completion_carries_the_loss_and_the_end_token(write: Write) -> None:
    path = write("a.jsonl", rows(("q r", " s t"), ("", "u")) + "\n \n")
    first, second = load([path], WordTokenizer(), 16)
    assert (first.ids.tolist(), first_label(first)) == ([BOS, 3, 4, 5, 6, EOS], 3)
    assert (second.ids.tolist(), first_label(second)) == ([BOS, 7, EOS], 1)


def test_border_inside_a_token_is_encoded_apart(write: Write) -> None:
    tokenizer = WordTokenizer()
    (example,) = load([write("a.jsonl", rows(("foo", "bar")))], tokenizer, 16)
    words = {number: word for word, number in tokenizer.words.items()}
    assert [words.get(int(i), int(i)) for i in example.ids] == [BOS, "foo", "bar", EOS]
    assert first_label(example) == 2


def test_truncation_is_counted_and_rows_without_labels_dropped(write: Write) -> None:
    path = write("a.jsonl", rows(("a b", " c d e f"), ("a b c d e", " f"), ("a", " b")))
    dataset = load_dataset([path], WordTokenizer(), DataOptions(seq_len=5))
    assert (dataset.report.truncated, dataset.report.dropped, len(dataset)) == (2, 1, 2)
    assert dataset[0].ids.tolist() == [BOS, 3, 4, 5, 6]
    assert dataset.num_labels == 2 + 2
    assert dataset.lengths.tolist() == [5, 4]
    assert dataset.label_counts.tolist() == [2, 2]
    assert dataset.report.files == (FileReport(str(path), 3, 2, 2, 1, 9, 4),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a"',
            r"x.jsonl:2: not JSON at character 14: expecting ',' delimiter; write one JSON object a line",
        ),
        (
            '{"frage": "a", "answer": "b"}',
            r"x.jsonl:1: bad row: no known schema, .* prompt/completion .*, got 'answer', 'frage'; .*--map",
        ),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "id": 1}',
            r"x.jsonl:2: bad row, expected the keys prompt, completion, .* got 'id', 'prompt'",
        ),
        ('["a", "b"]', r"x.jsonl:1: bad row, .* got list"),
        ('{"prompt": "a", "completion": 3}', r"x.jsonl:1: bad completion, expected text, got int"),
        ('{"prompt": "\\ud800", "completion": ""}', r"x.jsonl:1: not JSON: half a surrogate pair"),
        ("[" * 100000, r"x.jsonl:1: nested deeper than 64 levels"),
        ("\n\n", r"x.jsonl: no rows"),
        (
            rows(("a b c d e f g h", " i")),
            r"x.jsonl: every label is masked: all 1 prompts fill .* of 8; raise",
        ),
    ],
)
def test_bad_rows_are_told_with_their_line(content: str, message: str, write: Write) -> None:
    with pytest.raises(TrainError, match=message):
        load_dataset([write("x.jsonl", content)], WordTokenizer(), DataOptions(seq_len=8))


def test_bad_bytes_are_told_with_their_line(write: Write) -> None:
    for name in ("x.txt", "x.jsonl"):
        content = rows(("a", "b")).encode() + b"\n\xff\n"
        with pytest.raises(TrainError, match=rf"{name}:3: not UTF-8"):
            load_dataset([write(name, content)], WordTokenizer(), DataOptions(seq_len=8))


def test_other_problems_with_data_are_told(write: Write) -> None:
    with pytest.raises(TrainError, match=r"x.gz: unsupported kind of data, .* got .gz; unpack it first"):
        load_dataset([write("x.gz", "")], WordTokenizer(), DataOptions(seq_len=8))
    for text in ("", " \n", "\n<|doc|>\n"):
        with pytest.raises(TrainError, match="no text to train on"):
            load_dataset([write("x.txt", text)], WordTokenizer(), DataOptions(seq_len=8))
    with pytest.raises(TrainError, match="sequence length, expected at least 2 tokens, got 1"):
        load_dataset([write("x.txt", "a b")], WordTokenizer(), DataOptions(seq_len=1))
    endless = WordTokenizer()
    endless.eos_ids = ()
    with pytest.raises(TrainError, match="names no end token"):
        load_dataset([write("x.jsonl", rows(("a", "b")))], endless, DataOptions(seq_len=8))
