"""A trainable product of two thin matrices beside a frozen linear layer, and what goes with it.

Legend: M rows (batch * length), I in_features, O out_features, R rank.

    y_MO = base(x_MI) + scaling * (dropout(x_MI) @ A_RI^T) @ B_OR^T

The thin product comes first, so nothing of size O x I is formed, forward or backward. A and B are
fp32 or bf16, whatever the base; the arithmetic is in the dtype of x. Backward keeps x (which the layer
before needs anyway), the M x R product, and one byte per element for dropout where there is any.

Initial values that take their product out of the weight leave the packed weight alone: the product of the
initial A and B is subtracted beside it, fixed. With DoRA (`dora`) each output is then scaled.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .base import device_of, features, product
from .dora import Norms
from .initial import initial_values


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter; forward takes x [..., I] and returns [..., O] in x's dtype.

    Args:
        init: initial values as LoraConfig names them; None leaves them unset, for values from a file.
        trains_bias: take the base's bias over, to be trained.
        lora_bias: a bias of B. dora: magnitudes.
        dtype: of what trains. generator: draws initial values.

    Attributes:
        base: the layer it wraps, without its bias where that trains.
        lora_A: [R, I]. lora_B: [O, R].
        fixed_A, fixed_B: buffers, initial A and the negative of initial B where these came out of the weight,
            else None: they take part as lora_A and lora_B do, but do not change.
        lora_bias, bias: [O] or None. lora_magnitude: fp32 or bf16 [O], the norms that the rows of the weight
            have with the adapter (arXiv 2402.09353), or None.
        scaling: alpha / rank, or alpha / sqrt(rank) with rslora.
    """

    fixed_A: Tensor | None
    fixed_B: Tensor | None
    lora_bias: nn.Parameter | None
    bias: nn.Parameter | None
    lora_magnitude: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str | None = "default",
        trains_bias: bool = False,
        lora_bias: bool = False,
        dora: bool = False,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = features(base)
        self.base = base
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        device = device_of(base)
        for name in ("fixed_A", "fixed_B"):
            self.register_buffer(name, None)
        if init is None:
            lora_A = torch.empty(rank, self.in_features, dtype=dtype, device=device)
            lora_B = torch.empty(self.out_features, rank, dtype=dtype, device=device)
        else:
            drawn = initial_values(init, base, rank, self.scaling, generator)
            lora_A, lora_B = (value.to(device, dtype).contiguous() for value in drawn[:2])
            if drawn.is_of_weight:
                self.fixed_A, self.fixed_B = lora_A.clone(), -lora_B
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        zeros_O = torch.zeros(self.out_features, dtype=dtype, device=device) if lora_bias else None
        self.register_parameter("lora_bias", None if zeros_O is None else nn.Parameter(zeros_O))
        self.register_parameter("bias", take_bias(base, dtype) if trains_bias else None)
        self.register_parameter("lora_magnitude", None)
        self._norms: Norms | None = None
        if dora:
            self._norms = Norms(self)
            magnitude = self._norms.of_rows() if init else torch.empty(self.out_features, device=device)
            self.lora_magnitude = nn.Parameter(magnitude.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        keep = None
        if self.training and self.dropout:
            keep = torch.rand(x.shape, device=x.device) >= self.dropout
        if self._norms is not None:
            y = self._scaled(x, keep, self._norms)
        else:
            y = self._add_thin(self._add_fixed(self.base(x), x), x, keep)
        if self.lora_bias is not None:
            y = y + (self.scaling * self.lora_bias).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    @property
    def trains_pair_only(self) -> bool:
        """Whether A and B are all that trains, and the formula of the module's docstring is all there is."""
        return self.lora_bias is None and self.bias is None and self.lora_magnitude is None

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """A and B, and the fixed pair if there is one."""
        pairs: list[tuple[Tensor, Tensor]] = [(self.lora_A, self.lora_B)]
        if self.fixed_A is not None and self.fixed_B is not None:
            pairs.append((self.fixed_A, self.fixed_B))
        return pairs

    def extra_repr(self) -> str:
        extras = [name for name in ("fixed_A", "lora_bias", "bias", "lora_magnitude") if _has(self, name)]
        shown = f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"
        return ", ".join([shown, *extras])

    def train(self, mode: bool = True) -> LoRALinear:
        if self._norms is not None:
            self._norms.forget()
        super().train(mode)
        return self

    def _scaled(self, x: Tensor, keep: Tensor | None, norms: Norms) -> Tensor:
        """DoRA. Dropout is before both products, as in PEFT, but for what the base gives by itself.

        Factors are near one: what they are more than that keeps its digits in 16 bits.
        """
        excess_O = (norms.factor() - 1).to(x.dtype)
        frozen = self._add_fixed(product(self.base, x), x)
        if keep is None:
            whole = self._add_thin(frozen, x, None)
            y = torch.addcmul(whole, whole, excess_O)
        else:
            dropped = _drop(x, keep, self.dropout)
            weighed = self._add_fixed(product(self.base, dropped), dropped)
            whole = self._add_thin(weighed, dropped, None)
            y = frozen - weighed + torch.addcmul(whole, whole, excess_O)
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return y if bias is None else y + bias

    def _add_fixed(self, y: Tensor, x: Tensor) -> Tensor:
        if self.fixed_A is None or self.fixed_B is None:
            return y
        return _LowRank.apply(y, x, self.fixed_A, self.fixed_B, self.scaling, None, 0.0)

    def _add_thin(self, y: Tensor, x: Tensor, keep: Tensor | None) -> Tensor:
        return _LowRank.apply(y, x, self.lora_A, self.lora_B, self.scaling, keep, self.dropout)


class BiasedLinear(nn.Module):
    """A frozen linear layer whose bias [O] trains; it must have one."""

    def __init__(self, base: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = features(base)
        self.base = base
        bias = take_bias(base, dtype)
        assert bias is not None
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.bias.to(x.dtype)


def take_bias(base: nn.Module, dtype: torch.dtype) -> nn.Parameter | None:
    """A parameter in place of the layer's bias, which it loses; None where it has none."""
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    base.bias = None  # type: ignore[assignment]
    return None if bias is None else nn.Parameter(bias.detach().to(dtype, copy=True))


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
            x_MI = _drop(x, keep, ctx.dropout).reshape(-1, x.shape[-1])
            grad_A = (grad_thin_MR.T @ x_MI).to(lora_A.dtype)
        if ctx.needs_input_grad[3]:
            grad_B = (grad_MO.T @ thin_MR).float().mul_(ctx.scaling).to(lora_B.dtype)
        return grad, grad_x, grad_A, grad_B, None, None, None


def _has(module: nn.Module, name: str) -> bool:
    return getattr(module, name) is not None


def _drop(x: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    return x if keep is None else x * keep * (1 / (1 - dropout))
