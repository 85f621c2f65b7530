"""What an adapter asks of the frozen layer under it: packed, kept, or torch's own.

Shapes: O out_features (or rows of a table), I in_features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.linear import CONVERTED_ELEMENTS, KeptLinear, NF4Embedding, NF4Linear


def is_linear(module: nn.Module) -> bool:
    """Packed, kept and plain linear layers share these two attributes and no base class."""
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def features(base: nn.Module) -> tuple[int, int]:
    """(I, O) of a linear layer."""
    return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]


def device_of(base: nn.Module) -> torch.device:
    """Where its weight is."""
    return next(itertools.chain(base.parameters(), base.buffers())).device


def product(base: nn.Module, x: Tensor) -> Tensor:
    """x [..., I] -> x @ W.T [..., O], without the bias, in x's dtype."""
    if isinstance(base, (NF4Linear, KeptLinear)):
        return base.product(x)
    weight: Tensor = base.weight  # type: ignore[assignment]
    return F.linear(x, weight.to(x.dtype))


def row_blocks(base: nn.Module) -> Iterator[tuple[slice, Tensor]]:
    """A linear layer's weight in fp32 by blocks of whole rows, so that it never exists as a whole.

    Yields:
        The rows, and their block [rows, I].
    """
    width, count = features(base)
    height = max(1, CONVERTED_ELEMENTS // max(1, width))
    for first in range(0, count, height):
        rows = slice(first, min(first + height, count))
        if isinstance(base, NF4Linear):
            wanted = torch.arange(rows.start, rows.stop, device=base.codes.device)
            yield rows, torch.ops.nf4.embedding(wanted, *base.packed(), count, width, torch.float32)
        else:
            yield rows, base.weight[rows].detach().float()  # type: ignore[index]


def dense_weight(base: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy of the whole weight of a linear layer or an embedding, [O, I]."""
    if isinstance(base, NF4Linear):
        return base.dequantize(dtype)
    if isinstance(base, NF4Embedding):
        shape = (base.num_embeddings, base.embedding_dim)
        return torch.ops.nf4.dequantize(*base.packed(), shape, dtype)
    return base.weight.detach().to(dtype, copy=True)  # type: ignore[operator]
