"""The operators of `nf4.ops` on NVIDIA GPUs, over the kernels of `nf4._cuda` (csrc/cuda).

Three ways lead to a product, and the number of rows of x decides (`way`): for few rows a kernel reads the
codes directly; for more, another does so through Hopper's tensor cores; for many, the weight is decoded into
a workspace and multiplied by torch, that is by cuBLAS. There is one workspace for each device and stream,
which only grows. Everything is started in the current stream; nothing waits.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .operands import DTYPE_CODES, PackedOperand, floating, matrix
from .product_way import Way, panel_height, way

if TYPE_CHECKING:
    from types import ModuleType

MOST_WEIGHTS = 4  # of one launch, as in csrc/cuda/launchers.h


@cache
def kernels() -> ModuleType:
    """nf4._cuda. ImportError where it was not built."""
    from .. import _cuda  # type: ignore[attr-defined,unused-ignore]

    return _cuda


def stream_of(tensor: Tensor) -> int:
    """The current stream of a tensor's device, as an address."""
    return torch._C._cuda_getCurrentRawStream(tensor.device.index)


class _Weight(PackedOperand):
    """A packed weight on a GPU, and the kernels over it, in the stream that is current when it is made."""

    def __init__(self, packed: Sequence[Any], rows: int, columns: int, device: torch.device) -> None:
        super().__init__(packed, rows, columns, device)
        nested = (self.nested_absmax, self.nested_quant_map)
        self.constants = (self.codes, self.absmax, self.quant_map, *nested, self.nested_offset)
        self.tail = (_is_constant(self.codes), torch.cuda.current_stream(device).cuda_stream)
        self._device = device

    def decode(self, first: int, last: int, out: Tensor) -> None:
        """Rows [first, last) into the contiguous `out`, rounded to its dtype."""
        span = (first * self.columns, last * self.columns, out.data_ptr(), DTYPE_CODES[out.dtype])
        kernels().dequantize(*self.constants, *span, *self.tail)

    def look_up(self, ids: Tensor, out: Tensor) -> None:
        """Rows `ids`, contiguous int64, into the contiguous `out`."""
        table = (ids.data_ptr(), ids.numel(), self.rows, self.columns)
        where = (out.data_ptr(), DTYPE_CODES[out.dtype])
        kernels().embedding(*self.constants, *table, *where, *self.tail)

    def way(self, x_MK: Tensor) -> Way:
        """How x is multiplied by this weight."""
        aligned = (x_MK.data_ptr() | self.codes) % 16 == 0
        wgmma = self._wgmma_bytes(x_MK) > 0
        return way(x_MK.dtype, x_MK.shape[0], self.rows, self.columns, aligned=aligned, wgmma=wgmma)

    def multiply(self, x_MK: Tensor, y_MN: Tensor) -> None:
        """y = x @ W.T; either may be empty."""
        if y_MN.numel() == 0 or x_MK.shape[1] == 0:
            y_MN.zero_()
            return
        chosen = self.way(x_MK)
        if chosen is Way.FEW_ROWS:
            self.multiply_few_rows(x_MK, y_MN)
        elif chosen is Way.WGMMA:
            self.multiply_wgmma(x_MK, y_MN)
        else:
            height = panel_height(x_MK.dtype, x_MK.shape[0], self.rows, self.columns)
            with self.panels(x_MK.dtype, height) as panels:
                for first, last, panel in panels:
                    torch.mm(x_MK, panel.T, out=y_MN[:, first:last])

    def _wgmma_bytes(self, x_MK: Tensor) -> int:
        return kernels().linear_wgmma_workspace(x_MK.shape[0], self.rows, self.columns)

    def multiply_wgmma(self, x_MK: Tensor, y_MN: Tensor) -> None:
        """y = x @ W.T on Hopper's tensor cores, straight from the codes."""
        size = self._wgmma_bytes(x_MK)
        x = (x_MK.data_ptr(), DTYPE_CODES[x_MK.dtype], x_MK.shape[0])
        with _workspace(size, torch.uint8, self._device, self.tail[1]) as workspace:
            where = (self.rows, self.columns, 0, y_MN.data_ptr(), workspace.data_ptr(), size)
            kernels().linear_wgmma(*x, *self.constants, *where, *self.tail)

    def multiply_few_rows(self, x_MK: Tensor, y_MN: Tensor) -> None:
        """y = x @ W.T, straight from the codes, on any GPU."""
        x = (x_MK.data_ptr(), DTYPE_CODES[x_MK.dtype], x_MK.shape[0])
        sizes = (self.rows, self.columns)
        kernels().linear(*x, *self.constants, *sizes, 0, y_MN.data_ptr(), *self.tail)

    def together(self, y_MN: Tensor) -> tuple[int, int, int, int, int, float, int, int]:
        """This weight as one of `_cuda.linear_group`'s."""
        return (*self.constants, self.rows, y_MN.data_ptr())

    @contextmanager
    def panels(self, dtype: torch.dtype, height: int) -> Iterator[Iterator[tuple[int, int, Tensor]]]:
        """(first, last, rows [first, last) of the weight), each of `height` rows decoded over the one before.

        No other thread may start work on the workspace before the block ends.
        """
        with _workspace(height * self.columns, dtype, self._device, self.tail[1]) as workspace:
            yield self._decoded_panels(workspace, height)

    def _decoded_panels(self, workspace: Tensor, height: int) -> Iterator[tuple[int, int, Tensor]]:
        for first in range(0, self.rows, height):
            last = min(first + height, self.rows)
            panel = workspace[: (last - first) * self.columns].view(last - first, self.columns)
            self.decode(first, last, panel)
            yield first, last, panel


