"""Part of the examples kept apart for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import TrainError
from .dataset import Concatenation, Dataset, Source, Subset
from .order import Stream, generator


def split(sources: Sequence[Source], fraction: float, seed: int) -> tuple[list[Source], Dataset]:
    """Take a fraction of the examples, chosen by the seed, out: (sources to train on, what to evaluate on).

    Each source gives the same share of its examples, whatever its weight, and keeps at least one.

    Raises:
        TrainError: one side would be empty.
    """
    sizes = [len(source.dataset) for source in sources]
    count = sum(sizes)
    held_out = max(1, round(count * fraction)) if 0 < fraction < 1 else 0
    # Rounded along the running sum, so that shares add up.
    borders = [round(held_out * part / count) if count else 0 for part in np.cumsum([0, *sizes]).tolist()]
    shares = [
        min(border - before, max(size - 1, 0))
        for size, before, border in zip(sizes, borders, borders[1:], strict=False)
    ]
    if not 0 < sum(shares) < count or held_out >= count:
        raise TrainError(
            "",
            f"cannot hold out a fraction of {fraction} of {count} examples",
            expected="at least one example on either side, and one of each source to train on",
            remedy="give more data or a separate evaluation file",
        )
    kept, held = [], []
    for number, (source, share) in enumerate(zip(sources, shares, strict=True)):
        is_held = np.zeros(len(source.dataset), dtype=bool)
        order = generator(seed, Stream.SPLIT, number).permutation(len(is_held))
        is_held[order[:share]] = True
        kept.append(Source(Subset(source.dataset, np.flatnonzero(~is_held)), source.weight))
        if share:
            held.append(Subset(source.dataset, np.flatnonzero(is_held)))
    return kept, held[0] if len(held) == 1 else Concatenation(held)
