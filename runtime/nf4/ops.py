"""Products with NF4 weights as torch operators; weights stay packed and are decoded inside the operator.

    nf4::dequantize(packed..., shape, dtype)              -> W
    nf4::embedding(ids, packed..., rows, width, dtype)    -> W[ids]      [...] -> [..., width]
    nf4::linear(x, packed..., out_features)               -> x @ W.T     [..., K] -> [..., N]
    nf4::linear_input_grad(grad, packed..., in_features)  -> grad @ W    [..., N] -> [..., K]

`packed...` stands for codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset of a weight
W [N, K], as `nf4format.blocks` describes them. All four have fake implementations (torch.compile, meta
tensors); nf4::linear has a gradient for x, which decodes again, and none for the weight.

The number of rows of x decides the way: for few (`fused_rows`) the fused product reads the codes directly;
for more, panels of rows of W are decoded into a reused workspace and multiplied by torch. CPU tensors only.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nf4format import _native, blocks
from nf4format.codebook import BLOCK, NESTED_BLOCK

KERNEL_ROWS = 8  # the most rows that one call of the fused product takes
# Decoded weights at a time, at most 64 MB of workspace. Smaller panels would fit a cache, and lose far more
# to the switches between torch's threads, which spin for a while after each product, and the decoder's.
PANEL_ELEMENTS = 1 << 24

_NATIVE_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
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
    f"linear_input_grad(Tensor grad, {_PACKED}, SymInt in_features) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


class _Weight:
    """A packed weight [rows, columns] as addresses. Sizes are checked here; the native code trusts them."""

    def __init__(self, packed: Sequence[Any], rows: int, columns: int) -> None:
        codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset = packed
        size = rows * columns
        num_blocks = math.ceil(size / BLOCK)
        _check("codes", codes, torch.uint8, math.ceil(size / 2))
        _check("absmax", absmax, torch.uint8, num_blocks)
        _check("quant_map", quant_map, torch.float32, 16)
        _check("nested_absmax", nested_absmax, torch.float32, math.ceil(num_blocks / NESTED_BLOCK))
        _check("nested_quant_map", nested_quant_map, torch.float32, 256)
        self.rows, self.columns = rows, columns
        self.addresses = (
            codes.data_ptr(),
            absmax.data_ptr(),
            quant_map.data_ptr(),
            nested_absmax.data_ptr(),
            nested_quant_map.data_ptr(),
            float(nested_offset),
        )

    def decode(self, first: int, last: int, out: Tensor, threads: int) -> None:
        """Rows [first, last) into the contiguous `out`, rounded to its dtype."""
        start, stop = first * self.columns, last * self.columns
        _native.dequantize(*self.addresses, start, stop, out.data_ptr(), _NATIVE_DTYPE[out.dtype], threads)

    def multiply(self, x_MK: Tensor, y_MN: Tensor, threads: int) -> None:
        """y = x @ W.T for up to KERNEL_ROWS rows of x, straight from the codes."""
        dtype = _NATIVE_DTYPE[x_MK.dtype]
        codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset = self.addresses
        _native.linear(
            x_MK.data_ptr(),
            dtype,
            x_MK.shape[0],
            codes,
            absmax,
            quant_map,
            nested_absmax,
            nested_quant_map,
            nested_offset,
            self.rows,
            self.columns,
            y_MN.data_ptr(),
            dtype,
            threads,
        )

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """(first, last, rows [first, last) of the weight), each decoded over the one before."""
        height = min(self.rows, max(1, PANEL_ELEMENTS // max(1, self.columns)))
        workspace = _workspace(height * self.columns, dtype)
        threads = torch.get_num_threads()
        for first in range(0, self.rows, max(1, height)):
            last = min(first + height, self.rows)
            panel = workspace[: (last - first) * self.columns].view(last - first, self.columns)
            self.decode(first, last, panel, threads)
            yield first, last, panel


def _dequantize(*arguments: Any) -> Tensor:
    *packed, shape, dtype = arguments
    weight = _Weight(packed, 1, math.prod(shape))
    out = _empty(math.prod(shape), _floating("dtype", dtype)).view(shape)
    weight.decode(0, 1, out, torch.get_num_threads())
    return out


def _embedding(ids: Tensor, *arguments: Any) -> Tensor:
    *packed, rows, width, dtype = arguments
    weight = _Weight(packed, rows, width)
    wanted, places = torch.unique(ids, return_inverse=True)
    if wanted.numel() and not 0 <= int(wanted[0]) <= int(wanted[-1]) < rows:
        raise IndexError(f"ids: expected 0 to {rows - 1}, got {int(wanted[0])} to {int(wanted[-1])}")
    table = torch.empty(wanted.numel(), width, dtype=_floating("dtype", dtype))
    for out, row in zip(table, wanted.tolist(), strict=True):
        weight.decode(row, row + 1, out, 1)
    return table[places]


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    *packed, out_features = arguments
    weight = _Weight(packed, out_features, x.shape[-1])
    x_MK = _matrix("x", x)
    y_MN = x_MK.new_empty(x_MK.shape[0], out_features)
    num_rows = x_MK.shape[0]
    if num_rows <= fused_rows(x.dtype):
        for first in range(0, num_rows, KERNEL_ROWS):
            rows = slice(first, first + KERNEL_ROWS)
            weight.multiply(x_MK[rows], y_MN[rows], torch.get_num_threads())
    else:
        x_MK = x_MK.to(matmul_dtype(x.dtype))
        for first, last, panel in weight.panels(x_MK.dtype):
            if x_MK.dtype == y_MN.dtype:
                torch.mm(x_MK, panel.T, out=y_MN[:, first:last])
            else:
                y_MN[:, first:last] = x_MK @ panel.T
    return y_MN.view(*x.shape[:-1], out_features)


def _linear_input_grad(grad: Tensor, *arguments: Any) -> Tensor:
    *packed, in_features = arguments
    weight = _Weight(packed, grad.shape[-1], in_features)
    grad_MN = _matrix("grad", grad).to(matmul_dtype(grad.dtype))
    total: Tensor | None = None
    for first, last, panel in weight.panels(grad_MN.dtype):
        part = grad_MN[:, first:last] @ panel
        total = part if total is None else total.float().add_(part)  # sums of panels in fp32
    if total is None:
        total = grad_MN.new_zeros(grad_MN.shape[0], in_features)
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)


@cache
def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype this CPU multiplies matrices of `dtype`: their own if it has instructions, else fp32.

    Without them torch falls back to loops that take tens of times as long (fp16 on most CPUs).
    """
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype
    if dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return dtype
    return torch.float32


