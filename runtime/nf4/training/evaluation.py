"""The loss on data kept apart, and what follows from the losses of a run: which is best, when to give up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from ..data.batches import make_batch
from ..data.dataset import Dataset
from ..model.decoder import CausalLM
from .loss import labelled_positions, loss_sum


def evaluate(
    model: CausalLM, dataset: Dataset, batch_size: int, should_stop: Callable[[], bool] = lambda: False
) -> float | None:
    """Mean negative log-likelihood, in nats, of the labelled tokens; dropout off, the model's mode kept.

    Args:
        should_stop: asked before each batch; where it says so, the result is None.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    order = dataset.lengths.argsort(kind="stable").tolist()  # little padding
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                if should_stop():
                    return None
                batch = make_batch([dataset[i] for i in order[start : start + batch_size]]).to(model.device)
                hidden = model.hidden_states(batch.input_ids)  # padding is on the right, where nothing looks
                labelled = labelled_positions(hidden, batch.labels)
                total += loss_sum(model.head, *labelled, model.config.vocab_size)
    finally:
        model.train(was_training)
    return total / dataset.num_labels


def perplexity_of(loss: float) -> float:
    """exp of a mean negative log-likelihood; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def best_step(evaluations: Mapping[int, float]) -> int | None:
    """The step with the lowest loss, the first of equals; step 0, before training, does not count."""
    trained = {step: loss for step, loss in evaluations.items() if step > 0}
    return min(trained, key=lambda step: (trained[step], step), default=None)


def gives_up_at(evaluations: Mapping[int, float], patience: int, min_delta: float) -> int | None:
    """The step at which early stopping ends a run with these evaluations, or None.

    That is where `patience` evaluations in a row were not better by more than min_delta than the best before
    them; the one before training counts as a loss to beat. It follows from the evaluations alone, so that a
    run that goes on from a checkpoint stops where one never stopped does.

    Args:
        evaluations: step -> loss, in the order of the steps.
        patience: 0 never gives up.
    """
    best, waited = math.inf, 0
    for step, loss in evaluations.items():
        if loss < best - min_delta or best == math.inf:
            best, waited = loss, 0
        else:
            waited += 1
        if patience and waited >= patience:
            return step
    return None
