"""Training on a GPU that gives the same bits for the same seed.

Attention adds the gradients of queries up in whatever order its thread blocks end, unless torch is told to
wait for a fixed one. On one GPU, with one version of everything, runs are then equal bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import CUBLAS_WORKSPACE


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Inside, torch takes deterministic algorithms on a GPU; on a CPU ours and torch's are anyway.

    Warns, and goes on without, where the process multiplied on a GPU before nf4 was imported.
    """
    if device.type != "cuda":
        yield
        return
    was = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    try:
        memory.fill_uninitialized_memory = False  # nothing reads what nothing wrote
        torch.use_deterministic_algorithms(True)
        if not _products_are_allowed(device):
            torch.use_deterministic_algorithms(was, warn_only=warned_only)
            warnings.warn(
                f"this run will not be repeatable bit for bit: set {'='.join(CUBLAS_WORKSPACE)}"
                " in the environment, or import nf4 before using the GPU",
                stacklevel=3,
            )
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned_only)
        memory.fill_uninitialized_memory = filled


def _products_are_allowed(device: torch.device) -> bool:
    one = torch.ones(1, 1, device=device)
    try:
        torch.mm(one, one)
    except RuntimeError:
        return False
    return True
