"""Learning rate schedules at their corners, and against torch's own."""

from __future__ import annotations

import itertools

import pytest
import torch

from nf4.errors import TrainError
from nf4.training.schedule import SCHEDULES, rate_factor


def test_warmup_rises_to_the_peak_and_moves_at_once() -> None:
    for schedule in SCHEDULES:
        factors = [rate_factor(step, steps=20, warmup=4, schedule=schedule) for step in range(20)]
        assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert all(later <= earlier for earlier, later in itertools.pairwise(factors[4:]))
        assert all(factor > 0 for factor in factors)


def test_matches_torch_schedulers() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for step in range(10):
        ours = rate_factor(step + 3, steps=13, warmup=3, schedule="cosine")
        assert ours == pytest.approx(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()
    assert rate_factor(8, steps=13, warmup=3, schedule="linear") == pytest.approx(0.5)
    assert rate_factor(12, steps=13, warmup=3, schedule="constant") == 1.0


def test_warmup_longer_than_the_run_and_unknown_schedule() -> None:
    assert rate_factor(4, steps=5, warmup=10, schedule="cosine") == 0.5
    with pytest.raises(TrainError, match="unknown schedule, expected cosine or linear or constant, got step"):
        rate_factor(0, steps=1, warmup=0, schedule="step")
