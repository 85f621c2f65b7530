"""How far training has moved the weights: a run that learned nothing must not look like one that did."""

from __future__ import annotations

from typing import NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from ..lora import lora_layers


class WeightNorms(NamedTuple):
    """Euclidean norms over all adapted layers: of every lora_B, and of what training added to the weights."""

    of_b: float
    change: float


class WeightChange:
    """Remembers how the adapters of a model began.

    Only products that were not zero are kept: with default values lora_B begins at zero.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._first = {
            name: (layer.lora_A.detach().clone().cpu(), layer.lora_B.detach().clone().cpu())
            for name, layer in lora_layers(model)
            if layer.lora_B.any()
        }

    @torch.no_grad()
    def measure(self) -> WeightNorms:
        """The norms now. ||B A||^2 is the sum over (B^T B) * (A A^T): no large matrix is formed."""
        of_b = change = 0.0
        for name, layer in lora_layers(self._model):
            a, b = (t.detach().cpu().double() for t in (layer.lora_A, layer.lora_B))
            of_b += float(b.square().sum())
            if name in self._first:
                first_a, first_b = self._first[name]
                a, b = torch.cat((a, first_a.double())), torch.cat((b, -first_b.double()), dim=1)
            change += layer.scaling**2 * max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))
        return WeightNorms(of_b**0.5, change**0.5)


def parameters_fingerprint(model: nn.Module) -> str:
    """XXH3-128 of all that trains, in hexadecimal digits."""
    total = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            data: Tensor = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
            total.update(name.encode())
            total.update(data.numpy().data)
    return total.hexdigest()
