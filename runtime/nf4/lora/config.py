"""What to train beside the frozen model: the options of an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import torch

from ..errors import TrainError
from .names import matches

ALL_LINEAR: Final = "all-linear"  # PEFT's name: every linear layer but the output head
BIASES: Final = ("none", "all", "lora_only")
INITS: Final = ("default", "gaussian", "pissa", "pissa_niter_N", "olora")
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_ALPHA: Final = 1e30  # far from where fp32 ends

_PISSA = re.compile(r"pissa(?:_niter_([0-9]{1,3}))?")
T = TypeVar("T", int, float)


@dataclass(frozen=True)
class LoraConfig:
    """What to add.

    Patterns name modules as in a shell: `*` and `?`, matched with the whole path or with its last parts:
    `q_proj`, `mlp.*`, `model.layers.0.*`.

    Attributes:
        rank: R, at least 1.
        alpha: the product is scaled by alpha / rank (alpha / sqrt(rank) with rslora).
        dropout: share of the inputs of A set to zero in training, in [0, 1).
        targets: "all-linear", or patterns of the linear layers to adapt.
        rslora: rank-stabilized scaling (arXiv 2312.03732).
        ranks, alphas: pattern -> rank or alpha of the layers that it matches. A layer's whole path counts
            first, then the first pattern that matches.
        bias: which biases train: "none", "lora_only" (of adapted layers), "all" (of every linear layer).
        lora_bias: a trainable bias of B, scaled as the product is; not with dora.
        dora: weight-decomposed adaptation (arXiv 2402.09353): a trainable magnitude of each output row.
        modules_to_save: patterns of linear layers, embeddings and norms that train in full; where input and
            output embeddings are tied they stay so. LoRA leaves these layers alone.
        init: initial values. "default": A as torch's linear layers, B zero; "gaussian": A normal with
            deviation 1 / rank, B zero; "pissa" (arXiv 2404.02948): the weight's largest singular vectors;
            "pissa_niter_N": nearly these, by N rounds of randomized subspace iteration, in a small part of
            the time where layers are large; "olora" (arXiv 2406.01775): the weight's first columns made
            orthonormal. The last three start from the weight less their product.
        dtype: of everything that trains, "float32" or "bfloat16".
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    ranks: Mapping[str, int] | None = None
    alphas: Mapping[str, float] | None = None
    bias: str = "none"
    lora_bias: bool = False
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    init: str = "default"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for rank in (self.rank, *(self.ranks or {}).values()):
            if rank < 1:
                raise TrainError("", "bad LoRA rank", expected="at least 1", got=rank)
        for alpha in (self.alpha, *(self.alphas or {}).values()):
            if not 0 < alpha <= MOST_ALPHA:
                expected = f"above 0, at most {MOST_ALPHA:g}"
                raise TrainError("", "bad LoRA alpha", expected=expected, got=alpha)
        if not 0 <= self.dropout < 1:
            raise TrainError("", "bad LoRA dropout", expected="in [0, 1)", got=self.dropout)
        if self.bias not in BIASES:
            raise TrainError("", "bad LoRA bias", expected=f"one of {', '.join(BIASES)}", got=self.bias)
        if self.dtype not in DTYPES:
            raise TrainError("", "bad LoRA dtype", expected=f"one of {', '.join(DTYPES)}", got=self.dtype)
        if self.init not in INITS[:2] and self.init != "olora" and not _PISSA.fullmatch(self.init):
            raise TrainError(
                "", "unknown LoRA initial values", expected=f"one of {', '.join(INITS)}", got=self.init
            )
        if self.dora and self.lora_bias:
            raise TrainError("", "DoRA has no bias of B", remedy="leave out one of dora and lora_bias")

    def rank_of(self, name: str) -> int:
        """Rank of the module at this path."""
        return _of(name, self.ranks, self.rank)

    def alpha_of(self, name: str) -> float:
        """Alpha of the module at this path."""
        return _of(name, self.alphas, self.alpha)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return DTYPES[self.dtype]


def pissa_rounds(init: str) -> int | None:
    """Rounds of subspace iteration that a name of initial values asks for; None: the exact decomposition."""
    found = _PISSA.fullmatch(init)
    return int(found[1]) if found and found[1] else None


def _of(name: str, values: Mapping[str, T] | None, usual: T) -> T:
    if not values:
        return usual
    if name in values:
        return values[name]
    return next((value for pattern, value in values.items() if matches(name, pattern)), usual)
