"""Modules that train in full, as PEFT's modules_to_save: a trainable copy in front of a frozen layer.

The copy is fp32 or bf16, whatever the frozen weight is; the arithmetic is in the dtype of the activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.linear import KeptEmbedding, NF4Embedding
from ..model.norm import RMSNorm
from .base import dense_weight, features, is_linear


class SavedModule(nn.Module):
    """A trainable copy of `base`, which stays as it is.

    Args:
        dtype: of the copy. weight: the copy's weight, where another module has made it already.

    Attributes:
        base: the frozen layer.
        weight: a parameter of its shape. bias: a parameter where it has a bias.
    """

    def __init__(self, base: nn.Module, dtype: torch.dtype, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.base = base
        self.weight = nn.Parameter(_weight_of(base, dtype)) if weight is None else weight
        bias = getattr(base, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype, copy=True))


class SavedLinear(SavedModule):
    """y = x @ W.T + bias, in x's dtype."""

    def __init__(self, base: nn.Module, dtype: torch.dtype, weight: nn.Parameter | None = None) -> None:
        super().__init__(base, dtype, weight)
        self.out_features, self.in_features = self.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class SavedEmbedding(SavedModule):
    """Rows of the table, in the parameter's dtype."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class SavedNorm(SavedModule):
    """An RMS norm; `dtype` is that of its results, as before."""

    def __init__(self, base: nn.Module, dtype: torch.dtype, weight: nn.Parameter | None = None) -> None:
        super().__init__(base, dtype, weight)
        self.eps = float(base.eps)  # type: ignore[arg-type]
        self.dtype: torch.dtype = base.weight.dtype  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def saved_copy(base: nn.Module, dtype: torch.dtype, weight: nn.Parameter | None = None) -> SavedModule:
    """The trainable copy of a linear layer, an embedding or a norm; arguments as SavedModule's."""
    kind = SavedLinear if is_linear(base) else SavedNorm if _is_norm(base) else SavedEmbedding
    return kind(base, dtype, weight)


def can_save(module: nn.Module) -> bool:
    """Whether `saved_copy` takes it."""
    return is_linear(module) or _is_norm(module) or _is_embedding(module)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Of a module that `saved_copy` takes."""
    if is_linear(module):
        return features(module)[::-1]
    if isinstance(module, NF4Embedding):
        return (module.num_embeddings, module.embedding_dim)
    return tuple(module.weight.shape)  # type: ignore[arg-type]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (RMSNorm, SavedNorm))


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, KeptEmbedding, NF4Embedding, SavedEmbedding))


def _weight_of(base: nn.Module, dtype: torch.dtype) -> Tensor:
    if _is_norm(base):
        return base.weight.detach().to(dtype, copy=True)  # type: ignore[operator]
    return dense_weight(base, dtype)
