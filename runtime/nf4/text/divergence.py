"""How far a packed model's predictions are from the original's: KL divergence, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.decoder import CausalLM

_BATCH_TOKENS = 2048
_CHUNK_TOKENS = 512  # of which logits of both models are in memory at once


@dataclass(frozen=True)
class Divergence:
    """Over `tokens` predicted tokens, in nats.

    Attributes:
        kl: mean of KL(original || other), over the whole vocabulary at each token.
        kl_error: standard error of that mean, windows taken as independent.
        nll, original_nll: mean negative log-likelihoods; perplexity is exp of one.
        same_choice: share of the tokens where both models' likeliest next token is the same.
    """

    tokens: int
    kl: float
    kl_error: float
    nll: float
    original_nll: float
    same_choice: float


def divergence(
    original: CausalLM, other: CausalLM, windows: Tensor, progress: Callable[[int, int], None] | None = None
) -> Divergence:
    """Compare two models of one vocabulary on windows of tokens, int64 [windows, length].

    Every token of a window but the first is predicted. Logits are compared in float32.
    """
    window_kl: list[float] = []
    nll = original_nll = 0.0
    same = 0
    predicted = windows.shape[1] - 1
    step = max(1, _BATCH_TOKENS // windows.shape[1])
    for start in range(0, len(windows), step):
        ids = windows[start : start + step]
        with torch.inference_mode():
            streams = [model.hidden_states(ids.to(model.device))[:, :-1] for model in (original, other)]
            for row in range(len(ids)):
                total = 0.0
                for begin in range(0, predicted, _CHUNK_TOKENS):
                    part = slice(begin, min(begin + _CHUNK_TOKENS, predicted))
                    p, q = (
                        F.log_softmax(model.head(stream[row, part]).float(), -1)
                        for model, stream in zip((original, other), streams, strict=True)
                    )
                    q = q.to(p.device)
                    total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
                    labels = ids[row, 1:][part].to(p.device)
                    original_nll += float(F.nll_loss(p, labels, reduction="sum"))
                    nll += float(F.nll_loss(q, labels, reduction="sum"))
                    same += int((p.argmax(-1) == q.argmax(-1)).sum())
                window_kl.append(total / predicted)
        if progress is not None:
            progress(len(window_kl), len(windows))
    tokens = len(window_kl) * predicted
    spread = torch.tensor(window_kl, dtype=torch.float64)
    return Divergence(
        tokens,
        float(spread.mean()),
        float(spread.std(correction=1)) / len(window_kl) ** 0.5 if len(window_kl) > 1 else 0.0,
        nll / tokens,
        original_nll / tokens,
        same / tokens,
    )
