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


def texts(*contents: str) -> str:
    return "".join(json.dumps({"text": content}) + "\n" for content in contents)


def test_rows_of_text_are_closed_and_long_ones_are_cut_not_lost(write: Write) -> None:
    path = write("a.jsonl", texts("a b", " \n", "c d e f g h i"))
    dataset = load_dataset([path], WordTokenizer(), DataOptions(seq_len=4))
    a, b, c, d, e, f, g, h, i = range(3, 12)
    expected = [[BOS, a, b, EOS], [BOS, c, d, e], [BOS, f, g, h], [BOS, i, EOS]]
    assert [example.ids.tolist() for example in dataset] == [
        expected[0],
        *[
            [number + 1 if number > b else number for number in one] for one in expected[1:]
        ],  # " \n" has an id
    ]
    assert all(first_label(example) == 1 for example in dataset)
    (report,) = dataset.report.files
    assert (report.rows, report.examples, report.truncated, report.dropped) == (3, 4, 0, 1)
    # Without BOS a last window of one token has nothing to predict.
    one, two = load([write("b.jsonl", texts("a b c d"))], NoBos(), 4), load([path], NoBos(), 4)
    assert [example.ids.tolist() for example in one] == [[3, 4, 5, 6]]
    assert len(two) == 3


def test_texts_longer_than_one_encoding_lose_nothing(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nf4.data.encode.MAX_WHOLE", 80)
    words = [f"w{number}" for number in range(300)]
    tokenizer = WordTokenizer()
    (example,) = load([write("a.jsonl", texts(" ".join(words)))], tokenizer, 512)
    names = {number: word for word, number in tokenizer.words.items()}
    assert [names[int(number)].strip() for number in example.ids[1:-1]] == words
    assert example.ids[[0, -1]].tolist() == [BOS, EOS]


def test_loss_on_everything_and_a_tokenizer_that_closes_every_text(write: Write) -> None:
    class Closing(WordTokenizer):
        def encode(self, text: str, special: bool = True) -> list[int]:
            return super().encode(text, special) + [EOS] * special

    path = write("a.jsonl", rows(("q r", " s t")))
    for tokenizer in (WordTokenizer(), Closing()):
        (example,) = load_dataset([path], tokenizer, DataOptions(seq_len=16, loss="all"))
        assert example.ids.tolist() == [BOS, 3, 4, 5, 6, EOS]
        assert first_label(example) == 1
        (example,) = load_dataset([path], tokenizer, DataOptions(seq_len=16))
        assert first_label(example) == 3


def test_every_row_cut_is_an_error_and_one_that_is_not_makes_it_a_report(write: Write) -> None:
    long = ("a", " b c d e f g h")
    with pytest.raises(
        TrainError, match=r"x.jsonl: every row is cut: all 2 are longer than .* of 5; raise the"
    ):
        load([write("x.jsonl", rows(long, long))], WordTokenizer(), 5)
    dataset = load_dataset(
        [write("x.jsonl", rows(long, long, ("a", " b")))], WordTokenizer(), DataOptions(seq_len=5)
    )
    assert dataset.report.truncated == 2


def test_conversations_need_a_template_and_questions_do_not(write: Write) -> None:
    chat = write("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    with pytest.raises(TrainError, match=r"a.jsonl:1: conversations need a chat template"):
        load([chat], WordTokenizer(), 16)
    question = write("b.csv", "question,answer\nwho,me\n")
    (example,) = load([question], WordTokenizer(), 16)
    assert example.ids.tolist() == [BOS, 3, 4, 5, EOS]  # "Question:", " who\nAnswer:", " me"
    assert first_label(example) == 3
    with pytest.raises(TrainError, match="conversations need a chat template"):
        load_dataset([question], WordTokenizer(), DataOptions(seq_len=16, as_chat=True))


def test_progress_is_shown_on_request(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("a.txt", "a b c d e f g h i j k l m n o p")
    load_dataset([path], WordTokenizer(), DataOptions(seq_len=5))
    assert capsys.readouterr().err == ""
    load_dataset([path], WordTokenizer(), DataOptions(seq_len=5), progress=True)
    assert "tokenizing a.txt" in capsys.readouterr().err


def test_an_error_in_the_middle_comes_from_its_row_and_ends_the_work(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are read ahead by a thread; what it meets is told once the rows before are done."""
    monkeypatch.setattr("nf4.data.reading._BATCH_ROWS", 3)
    content = rows(*[("a", " b")] * 10) + '{"prompt": 1, "completion": ""}\n' + rows(("a", " b"))
    with pytest.raises(TrainError, match=r"x.jsonl:11: bad prompt"):
        load([write("x.jsonl", content)], WordTokenizer(), 16)
    assert len(load([write("x.jsonl", rows(*[("a", " b")] * 10))], WordTokenizer(), 16)) == 10
