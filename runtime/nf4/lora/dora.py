"""DoRA (arXiv 2402.09353): the norms of the weight's rows with the adapter, over weights that stay packed.

Legend: O out_features, I in_features, R rank. Of V = W + s B A, row by row:

    |V|^2 = |W|^2 + 2 s sum(W A^T * B) + s^2 sum(B (A A^T) * B)

The first term is computed once, by blocks of rows; the second takes one product of the frozen layer with
R rows, as any input goes through it; so no weight is ever decoded as a whole. The sums are in fp64. The paper
(4.3) takes the norms for constants: no gradient flows through them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import device_of, features, product, row_blocks

if TYPE_CHECKING:
    from .layer import LoRALinear


class Norms:
    """The norms of one layer's rows, and what DoRA multiplies its outputs by."""

    def __init__(self, layer: LoRALinear) -> None:
        self._layer = (layer,)  # in a tuple: nothing of nn.Module's walks goes around in a circle
        self._frozen_squares_O: Tensor | None = None
        self._known: tuple[list[tuple[int, int]], Tensor] | None = None

    def factor(self) -> Tensor:
        """magnitude / norm, fp32 [O], with a gradient for the magnitude.

        A row of zeros, whose norm is zero, is divided by one. While a layer is in evaluation mode and without
        gradients the factor is kept until a tensor in it changes.
        """
        (layer,) = self._layer
        assert layer.lora_magnitude is not None
        if layer.training or torch.is_grad_enabled():
            return self._factor(layer.lora_magnitude)
        parts = [layer.lora_magnitude, *(tensor for pair in layer.pairs() for tensor in pair)]
        state = [(tensor.data_ptr(), tensor._version) for tensor in parts]
        if self._known is None or self._known[0] != state:
            self._known = (state, self._factor(layer.lora_magnitude))
        return self._known[1]

    @torch.no_grad()
    def of_rows(self) -> Tensor:
        """Norms of the rows of W + scaling * B A, fp32 [O]."""
        (layer,) = self._layer
        pairs = layer.pairs()
        lora_A = torch.cat([A.float() for A, _ in pairs])
        lora_B = torch.cat([B.float() for _, B in pairs], dim=1).double()
        scaling = layer.scaling
        of_weight_OR = product(layer.base, lora_A).T.double()
        gram_RR = lora_A.double() @ lora_A.double().T
        squares_O = (
            self._frozen_squares()
            + 2 * scaling * (of_weight_OR * lora_B).sum(1)
            + scaling**2 * ((lora_B @ gram_RR) * lora_B).sum(1)
        )
        return squares_O.clamp(min=0).sqrt().float()

    def forget(self) -> None:
        """Drop the factor that was kept."""
        self._known = None

    def _factor(self, magnitude: Tensor) -> Tensor:
        norms = self.of_rows()
        return magnitude.float() / torch.where(norms > 0, norms, 1.0)

    def _frozen_squares(self) -> Tensor:
        """Squared norms of the rows of the frozen weight, fp64 [O]."""
        (layer,) = self._layer
        device = device_of(layer.base)
        if self._frozen_squares_O is None or self._frozen_squares_O.device != device:
            squares = torch.empty(features(layer.base)[1], dtype=torch.float64, device=device)
            for rows, block in row_blocks(layer.base):
                squares[rows] = block.double().square().sum(1)
            self._frozen_squares_O = squares
        return self._frozen_squares_O
