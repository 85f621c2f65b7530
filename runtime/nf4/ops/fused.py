"""The elementwise parts of a layer's step, one pass over memory each: norms, rotation, SwiGLU, cross entropy.

On a GPU each function starts one kernel (csrc/cuda); elsewhere it evaluates the torch expression below, which
is also what the kernels are tested against. Operands are matrices of one dtype whose rows are contiguous and
may have room between them; results go where the caller says, in place of an input too. Arithmetic is in fp32
(fp64 for fp64), rounded once. No autograd: backward passes are functions of their own.

Legend: M rows (tokens), H size of a row, N heads of size D, F inner size of the MLP, C rows of logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cuda import kernels, stream_of
from .operands import DTYPE_CODES


def copy_rows(source_MH: Tensor, out: Tensor) -> None:
    """out = source."""
    if source_MH.is_cuda:
        kernels().copy_rows(*_rows(source_MH), *_rows(out), *out.shape, *_dtype_and_stream(out))
    else:
        out.copy_(source_MH)


def rms_norm(
    x_MH: Tensor, weight_H: Tensor, eps: float, *, out: Tensor, residual: Tensor | None = None
) -> None:
    """out = x / rms(x) * weight; with a residual, x + residual is normalized, and takes residual's place."""
    if x_MH.is_cuda:
        added = (0, 0) if residual is None else _rows(residual)
        rows = (*_rows(x_MH), *added, *added, weight_H.data_ptr(), *_rows(out))
        kernels().rms_norm(*rows, *x_MH.shape, eps, *_dtype_and_stream(x_MH))
        return
    if residual is not None:
        x_MH = residual.add_(x_MH)
    x = _wide(x_MH)
    out.copy_(x * _inverse_rms(x, eps) * _wide(weight_H))


def rms_norm_backward(
    grad_MH: Tensor, x_MH: Tensor, weight_H: Tensor, eps: float, *, passed: Tensor, out: Tensor
) -> None:
    """out = passed + the gradient of x, where grad is that of rms_norm(x). The weight gets none."""
    if x_MH.is_cuda:
        rows = (*_rows(grad_MH), *_rows(x_MH), weight_H.data_ptr(), *_rows(passed), *_rows(out))
        kernels().rms_norm_backward(*rows, *x_MH.shape, eps, *_dtype_and_stream(x_MH))
        return
    x, weighted = _wide(x_MH), _wide(grad_MH) * _wide(weight_H)
    inverse = _inverse_rms(x, eps)
    along = (weighted * x).mean(-1, keepdim=True) * inverse * inverse
    out.copy_(_wide(passed) + inverse * (weighted - x * along))


def rotate(
    x_MW: Tensor, cos_PD: Tensor, sin_PD: Tensor, *, out: Tensor | None = None, backward: bool = False
) -> None:
    """Rotary embedding of the heads [N * D] in each row, by the angles of row r % P; in place without `out`.

    Pairs are (d, d + D/2); of cos and sin only the first halves are read. backward: by the negative angles.
    """
    out = x_MW if out is None else out
    size = cos_PD.shape[-1]
    if x_MW.is_cuda:
        heads = (x_MW.shape[0], x_MW.shape[1] // size, size)
        table = (cos_PD.data_ptr(), sin_PD.data_ptr(), cos_PD.shape[0], cos_PD.stride(0), backward)
        kernels().rotary(*_rows(x_MW), *_rows(out), *heads, *table, *_dtype_and_stream(x_MW))
        return
    first, second = _wide(x_MW).view(-1, cos_PD.shape[0], x_MW.shape[1] // size, size).chunk(2, dim=-1)
    cos, sin = (_wide(table)[:, None, : size // 2] for table in (cos_PD, -sin_PD if backward else sin_PD))
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    out.copy_(rotated.view(x_MW.shape))


def swiglu(gate_up: Tensor, *, out: Tensor) -> None:
    """out [M, F] = silu(gate) * up, of rows [gate | up] of 2 F."""
    if gate_up.is_cuda:
        rows = (*_rows(gate_up), *_rows(out), *out.shape, False)
        kernels().swiglu(*rows, *_dtype_and_stream(gate_up))
        return
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    out.copy_(gate * gate.sigmoid() * up)


def swiglu_backward(gate_up: Tensor, grad_MF: Tensor) -> None:
    """Puts the gradients of gate and up, [M, 2 F], in their place, where grad is that of swiglu's output."""
    if gate_up.is_cuda:
        rows = (*_rows(gate_up), *_rows(grad_MF), *grad_MF.shape, True)
        kernels().swiglu(*rows, *_dtype_and_stream(gate_up))
        return
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    grad, sigmoid = _wide(grad_MF), gate.sigmoid()
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    gate_up.copy_(torch.cat((grad_gate, grad * gate * sigmoid), dim=-1))


def cross_entropy(logits_CV: Tensor, targets_C: Tensor, *, gradient_scale: float | None = None) -> Tensor:
    """Negative log-likelihoods in nats, fp32 [C] (fp64 of fp64 logits); targets int64.

    With gradient_scale, the gradient of that many times their sum takes the place of the logits.
    """
    wants = gradient_scale is not None
    scale = gradient_scale if gradient_scale is not None else 0.0
    if logits_CV.is_cuda:
        losses = torch.empty(len(logits_CV), dtype=torch.float32, device=logits_CV.device)
        rows = (*_rows(logits_CV), targets_C.data_ptr(), losses.data_ptr(), *logits_CV.shape, wants, scale)
        kernels().cross_entropy(*rows, *_dtype_and_stream(logits_CV))
        return losses
    log_probabilities = torch.log_softmax(_wide(logits_CV), dim=-1)
    losses = -log_probabilities.gather(1, targets_C[:, None]).squeeze(1)
    if wants:
        gradient = log_probabilities.exp_()
        gradient[torch.arange(len(targets_C)), targets_C] -= 1
        logits_CV.copy_(gradient.mul_(scale))
    return losses


def _rows(matrix: Tensor) -> tuple[int, int]:
    return matrix.data_ptr(), matrix.stride(0)


def _dtype_and_stream(tensor: Tensor) -> tuple[int, int]:
    return DTYPE_CODES[tensor.dtype], stream_of(tensor)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()
