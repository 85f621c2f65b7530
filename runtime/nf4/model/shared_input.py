"""Linear layers that share an input as one matrix, LoRA included: q/k/v, gate/up, or a single one.

The decoded weights W_i lie below each other; the thin matrices of the adapters lie beside and below them, so
that they ride along in the large products:

                K        R                 M tokens (rows), K inputs, N outputs of all layers together,
         | W_1   s_1 B_1  0     |          R ranks of all adapters together, filled up with zeros
    N    | W_2   0     s_2 B_2  |
         |----------------------|          y      = [x | x A^T]   times the upper part, transposed
    R    | A_1                  |          grad_x = [gy | gy B]   times the left part
         | A_2                  |

Who owns the input or the gradient leaves R columns of room behind it; `room` is the width of that room. The
adapters are fp32 masters, rounded to the dtype of the activations once a matrix; their gradients come out of
products in that dtype and are added up in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..lora import LoRALinear
from ..ops.cuda import RowDecoder, kernels, stream_of
from ..ops.operands import DTYPE_CODES
from .linear import KeptLinear, NF4Linear

# Ranks together, filled up: with rows and inner sizes at multiples of 128 bytes large products take 2 % less
# on an H200 than with as many columns as there are ranks.
ROOM_ALIGNMENT = 64


class SharedInput:
    """Layers over one input: NF4Linear or KeptLinear, plain or under a LoRALinear.

    Attributes:
        inputs, outputs: K and N. room: R.
        parameters: A and B of each adapter, in order.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers: list[Any] = [layer.base if isinstance(layer, LoRALinear) else layer for layer in layers]
        self.inputs = int(self._layers[0].in_features)
        self._first_rows: list[int] = []
        self._places: list[tuple[LoRALinear, int, int]] = []  # adapter, its first row and rank
        self.outputs = ranks = 0
        for layer, base in zip(layers, self._layers, strict=True):
            if isinstance(layer, LoRALinear):
                self._places.append((layer, self.outputs, ranks))
                ranks += layer.rank
            self._first_rows.append(self.outputs)
            self.outputs += int(base.out_features)
        self._decoders: list[RowDecoder | None] = [None] * len(self._layers)
        self.room = -(-ranks // ROOM_ALIGNMENT) * ROOM_ALIGNMENT
        self.parameters = [p for layer, *_ in self._places for p in (layer.lora_A, layer.lora_B)]

    def matrix(self, like: Tensor) -> Tensor:
        """[N + R, K + R] on the device and in the dtype of the activations; R x R of it mean nothing."""
        matrix = like.new_empty(self.outputs + self.room, self.inputs + self.room)
        for i, (base, first) in enumerate(zip(self._layers, self._first_rows, strict=True)):
            rows = matrix[first : first + base.out_features, : self.inputs]
            if isinstance(base, NF4Linear) and like.is_cuda:
                self._decoder(i, base).decode(rows)
            else:
                rows.copy_(base.dequantize(like.dtype) if isinstance(base, NF4Linear) else base.weight)
        if self.room:
            self._place_adapters(matrix)
        return matrix

    def thin(self, matrix: Tensor, x_ML: Tensor) -> None:
        """Makes the last R columns of x_ML x A^T, where x is the first K."""
        if self.room:
            torch.mm(
                x_ML[:, : self.inputs], matrix[self.outputs :, : self.inputs].T, out=x_ML[:, self.inputs :]
            )

    def project(self, matrix: Tensor, x_ML: Tensor, out: Tensor, *, add: bool = False) -> None:
        """out = y, or out += y, [M, N]; x_ML holds x in the first K columns and x A^T in the last R."""
        weight_LN = matrix[: self.outputs].T
        if add:
            out.addmm_(x_ML, weight_LN)
        else:
            torch.mm(x_ML, weight_LN, out=out)
        for base, first in zip(self._layers, self._first_rows, strict=True):
            if base.bias is not None:
                out[:, first : first + len(base.bias)] += base.bias

    def thin_back(self, matrix: Tensor, grad_ML: Tensor) -> None:
        """Makes the last R columns of grad_ML gy B, where gy is the first N."""
        if self.room:
            torch.mm(
                grad_ML[:, : self.outputs],
                matrix[: self.outputs, self.inputs :],
                out=grad_ML[:, self.outputs :],
            )

    def project_back(self, matrix: Tensor, grad_ML: Tensor, out: Tensor | None = None) -> Tensor:
        """Gradient of x [M, K]; grad_ML holds gy in the first N columns and gy B in the last R."""
        return torch.mm(grad_ML, matrix[:, : self.inputs], out=out)

    def put_gradients(
        self, gradients: Sequence[Tensor], x_MK: Tensor, thin_MR: Tensor, grad_ML: Tensor, *, add: bool
    ) -> None:
        """Gradients of the adapters over these rows, written or added.

        Args:
            gradients: fp32, of `parameters`, in their order.
            x_MK: the input. thin_MR: x A^T.
            grad_ML: gy, and gy B behind it.
        """
        if not self.room:
            return
        grad_A_RK = grad_ML[:, self.outputs :].T @ x_MK
        grad_B_RN = thin_MR.T @ grad_ML[:, : self.outputs]
        if x_MK.is_cuda:
            pairs = zip(gradients[::2], gradients[1::2], strict=True)
            places = [(grad_A.data_ptr(), grad_B.data_ptr()) for grad_A, grad_B in pairs]
            matrices = (grad_A_RK.data_ptr(), grad_B_RN.data_ptr(), self.outputs, self.inputs)
            kernels().lora_unpack(
                self._adapters(), places, *matrices, add, DTYPE_CODES[x_MK.dtype], stream_of(x_MK)
            )
            return
        for i, (layer, row, rank) in enumerate(self._places):
            own_A = grad_A_RK[rank : rank + layer.rank]
            own_B = grad_B_RN[rank : rank + layer.rank, row : row + layer.out_features].T
            for gradient, own, scaling in (
                (gradients[2 * i], own_A, 1.0),
                (gradients[2 * i + 1], own_B, layer.scaling),
            ):
                if add:
                    gradient.add_(own, alpha=scaling)
                else:
                    gradient.copy_(own * scaling)

    def _decoder(self, i: int, base: NF4Linear) -> RowDecoder:
        known = self._decoders[i]
        if known is None or known.codes != base.codes.data_ptr():
            known = self._decoders[i] = RowDecoder(base.packed(), base.out_features, base.in_features)
        return known

    def _place_adapters(self, matrix: Tensor) -> None:
        if matrix.is_cuda:
            sizes = (self.outputs, self.inputs, self.room, DTYPE_CODES[matrix.dtype])
            kernels().lora_pack(
                self._adapters(), matrix.data_ptr(), matrix.stride(0), *sizes, stream_of(matrix)
            )
            return
        matrix[: self.outputs, self.inputs :] = 0
        matrix[self.outputs :, : self.inputs] = 0
        for layer, row, rank in self._places:
            columns = slice(self.inputs + rank, self.inputs + rank + layer.rank)
            matrix[row : row + layer.out_features, columns] = layer.lora_B * layer.scaling
            matrix[self.outputs + rank : self.outputs + rank + layer.rank, : self.inputs] = layer.lora_A

    def _adapters(self) -> list[tuple[int, int, int, int, int, int, float]]:
        return [
            (
                layer.lora_A.data_ptr(),
                layer.lora_B.data_ptr(),
                row,
                layer.out_features,
                rank,
                layer.rank,
                layer.scaling,
            )
            for layer, row, rank in self._places
        ]


def can_share(layers: Sequence[nn.Module]) -> bool:
    """Whether `SharedInput` computes these layers: frozen weights, adapters in fp32 without dropout."""
    return all(_is_known(layer) for layer in layers)


def _is_known(layer: nn.Module) -> bool:
    if isinstance(layer, LoRALinear):
        drops = layer.training and layer.dropout > 0
        is_fp32 = layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
        return not drops and is_fp32 and _is_known(layer.base)
    return isinstance(layer, (NF4Linear, KeptLinear))
