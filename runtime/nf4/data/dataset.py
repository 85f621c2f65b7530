"""What files become and batches are made of: token sequences with labels, read by their index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


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
    """

    path: str
    rows: int
    examples: int
    truncated: int
    dropped: int
    tokens: int
    labelled: int


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

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def num_labels(self) -> int:
        """Tokens that carry loss."""
        return int(self.label_counts.sum(dtype=np.int64))


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
    """Some examples of another dataset, by their indices there."""

    def __init__(self, dataset: Dataset, indices: np.ndarray, report: DataReport | None = None) -> None:
        self._dataset, self._indices = dataset, indices
        self.lengths = dataset.lengths[indices]
        self.label_counts = dataset.label_counts[indices]
        self.report = DataReport() if report is None else report

    def __getitem__(self, index: int) -> Example:
        return self._dataset[int(self._indices[index])]


class Source(NamedTuple):
    """One part of the training data.

    weight: how often an epoch shows each of its examples: 2.0 twice; 0.5 half of them, others in each epoch.
    """

    dataset: Dataset
    weight: float
