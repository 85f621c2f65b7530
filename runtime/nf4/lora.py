"""LoRA (arXiv 2106.09685): a trainable product of two thin matrices beside each frozen linear layer.

Legend: M rows (batch * length), I in_features, O out_features, R rank.

    y_MO = base(x_MI) + scaling * (dropout(x_MI) @ A_RI^T) @ B_OR^T

The thin product comes first, so nothing of size O x I is formed, forward or backward. A and B are
fp32, whatever the base; the arithmetic is in the dtype of x. Backward keeps x (which the layer before
needs anyway), the M x R product, and one byte per element for dropout where there is any.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import TrainError

ALL_LINEAR = "all-linear"  # PEFT's name: every linear layer but the output head
OUTPUT_HEAD = "lm_head"


@dataclass(frozen=True)
class LoraConfig:
    """What to add.

    Attributes:
        rank: R, at least 1.
        alpha: the product is scaled by alpha / rank (alpha / sqrt(rank) with rslora).
        dropout: share of the inputs of A set to zero in training, in [0, 1).
        targets: "all-linear", or patterns of module names; `*` and `?` as in a shell, matched with
            the whole path or with its last parts: `q_proj`, `mlp.*`, `model.layers.0.*`.
        rslora: rank-stabilized scaling (arXiv 2312.03732).
        ranks, alphas: module path -> its own rank or alpha.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    ranks: Mapping[str, int] | None = None
    alphas: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for rank in (self.rank, *(self.ranks or {}).values()):
            if rank < 1:
                raise TrainError("", "bad LoRA rank", expected="at least 1", got=rank)
        for alpha in (self.alpha, *(self.alphas or {}).values()):
            if not 0 < alpha < math.inf:
                raise TrainError("", "bad LoRA alpha", expected="above 0", got=alpha)
        if not 0 <= self.dropout < 1:
            raise TrainError("", "bad LoRA dropout", expected="in [0, 1)", got=self.dropout)

    def rank_of(self, name: str) -> int:
        """Rank of the module at this path."""
        return (self.ranks or {}).get(name, self.rank)

    def alpha_of(self, name: str) -> float:
        """Alpha of the module at this path."""
        return (self.alphas or {}).get(name, self.alpha)


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter; forward takes x [..., I] and returns [..., O] in x's dtype.

    Attributes:
        base: the layer it wraps.
        lora_A: fp32 [R, I], kaiming_uniform(a=sqrt(5)). lora_B: fp32 [O, R], zero.
        scaling: alpha / rank, or alpha / sqrt(rank) with rslora.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = _features(base)
        self.base = base
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        # Drawn on the CPU, so that a seed gives the same values wherever the base lies.
        values = nn.init.kaiming_uniform_(
            torch.empty(rank, self.in_features, dtype=torch.float32), a=math.sqrt(5), generator=generator
        )
        device = _device_of(base)
        self.lora_A = nn.Parameter(values.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        keep = None
        if self.training and self.dropout:
            keep = torch.rand(x.shape, device=x.device) >= self.dropout
        return _LowRank.apply(self.base(x), x, self.lora_A, self.lora_B, self.scaling, keep, self.dropout)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class _LowRank(torch.autograd.Function):
    """base_output + scaling * (drop(x) A^T) B^T; gradients to all four."""

    @staticmethod
    def forward(  # noqa: PLR0917 -- autograd functions take positional arguments only
        ctx: Any,
        base_output: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        keep: Tensor | None,
        dropout: float,
    ) -> Tensor:
        x_MI = _drop(x, keep, dropout).reshape(-1, x.shape[-1])
        thin_MR = x_MI @ lora_A.to(x.dtype).T
        ctx.save_for_backward(x, lora_A, lora_B, thin_MR, keep)
        ctx.scaling, ctx.dropout = scaling, dropout
        output_MO = base_output.reshape(-1, base_output.shape[-1])
        return torch.addmm(output_MO, thin_MR, lora_B.to(x.dtype).T, alpha=scaling).view(base_output.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, thin_MR, keep = ctx.saved_tensors
        grad_MO = grad.reshape(-1, grad.shape[-1])
        grad_thin_MR = (grad_MO @ lora_B.to(x.dtype)).mul_(ctx.scaling)
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[1]:
            grad_x = _drop((grad_thin_MR @ lora_A.to(x.dtype)).view(x.shape), keep, ctx.dropout)
        if ctx.needs_input_grad[2]:
            grad_A = (grad_thin_MR.T @ _drop(x, keep, ctx.dropout).reshape(-1, x.shape[-1])).float()
        if ctx.needs_input_grad[3]:
            grad_B = (grad_MO.T @ thin_MR).float().mul_(ctx.scaling)
        return grad, grad_x, grad_A, grad_B, None, None, None


def add_lora(model: nn.Module, config: LoraConfig, seed: int = 0) -> list[str]:
    """Wrap the target layers in place, freeze everything else, and return the wrapped paths in order.

    A is drawn from the seed and B is zero, as PEFT's default: the model computes what it did before,
    until trained.

    Raises:
        TrainError: the model has adapters already, or a pattern matches no linear layer.
    """
    names = target_names(model, config.targets)
    attach_lora(model, names, config, torch.Generator().manual_seed(seed))
    return names


def attach_lora(
    model: nn.Module, names: list[str], config: LoraConfig, generator: torch.Generator | None = None
) -> None:
    """Wrap the linear layers at these paths and freeze everything else; `config.targets` is not looked at.

    Raises:
        TrainError: the model has adapters already.
    """
    if any(True for _ in lora_layers(model)):
        raise TrainError("", "the model has an adapter already", remedy="load the model afresh")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        base = getattr(parent, leaf)
        layer = LoRALinear(
            base,
            rank=config.rank_of(name),
            alpha=config.alpha_of(name),
            dropout=config.dropout,
            rslora=config.rslora,
            generator=generator,
        )
        setattr(parent, leaf, layer.train(base.training))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Paths and adapters of a model, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def linear_names(model: nn.Module) -> list[str]:
    """Paths of the linear layers, in module order; those under an adapter count by the adapter's path."""
    wrapped = {name for name, _ in lora_layers(model)}
    return [
        name
        for name, module in model.named_modules()
        if name in wrapped or (_is_linear(module) and name.rpartition(".")[0] not in wrapped)
    ]


def target_names(model: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """Paths of the linear layers that the targets mean (see `LoraConfig`), in module order.

    Raises:
        TrainError: a pattern matches none of them.
    """
    linears = linear_names(model)
    if targets == ALL_LINEAR:
        chosen = {name for name in linears if name.rpartition(".")[2] != OUTPUT_HEAD}
    else:
        chosen = set()
        for pattern in (targets,) if isinstance(targets, str) else targets:
            matched = {name for name in linears if _matches(name, pattern)}
            if not matched:
                shown = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
                raise TrainError(
                    "", f"target {pattern!r} matches no linear layer", expected=f"one of {shown}"
                )
            chosen |= matched
    if not chosen:
        raise TrainError("", "the model has no linear layer to train")
    return [name for name in linears if name in chosen]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _is_linear(module: nn.Module) -> bool:
    """Packed, kept and plain linear layers share these two attributes and no base class."""
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _features(base: nn.Module) -> tuple[int, int]:
    return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]


def _device_of(base: nn.Module) -> torch.device:
    return next(itertools.chain(base.parameters(), base.buffers())).device


def _drop(x: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    return x if keep is None else x * keep * (1 / (1 - dropout))
