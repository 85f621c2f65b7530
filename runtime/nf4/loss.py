"""Next-token cross entropy on labelled positions only, in chunks, so that full logits never exist.

Legend: B batch, T length, H hidden size, V vocabulary, N labelled positions, C rows of a chunk. At a
vocabulary of 128 K the fp32 logits of one token take 513 KB, and as much again for their gradient;
a chunk bounds both. Losses are sums, so that the caller can divide by the tokens of a whole step
and accumulation over micro-batches gives what one large batch gives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import IGNORED

# fp32 logits of a chunk: within a CPU's caches, yet enough rows for matrix products
LOGIT_BYTES = 8 << 20
CUDA_LOGIT_BYTES = 256 << 20  # a GPU needs hundreds of rows at large vocabularies to be busy

Head = Callable[[Tensor], Tensor]


def labelled_positions(hidden_BTH: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict a label, [N, H], and those labels, [N].

    The state at position t predicts the token at t + 1; labels stand at their own position.
    """
    targets = labels_BT[:, 1:]
    wanted = targets != IGNORED
    return hidden_BTH[:, :-1][wanted], targets[wanted]


def loss_sum(head: Head, hidden_NH: Tensor, targets_N: Tensor, vocab_size: int) -> float:
    """Sum of the negative log-likelihoods, in nats; no gradient."""
    total = hidden_NH.new_zeros((), dtype=torch.float64)  # on the device: one wait, at the end
    with torch.no_grad():
        for hidden, targets in _chunks(hidden_NH, targets_N, vocab_size):
            total += F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    return total.item()


def backward_loss(
    head: Head, hidden_NH: Tensor, targets_N: Tensor, vocab_size: int, *, scale: float
) -> Tensor:
    """Sum of the negative log-likelihoods, in nats, after backward of `scale` times that sum.

    The sum is float64, without shape, on the device of the states: nothing waits for it.

    Each chunk goes forward and backward before the next one, down to the hidden states and to whatever
    the head trains; one backward through the rest of the model follows.

    Args:
        head: hidden states [C, H] -> logits [C, V].
        hidden_NH: hidden states with a gradient function.
        targets_N: int64 tokens to predict.
        vocab_size: V.
        scale: usually 1 / labelled tokens of the step.
    """
    leaf = hidden_NH.detach().requires_grad_()
    gradient = torch.zeros_like(leaf)
    total = leaf.new_zeros((), dtype=torch.float64)
    start = 0
    for hidden, targets in _chunks(leaf, targets_N, vocab_size):
        rows = hidden.detach().requires_grad_()
        loss = F.cross_entropy(head(rows).float(), targets, reduction="sum")
        (loss * scale).backward()
        if rows.grad is not None:
            gradient[start : start + len(rows)] = rows.grad
        start += len(rows)
        total += loss.detach()
    if hidden_NH.requires_grad:  # not when only the head is trained
        hidden_NH.backward(gradient)
    return total


def _chunks(hidden_NH: Tensor, targets_N: Tensor, vocab_size: int) -> list[tuple[Tensor, Tensor]]:
    most = CUDA_LOGIT_BYTES if hidden_NH.is_cuda else LOGIT_BYTES
    rows = max(1, most // (4 * vocab_size))
    return list(zip(hidden_NH.split(rows), targets_N.split(rows), strict=True))
