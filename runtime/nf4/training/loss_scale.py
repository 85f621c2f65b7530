"""Dynamic loss scaling (arXiv 1710.03740): keeps gradients inside the range of fp16.

The loss is multiplied by the scale before backward, and gradients by its reciprocal in the update, so
small ones do not vanish. A scale too large makes some infinite: that step is left out and the scale
halved. After many steps without, it is doubled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import TrainError

GOOD_STEPS = 2000  # until the scale is doubled
LARGEST = 2.0**24


@dataclass
class LossScale:
    """The scale, a power of two, so that scaling rounds nothing; and the steps since it last changed."""

    value: float = 2.0**16
    good_steps: int = 0

    def succeeded(self) -> None:
        """All gradients of a step were finite."""
        self.good_steps += 1
        if self.good_steps == GOOD_STEPS:
            self.value, self.good_steps = min(2 * self.value, LARGEST), 0

    def overflowed(self) -> None:
        """Some were not.

        Raises:
            TrainError: although nothing was scaled.
        """
        if self.value <= 1:
            remedy = "lower the learning rate, or use bfloat16 or float32"
            raise TrainError("", "gradients are not finite at a loss scale of 1", remedy=remedy)
        self.value, self.good_steps = self.value / 2, 0

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another one was."""
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
