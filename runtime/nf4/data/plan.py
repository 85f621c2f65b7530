"""What each optimizer step is made of: a function of sources, options, seed and the step's number.

The epochs' rows form one endless stream, of which every step takes the next `batch * accumulate`; a row is an
example or, packed, a bin of them. So a step may span the border of two epochs, and all steps are full but the
last one of a run whose length is given in epochs, which ends exactly there.

Without length grouping, what a step holds depends on the product of `batch` and `accumulate` only, and so
does, with a loss that is averaged over the tokens of the whole step, what it does to the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import TrainError
from .batches import Batch, make_batch, pack_batch
from .dataset import Concatenation, Source
from .order import Stream, generator, grouped_by_length, members, shown_before
from .packing import best_fit

PACKINGS = ("none", "best-fit")
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 100.0  # of a source
MOST_EPOCHS = 10_000
MOST_EXAMPLES = 2**31 - 2**16  # of an epoch: their numbers are int32
MOST_TOKENS = 2**31 - 1  # of a micro-batch: places in it are int32


@dataclass(frozen=True)
class BatchOptions:
    """How examples come together.

    Attributes:
        batch, accumulate: rows of a micro-batch, and micro-batches of a step.
        seq_len: the most tokens in a row.
        packing: "none" gives each example a row, padded on the right; "best-fit" fills rows with whole
            examples, none of which sees another.
        group_by_length: make micro-batches of examples of similar length, for less padding; without packing.
    """

    batch: int = 4
    accumulate: int = 4
    seq_len: int = 512
    packing: str = "none"
    group_by_length: bool = False


class Volume(NamedTuple):
    """How much there is in a number of rows: examples, their tokens, those with loss, and the tokens that go
    through the model, padding included."""

    rows: int
    examples: int
    tokens: int
    labelled: int
    computed: int


class Batches:
    """The micro-batches of every step.

    Attributes:
        dataset: the examples of all sources, one source behind the other.
        options: as given.
        steps: optimizer steps of the run.
        rows: rows that they take.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        options: BatchOptions,
        seed: int,
        *,
        steps: int | None = None,
        epochs: float = 1.0,
    ) -> None:
        """
        Args:
            seed: at least 0.
            steps: length of the run, all of them full; else it is `epochs` passes over the data.

        Raises:
            TrainError: options that exclude each other or are out of range, no examples, an example without
                a label or longer than seq_len.
        """
        _check(options, sources, steps, epochs)
        self.options = options
        self.dataset = Concatenation([source.dataset for source in sources])
        self._sizes = [len(source.dataset) for source in sources]
        self._weights = [source.weight for source in sources]
        self._seed = seed
        self._check_examples()
        self._shown = sum(size * weight for size, weight in zip(self._sizes, self._weights, strict=True))
        if self._shown > MOST_EXAMPLES:
            got = f"{self._shown:,.0f}"
            raise TrainError("", "too many examples", expected=f"at most {MOST_EXAMPLES:,} an epoch", got=got)
        self._starts = [0]  # the first row of each epoch, where that is known from packing them all only
        self._epochs: dict[int, _Epoch] = {}  # the last two; a step may need both
        if steps is not None:
            self.rows = steps * self._rows_of_step
        else:
            whole = math.floor(epochs)
            begun = round((epochs - whole) * self._rows_in(whole)) if epochs > whole else 0
            self.rows = max(1, self._start(whole) + begun)
        self.steps = -(-self.rows // self._rows_of_step)

    def epochs_after(self, step: int) -> float:
        """How many epochs have gone by when so many steps are done."""
        row = min(step * self._rows_of_step, self.rows)
        epoch = self._epoch_of(row)
        return epoch + (row - self._start(epoch)) / max(1, self._rows_in(epoch))

    def step(self, k: int) -> list[Batch]:
        """The micro-batches of step k, counted from 0.

        Raises:
            IndexError: k is not one of `steps`.
        """
        return [self._batch(rows) for rows in self._micro_batches(k)]

    def places(self, batch: Batch) -> list[str]:
        """Where the examples of a batch are from, for messages."""
        return [self.dataset.place(index) for index in batch.examples]

    def volume(self) -> Volume:
        """The first epoch's rows counted, or those of the run if it has fewer."""
        epoch = self._epoch_of(0)
        rows = min(self.rows, self._rows_in(epoch))
        items, bounds = self._epoch(epoch).items, self._epoch(epoch).bounds
        items = items[: rows if bounds is None else int(bounds[rows])]
        lengths = self.dataset.lengths[items]
        tokens = int(lengths.sum(dtype=np.int64))
        computed = tokens
        if self.options.packing == "none":
            # As `step` has it: longest first in each step, and each micro-batch padded to its longest.
            steps = np.zeros((-(-rows // self._rows_of_step), self._rows_of_step), dtype=np.int64)
            steps.reshape(-1)[:rows] = lengths
            steps = -np.sort(-steps, axis=1)
            for at in range(0, self._rows_of_step, self.options.batch):
                padded = steps[:, at : at + self.options.batch]
                computed += int((padded[:, :1] - padded)[padded > 0].sum())
        labelled = int(self.dataset.label_counts[items].sum(dtype=np.int64))
        return Volume(rows, len(items), tokens, labelled, computed)

    def _batch(self, rows: list[np.ndarray]) -> Batch:
        indices: list[int] = np.concatenate(rows).tolist()
        make = make_batch if self.options.packing == "none" else pack_batch
        return make([self.dataset[index] for index in indices], indices)

    def _micro_batches(self, k: int) -> list[list[np.ndarray]]:
        """For each micro-batch of a step the example indices of its rows."""
        if not 0 <= k < self.steps:
            raise IndexError(f"step {k} of {self.steps}")
        first = k * self._rows_of_step
        rows = [self._row(row) for row in range(first, min(first + self._rows_of_step, self.rows))]
        if self.options.packing == "none":
            # Similar lengths side by side: less padding, and the step's sum is the same.
            rows.sort(key=lambda row: -int(self.dataset.lengths[row[0]]))
        return [rows[at : at + self.options.batch] for at in range(0, len(rows), self.options.batch)]

    def _row(self, row: int) -> np.ndarray:
        epoch = self._epoch_of(row)
        return self._epoch(epoch).row(row - self._start(epoch))

    @property
    def _rows_of_step(self) -> int:
        return self.options.batch * self.options.accumulate

    def _epoch_of(self, row: int) -> int:
        typical = self._shown if self.options.packing == "none" else max(1, self._rows_in(0))
        epoch = int(row / typical)
        while self._start(epoch) > row:
            epoch -= 1
        while self._start(epoch + 1) <= row:
            epoch += 1
        return epoch

    def _start(self, epoch: int) -> int:
        """Rows of the epochs before this one."""
        if self.options.packing == "none":
            shown = zip(self._sizes, self._weights, strict=True)
            return sum(shown_before(epoch, size, weight) for size, weight in shown)
        is_same = all(weight == int(weight) for weight in self._weights)  # each epoch has the same lengths
        while len(self._starts) <= (min(epoch, 1) if is_same else epoch):
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        return epoch * self._starts[min(epoch, 1)] if is_same else self._starts[epoch]

    def _rows_in(self, epoch: int) -> int:
        return self._start(epoch + 1) - self._start(epoch)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            made = self._make_epoch(epoch)
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs, key=lambda other: abs(other - epoch))]
            self._epochs[epoch] = made
        return self._epochs[epoch]

    def _make_epoch(self, epoch: int) -> _Epoch:
        order = members(self._sizes, self._weights, self._seed, epoch)
        generator(self._seed, Stream.ORDER, epoch).shuffle(order)
        options, lengths = self.options, self.dataset.lengths
        if options.packing == "best-fit":
            return _packed_epoch(order, lengths[order], options.seq_len, self._seed, epoch)
        if options.group_by_length:
            lead = -self._start(epoch) % options.batch
            order = grouped_by_length(
                order, lengths[order], options.batch, lead=lead, seed=self._seed, epoch=epoch
            )
        if epoch == 0 and len(order):
            _largest_first(order, lengths[order], options.batch if options.group_by_length else 1)
        return _Epoch(order)

    def _check_examples(self) -> None:
        if not len(self.dataset):
            raise TrainError("", "no examples to train on", remedy="give other data")
        lengths, labels = self.dataset.lengths, self.dataset.label_counts
        if not labels.any():
            raise TrainError(
                "",
                "every label is masked: not one token of the training data carries loss",
                remedy="raise the sequence length, or let the loss be on more than the answers",
            )
        wrong = (labels < 1) | (lengths > self.options.seq_len)
        if wrong.any():
            index = int(wrong.argmax())
            raise TrainError(
                self.dataset.place(index),
                "unusable example",
                expected=f"at most {self.options.seq_len} tokens, at least one with loss",
                got=f"{lengths[index]} tokens, {labels[index]} with loss",
            )


@dataclass(frozen=True)
class _Epoch:
    """The rows of an epoch: items[bounds[i] : bounds[i + 1]], or items[i] alone where there are no bounds."""

    items: np.ndarray
    bounds: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.items) if self.bounds is None else len(self.bounds) - 1

    def row(self, i: int) -> np.ndarray:
        """Example indices of a row."""
        if self.bounds is None:
            return self.items[i : i + 1]
        return self.items[self.bounds[i] : self.bounds[i + 1]]


def _packed_epoch(order: np.ndarray, lengths: np.ndarray, capacity: int, seed: int, epoch: int) -> _Epoch:
    """Bins in random order: packing puts those with the longest examples first."""
    packing = best_fit(lengths, capacity)
    sizes = np.diff(packing.bounds)
    mixed = generator(seed, Stream.ROWS, epoch).permutation(len(sizes))
    bounds = np.concatenate(([0], np.cumsum(sizes[mixed])))
    from_to = np.repeat(packing.bounds[:-1][mixed] - bounds[:-1], sizes[mixed])
    from_to += np.arange(len(order))
    return _Epoch(order[packing.items[from_to]], bounds)


def _largest_first(order: np.ndarray, lengths: np.ndarray, size: int) -> None:
    """Exchange the first `size` examples, a micro-batch, with those that the longest one is among: if memory
    does not suffice, that shows at once."""
    first = int(lengths.argmax()) // size * size
    if first + size <= len(order):
        there = order[first : first + size].copy()
        order[first : first + size] = order[:size]
        order[:size] = there


def _check(options: BatchOptions, sources: Sequence[Source], steps: int | None, epochs: float) -> None:
    limits: dict[str, tuple[float, float, float]] = {
        "batch": (options.batch, 1, MOST_TOKENS),
        "accumulate": (options.accumulate, 1, MOST_TOKENS),
        "seq_len": (options.seq_len, 2, MOST_TOKENS),
        "steps": (1 if steps is None else steps, 1, math.inf),
        "epochs": (epochs, 0, MOST_EPOCHS),
    }
    for name, (value, least, most) in limits.items():
        if not least <= value <= most or not value:
            expected = f"above 0, at most {most:,}" if not least else f"{least:,} to {most:,}"
            raise TrainError("", f"bad {name}", expected=expected, got=value)
    if options.batch * options.seq_len > MOST_TOKENS:
        raise TrainError(
            "",
            "a micro-batch is too large",
            expected=f"at most {MOST_TOKENS:,} tokens",
            got=f"{options.batch} rows of {options.seq_len}",
            remedy="lower the batch, and accumulate more of them",
        )
    if options.packing not in PACKINGS:
        raise TrainError("", "unknown packing", expected=" or ".join(PACKINGS), got=options.packing)
    if options.packing != "none" and options.group_by_length:
        raise TrainError(
            "",
            "packing and grouping by length exclude each other",
            remedy="leave out grouping: packed rows have no padding that it could save",
        )
    for source in sources:
        if not LEAST_WEIGHT <= source.weight <= MOST_WEIGHT:
            raise TrainError("", "weight", expected=f"{LEAST_WEIGHT} to {MOST_WEIGHT:g}", got=source.weight)
