"""A decoder layer as modules, named as in Hugging Face checkpoints.

Shapes: B batch, T new tokens, S all tokens (cached ones and new ones), H hidden, N query heads, G key/value
heads, D head size. x_BTH is the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Seen, attend
from .cache import KVCache
from .config import ModelConfig
from .linear import project
from .norm import RMSNorm
from .rotary import rotate

LinearFactory = Callable[..., nn.Module]  # (in_features, out_features, bias=...) -> a module with forward(x)


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
        """What attention adds to the residual stream, [B, T, H].

        Args:
            x_BTH: the stream, normed.
            cos_BTD, sin_BTD: of `rotary_table`; B may be 1.
            seen: see `attention.attend`.
            cache: where keys and values of earlier tokens are, and these go.
        """
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
        """What the MLP adds to the residual stream, [B, T, H], from the stream, normed."""
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
        """The residual stream behind the layer, [B, T, H]; arguments as `Attention.forward`."""
        normed_BTH = self.input_layernorm(x_BTH)
        x_BTH = x_BTH + self.self_attn(normed_BTH, cos_BTD, sin_BTD, seen, cache)
        return x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))
