"""Text files and prompt/completion rows as token sequences with labels.

Two kinds of file, told apart by suffix:

* plain text (any suffix but the ones below): documents separated by a line `<|doc|>`. Each is encoded,
  the tokens are laid end to end and cut into windows of seq_len, BOS in front of each where the model
  has one: the protocol of `nf4 eval`, so that both report the same perplexity. The last, incomplete
  window is left out unless it is the only one.
* `.jsonl`: one object a line with exactly the keys `prompt` and `completion`. The loss is on the
  completion and the end token behind it.

Limits: everything is tokenized at the start and held in memory, 4 bytes a token; no packing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import TrainError
from .dataset import DataReport, Dataset, Example, FileReport, ListDataset

DOCUMENT_SEPARATOR = "\n<|doc|>\n"
ROW_SUFFIXES = (".jsonl", ".ndjson")
# Training on the markup of these as if it were prose would go unnoticed.
UNSUPPORTED_SUFFIXES = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".zip", ".xz", ".bz2")


class TextEncoder(Protocol):
    """What data needs of `nf4.text.tokenizer.Tokenizer`."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> Sequence[int]: ...

    def encode(self, text: str, special: bool = True) -> list[int]: ...


def load_dataset(paths: Iterable[str | Path], tokenizer: TextEncoder, seq_len: int) -> Dataset:
    """Read and tokenize files, each by its kind.

    Args:
        paths: text or JSONL files.
        tokenizer: the model's.
        seq_len: the most tokens in an example, BOS and end token included.

    Raises:
        TrainError: a file of an unsupported kind, not UTF-8, malformed or empty, a row with other
            keys (told as file:line), or not one token with a label.
        OSError: a file that cannot be read.
    """
    if seq_len < 2:
        raise TrainError("", "sequence length", expected="at least 2 tokens", got=seq_len)
    examples: list[Example] = []
    reports: list[FileReport] = []
    for path in map(Path, paths):
        if path.suffix.lower() in UNSUPPORTED_SUFFIXES:
            raise TrainError(
                path,
                "unsupported kind of data",
                expected="plain text or .jsonl",
                got=path.suffix,
                remedy="convert it to JSONL rows with the keys prompt and completion",
            )
        read = _read_rows if path.suffix.lower() in ROW_SUFFIXES else _read_text
        part, report = read(path, tokenizer, seq_len)
        examples += part
        reports.append(report)
    return ListDataset(examples, DataReport(tuple(reports)))


def _read_text(path: Path, tokenizer: TextEncoder, seq_len: int) -> tuple[list[Example], FileReport]:
    text = _decode(path.read_bytes(), path, 1)
    tokens: list[int] = []
    documents = [document for document in text.split(DOCUMENT_SEPARATOR) if document.strip()]
    for document in documents:
        tokens += tokenizer.encode(document)
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    stride = seq_len - len(head)
    stop = max(len(tokens) // stride, 1) * stride
    examples = [_example(head + tokens[at : at + stride], 1) for at in range(0, stop, stride)]
    if len(examples[0].ids) < 2:
        raise TrainError(path, "no text to train on", expected="at least two tokens", got=len(tokens))
    return examples, _report(path, len(documents), examples)


def _read_rows(path: Path, tokenizer: TextEncoder, seq_len: int) -> tuple[list[Example], FileReport]:
    if not tokenizer.eos_ids:
        raise TrainError(
            path,
            "the model names no end token, so completions cannot be closed",
            remedy="train on plain text",
        )
    examples: list[Example] = []
    rows = truncated = dropped = 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        prompt, completion = _parse_row(_decode(line, path, number), f"{path}:{number}")
        ids, first_label = _encode_row(tokenizer, prompt, completion)
        rows += 1
        truncated += len(ids) > seq_len
        if first_label < min(len(ids), seq_len):
            examples.append(_example(ids[:seq_len], first_label))
        else:
            dropped += 1
    if not examples:
        if dropped:
            raise TrainError(
                path,
                f"every label is masked: all {dropped} prompts fill the sequence length of {seq_len}",
                remedy="raise the sequence length or shorten the prompts",
            )
        raise TrainError(path, "no rows", expected="one JSON object a line", got="an empty file")
    return examples, _report(path, rows, examples, truncated, dropped)


def _example(ids: list[int], first_label: int) -> Example:
    """Tokens of which those from first_label on carry loss."""
    return Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= first_label)


def _report(
    path: Path, rows: int, examples: list[Example], truncated: int = 0, dropped: int = 0
) -> FileReport:
    tokens = sum(len(example.ids) for example in examples)
    labelled = sum(int(example.labelled.sum()) for example in examples)
    return FileReport(str(path), rows, len(examples), truncated, dropped, tokens, labelled)


def _encode_row(tokenizer: TextEncoder, prompt: str, completion: str) -> tuple[list[int], int]:
    """Token ids of prompt, completion and end token, and where the completion begins.

    The completion's tokens are those that follow the prompt's in the encoding of both together; where
    the border falls inside a token, the two are encoded apart, as generation will see the prompt alone.
    """
    end = tokenizer.eos_ids[0]
    prompt_ids = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + completion)
    for ids in (prompt_ids, whole):
        while ids and ids[-1] == end:  # some tokenizers close every text
            ids.pop()
    if whole[: len(prompt_ids)] != prompt_ids:
        whole = prompt_ids + tokenizer.encode(completion, special=False)
    return [*whole, end], max(len(prompt_ids), 1)


def _parse_row(text: str, place: str) -> tuple[str, str]:
    try:
        row: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        told = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
        )
        raise TrainError(place, f"malformed JSON: {told}", remedy="write one JSON object a line") from None
    expected = "an object with the keys prompt and completion"
    if not isinstance(row, dict):
        raise TrainError(place, "bad row", expected=expected, got=type(row).__name__)
    if row.keys() != {"prompt", "completion"}:
        shown = ", ".join(sorted(map(ascii, row)))[:200] or "no keys"
        raise TrainError(place, "bad row", expected=expected, got=shown, remedy="rename the keys")
    for key, value in row.items():
        if not isinstance(value, str):
            raise TrainError(place, f"bad {key}", expected="text", got=type(value).__name__)
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise TrainError(place, f"bad {key}", expected="valid Unicode", got="half of a surrogate pair")
    return row["prompt"], row["completion"]


def _decode(data: bytes, path: Path, first_line: int) -> str:
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise TrainError(
            f"{path}:{line}", "not UTF-8", got=f"byte 0x{data[error.start]:02x}", remedy="convert it to UTF-8"
        ) from None
