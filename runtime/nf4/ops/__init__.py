"""Products with NF4 weights as torch operators; weights stay packed and are decoded inside the operator.

    nf4::dequantize(packed..., shape, dtype)              -> W
    nf4::embedding(ids, packed..., rows, width, dtype)    -> W[ids]      [...] -> [..., width]
    nf4::linear(x, packed..., out_features)               -> x @ W.T     [..., K] -> [..., N]
    nf4::linear_group(x, packed[], offsets[], out_features[]) -> x @ W_i.T for several weights; no gradient
    nf4::linear_input_grad(grad, packed..., in_features)  -> grad @ W    [..., N] -> [..., K]

`packed...` stands for codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset of a weight
W [N, K], as `nf4format.blocks` describes them. All have fake implementations (torch.compile, meta
tensors); nf4::linear has a gradient for x, which decodes again, and none for the weight.

What runs on which device: `cpu`, `cuda`. All tensors of a call lie on one device, and the result too.
On CUDA ids are not checked on the host (a bad one gives a row of NaN), products round the levels to float16
(so quant_map has to lie in [-1, 1], as that of every file does), and work is started in the current stream
without waiting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu, cuda

_PACKED = (
    "Tensor codes, Tensor absmax, Tensor quant_map, "
    "Tensor nested_absmax, Tensor nested_quant_map, float nested_offset"
)
_NUM_PACKED = 6

_library = torch.library.Library("nf4", "DEF")
for _schema in (
    f"dequantize({_PACKED}, SymInt[] shape, ScalarType dtype) -> Tensor",
    f"embedding(Tensor ids, {_PACKED}, SymInt rows, SymInt width, ScalarType dtype) -> Tensor",
    f"linear(Tensor x, {_PACKED}, SymInt out_features) -> Tensor",
    "linear_group(Tensor x, Tensor[] packed, float[] nested_offsets, SymInt[] out_features) -> Tensor[]",
    f"linear_input_grad(Tensor grad, {_PACKED}, SymInt in_features) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _fake_dequantize(*arguments: Any) -> Tensor:
    codes, shape, dtype = arguments[0], *arguments[_NUM_PACKED:]
    return codes.new_empty(shape, dtype=dtype)


def _fake_embedding(ids: Tensor, *arguments: Any) -> Tensor:
    width, dtype = arguments[-2:]
    return ids.new_empty((*ids.shape, width), dtype=dtype)


def _fake_linear(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[-1]))


def _fake_linear_group(
    x: Tensor, packed: list[Tensor], nested_offsets: list[float], out_features: list[int]
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], features)) for features in out_features]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *tensors, ctx.nested_offset, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(*tensors)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        packed = (*ctx.saved_tensors, ctx.nested_offset)
        grad_x = torch.ops.nf4.linear_input_grad(grad, *packed, ctx.in_features)
    return grad_x, *[None] * (_NUM_PACKED + 1)


def matmul_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which dtype a device multiplies matrices of `dtype` fast: their own, or float32."""
    return cpu.matmul_dtype(dtype) if device.type == "cpu" else dtype


for _name, _fake in (
    ("dequantize", _fake_dequantize),
    ("embedding", _fake_embedding),
    ("linear", _fake_linear),
    ("linear_group", _fake_linear_group),
    ("linear_input_grad", _fake_linear),
):
    _library.impl(_name, getattr(cpu, _name), "CPU")
    _library.impl(_name, getattr(cuda, _name), "CUDA")
    torch.library.register_fake(f"nf4::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "nf4::linear", _linear_backward, setup_context=_save_for_backward, lib=_library
)
