"""Examples -> tensors: padding, packed rows, labels."""

from __future__ import annotations

import numpy as np
import torch

from nf4.data.batches import IGNORED, make_batch, pack_batch
from nf4.data.dataset import Example


def example(ids: list[int], first_label: int = 1) -> Example:
    return Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= first_label)


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


def test_packed_examples_stand_end_to_end_in_one_row() -> None:
    examples = [example([1, 5, 6, 7], first_label=2), example([1, 8]), example([1, 9, 4])]
    batch = pack_batch(examples, [7, 3, 5])
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 1, 8, 1, 9, 4]]
    i = IGNORED
    assert batch.labels.tolist() == [[i, i, 6, 7, i, 8, i, 9, 4]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.attention_mask is None
    assert batch.segments is not None
    assert batch.segments.bounds.tolist() == [0, 4, 6, 9]
    assert (batch.segments.longest, batch.segments.tokens) == (4, 9)
    assert batch.segments.positions().tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert (batch.num_tokens, batch.num_labels, batch.examples) == (9, 5, [7, 3, 5])


def test_a_batch_moves_with_everything_it_holds() -> None:
    examples = [example([1, 5, 6]), example([1, 8])]
    packed = pack_batch(examples, [1, 0]).to(torch.device("meta"))
    padded = make_batch(examples, [1, 0]).to(torch.device("meta"))
    assert packed.segments is not None
    assert padded.attention_mask is not None
    moved = [packed.input_ids, packed.labels, packed.segments.bounds, padded.attention_mask, padded.labels]
    assert {tensor.device.type for tensor in moved} == {"meta"}
    assert packed.examples == padded.examples == [1, 0]