def _multiply_together(weights: list[_Weight], x_MK: Tensor, outputs: list[Tensor]) -> bool:
    """outputs = x @ W.T of every weight, in one launch; False where that cannot be."""
    if len(weights) > MOST_WEIGHTS:
        return False
    parts = [weight.together(y_MN) for weight, y_MN in zip(weights, outputs, strict=True)]
    are_constant = all(weight.tail[0] for weight in weights)
    x = (x_MK.data_ptr(), DTYPE_CODES[x_MK.dtype], *x_MK.shape)
    return kernels().linear_group(*x, parts, are_constant, weights[0].tail[1])


def dequantize(*arguments: Any) -> Tensor:
    *packed, shape, dtype = arguments
    device = packed[0].device
    weight = _Weight(packed, 1, math.prod(shape), device)
    out = torch.empty(shape, dtype=floating("dtype", dtype), device=device)
    with torch.cuda.device(device):
        weight.decode(0, 1, out)
    return out


class RowDecoder:
    """Decodes a whole weight again and again on the current device; what it is made of is checked once.

    Args:
        packed: as every operator takes it. The tensors must live as long as this does.
        rows, columns: the weight's.

    Attributes:
        codes: their address.
    """

    def __init__(self, packed: Sequence[Any], rows: int, columns: int) -> None:
        weight = _Weight(packed, rows, columns, packed[0].device)
        self.codes = weight.codes
        self._arguments = (*weight.constants, rows, columns)
        self._overlap = weight.tail[0]

    def decode(self, out: Tensor) -> None:
        """Into `out` [rows, columns], whose rows may have room between them."""
        place = (out.data_ptr(), out.stride(0), DTYPE_CODES[out.dtype])
        kernels().dequantize_rows(*self._arguments, *place, self._overlap, stream_of(out))


def embedding(ids: Tensor, *arguments: Any) -> Tensor:
    *packed, rows, width, dtype = arguments
    weight = _Weight(packed, rows, width, ids.device)
    out = torch.empty(*ids.shape, width, dtype=floating("dtype", dtype), device=ids.device)
    with torch.cuda.device(ids.device):
        weight.look_up(ids.long().contiguous(), out)
    return out


