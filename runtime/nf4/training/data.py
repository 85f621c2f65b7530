"""Text files and prompt/completion rows as token sequences with labels, split, ordered and batched.

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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import TrainError

DOCUMENT_SEPARATOR = "\n<|doc|>\n"
IGNORED = -100  # label of a position without loss, torch's and transformers' convention
ROW_SUFFIXES = (".jsonl", ".ndjson")
# Training on the markup of these as if it were prose would go unnoticed.
UNSUPPORTED_SUFFIXES = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".zip", ".xz", ".bz2")
_SPLIT_STREAM, _ORDER_STREAM = 1, 2  # keep the random streams of one seed apart


class TextEncoder(Protocol):
    """What data needs of `nf4.text.tokenizer.Tokenizer`."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> Sequence[int]: ...

    def encode(self, text: str, special: bool = True) -> list[int]: ...


class Example(NamedTuple):
    """One sequence: ids, int32 [n], of which ids[first_label:] are to be predicted; first_label >= 1."""

    ids: np.ndarray
    first_label: int


@dataclass(frozen=True)
class Dataset:
    """Examples, and how many rows lost their end (`truncated`) or all of their labels (`dropped`)."""

    examples: list[Example]
    truncated: int = 0
    dropped: int = 0

    @property
    def num_labels(self) -> int:
        """Tokens that carry loss."""
        return sum(len(example.ids) - example.first_label for example in self.examples)


@dataclass(frozen=True)
class Batch:
    """Right-padded examples.

    input_ids: int64 [B, T]. labels: int64 [B, T], the token at its own position, -100 where it has no
    loss. attention_mask: bool [B, T], false on padding; None where nothing is padded.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; nothing waits for the copy."""
        mask = None if self.attention_mask is None else send(self.attention_mask, device)
        return Batch(send(self.input_ids, device), send(self.labels, device), mask)

    @property
    def num_labels(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens without the padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. To a GPU by way of pinned memory: other copies would wait for all its work."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
    truncated = dropped = 0
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
        part = read(path, tokenizer, seq_len)
        examples += part.examples
        truncated += part.truncated
        dropped += part.dropped
    return Dataset(examples, truncated, dropped)


def split_dataset(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Take a fraction of the examples, chosen by the seed, out for evaluation: (train, eval).

    Raises:
        TrainError: one side would be empty.
    """
    count = len(dataset.examples)
    held_out = max(1, round(count * fraction))
    if not 0 < fraction < 1 or held_out >= count:
        raise TrainError(
            "",
            f"cannot hold out a fraction of {fraction} of {count} examples",
            expected="at least one example on either side",
            remedy="give more data or a separate evaluation file",
        )
    chosen = set(np.random.default_rng([seed, _SPLIT_STREAM]).permutation(count)[:held_out].tolist())
    train = [example for index, example in enumerate(dataset.examples) if index not in chosen]
    held = [example for index, example in enumerate(dataset.examples) if index in chosen]
    return Dataset(train, dataset.truncated, dataset.dropped), Dataset(held)


def example_order(count: int, seed: int) -> Iterator[int]:
    """Example indices without end: epoch after epoch, each a permutation given by seed and epoch."""
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, _ORDER_STREAM, epoch]).permutation(count).tolist()
        epoch += 1


def make_batch(examples: Sequence[Example]) -> Batch:
    """Pad examples on the right to the longest of them."""
    longest = max(len(example.ids) for example in examples)
    shape = (len(examples), longest)
    # Any id in the vocabulary does for padding: nothing attends to it and nothing is predicted from it.
    input_ids = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    real = np.zeros(shape, dtype=bool)
    for row, (ids, first_label) in enumerate(examples):
        input_ids[row, : len(ids)] = ids
        labels[row, first_label : len(ids)] = ids[first_label:]
        real[row, : len(ids)] = True
    mask = None if real.all() else torch.from_numpy(real)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), mask)


def _read_text(path: Path, tokenizer: TextEncoder, seq_len: int) -> Dataset:
    text = _decode(path.read_bytes(), path, 1)
    tokens: list[int] = []
    for document in text.split(DOCUMENT_SEPARATOR):
        if document.strip():
            tokens += tokenizer.encode(document)
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    stride = seq_len - len(head)
    stop = max(len(tokens) // stride, 1) * stride
    examples = [
        Example(np.array(head + tokens[at : at + stride], dtype=np.int32), 1) for at in range(0, stop, stride)
    ]
    if len(examples[0].ids) < 2:
        raise TrainError(path, "no text to train on", expected="at least two tokens", got=len(tokens))
    return Dataset(examples)


def _read_rows(path: Path, tokenizer: TextEncoder, seq_len: int) -> Dataset:
    if not tokenizer.eos_ids:
        raise TrainError(
            path,
            "the model names no end token, so completions cannot be closed",
            remedy="train on plain text",
        )
    examples: list[Example] = []
    truncated = dropped = 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        prompt, completion = _parse_row(_decode(line, path, number), f"{path}:{number}")
        ids, first_label = _encode_row(tokenizer, prompt, completion)
        truncated += len(ids) > seq_len
        if first_label < min(len(ids), seq_len):
            examples.append(Example(np.array(ids[:seq_len], dtype=np.int32), first_label))
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
    return Dataset(examples, truncated, dropped)


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
