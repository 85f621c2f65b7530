"""Chunked loss against one plain cross entropy over all positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nf4.training import loss

BATCH, LENGTH, HIDDEN, VOCAB = 3, 11, 8, 50


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, LENGTH, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    labels[0, :5] = -100
    labels[1, 7:] = -100
    head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=generator))
    return hidden, labels, head


def plain_loss(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    logits = head(hidden)[:, :-1].reshape(-1, VOCAB)
    return F.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("head_trains", [False, True])
def test_value_and_gradients_match_the_plain_loss(
    rows: int, head_trains: bool, tensors: tuple[Tensor, Tensor, nn.Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "LOGIT_BYTES", 4 * VOCAB * rows)
    hidden, labels, head = tensors
    head.requires_grad_(head_trains)
    before = hidden.clone().requires_grad_()
    expected = plain_loss(before * 2, labels, head) * 0.25
    expected.backward()
    head_gradient = None if head.weight.grad is None else head.weight.grad.clone()
    head.zero_grad()

    ours = hidden.clone().requires_grad_()
    states, targets = loss.labelled_positions(ours * 2, labels)
    loss_alone = loss.loss_sum(head, states, targets, VOCAB)
    widest = 0

    def counted(chunk: Tensor) -> Tensor:
        nonlocal widest
        widest = max(widest, len(chunk))
        return head(chunk)

    total = loss.backward_loss(counted, states, targets, VOCAB, scale=0.25).item()
    assert widest <= rows
    assert total * 0.25 == pytest.approx(expected.item(), rel=1e-6)  # the loss itself is taken in fp32
    torch.testing.assert_close(ours.grad, before.grad, rtol=1e-5, atol=1e-7)
    if head_trains:
        torch.testing.assert_close(head.weight.grad, head_gradient, rtol=1e-5, atol=1e-6)
    else:
        assert head.weight.grad is None
    assert loss_alone == pytest.approx(total, rel=1e-6)


def test_only_the_head_trains(tensors: tuple[Tensor, Tensor, nn.Linear]) -> None:
    hidden, labels, head = tensors
    states, targets = loss.labelled_positions(hidden, labels)
    loss.backward_loss(head, states, targets, VOCAB, scale=1.0)
    assert head.weight.grad is not None
