"""Examples side by side in tensors: padded, a row each, or packed end to end into one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..model.attention import Segments
from .dataset import Example

IGNORED = -100  # label of a position without loss, torch's and transformers' convention


@dataclass(frozen=True)
class Batch:
    """Examples for one pass forward and backward.

    Attributes:
        input_ids: int64 [B, T].
        labels: int64 [B, T], the token at its own position, -100 where it has no loss.
        attention_mask: bool [B, T], false on padding, which stands on the right; None where there is none.
        segments: where the examples of a packed row begin, B = 1; None where each has a row of its own.
        examples: their indices in the dataset, in order.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    segments: Segments | None = None
    examples: Sequence[int] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; nothing waits for the copy."""
        mask = None if self.attention_mask is None else send(self.attention_mask, device)
        segments = self.segments
        if segments is not None:
            segments = replace(segments, bounds=send(segments.bounds, device))
        return Batch(send(self.input_ids, device), send(self.labels, device), mask, segments, self.examples)

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


def make_batch(examples: Sequence[Example], indices: Sequence[int] = ()) -> Batch:
    """Examples in a row each, padded on the right to the longest of them."""
    longest = max(len(example.ids) for example in examples)
    shape = (len(examples), longest)
    # Any id in the vocabulary does for padding: nothing attends to it and nothing is predicted from it.
    input_ids = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    real = np.zeros(shape, dtype=bool)
    for row, (ids, labelled) in enumerate(examples):
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)][labelled] = ids[labelled]
        real[row, : len(ids)] = True
    mask = None if real.all() else torch.from_numpy(real)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), mask, examples=indices)


def pack_batch(examples: Sequence[Example], indices: Sequence[int] = ()) -> Batch:
    """Examples end to end in one row, each a document of its own: nothing is padded."""
    input_ids = np.concatenate([example.ids for example in examples]).astype(np.int64)
    labelled = np.concatenate([example.labelled for example in examples])
    labels = np.where(labelled, input_ids, IGNORED)
    segments = Segments.of([len(example.ids) for example in examples])
    row, labels_row = torch.from_numpy(input_ids)[None], torch.from_numpy(labels)[None]
    return Batch(row, labels_row, None, segments, indices)