def linear(x: Tensor, *arguments: Any) -> Tensor:
    *packed, out_features = arguments
    weight = _Weight(packed, out_features, x.shape[-1], x.device)
    x_MK = matrix("x", x)
    y_MN = x_MK.new_empty(x_MK.shape[0], out_features)
    with torch.cuda.device(x.device):
        weight.multiply(x_MK, y_MN)
    return y_MN.view(*x.shape[:-1], out_features)


def linear_group(
    x: Tensor, packed: Sequence[Tensor], nested_offsets: Sequence[float], out_features: Sequence[int]
) -> list[Tensor]:
    parts = [(*packed[5 * i : 5 * i + 5], offset) for i, offset in enumerate(nested_offsets)]
    sizes = zip(parts, out_features, strict=True)
    weights = [_Weight(part, rows, x.shape[-1], x.device) for part, rows in sizes]
    x_MK = matrix("x", x)
    outputs = [x_MK.new_empty(x_MK.shape[0], weight.rows) for weight in weights]
    with torch.cuda.device(x.device):
        together = x.dtype != torch.float32 and x_MK.numel() > 0
        together = together and all(weight.way(x_MK) is Way.FEW_ROWS for weight in weights)
        if not together or not _multiply_together(weights, x_MK, outputs):
            for weight, y_MN in zip(weights, outputs, strict=True):
                weight.multiply(x_MK, y_MN)
    return [y_MN.view(*x.shape[:-1], y_MN.shape[1]) for y_MN in outputs]


def linear_input_grad(grad: Tensor, *arguments: Any) -> Tensor:
    *packed, in_features = arguments
    weight = _Weight(packed, grad.shape[-1], in_features, grad.device)
    grad_MN = matrix("grad", grad)
    total: Tensor | None = None
    with torch.cuda.device(grad.device):
        if grad_MN.numel() and in_features:
            # A panel gives a sum over its rows: fewer of them would mean more sums.
            height = panel_height(grad.dtype, 1, weight.rows, weight.columns)
            with weight.panels(grad.dtype, height) as panels:
                for first, last, panel in panels:
                    part = grad_MN[:, first:last] @ panel
                    total = part if total is None else total.float().add_(part)  # sums of panels in fp32
    if total is None:
        total = grad_MN.new_zeros(grad_MN.shape[0], in_features)
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)


_constant: dict[int, int] = {}  # begin -> end of memory that no kernel writes


def mark_constant(slab: Tensor) -> None:
    """Promise that `slab` is complete and that no kernel will write it as long as it lives.

    Kernels may then read weights inside of it before the kernel ahead of them in the stream has ended.
    """
    begin = slab.data_ptr()
    _constant[begin] = begin + slab.numel() * slab.element_size()
    weakref.finalize(slab, _constant.pop, begin, None)


def _is_constant(address: int) -> bool:
    return any(begin <= address < end for begin, end in list(_constant.items()))


class _Workspace:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.memory: Tensor | None = None


_workspaces: dict[tuple[int, int], _Workspace] = {}


@contextmanager
def _workspace(elements: int, dtype: torch.dtype, device: torch.device, stream: int) -> Iterator[Tensor]:
    """Uninitialised [elements], the same memory for all work of a stream, one thread at a time."""
    size = elements * dtype.itemsize
    if torch.cuda.is_current_stream_capturing():  # belongs to the graph, which may be replayed in any stream
        yield torch.empty(size, dtype=torch.uint8, device=device).view(dtype)
        return
    held = _workspaces.setdefault((device.index, stream), _Workspace())
    with held.lock:
        if held.memory is None or held.memory.numel() < size:
            held.memory = None  # give the old one back first
            held.memory = torch.empty(size, dtype=torch.uint8, device=device)
        yield held.memory[:size].view(dtype)
