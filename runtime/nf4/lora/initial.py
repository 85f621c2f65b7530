"""Initial values of an adapter.

Legend: O out_features, I in_features, R rank, s the adapter's scaling; W [O, I] the frozen weight.

Random numbers are drawn on the CPU, so that a seed gives the same values wherever the base lies. Values that
come out of the weight are computed where it lies: the same on one machine, equal up to rounding on others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TrainError
from .base import dense_weight, features
from .config import pissa_rounds

MORE_COLUMNS = 8  # of the randomized subspace than singular vectors asked for (arXiv 0909.4061, 4.2)


class Initial(NamedTuple):
    """A [R, I] and B [O, R], fp32; is_of_weight: whether s B A is to be taken out of the frozen weight."""

    lora_A: Tensor
    lora_B: Tensor
    is_of_weight: bool


@torch.no_grad()
def initial_values(
    init: str, base: nn.Module, rank: int, scaling: float, generator: torch.Generator | None
) -> Initial:
    """Initial values as `LoraConfig.init` names them; `check_rank` has been asked before."""
    inputs, outputs = features(base)
    if init in ("default", "gaussian"):
        lora_A = torch.empty(rank, inputs, dtype=torch.float32)
        if init == "default":
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
        else:
            nn.init.normal_(lora_A, std=1 / rank, generator=generator)
        return Initial(lora_A, torch.zeros(outputs, rank, dtype=torch.float32), False)
    weight_OI = dense_weight(base)
    if init == "olora":
        # The first R columns of Q depend on as many columns of W only, and R = Q^T W.
        columns_OR = torch.linalg.qr(weight_OI[:, :rank])[0]
        return Initial(columns_OR.T @ weight_OI, columns_OR, True)
    left_OR, values_R, right_RI = _largest(weight_OI, rank, pissa_rounds(init), generator)
    roots_R = (values_R / scaling).sqrt()
    return Initial(roots_R[:, None] * right_RI, left_OR * roots_R, True)


def check_rank(init: str, name: str, base: nn.Module, rank: int) -> None:
    """Whether a layer's weight can give initial values of this rank.

    Raises:
        TrainError: it has fewer rows or columns.
    """
    most = min(features(base))
    if init not in ("default", "gaussian") and rank > most:
        problem, expected = f"rank for {init!r} initial values", f"at most {most}, its smaller side"
        raise TrainError("", problem, tensor=name, expected=expected, got=rank)


def _largest(
    weight_OI: Tensor, rank: int, rounds: int | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The R largest singular values with their vectors.

    rounds: of subspace iteration (arXiv 0909.4061, 4.4), each a product with W^T and one with W, made
        orthonormal; None: the exact decomposition.
    """
    if rounds is None:
        left_OK, values_K, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        width = min(rank + MORE_COLUMNS, *weight_OI.shape)
        start_IK = torch.randn(weight_OI.shape[1], width, generator=generator).to(weight_OI.device)
        basis_OK = torch.linalg.qr(weight_OI @ start_IK)[0]
        for _ in range(rounds):
            basis_IK = torch.linalg.qr(weight_OI.T @ basis_OK)[0]
            basis_OK = torch.linalg.qr(weight_OI @ basis_IK)[0]
        inner_KK, values_K, right_KI = torch.linalg.svd(basis_OK.T @ weight_OI, full_matrices=False)
        left_OK = basis_OK @ inner_KK
    return left_OK[:, :rank], values_K[:rank], right_KI[:rank]
