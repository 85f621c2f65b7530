"""How far a packed model's predictions are from the original's: KL divergence, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LoadError
from ..model.decoder import CausalLM
from .perplexity import Perplexity, check_vocabulary

_BATCH_TOKENS = 2048
_CHUNK_TOKENS = 512  # of which logits of both models are in memory at once


@dataclass(frozen=True)
class Divergence:
    """Over `tokens` predicted tokens, in nats; windows have the same number of them.

    Attributes:
        kl: mean of KL(original || other), over the whole vocabulary at each token.
        kl_error: standard error of that mean, windows taken as independent.
        nll, original_nll: mean negative log-likelihoods; perplexity is exp of one.
        same_choice: share of the tokens where both models' likeliest next token is the same.
        window_kl, window_nll, window_original_nll: means of each window, for comparisons window by window.
    """

    tokens: int
    kl: float
    kl_error: float
    nll: float
    original_nll: float
    same_choice: float
    window_kl: tuple[float, ...]
    window_nll: tuple[float, ...]
    window_original_nll: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinity where that is too large for a float."""
        return Perplexity(self.nll * self.tokens, self.tokens).perplexity

    @property
    def original_perplexity(self) -> float:
        """The same of the original."""
        return Perplexity(self.original_nll * self.tokens, self.tokens).perplexity


def divergence(
    original: CausalLM, other: CausalLM, windows: Tensor, progress: Callable[[int, int], None] | None = None
) -> Divergence:
    """Compare two models of one vocabulary on windows of tokens, int64 [windows, length].

    Every token of a window but the first is predicted. Logits are compared in float32.

    Args:
        progress: called with (windows done, windows in all).

    Raises:
        LoadError: vocabularies of different sizes, or a token outside.
    """
    if original.config.vocab_size != other.config.vocab_size:
        expected, got = original.config.vocab_size, other.config.vocab_size
        raise LoadError("", "vocabularies of different sizes", expected=expected, got=got)
    check_vocabulary(original, windows)
    sums = torch.empty(len(windows), 3, dtype=torch.float64)  # KL, both negative log-likelihoods
    same = 0
    predicted = windows.shape[1] - 1
    step = max(1, _BATCH_TOKENS // windows.shape[1])
    for start in range(0, len(windows), step):
        ids = windows[start : start + step]
        with torch.inference_mode():
            streams = [model.hidden_states(ids.to(model.device))[:, :-1] for model in (original, other)]
            for row in range(len(ids)):
                total = torch.zeros(3, dtype=torch.float64)
                for begin in range(0, predicted, _CHUNK_TOKENS):
                    part = slice(begin, min(begin + _CHUNK_TOKENS, predicted))
                    p, q = (
                        F.log_softmax(model.head(stream[row, part]).float(), -1)
                        for model, stream in zip((original, other), streams, strict=True)
                    )
                    q = q.to(p.device)
                    labels = ids[row, 1:][part, None].to(p.device)
                    total[0] += float((p.exp() * (p - q)).sum(dtype=torch.float64))
                    total[1] -= float(q.gather(-1, labels).sum(dtype=torch.float64))
                    total[2] -= float(p.gather(-1, labels).sum(dtype=torch.float64))
                    same += int((p.argmax(-1) == q.argmax(-1)).sum())
                sums[start + row] = total
        if progress is not None:
            progress(start + len(ids), len(windows))
    means = sums / predicted
    kl, nll, original_nll = means.T.tolist()
    spread = float(means[:, 0].std(correction=1)) / len(kl) ** 0.5 if len(kl) > 1 else 0.0
    return Divergence(
        tokens=len(kl) * predicted,
        kl=float(means[:, 0].mean()),
        kl_error=spread,
        nll=float(means[:, 1].mean()),
        original_nll=float(means[:, 2].mean()),
        same_choice=same / (len(kl) * predicted),
        window_kl=tuple(kl),
        window_nll=tuple(nll),
        window_original_nll=tuple(original_nll),
    )
