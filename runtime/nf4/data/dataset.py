"""What files become and batches are made of: token sequences with labels, read by their index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import xxhash


class Example(NamedTuple):
    """One sequence.

    ids: int32 [n]. labelled: bool [n], the tokens that carry loss; labelled[0] is False, as nothing predicts
    the first token.
    """

    ids: np.ndarray
    labelled: np.ndarray


@dataclass(frozen=True)
class FileReport:
    """What became of one file.

    Attributes:
        path: of the file, as given.
        rows: read: JSON objects, table rows, or documents of plain text.
        examples: made of them. In the dataset the examples of a file stand together, files in this order.
        truncated: rows that lost their end to the sequence length.
        dropped: rows left out because no token with loss remained.
        tokens, labelled: of all examples; those of them that carry loss.
        notes: what else a user should know, a line each.
    """

    path: str
    rows: int
    examples: int
    truncated: int
    dropped: int
    tokens: int
    labelled: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataReport:
    """What became of the files of a dataset."""

    files: tuple[FileReport, ...] = ()

    @property
    def rows(self) -> int:
        """Rows read."""
        return sum(file.rows for file in self.files)

    @property
    def truncated(self) -> int:
        """Rows that lost their end."""
        return sum(file.truncated for file in self.files)

    @property
    def dropped(self) -> int:
        """Rows left out for want of a label."""
        return sum(file.dropped for file in self.files)


class Dataset(ABC):
    """Examples by index, not necessarily in memory.

    Attributes:
        lengths: int32 [N], tokens of each example; none is longer than the sequence length.
        label_counts: int32 [N], how many of them carry loss; none is 0.
        report: how the examples came about.
    """

    lengths: np.ndarray
    label_counts: np.ndarray
    report: DataReport

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    @property
    def max_token_id(self) -> int:
        """The largest id in any example, or above it; 0 without examples."""
        return max((int(example.ids.max()) for example in self), default=0)

    @property
    def fingerprint(self) -> str:
        """A sum of all examples in their order, or of all that they were made of; hexadecimal digits."""
        total = xxhash.xxh3_128(self.lengths.tobytes())
        for example in self:
            total.update(example.ids.tobytes())
            total.update(example.labelled.tobytes())
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def num_labels(self) -> int:
        """Tokens that carry loss."""
        return int(self.label_counts.sum(dtype=np.int64))

    def place(self, index: int) -> str:
        """Where an example is from, for people: its file, and which of the file's examples it is, from 1."""
        for file in self.report.files:
            if index < file.examples:
                return f"{file.path}, example {index + 1}"
            index -= file.examples
        return f"example {index + 1}"


class ListDataset(Dataset):
    """Examples in memory."""

    def __init__(self, examples: Sequence[Example], report: DataReport | None = None) -> None:
        self._examples = examples
        self.lengths = np.array([len(example.ids) for example in examples], dtype=np.int32)
        self.label_counts = np.array([example.labelled.sum() for example in examples], dtype=np.int32)
        self.report = DataReport() if report is None else report

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


class Subset(Dataset):
    """Some examples of another dataset, by their ascending indices there.

    Its report counts these examples, and those rows, cut and left out ones, of the files as a whole.
    """

    def __init__(self, dataset: Dataset, indices: np.ndarray) -> None:
        self._dataset, self._indices = dataset, indices
        self.lengths = dataset.lengths[indices]
        self.label_counts = dataset.label_counts[indices]
        files, first = [], 0
        for file in dataset.report.files:
            here = slice(*np.searchsorted(indices, (first, first + file.examples)))
            tokens, labelled = (int(n[here].sum(dtype=np.int64)) for n in (self.lengths, self.label_counts))
            counts = {"examples": here.stop - here.start, "tokens": tokens, "labelled": labelled}
            files.append(replace(file, **counts))
            first += file.examples
        self.report = DataReport(tuple(files))

    def __getitem__(self, index: int) -> Example:
        return self._dataset[int(self._indices[index])]

    @property
    def max_token_id(self) -> int:
        return self._dataset.max_token_id

    @property
    def fingerprint(self) -> str:
        total = xxhash.xxh3_128(self._dataset.fingerprint.encode())
        total.update(self._indices.tobytes())
        return total.hexdigest()

    def place(self, index: int) -> str:
        return self._dataset.place(int(self._indices[index]))


class Concatenation(Dataset):
    """The examples of several datasets, one dataset behind the other.

    starts: int64 [datasets + 1], the index of each one's first example, and of the end.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._datasets = datasets
        self.starts = np.cumsum([0, *map(len, datasets)])
        self.lengths = np.concatenate([dataset.lengths for dataset in datasets])
        self.label_counts = np.concatenate([dataset.label_counts for dataset in datasets])
        self.report = DataReport(tuple(file for dataset in datasets for file in dataset.report.files))

    def __getitem__(self, index: int) -> Example:
        dataset, own = self._find(index)
        return dataset[own]

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(" ".join(each.fingerprint for each in self._datasets).encode())

    def place(self, index: int) -> str:
        dataset, own = self._find(index)
        return dataset.place(own)

    def _find(self, index: int) -> tuple[Dataset, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self._datasets[at], index - int(self.starts[at])

    @property
    def max_token_id(self) -> int:
        return max(dataset.max_token_id for dataset in self._datasets)


class Source(NamedTuple):
    """One part of the training data.

    weight: how often an epoch shows each of its examples: 2.0 twice; 0.5 half of them, others in each epoch.
    """

    dataset: Dataset
    weight: float
