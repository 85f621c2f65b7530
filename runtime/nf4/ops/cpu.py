"""The operators of `nf4.ops` on the CPU, over the native kernels of `nf4format._native`.

The number of rows of x decides the way: for few (`fused_rows`) the fused product reads the codes directly;
for more, panels of rows of W are decoded into a reused workspace and multiplied by torch.
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

from .operands import DTYPE_CODES, PackedOperand, floating, matrix

KERNEL_ROWS = 8  # the most rows that one call of the fused product takes
# Decoded weights at a time, at most 64 MB of workspace. Smaller panels would fit a cache, and lose far more
# to the switches between torch's threads, which spin for a while after each product, and the decoder's.
PANEL_ELEMENTS = 1 << 24

_CPU = torch.device("cpu")


class _Weight(PackedOperand):
    """A packed weight in memory, and the kernels over it."""

    def decode(self, first: int, last: int, out: Tensor, threads: int) -> None:
        """Rows [first, last) into the contiguous `out`, rounded to its dtype."""
        _native.dequantize(
            self.codes,
            self.absmax,
            self.quant_map,
            self.nested_absmax,
            self.nested_quant_map,
            self.nested_offset,
            first * self.columns,
            last * self.columns,
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            threads,
        )

    def multiply(self, x_MK: Tensor, y_MN: Tensor, threads: int) -> None:
        """y = x @ W.T for up to KERNEL_ROWS rows of x, straight from the codes."""
        dtype = DTYPE_CODES[x_MK.dtype]
        _native.linear(
            x_MK.data_ptr(),
            dtype,
            x_MK.shape[0],
            self.codes,
            self.absmax,
            self.quant_map,
            self.nested_absmax,
            self.nested_quant_map,
            self.nested_offset,
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


def dequantize(*arguments: Any) -> Tensor:
    *packed, shape, dtype = arguments
    weight = _Weight(packed, 1, math.prod(shape), _CPU)
    out = _empty(math.prod(shape), floating("dtype", dtype)).view(shape)
    weight.decode(0, 1, out, torch.get_num_threads())
    return out


def embedding(ids: Tensor, *arguments: Any) -> Tensor:
    *packed, rows, width, dtype = arguments
    weight = _Weight(packed, rows, width, _CPU)
    wanted, places = torch.unique(ids, return_inverse=True)
    if wanted.numel() and not 0 <= int(wanted[0]) <= int(wanted[-1]) < rows:
        raise IndexError(f"ids: expected 0 to {rows - 1}, got {int(wanted[0])} to {int(wanted[-1])}")
    table = torch.empty(wanted.numel(), width, dtype=floating("dtype", dtype))
    for out, row in zip(table, wanted.tolist(), strict=True):
        weight.decode(row, row + 1, out, 1)
    return table[places]


def linear(x: Tensor, *arguments: Any) -> Tensor:
    *packed, out_features = arguments
    weight = _Weight(packed, out_features, x.shape[-1], _CPU)
    x_MK = matrix("x", x)
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


def linear_group(
    x: Tensor, packed: Sequence[Tensor], nested_offsets: Sequence[float], out_features: Sequence[int]
) -> list[Tensor]:
    parts = zip(nested_offsets, out_features, strict=True)
    return [linear(x, *packed[5 * i : 5 * i + 5], *part) for i, part in enumerate(parts)]


def linear_input_grad(grad: Tensor, *arguments: Any) -> Tensor:
    *packed, in_features = arguments
    weight = _Weight(packed, grad.shape[-1], in_features, _CPU)
    grad_MN = matrix("grad", grad).to(matmul_dtype(grad.dtype))
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
