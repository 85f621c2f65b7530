"""The operators of `nf4.ops` on NVIDIA GPUs, over the kernels of `nf4._cuda` (csrc/cuda).

The number of rows of x decides the way: for few (`fused_rows`) the fused product reads the codes directly;
for more, the weight is decoded into a workspace and multiplied by torch, that is by cuBLAS. There is one
workspace for each device and stream, which only grows. Everything is started in the current stream; nothing
waits.
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

if TYPE_CHECKING:
    from types import ModuleType

# Up to how many rows the fused product is the faster way. 16-bit: it takes 16 rows at a time, and on an H200
# three times that still costs less than decoding and cuBLAS at most sizes; four times does not.
FUSED_ROWS = {torch.bfloat16: 48, torch.float16: 48, torch.float32: 8}
MOST_WEIGHTS = 4  # of one launch, as in csrc/cuda/launchers.h
SLOW_FUSED_ROWS = 8  # where only the kernel for any shape can run
WORKSPACE_BYTES = 512 << 20  # at most, unless one row takes more; larger weights go by panels of rows


@cache
def kernels() -> ModuleType:
    """nf4._cuda. ImportError where it was not built."""
    from . import _cuda  # type: ignore[attr-defined,unused-ignore]

    return _cuda


def stream_of(tensor: Tensor) -> int:
    """The current stream of a tensor's device, as an address."""
    return torch._C._cuda_getCurrentRawStream(tensor.device.index)


def fused_rows(dtype: torch.dtype, columns: int, codes: int) -> int:
    """Up to how many rows of `dtype` the fused product takes a weight with codes at that address."""
    is_fast = dtype != torch.float32 and columns % 64 == 0 and codes % 16 == 0
    return FUSED_ROWS[dtype] if is_fast else SLOW_FUSED_ROWS


class _Weight(PackedOperand):
    """A packed weight on a GPU, and the kernels over it, in the stream that is current when it is made."""

    def __init__(self, packed: Sequence[Any], rows: int, columns: int, device: torch.device) -> None:
        super().__init__(packed, rows, columns, device)
        self.constants = (self.codes, self.absmax, self.nested_absmax, self.nested_quant_map)
        self.tail = (_is_constant(self.codes), torch.cuda.current_stream(device).cuda_stream)
        self._device = device

    def decode(self, first: int, last: int, out: Tensor) -> None:
        """Rows [first, last) into the contiguous `out`, rounded to its dtype."""
        span = (first * self.columns, last * self.columns, out.data_ptr(), DTYPE_CODES[out.dtype])
        kernels().dequantize(*self.constants, self.nested_offset, *span, *self.tail)

    def look_up(self, ids: Tensor, out: Tensor) -> None:
        """Rows `ids`, contiguous int64, into the contiguous `out`."""
        table = (ids.data_ptr(), ids.numel(), self.rows, self.columns)
        where = (out.data_ptr(), DTYPE_CODES[out.dtype])
        kernels().embedding(*self.constants, self.nested_offset, *table, *where, *self.tail)

    def multiply(self, x_MK: Tensor, y_MN: Tensor) -> None:
        """y = x @ W.T, straight from the codes."""
        x = (x_MK.data_ptr(), DTYPE_CODES[x_MK.dtype], x_MK.shape[0])
        sizes = (self.rows, self.columns)
        kernels().linear(*x, *self.constants, self.nested_offset, *sizes, 0, y_MN.data_ptr(), *self.tail)

    def together(self, y_MN: Tensor) -> tuple[int, int, int, int, float, int, int]:
        """This weight as one of `_cuda.linear_group`'s."""
        return (*self.constants, self.nested_offset, self.rows, y_MN.data_ptr())

    @contextmanager
    def panels(self, dtype: torch.dtype) -> Iterator[Iterator[tuple[int, int, Tensor]]]:
        """(first, last, rows [first, last) of the weight), each decoded over the one before.

        No other thread may start work on the workspace before the block ends.
        """
        most = max(1, WORKSPACE_BYTES // (self.columns * dtype.itemsize))
        height = math.ceil(self.rows / math.ceil(self.rows / most))
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
        self._arguments = (*weight.constants, weight.nested_offset, rows, columns)
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
        if y_MN.numel() == 0 or x_MK.shape[1] == 0:
            y_MN.zero_()
        elif x_MK.shape[0] <= fused_rows(x.dtype, weight.columns, weight.codes):
            weight.multiply(x_MK, y_MN)
        else:
            with weight.panels(x.dtype) as panels:
                for first, last, panel in panels:
                    torch.mm(x_MK, panel.T, out=y_MN[:, first:last])
    return y_MN.view(*x.shape[:-1], out_features)


def linear_group(
    x: Tensor, packed: Sequence[Tensor], nested_offsets: Sequence[float], out_features: Sequence[int]
) -> list[Tensor]:
    parts = [(*packed[5 * i : 5 * i + 5], offset) for i, offset in enumerate(nested_offsets)]
    sizes = zip(parts, out_features, strict=True)
    weights = [_Weight(part, rows, x.shape[-1], x.device) for part, rows in sizes]
    x_MK = matrix("x", x)
    few = min(fused_rows(x.dtype, weight.columns, weight.codes) for weight in weights)
    if x.dtype == torch.float32 or not 0 < x_MK.shape[0] <= few:
        return [linear(x, *part, rows) for part, rows in zip(parts, out_features, strict=True)]
    outputs = [x_MK.new_empty(x_MK.shape[0], weight.rows) for weight in weights]
    with torch.cuda.device(x.device):
        if not _multiply_together(weights, x_MK, outputs):
            return [linear(x, *part, rows) for part, rows in zip(parts, out_features, strict=True)]
    return [y_MN.view(*x.shape[:-1], y_MN.shape[1]) for y_MN in outputs]


def linear_input_grad(grad: Tensor, *arguments: Any) -> Tensor:
    *packed, in_features = arguments
    weight = _Weight(packed, grad.shape[-1], in_features, grad.device)
    grad_MN = matrix("grad", grad)
    total: Tensor | None = None
    with torch.cuda.device(grad.device):
        if grad_MN.numel() and in_features:
            with weight.panels(grad.dtype) as panels:
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
