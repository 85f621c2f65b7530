"""Choosing the next token from logits: the likeliest, or at random by temperature, top-k and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoadError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: only the k likeliest tokens may come; 0 = all.
        top_p: only the fewest likeliest tokens whose probabilities reach p (arXiv 1904.09751); 1 = all.
        seed: of the random choices; the same seed, prompts and settings give the same tokens.

    Raises:
        LoadError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise LoadError("", "temperature", expected="0 or more", got=self.temperature)
        if self.top_k < 0:
            raise LoadError("", "top-k", expected="0 or more", got=self.top_k)
        if not 0 < self.top_p <= 1:
            raise LoadError("", "top-p", expected="over 0 and up to 1", got=self.top_p)


class Sampler:
    """Draws tokens by a `Sampling`, with a random generator of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Next token ids, int64 [B]. Probabilities are computed in fp32."""
        if self.sampling.temperature == 0:
            return logits_BV.argmax(dim=-1)
        probabilities_BV, ids_BV = self._candidates(logits_BV.float())
        # Drawn on the CPU: a seed means the same choices on every device.
        chosen_B1 = torch.multinomial(probabilities_BV.cpu(), 1, generator=self._generator)
        return ids_BV.gather(1, chosen_B1.to(ids_BV.device)).squeeze(1)

    def _candidates(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (not normalised) and ids of the tokens that may come, likeliest first."""
        sampling = self.sampling
        count = min(sampling.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
        values_BK, ids_BK = (logits_BV / sampling.temperature).topk(count, dim=-1)
        probabilities_BK = values_BK.softmax(dim=-1)
        before_BK = probabilities_BK.cumsum(dim=-1) - probabilities_BK
        return probabilities_BK.masked_fill(before_BK >= sampling.top_p, 0.0), ids_BK
