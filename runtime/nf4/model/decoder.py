"""Decoder-only transformers of the Llama shape (Llama, Mistral, Qwen2, Qwen3), driven by a ModelConfig.

Module and parameter names are those of Hugging Face checkpoints, so `CausalLM(config)` with ordinary linears
loads a transformers state_dict; `nf4.load` puts packed linears in their place.

Shapes: B batch, T new tokens, S all tokens (cached ones and new ones), H hidden, N query heads, G key/value
heads, D head size, V vocabulary. x_BTH is the residual stream. Rotary angles are computed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Seen, Segments, attend, rotate, takes_segments
from .cache import KVCache
from .checkpoints import Checkpoints, HostCheckpoints
from .config import ModelConfig
from .layer_graphs import LayerGraphs
from .layer_step import Context, LayerStep, can_step, stepped
from .linear import project
from .norm import RMSNorm

if TYPE_CHECKING:
    from nf4format.container import Nf4File

LinearFactory = Callable[..., nn.Module]  # (in_features, out_features, bias=...) -> a module with forward(x)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each rotary pair, fp32 [D/2] (arXiv 2104.09864), scaled as configured.

    Llama 3.1: wavelengths over original/low_freq_factor are slowed by `factor`, those under
    original/high_freq_factor are left alone, and the band between is interpolated.
    """
    with torch.device("cpu"):  # also inside `with torch.device("meta")`
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        frequencies = 1.0 / (config.rope_theta**exponents)
        scaling = config.rope_scaling
        if scaling is None:
            return frequencies
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        band = scaling.high_freq_factor - scaling.low_freq_factor
        smooth = ((turns - scaling.low_freq_factor) / band).clamp(0.0, 1.0)
        return frequencies * smooth + frequencies / scaling.factor * (1 - smooth)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; an optional norm on query and key heads (Qwen3)."""

    def __init__(self, config: ModelConfig, layer: int, linear: LinearFactory) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, query, bias=config.attention_bias)
        self.k_proj = linear(config.hidden_size, key, bias=config.attention_bias)
        self.v_proj = linear(config.hidden_size, key, bias=config.attention_bias)
        self.o_proj = linear(query, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.has_qk_norm = config.qk_norm

    def forward(
        self,
        x_BTH: Tensor,
        cos_BTD: Tensor,
        sin_BTD: Tensor,
        seen: Seen = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        heads = (*x_BTH.shape[:-1], -1, self.head_dim)
        projected = project((self.q_proj, self.k_proj, self.v_proj), x_BTH)
        q_BTND, k_BTGD, v_BTGD = (projection.view(heads) for projection in projected)
        if self.has_qk_norm:
            q_BTND, k_BTGD = self.q_norm(q_BTND), self.k_norm(k_BTGD)
        q_BNTD = rotate(q_BTND.transpose(1, 2), cos_BTD, sin_BTD)
        k_BGSD = rotate(k_BTGD.transpose(1, 2), cos_BTD, sin_BTD)
        v_BGSD = v_BTGD.transpose(1, 2)
        if cache is not None:
            k_BGSD, v_BGSD = cache.append(self.layer, k_BGSD, v_BGSD)
        attended = attend(q_BNTD, k_BGSD, v_BGSD, seen)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, linear: LinearFactory) -> None:
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTH: Tensor) -> Tensor:
        gate, up = project((self.gate_proj, self.up_proj), x_BTH)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention, then the MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, linear: LinearFactory) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, linear)
        self.mlp = MLP(config, linear)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTH: Tensor,
        cos_BTD: Tensor,
        sin_BTD: Tensor,
        seen: Seen = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        normed_BTH = self.input_layernorm(x_BTH)
        x_BTH = x_BTH + self.self_attn(normed_BTH, cos_BTD, sin_BTD, seen, cache)
        return x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))


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
        self.gradient_checkpointing = False
        self.offload_checkpoints = False
        self._host_checkpoints: HostCheckpoints | None = None
        self.capture_graphs = False
        self._steps: dict[int, LayerStep] = {}
        self._graphs = LayerGraphs()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._steps.clear()  # these hold addresses of what is about to move
        self.drop_graphs()
        return super()._apply(fn, recurse)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
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
        angles = position_ids[..., None].float() * self.frequencies
        # [1, T, D] where all sequences count alike.
        cos_BTD = torch.cat((angles.cos(),) * 2, dim=-1).to(compute_dtype)
        sin_BTD = torch.cat((angles.sin(),) * 2, dim=-1).to(compute_dtype)
        packs = segments is not None and takes_segments(x_BTH, cos_BTD.shape[-1])
        seen: dict[int | None, Seen] = {
            window: attention_bias(attention_mask, past, new, window, x_BTH.device)
            if segments is None
            else segments.seen(window, packs)
            for window in set(self.layer_windows)
        }
        contexts = [Context(cos_BTD, sin_BTD, seen[window]) for window in self.layer_windows]
        if cache is None and torch.is_grad_enabled() and (x_BTH.is_cuda or self.gradient_checkpointing):
            x_BTH = self._differentiable(x_BTH, contexts)
        else:
            for layer, context in zip(self.layers, contexts, strict=True):
                x_BTH = layer(x_BTH, *context, cache)
        if cache is not None:
            cache.length += new
        return self.norm(x_BTH)

    def _differentiable(self, x_BTH: Tensor, contexts: list[Context]) -> Tensor:
        """All layers, ready for a backward pass: by hand where that can be, else by their modules."""
        steps = [self._step(i, layer) if x_BTH.is_cuda else None for i, layer in enumerate(self.layers)]
        own = [step for step in steps if step is not None]
        if not any(step.parameters for step in own) and not x_BTH.requires_grad:
            own, steps = [], [None] * len(steps)
        keep = not self.gradient_checkpointing
        if self.capture_graphs and len(own) == len(self.layers) and (keep or not self.offload_checkpoints):
            replayed = self._graphs.run(x_BTH, own, contexts, keep=keep)
            if replayed is not None:
                return replayed
        checkpoints = None if keep else self._begin_checkpoints(x_BTH.device)
        for layer, step, context in zip(self.layers, steps, contexts, strict=True):
            if step is not None:
                x_BTH = stepped(x_BTH, step, context, checkpoints)
            elif keep:
                x_BTH = layer(x_BTH, *context)
            else:
                x_BTH = checkpoint(layer, x_BTH, *context, use_reentrant=False)
        return x_BTH

    def drop_graphs(self) -> None:
        """Gives back what recorded passes hold; they are recorded again when their shapes come again."""
        self._graphs = LayerGraphs()

    @property
    def graphs(self) -> LayerGraphs:
        """Recorded passes."""
        return self._graphs

    def _step(self, index: int, layer: nn.Module) -> LayerStep | None:
        """The layer's step by hand, made once; None where it has to go by its modules."""
        assert isinstance(layer, DecoderLayer)
        if not can_step(layer):
            return None
        known = self._steps.get(index)
        if known is None or not known.is_of(layer):
            if known is not None:
                self.drop_graphs()  # recorded over the layers that there were
            known = self._steps[index] = LayerStep(layer)
        return known

    def _begin_checkpoints(self, device: torch.device) -> Checkpoints:
        if not self.offload_checkpoints or device.type != "cuda":
            self._host_checkpoints = None
            return Checkpoints()
        if self._host_checkpoints is None:
            self._host_checkpoints = HostCheckpoints(device)
        self._host_checkpoints.begin()
        return self._host_checkpoints


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
        gradient_checkpointing: when True, training keeps only each layer's input and runs the layer again in
            the backward pass.
        offload_checkpoints: when True too, these inputs wait in pinned host memory; on a GPU only.
        capture_graphs: when True too, small batches of a shape that comes again are recorded and replayed
            (see layer_graphs); on a GPU only. Gradients of adapters are then added to `.grad` without a hook
            of autograd being called.
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
    def gradient_checkpointing(self) -> bool:
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.model.gradient_checkpointing = value

    @property
    def offload_checkpoints(self) -> bool:
        return self.model.offload_checkpoints

    @offload_checkpoints.setter
    def offload_checkpoints(self, value: bool) -> None:
        self.model.offload_checkpoints = value

    @property
    def capture_graphs(self) -> bool:
        return self.model.capture_graphs

    @capture_graphs.setter
    def capture_graphs(self, value: bool) -> None:
        self.model.capture_graphs = value
        if not value:
            self.model.drop_graphs()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations, that of the norms."""
        return self.model.norm.dtype

    @property
    def device(self) -> torch.device:
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
        """The residual stream after the final norm, [B, T, H]; arguments as in `forward`."""
        return self.model(input_ids, attention_mask, position_ids, cache, segments)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H]; apart, so that a loss can be taken in chunks."""
        return self.lm_head(hidden)


def attention_bias(
    attention_mask: Tensor | None, past: int, new: int, window: int | None, device: torch.device
) -> Tensor | None:
    """Which keys each query sees, bool [B or 1, 1, T, S], or None where plain causal attention does.

    None, where no window or padding is in force, means: the queries are all the tokens there are (causal), or
    one query sees all keys. Padding on the right alone needs no mask, as no real token looks to its right;
    what padding rows then compute is never used.
    """
    total = past + new
    if window is not None and total <= window:
        window = None
    if attention_mask is not None:
        is_right_padded = past == 0 and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
        if is_right_padded or bool(attention_mask.all()):
            attention_mask = None
    if attention_mask is None and window is None and (past == 0 or new == 1):
        return None
    query = torch.arange(past, total, device=device)[:, None]
    key = torch.arange(total, device=device)[None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    if attention_mask is None:
        return seen[None, None]
    # A padding row would see nothing and come out as NaN: it sees itself.
    return ((seen & attention_mask.bool()[:, None, :]) | (key == query))[:, None]


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
