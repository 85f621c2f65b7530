"""The norm of the residual stream and of heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, the mean of squares in fp32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size], normed, in its dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
