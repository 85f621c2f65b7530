"""Part of the examples kept apart for evaluation."""

from __future__ import annotations

import numpy as np

from ..errors import TrainError
from .dataset import Dataset, Subset

_SPLIT_STREAM = 1  # keeps random streams of one seed apart


def split_dataset(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Take a fraction of the examples, chosen by the seed, out for evaluation: (train, eval).

    Raises:
        TrainError: one side would be empty.
    """
    count = len(dataset)
    held_out = max(1, round(count * fraction))
    if not 0 < fraction < 1 or held_out >= count:
        raise TrainError(
            "",
            f"cannot hold out a fraction of {fraction} of {count} examples",
            expected="at least one example on either side",
            remedy="give more data or a separate evaluation file",
        )
    is_held = np.zeros(count, dtype=bool)
    is_held[np.random.default_rng([seed, _SPLIT_STREAM]).permutation(count)[:held_out]] = True
    return Subset(dataset, np.flatnonzero(~is_held), dataset.report), Subset(dataset, np.flatnonzero(is_held))
