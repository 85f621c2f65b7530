"""Layers over frozen weights that stay where the file is mapped: packed (NF4) or kept (16-bit or fp32).

Shapes: x [..., K] -> y [..., N] for a weight [N, K]; ids [...] -> [..., K] for a table [N, K]. Weights are
buffers, never parameters: no optimizer and no `requires_grad_` reaches them. Gradients flow through to x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nf4format.blocks import PackedTensor

from .. import ops

# Elements of a kept weight converted at a time when activations have another dtype.
CONVERTED_ELEMENTS = 1 << 20


class _FrozenLayer(nn.Module):
    """A layer without parameters, whose buffers keep their dtype; only a bias follows the compute dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `.to(dtype)` and `.half()` are about activations: here they would round the constants of packed
        # weights, and copy kept ones out of the mapping. Moves to another device go through.
        for name, tensor in self._buffers.items():
            if tensor is not None:
                moved = fn(tensor)
                keeps = name == "bias" or moved.dtype == tensor.dtype
                self._buffers[name] = moved if keeps else tensor.to(moved.device)
        return self


# Buffer of a packed layer -> what follows the weight's name in the file.
PACKED_PARTS = {
    "codes": "",
    "absmax": ".absmax",
    "quant_map": ".quant_map",
    "nested_absmax": ".nested_absmax",
    "nested_quant_map": ".nested_quant_map",
}


class _PackedLayer(_FrozenLayer):
    """The buffers of one packed weight, views of the arrays given."""

    codes: Tensor
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor
    nested_quant_map: Tensor

    def __init__(self, weight: PackedTensor) -> None:
        super().__init__()
        for name in PACKED_PARTS:
            array = getattr(weight, name)
            # torch has no read-only tensors. Arrays of a mapped file are private and writable; what is not
            # (the shared constant tables) is small.
            self.register_buffer(name, torch.from_numpy(array if array.flags.writeable else array.copy()))
        self.nested_offset = float(weight.nested_offset)

    def packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        """The arguments that every operator of `nf4.ops` takes."""
        constants = (self.quant_map, self.nested_absmax, self.nested_quant_map)
        return self.codes, self.absmax, *constants, self.nested_offset


class NF4Linear(_PackedLayer):
    """y = x @ W.T + bias with W packed in NF4; y has x's dtype (float32, bfloat16 or float16).

    Args:
        weight: shape (out_features, in_features).
        bias: [out_features], in the compute dtype.

    Attributes:
        in_features, out_features: ints.
        codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset: as in `PackedTensor`.
    """

    bias: Tensor | None

    def __init__(self, weight: PackedTensor, bias: Tensor | None = None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def product(self, x: Tensor) -> Tensor:
        """x @ W.T, without the bias."""
        return torch.ops.nf4.linear(x, *self.packed(), self.out_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight, decoded: [out_features, in_features]."""
        return torch.ops.nf4.dequantize(*self.packed(), (self.out_features, self.in_features), dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


def project(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Each layer's output of one x: q/k/v, or gate and up.

    On a GPU without gradients packed layers go together, in one launch where x has few rows; the values are
    those of separate calls.
    """
    packed = [layer for layer in layers if isinstance(layer, NF4Linear) and layer.bias is None]
    if len(packed) < len(layers) or not x.is_cuda or (x.requires_grad and torch.is_grad_enabled()):
        return [layer(x) for layer in layers]
    tensors = [tensor for layer in packed for tensor in layer.packed()[:-1]]
    offsets, features = [layer.nested_offset for layer in packed], [layer.out_features for layer in packed]
    return list(torch.ops.nf4.linear_group(x, tensors, offsets, features))


class NF4Embedding(_PackedLayer):
    """Rows of a packed table [N, K]; only the rows looked up are decoded, to `dtype`."""

    def __init__(self, weight: PackedTensor, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return torch.ops.nf4.embedding(
            ids, *self.packed(), self.num_embeddings, self.embedding_dim, self.dtype
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype}"


class KeptLinear(_FrozenLayer):
    """y = x @ W.T + bias with a frozen W in the file's dtype; y has x's dtype.

    Where the dtypes differ (or the CPU has no fast product in theirs), panels of rows are converted on the
    way, forward and backward: the weight as a whole is never copied.

    Args:
        weight: [out_features, in_features], float32, bfloat16 or float16.
        bias: [out_features], in the compute dtype.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == ops.matmul_dtype(x.dtype, x.device):
            return F.linear(x, self.weight, self.bias)
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def product(self, x: Tensor) -> Tensor:
        """x @ W.T, without the bias."""
        if x.dtype == self.weight.dtype == ops.matmul_dtype(x.dtype, x.device):
            return F.linear(x, self.weight)
        return _ConvertedProduct.apply(x, self.weight)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, dtype={self.weight.dtype}"


class KeptEmbedding(_FrozenLayer):
    """Rows of a frozen table [N, K], in the file's dtype; the decoder converts what it looked up."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.weight.dtype}"


class _ConvertedProduct(torch.autograd.Function):
    """x [..., K] @ weight [N, K].T by panels, each converted to the dtype in which the device multiplies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        x_MK = x.reshape(-1, x.shape[-1]).to(ops.matmul_dtype(x.dtype, x.device))
        y_MN = x.new_empty(x_MK.shape[0], weight.shape[0])
        for rows in _row_panels(weight):
            y_MN[:, rows] = x_MK @ weight[rows].to(x_MK.dtype).T
        return y_MN.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,), (grad,) = ctx.saved_tensors, grads
        grad_MN = grad.reshape(-1, grad.shape[-1]).to(ops.matmul_dtype(grad.dtype, grad.device))
        total = torch.zeros(grad_MN.shape[0], weight.shape[1], device=grad.device)  # sums of panels in fp32
        for rows in _row_panels(weight):
            total += grad_MN[:, rows] @ weight[rows].to(grad_MN.dtype)
        return total.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1]), None


def _row_panels(weight: Tensor) -> Iterator[slice]:
    height = max(1, CONVERTED_ELEMENTS // max(1, weight.shape[1]))
    for first in range(0, weight.shape[0], height):
        yield slice(first, first + height)
