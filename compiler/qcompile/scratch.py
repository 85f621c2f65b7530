"""Room for the block scales of the tensors at work, under one budget, whatever their sizes and number."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nf4format.codebook import BLOCK
from nf4format.scratch_file import float32_in_a_file

# Anonymous memory that scales may take, all threads together; chunk buffers come on top of it.
BUDGET_BYTES = 384 << 20


class Scratch:
    """Hands out arrays for scales; a thread waits while others hold more than the budget leaves.

    The largest fused experts have 10^10 values, 700 MB of scales: those are given an unlinked file instead.
    """

    def __init__(self, directory: Path, budget_bytes: int = BUDGET_BYTES) -> None:
        """`directory`: where a file may be made, on a disk with room."""
        self._directory, self._budget = directory, budget_bytes
        self._used = 0
        self._freed = threading.Condition()

    @contextmanager
    def scales(self, num_values: int) -> Iterator[np.ndarray]:
        """float32 [ceil(num_values / 64)], not initialised, until the end of the block.

        The 8-bit scales that are made from it, a quarter of its size, are counted too.
        """
        num_blocks = -(-num_values // BLOCK)
        in_memory = 5 * num_blocks <= self._budget
        needed = (5 if in_memory else 1) * num_blocks
        with self._freed:
            # Whoever is alone may start, so that a tensor larger than the budget is not refused.
            self._freed.wait_for(lambda: not self._used or self._used + needed <= self._budget)
            self._used += needed
        try:
            if in_memory:
                yield np.empty(num_blocks, np.float32)
            else:
                yield float32_in_a_file(num_blocks, self._directory)
        finally:
            with self._freed:
                self._used -= needed
                self._freed.notify_all()
