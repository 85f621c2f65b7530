"""Next-token cross entropy on labelled positions only, in chunks, so that full logits never exist.

Legend: B batch, T length, H hidden size, V vocabulary, N labelled positions, C rows of a chunk. At a
vocabulary of 128 K the fp32 logits of one token take 513 KB, and as much again for their gradient;
a chunk bounds both, and the gradient takes the place of the logits. Losses are sums, so that the caller
can divide by the tokens of a whole step and accumulation over micro-batches gives what one large batch gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..data.batches import IGNORED, send
from ..ops import fused

LOGIT_BYTES = 8 << 20  # logits of a chunk in fp32: within a CPU's caches, yet enough rows for matrix products
# On a GPU, in their own dtype: it needs hundreds of rows at large vocabularies to be busy.
CUDA_LOGIT_BYTES = 256 << 20

Head = Callable[[Tensor], Tensor]


def labelled_positions(hidden_BTH: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict a label, [N, H], and those labels, [N].

    The state at position t predicts the token at t + 1; labels stand at their own position. They may be on
    the CPU while the states are on a GPU: then nothing waits for the GPU to count them.
    """
    targets = labels_BT[:, 1:]
    wanted = targets != IGNORED
    batch, length = labels_BT.shape
    at_BT = torch.arange(batch * length, device=labels_BT.device).view(batch, length)
    rows, device = at_BT[:, :-1][wanted], hidden_BTH.device
    return _Rows.apply(hidden_BTH.flatten(0, 1), send(rows, device)), send(targets[wanted], device)


class _Rows(torch.autograd.Function):
    """x_MH[rows] of different rows: without that promise, torch's backward sorts them."""

    @staticmethod
    def forward(ctx: Any, x_MH: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x_MH.shape
        return x_MH.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad_NH.new_zeros(ctx.shape).index_copy_(0, rows, grad_NH), None


def loss_sum(head: Head, hidden_NH: Tensor, targets_N: Tensor, vocab_size: int) -> float:
    """Sum of the negative log-likelihoods, in nats; no gradient."""
    total = hidden_NH.new_zeros((), dtype=torch.float64)  # on the device: one wait, at the end
    with torch.no_grad():
        for hidden, targets in _chunks(hidden_NH, targets_N, vocab_size):
            total += fused.cross_entropy(head(hidden), targets).sum(dtype=torch.float64)
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
        hidden_NH: hidden states with a gradient function that does not need their values, which are lost.
        targets_N: int64 tokens to predict.
        vocab_size: V.
        scale: usually 1 / labelled tokens of the step.
    """
    gradient_NH = hidden_NH.detach()
    total = gradient_NH.new_zeros((), dtype=torch.float64)
    for hidden, targets in _chunks(gradient_NH, targets_N, vocab_size):
        total += _backward_chunk(head, hidden, targets, scale)
    if hidden_NH.requires_grad:  # not when only the head is trained
        hidden_NH.backward(gradient_NH)
    return total


def _backward_chunk(head: Head, hidden_CH: Tensor, targets_C: Tensor, scale: float) -> Tensor:
    """The chunk's loss; its gradient takes the place of its hidden states."""
    rows = hidden_CH.detach().clone().requires_grad_()
    logits = head(rows)
    gradient = logits.detach()  # the same memory: no backward of a linear layer reads its output
    root = _WithGradient.apply(logits, gradient)
    loss = fused.cross_entropy(gradient, targets_C, gradient_scale=scale).sum(dtype=torch.float64)
    root.backward()
    assert rows.grad is not None
    hidden_CH.copy_(rows.grad)
    return loss


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient for the logits is what `gradient` holds when backward begins.

    torch would take it through `logits.backward(gradient)` too, but then the first thing that its thread does
    on a GPU may be a matrix product, and cuBLAS warns where it finds no context.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        torch.zeros_like(grads[0])  # any kernel: it makes the context for this thread
        return ctx.gradient, None


def _chunks(hidden_NH: Tensor, targets_N: Tensor, vocab_size: int) -> list[tuple[Tensor, Tensor]]:
    if hidden_NH.is_cuda:
        rows = CUDA_LOGIT_BYTES // (hidden_NH.element_size() * vocab_size)
    else:
        rows = LOGIT_BYTES // (4 * vocab_size)
    rows = max(1, rows)
    return list(zip(hidden_NH.split(rows), targets_N.split(rows), strict=True))