def fused_rows(dtype: torch.dtype) -> int:
    """Up to how many rows the fused product, KERNEL_ROWS at a time, is the faster way.

    Measured at 4096 x 4096 and 384 x 1024 on two cores with AVX-512: the border is where it meets decoding
    the whole weight once and multiplying by torch in `matmul_dtype`, which is quick where that has 16 bits.
    """
    return 24 if matmul_dtype(dtype) != torch.float32 else 64


def _empty(elements: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [elements], on huge pages where it is large enough to gain by them."""
    return torch.from_numpy(blocks.empty(elements * dtype.itemsize, np.uint8)).view(dtype)


_local = threading.local()


def _workspace(elements: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [elements], the same memory at every call of a thread; it only ever grows."""
    size = elements * dtype.itemsize
    held: Tensor | None = getattr(_local, "workspace", None)
    if held is None or held.numel() < size:
        held = _local.workspace = _empty(size, torch.uint8)
    return held[:size].view(dtype)


def _matrix(name: str, tensor: Tensor) -> Tensor:
    """[..., K] as contiguous [M, K] of a dtype that the kernels know."""
    _floating(name, tensor.dtype)
    rows = math.prod(tensor.shape[:-1])
    return tensor.reshape(rows, tensor.shape[-1]).contiguous()


def _floating(name: str, dtype: torch.dtype) -> torch.dtype:
    if dtype not in _NATIVE_DTYPE:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {dtype}")
    return dtype


def _check(name: str, tensor: Tensor, dtype: torch.dtype, size: int) -> None:
    fits = tensor.dtype == dtype and tensor.numel() == size and tensor.is_contiguous()
    if not fits or tensor.device.type != "cpu":
        got = f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
        raise ValueError(f"{name}: expected contiguous {dtype} of {size} elements on the cpu, got {got}")


def _fake_dequantize(*arguments: Any) -> Tensor:
    codes, shape, dtype = arguments[0], *arguments[_NUM_PACKED:]
    return codes.new_empty(shape, dtype=dtype)


def _fake_embedding(ids: Tensor, *arguments: Any) -> Tensor:
    width, dtype = arguments[-2:]
    return ids.new_empty((*ids.shape, width), dtype=dtype)


def _fake_linear(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[-1]))


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


for _name, _run, _fake in (
    ("dequantize", _dequantize, _fake_dequantize),
    ("embedding", _embedding, _fake_embedding),
    ("linear", _linear, _fake_linear),
    ("linear_input_grad", _linear_input_grad, _fake_linear),
):
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"nf4::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "nf4::linear", _linear_backward, setup_context=_save_for_backward, lib=_library
)
