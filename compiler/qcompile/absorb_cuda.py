"""Corrections of `absorb` on a GPU, without singular values of large matrices.

With H = L LT, the error of a weight at the output is that of D L, and its best part of a rank is U UT D: the
columns of U are the first left singular vectors of D L, by way of a matrix of the weight's smaller side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .feedback_cuda import Known


@dataclass(frozen=True)
class LowRank:
    """A [rank, k] and B [n, rank], float32; B A is added to the weight."""

    a: Tensor
    b: Tensor

    def product(self) -> Tensor:
        """B A, float32 [n, k]."""
        return self.b @ self.a


class Corrections:
    """As `absorb.Corrections`: finds corrections of one weight."""

    def __init__(self, moment: Known, rank: int) -> None:
        self._root = torch.linalg.cholesky(moment.h.double())
        self._rank = rank

    def of(self, difference: Tensor) -> LowRank:
        """The correction of a weight's error, float32 [n, k]. A and B share the singular values."""
        n, k = difference.shape
        wide = difference.double()
        seen = wide @ self._root
        if n <= k:
            squares, vectors = torch.linalg.eigh(seen @ seen.T)
            values, u = self._first(squares), vectors[:, -self._rank :].flip(1)
        else:
            squares, vectors = torch.linalg.eigh(seen.T @ seen)
            values = self._first(squares)
            u = (seen @ vectors[:, -self._rank :].flip(1)) * _inverse(values)
        shared = values.sqrt()
        a = _inverse(shared)[:, None] * (u.T @ wide)
        return LowRank(a.float(), (u * shared).float())

    def _first(self, squares: Tensor) -> Tensor:
        """The largest singular values, falling, from all squares, rising."""
        return squares[-self._rank :].flip(0).clamp(min=0).sqrt()


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1 / values, 0.0)
