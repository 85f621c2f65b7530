"""Token-level perplexity of a text, by a protocol that two programs can agree on.

The text is split at the document separator; each document is encoded with the special tokens the tokenizer
adds; all tokens are laid end to end and cut into consecutive windows. With a BOS token, a window is BOS and
window - 1 tokens, all of them predicted; without one, it is `window` tokens, all but the first predicted. The
last window is left out unless it is complete or the only one. Perplexity is exp of the mean negative
log-likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..data.documents import DOCUMENT_SEPARATOR
from ..errors import LoadError
from ..model.decoder import CausalLM
from ..training.loss import loss_sum
from .tokenizer import Tokenizer

BATCH_TOKENS = 4096  # tokens in flight: enough rows for matrix products, little memory


@dataclass(frozen=True)
class Perplexity:
    """nll: the sum of negative log-likelihoods in nats; tokens: how many were predicted."""

    nll: float
    tokens: int

    @property
    def mean_nll(self) -> float:
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinity where that is too large for a float."""
        try:
            return math.exp(self.mean_nll)
        except OverflowError:
            return math.inf


def encode_documents(tokenizer: Tokenizer, text: str, separator: str = DOCUMENT_SEPARATOR) -> list[int]:
    """Token ids of all documents of a text, end to end; empty documents count for nothing."""
    documents = text.split(separator) if separator else [text]
    return [token for document in documents if document.strip() for token in tokenizer.encode(document)]


def perplexity(
    model: CausalLM,
    token_ids: Sequence[int],
    window: int,
    *,
    bos_id: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a model on tokens.

    Args:
        token_ids: of `encode_documents`.
        window: tokens the model sees at once, BOS included; at least 2.
        bos_id: put in front of every window; None = windows without one.
        max_tokens: stop after the windows that fit into this many predicted tokens (at least one window).
        progress: called with (tokens predicted so far, tokens in all) after every batch.

    Raises:
        LoadError: a window too short, fewer than two tokens, or an id outside the vocabulary.
    """
    windows = windows_of(token_ids, window, bos_id)
    if max_tokens is not None:
        windows = windows[: max(1, max_tokens // (windows.shape[1] - 1))]
    return perplexity_of(model, windows, progress)


def perplexity_of(
    model: CausalLM, windows: torch.Tensor, progress: Callable[[int, int], None] | None = None
) -> Perplexity:
    """Perplexity of a model on windows, int64 [windows, length]: of every token but each one's first.

    Raises:
        LoadError: an id outside the vocabulary.
    """
    check_vocabulary(model, windows)
    predicted = windows.shape[1] - 1
    nll, tokens = 0.0, 0
    for batch in windows.split(max(1, BATCH_TOKENS // windows.shape[1])):
        ids_BT = batch.to(model.device)
        with torch.inference_mode():
            hidden_NH = model.hidden_states(ids_BT)[:, :-1].flatten(0, 1)
            nll += loss_sum(model.head, hidden_NH, ids_BT[:, 1:].flatten(), model.config.vocab_size)
        tokens += ids_BT.shape[0] * predicted
        if progress is not None:
            progress(tokens, windows.shape[0] * predicted)
    return Perplexity(nll, tokens)


def check_vocabulary(model: CausalLM, windows: torch.Tensor) -> None:
    """Raise LoadError for an id that the model has no embedding of."""
    vocab_size = model.config.vocab_size
    if not 0 <= int(windows.min()) <= int(windows.max()) < vocab_size:
        got = f"{int(windows.min())} to {int(windows.max())}"
        remedy = "the tokenizer is not the model's"
        raise LoadError("", "token ids", expected=f"0 to {vocab_size - 1}", got=got, remedy=remedy)


def evenly(windows: torch.Tensor, count: int) -> torch.Tensor:
    """At most so many of the windows, taken evenly over all of them."""
    if len(windows) <= count:
        return windows
    return windows[torch.arange(count) * len(windows) // count]


def windows_of(token_ids: Sequence[int], window: int, bos_id: int | None) -> torch.Tensor:
    """Tokens cut into windows, int64 [windows, length], BOS in front where there is one.

    Raises:
        LoadError: a window too short, or fewer than two tokens.
    """
    head = 0 if bos_id is None else 1
    if window < 2:
        raise LoadError("", "window", expected="at least 2 tokens", got=window)
    if len(token_ids) + head < 2:
        raise LoadError("", "the text is too short", expected="at least two tokens", got=len(token_ids))
    length = min(window - head, len(token_ids))
    count = len(token_ids) // length
    windows = torch.tensor(token_ids[: count * length], dtype=torch.int64).view(count, length)
    if bos_id is None:
        return windows
    return torch.cat((torch.full((count, 1), bos_id), windows), dim=1)
