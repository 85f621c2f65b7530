"""Rotary position embedding (arXiv 2104.09864): angles a position, and heads turned by them.

Shapes: B batch, T tokens, N heads, D head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import ModelConfig


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each rotary pair, fp32 [D/2], scaled as configured.

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


def rotate(x_BNTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Heads [B, N, T, D] turned by a table's angles; pairs are (d, d + D/2), as in Hugging Face's models."""
    first, second = x_BNTD.chunk(2, dim=-1)
    return x_BNTD * cos_BTD[:, None] + torch.cat((-second, first), dim=-1) * sin_BTD[:, None]


def rotary_table(position_ids: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, D] in `dtype`, of positions [B, T]; angles are computed in fp32."""
    angles = position_ids[..., None].float() * frequencies
    return torch.cat((angles.cos(),) * 2, dim=-1).to(dtype), torch.cat((angles.sin(),) * 2, dim=-1).to(dtype)
