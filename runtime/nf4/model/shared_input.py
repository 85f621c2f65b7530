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
adapters are fp32 or bf16 masters, rounded to the dtype of the activations once a matrix; their gradients come
out of products in that dtype and are added up in fp32. The fixed pair of an adapter whose initial values came
out of the weight stands there like an adapter of its own, without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..lora import LoRALinear
from ..ops.cuda import RowDecoder, kernels, stream_of
from ..ops.operands import DTYPE_CODES
from .linear import KeptLinear, NF4Linear

# Ranks together, filled up: with rows and inner sizes at multiples of 128 bytes large products take 2 % less
# on an H200 than with as many columns as there are ranks.
ROOM_ALIGNMENT = 64


class _Place(NamedTuple):
    """A pair A, B of an adapter, and where its outputs and its ranks begin."""

    layer: LoRALinear
    lora_A: Tensor
    lora_B: Tensor
    row: int
    first_rank: int
    trains: bool

    @property
    def rank(self) -> int:
        return len(self.lora_A)


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
        self._places: list[_Place] = []
        self.outputs = ranks = 0
        for layer, base in zip(layers, self._layers, strict=True):
            if isinstance(layer, LoRALinear):
                for i, (lora_A, lora_B) in enumerate(layer.pairs()):
                    self._places.append(_Place(layer, lora_A, lora_B, self.outputs, ranks, trains=i == 0))
                    ranks += len(lora_A)
            self._first_rows.append(self.outputs)
            self.outputs += int(base.out_features)
        self._decoders: list[RowDecoder | None] = [None] * len(self._layers)
        self.room = -(-ranks // ROOM_ALIGNMENT) * ROOM_ALIGNMENT
        self._trained = [place for place in self._places if place.trains]
        self.parameters = [p for place in self._trained for p in (place.layer.lora_A, place.layer.lora_B)]
        self._are_fp32 = all(place.lora_A.dtype == torch.float32 for place in self._places)

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
            gradients: of `parameters`, in their order; fp32, or where the parameters are bf16 also bf16.
            x_MK: the input. thin_MR: x A^T.
            grad_ML: gy, and gy B behind it.
        """
        if not self.room:
            return
        grad_A_RK = grad_ML[:, self.outputs :].T @ x_MK
        grad_B_RN = thin_MR.T @ grad_ML[:, : self.outputs]
        if x_MK.is_cuda and all(gradient.dtype == torch.float32 for gradient in gradients):
            pairs = zip(gradients[::2], gradients[1::2], strict=True)
            places = [(grad_A.data_ptr(), grad_B.data_ptr()) for grad_A, grad_B in pairs]
            matrices = (grad_A_RK.data_ptr(), grad_B_RN.data_ptr(), self.outputs, self.inputs)
            kernels().lora_unpack(
                _adapters(self._trained), places, *matrices, add, DTYPE_CODES[x_MK.dtype], stream_of(x_MK)
            )
            return
        for i, place in enumerate(self._trained):
            ranks = slice(place.first_rank, place.first_rank + place.rank)
            own_A, own_B = grad_A_RK[ranks], grad_B_RN[ranks, place.row : place.row + len(place.lora_B)].T
            for gradient, own, scaling in (
                (gradients[2 * i], own_A, 1.0),
                (gradients[2 * i + 1], own_B, place.layer.scaling),
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
        if matrix.is_cuda and self._are_fp32:
            sizes = (self.outputs, self.inputs, self.room, DTYPE_CODES[matrix.dtype])
            kernels().lora_pack(
                _adapters(self._places), matrix.data_ptr(), matrix.stride(0), *sizes, stream_of(matrix)
            )
            return
        matrix[: self.outputs, self.inputs :] = 0
        matrix[self.outputs :, : self.inputs] = 0
        for place in self._places:
            row, rank = place.row, place.first_rank
            columns = slice(self.inputs + rank, self.inputs + rank + place.rank)
            scaled_B = place.lora_B.float() * place.layer.scaling
            matrix[row : row + len(place.lora_B), columns] = scaled_B
            matrix[self.outputs + rank : self.outputs + rank + place.rank, : self.inputs] = place.lora_A


def _adapters(places: Sequence[_Place]) -> list[tuple[int, int, int, int, int, int, float]]:
    """As the kernels take them."""
    return [
        (
            place.lora_A.data_ptr(),
            place.lora_B.data_ptr(),
            place.row,
            len(place.lora_B),
            place.first_rank,
            place.rank,
            place.layer.scaling,
        )
        for place in places
    ]


def can_share(layers: Sequence[nn.Module]) -> bool:
    """Whether `SharedInput` computes these layers.

    Weights are frozen; of an adapter A and B are all that trains, without dropout. So adapters with trained
    biases or magnitudes, and layers that train in full, go by their modules.
    """
    return all(_is_known(layer) for layer in layers)


def _is_known(layer: nn.Module) -> bool:
    if isinstance(layer, LoRALinear):
        drops = layer.training and layer.dropout > 0
        return not drops and layer.trains_pair_only and _is_known(layer.base)
    return isinstance(layer, (NF4Linear, KeptLinear))
