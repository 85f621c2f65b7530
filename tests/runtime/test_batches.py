"""Examples -> batches: order, padding, labels; and what is held out for evaluation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nf4.data.batches import IGNORED, example_order, make_batch
from nf4.data.dataset import Dataset, Example, ListDataset
from nf4.data.split import split_dataset
from nf4.errors import TrainError


def example(ids: list[int], first_label: int = 1) -> Example:
    return Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= first_label)


def numbered(count: int) -> Dataset:
    return ListDataset([example([1, 10 + i]) for i in range(count)])


def test_split_is_given_by_the_seed_and_loses_nothing() -> None:
    def ids(dataset: Dataset) -> list[int]:
        return [int(example.ids[1]) for example in dataset]

    train, held = split_dataset(numbered(50), 0.1, seed=3)
    assert len(ids(held)) == 5
    assert sorted(ids(train) + ids(held)) == list(range(10, 60))
    assert ids(split_dataset(numbered(50), 0.1, seed=3)[1]) == ids(held)
    assert ids(split_dataset(numbered(50), 0.1, seed=4)[1]) != ids(held)
    assert len(split_dataset(numbered(2), 0.01, seed=0)[1]) == 1
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
    examples = [example([1, 5, 6, 7], first_label=2), example([1, 8])]
    batch = make_batch(examples)
    assert batch.input_ids.tolist() == [[1, 5, 6, 7], [1, 8, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 6, 7], [IGNORED, 8, IGNORED, IGNORED]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.num_labels == 3
    assert make_batch(examples[:1]).attention_mask is None


def test_labels_may_stand_anywhere() -> None:
    ids = np.array([1, 5, 6, 7, 8], dtype=np.int32)
    batch = make_batch([Example(ids, np.array([False, True, False, False, True]))])
    assert batch.labels.tolist() == [[IGNORED, 5, IGNORED, IGNORED, 8]]
