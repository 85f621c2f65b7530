"""Decoder-only transformers of the Llama shape (Llama, Mistral, Qwen2, Qwen3), driven by a ModelConfig.

Module and parameter names are those of Hugging Face checkpoints, so `CausalLM(config)` with ordinary linears
loads a transformers state_dict; `nf4.load` puts packed linears in their place.

Shapes: B batch, T new tokens, S all tokens (cached ones and new ones), H hidden, N query heads, G key/value
heads, D head size, V vocabulary. x_BTH is the residual stream. Rotary angles are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .attention import Seen, Segments, attention_bias, takes_segments
from .cache import KVCache
from .config import ModelConfig
from .layer import DecoderLayer, LinearFactory
from .layer_passes import LayerPasses
from .layer_step import Context
from .norm import RMSNorm
from .rotary import rotary_frequencies, rotary_table

if TYPE_CHECKING:
    from nf4format.container import Nf4File


class Decoder(nn.Module):
    """Embedding, layers, final norm: everything but the output head."""

    def __init__(self, config: ModelConfig, linear: LinearFactory) -> None:
        super().__init__()
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, linear) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layer_windows = config.layer_windows
        self.frequencies = rotary_frequencies(config)  # not a buffer: `.to(dtype)` must never round it
        self.passes = LayerPasses()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.passes.forget()
        return super()._apply(fn, recurse)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """The residual stream after the final norm, [B, T, H]; arguments and errors as `CausalLM.forward`."""
        new = input_ids.shape[1]
        past = cache.length if cache is not None else 0
        _check_shapes(input_ids, attention_mask, position_ids, cache)
        if segments is not None:
            _check_packed(input_ids, attention_mask, cache, segments)
        if position_ids is None and segments is not None:
            position_ids = segments.positions()
        elif position_ids is None:
            position_ids = _positions(attention_mask, past, new, input_ids.device)
        compute_dtype = self.norm.dtype
        x_BTH = self.embed_tokens(input_ids).to(compute_dtype)

        if self.frequencies.device != x_BTH.device:
            self.frequencies = self.frequencies.to(x_BTH.device)  # once, not at every step
        # [1, T, D] where all sequences count alike.
        cos_BTD, sin_BTD = rotary_table(position_ids, self.frequencies, compute_dtype)
        packs = segments is not None and takes_segments(x_BTH, cos_BTD.shape[-1])
        seen: dict[int | None, Seen] = {
            window: attention_bias(attention_mask, past, new, window, x_BTH.device)
            if segments is None
            else segments.seen(window, packs)
            for window in set(self.layer_windows)
        }
        contexts = [Context(cos_BTD, sin_BTD, seen[window]) for window in self.layer_windows]
        may_save = x_BTH.is_cuda or self.passes.gradient_checkpointing
        if cache is None and torch.is_grad_enabled() and may_save:
            x_BTH = self.passes.run(list(self.layers), x_BTH, contexts)
        else:
            for layer, context in zip(self.layers, contexts, strict=True):
                x_BTH = layer(x_BTH, *context, cache)
        if cache is not None:
            cache.length += new
        return self.norm(x_BTH)


class CausalLM(nn.Module):
    """A decoder with an output head: token ids in, next-token logits out.

    Args:
        config: shapes and constants.
        linear: builds every projection and the head, called as linear(in_features, out_features, bias=...).
            With nn.Linear this is an ordinary dense, trainable model with Hugging Face names.

    Attributes:
        config: the ModelConfig.
        source: the open Nf4File whose mapping holds the weights, or None for a dense model.
        slab: device memory that holds the weights of a model loaded to a GPU, uint8; else None.
    """

    def __init__(self, config: ModelConfig, *, linear: LinearFactory = nn.Linear) -> None:
        super().__init__()
        self.config = config
        self.source: Nf4File | None = None
        self.slab: Tensor | None = None
        self.model = Decoder(config, linear)
        self.lm_head = linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def passes(self) -> LayerPasses:
        """How the layers run where a backward pass follows; its switches are the caller's to set."""
        return self.model.passes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations, that of the norms."""
        return self.model.norm.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.norm.weight.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Logits [B, T, V] in the compute dtype.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, S], nonzero where a token is real; S counts the cached tokens too. Padding may
                stand left or right of a text. None = all real.
            position_ids: int64 [B, T]; None = counted along the real tokens.
            cache: keys and values of earlier tokens, to which these are appended.
            segments: documents packed into one row, B = 1; each sees itself only and counts from position 0.
                Instead of attention_mask and cache.

        Raises:
            ValueError: a shape does not fit the others.
        """
        return self.head(self.hidden_states(input_ids, attention_mask, position_ids, cache, segments))

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """The residual stream after the final norm, [B, T, H]; arguments and errors as `forward`."""
        return self.model(input_ids, attention_mask, position_ids, cache, segments)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H]; apart, so that a loss can be taken in chunks."""
        return self.lm_head(hidden)


def _positions(attention_mask: Tensor | None, past: int, new: int, device: torch.device) -> Tensor:
    if attention_mask is None:
        return torch.arange(past, past + new, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def _check_packed(
    input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None, segments: Segments
) -> None:
    if input_ids.shape[0] != 1 or attention_mask is not None or cache is not None:
        got = f"{len(input_ids)} rows, {'a' if attention_mask is not None else 'no'} mask"
        raise ValueError(f"segments: expected one row of tokens without mask and cache, got {got}")
    if segments.tokens != input_ids.shape[1]:
        raise ValueError(f"segments: expected {input_ids.shape[1]} tokens, got {segments.tokens}")


def _check_shapes(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: KVCache | None
) -> None:
    batch, new = input_ids.shape
    total = new + (cache.length if cache is not None else 0)
    if attention_mask is not None and attention_mask.shape != (batch, total):
        got = list(attention_mask.shape)
        expected = f"expected shape {[batch, total]} (cached tokens included)"
        raise ValueError(f"attention_mask: {expected}, got {got}")
    if position_ids is not None and position_ids.shape[-1] != new:
        raise ValueError(f"position_ids: expected {new} positions, got shape {list(position_ids.shape)}")
    if cache is not None and cache.batch != batch:
        raise ValueError(f"cache: made for {cache.batch} sequences, got input_ids of {batch}")
