"""Continuing prompts token by token, with a KV cache: a batch at once, or one prompt as a stream of text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import LoadError
from ..model.cache import KVCache
from ..model.decoder import CausalLM
from .sampling import Sampler, Sampling
from .tokenizer import Tokenizer


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    eos_ids: Collection[int] = (),
    on_step: Callable[[list[int | None]], None] | None = None,
) -> list[list[int]]:
    """Continue a batch of prompts.

    Args:
        prompts: token ids of each prompt, at least one; lengths may differ.
        max_new_tokens: the most tokens to add to each.
        sampling: how tokens are chosen; greedy by default.
        eos_ids: ids that end a text; such an id is not part of the result.
        on_step: called after every step with each prompt's new token, None where the text has ended.

    Returns:
        The new tokens of each prompt.

    Raises:
        LoadError: no prompt, an empty one, or an id outside the vocabulary.
    """
    results: list[list[int]] = [[] for _ in prompts]
    for step in generate_steps(
        model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, eos_ids=eos_ids
    ):
        for result, token in zip(results, step, strict=True):
            if token is not None:
                result.append(token)
        if on_step is not None:
            on_step(step)
    return results


def generate_steps(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos_ids: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """As `generate`, one step at a time: each prompt's new token, None from where its text has ended on."""
    ids_BT, mask_BT = _left_padded(prompts, model.config.vocab_size)
    mask: Tensor | None = None if bool(mask_BT.all()) else mask_BT.to(model.device)  # the plain causal path
    ids_BT = ids_BT.to(model.device)
    sampler = Sampler(sampling or Sampling())
    batch, length = ids_BT.shape
    capacity = length + max_new_tokens
    cache = KVCache(model.config, batch, capacity=capacity, dtype=model.dtype, device=model.device)
    running = [True] * batch
    for _ in range(max_new_tokens):
        # Not around the yield: the caller's code must not run in inference mode.
        with torch.inference_mode():
            hidden_BTH = model.hidden_states(ids_BT, attention_mask=mask, cache=cache)
            tokens_B = sampler(model.head(hidden_BTH[:, -1]))
            ids_BT = tokens_B[:, None]
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(batch, 1)), dim=1)
        tokens = tokens_B.tolist()
        running = [on and token not in eos_ids for on, token in zip(running, tokens, strict=True)]
        if not any(running):
            return
        yield [token if on else None for on, token in zip(running, tokens, strict=True)]


def stream_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
) -> Iterator[str]:
    """Continue a text, piece by piece as tokens come; the pieces are whole characters.

    Raises:
        LoadError: the prompt has no tokens, or one outside the model's vocabulary.
    """
    ids = tokenizer.encode(prompt)
    if not ids and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id]
    decoder = tokenizer.stream(ids)
    steps = generate_steps(
        model, [ids], max_new_tokens=max_new_tokens, sampling=sampling, eos_ids=tokenizer.eos_ids
    )
    for (token,) in steps:
        piece = decoder.push(token) if token is not None else ""
        if piece:
            yield piece
    rest = decoder.finish()
    if rest:
        yield rest


def _left_padded(prompts: Sequence[Sequence[int]], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [B, T], padded so that the last tokens of all prompts stand in one column."""
    if not prompts:
        raise LoadError("", "no prompt to continue")
    length = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise LoadError("", "the prompt has no tokens", remedy="begin it with at least one word")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            got = f"{min(prompt)} to {max(prompt)}"
            expected = f"0 to {vocab_size - 1}"
            remedy = "the tokenizer is not the model's"
            raise LoadError("", "token ids of the prompt", expected=expected, got=got, remedy=remedy)
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask
