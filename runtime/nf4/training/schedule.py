"""Learning rate over a run: linear warm-up, then constant, linear or cosine decay."""

from __future__ import annotations

import math

from ..errors import TrainError

SCHEDULES = ("cosine", "linear", "constant")


def rate_factor(step: int, *, steps: int, warmup: int, schedule: str, floor: float = 0.0) -> float:
    """The factor of the peak rate at a step.

    Args:
        step: 0 .. steps - 1.
        steps: optimizer steps of the whole run.
        warmup: steps over which the rate rises linearly; the first already moves (1 / warmup).
        schedule: what follows, one of SCHEDULES.
        floor: what linear and cosine would reach at step `steps`, from 0 to 1.

    Raises:
        TrainError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise TrainError("", "unknown schedule", expected=" or ".join(SCHEDULES), got=schedule)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    factor = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + (1.0 - floor) * factor
