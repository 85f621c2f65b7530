"""AdamW over pages on a CPU: torch's own tensor operations, in the order of torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .blockwise import BLOCK, DynamicMap, signed_map, unsigned_map
from .layout import Piece

CHUNK_ELEMENTS = 1 << 17  # at a time: what an update needs stays in a cache; whole blocks


class Update:
    """One parameter's AdamW update of this step, applied piece by piece."""

    def __init__(
        self, p: Tensor, gradient: Tensor, factor: Tensor | None, group: dict[str, Any], step: int
    ) -> None:
        self.param, self.grad = p.view(-1), gradient.view(-1)
        self.factor = None if factor is None or factor == 1 else factor
        self.beta1, self.beta2 = group["betas"]
        self.eps = group["eps"]
        self.decay = 1 - group["lr"] * group["weight_decay"] if group["weight_decay"] else None
        self.step_size = group["lr"] / (1 - self.beta1**step)
        self.correction2_sqrt = (1 - self.beta2**step) ** 0.5

    def apply(self, start: int, exp_avg: Tensor, exp_avg_sq: Tensor, scratch: Tensor) -> None:
        """Elements from `start` on, as many as the moments (float32) have; scratch: float32, of that size.

        The operations and their order are torch's: reordering them changes last bits.
        """
        stored = self.param[start : start + len(exp_avg)]
        param = stored.float()  # itself, where it is fp32
        grad = self.grad[start : start + len(exp_avg)].float()
        if self.factor is not None:
            grad = grad * self.factor
        if self.decay is not None:
            param.mul_(self.decay)
        exp_avg.lerp_(grad, 1 - self.beta1)
        exp_avg_sq.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        denominator = torch.sqrt(exp_avg_sq, out=scratch).div_(self.correction2_sqrt).add_(self.eps)
        param.addcdiv_(exp_avg, denominator, value=-self.step_size)
        if param is not stored:
            stored.copy_(param)


class Scratch:
    """Memory that updates use again and again, of a size that pages do not change: float32 [3, chunk]."""

    def __init__(self, most_elements: int) -> None:
        size = min(CHUNK_ELEMENTS, -(-most_elements // BLOCK) * BLOCK)
        self.exp_avg, self.exp_avg_sq, self.denominator = torch.empty(3, size)


def update_page(
    pieces: Sequence[Piece], fields: Mapping[str, Tensor], updates: Mapping[int, Update], scratch: Scratch
) -> None:
    """Apply the updates of this step to what lies in a page.

    Args:
        pieces: what lies there.
        fields: the page's tensors, by name (see `StateLayout.fields`); 8-bit states have absmaxes.
        updates: by number of the parameter; a parameter without one stays as it is.
    """
    work = _update_blocks if "exp_avg_absmax" in fields else _update_plain
    for piece in pieces:
        if (update := updates.get(piece.param)) is not None:
            for start in range(piece.start, piece.stop, CHUNK_ELEMENTS):
                stop = min(piece.stop, start + CHUNK_ELEMENTS)
                work(update, Piece(piece.param, start, stop, piece.at + start - piece.start), fields, scratch)


def _update_plain(update: Update, piece: Piece, fields: Mapping[str, Tensor], scratch: Scratch) -> None:
    size = piece.stop - piece.start
    exp_avg, exp_avg_sq = (fields[name].narrow(0, piece.at, size) for name in ("exp_avg", "exp_avg_sq"))
    update.apply(piece.start, exp_avg, exp_avg_sq, scratch.denominator[:size])


def _update_blocks(update: Update, piece: Piece, fields: Mapping[str, Tensor], scratch: Scratch) -> None:
    """The moments become fp32, are updated as any others, and become codes again."""
    size = piece.stop - piece.start
    blocks = slice(piece.at // BLOCK, -(-(piece.at + size) // BLOCK))
    elements = slice(piece.at, blocks.stop * BLOCK)
    moments: list[tuple[Tensor, DynamicMap, Tensor, Tensor]] = []
    for name, values, code_map in (
        ("exp_avg", scratch.exp_avg, signed_map()),
        ("exp_avg_sq", scratch.exp_avg_sq, unsigned_map()),
    ):
        codes, absmax = fields[name][elements], fields[f"{name}_absmax"][blocks]
        code_map.dequantize(codes, absmax, values[: len(codes)])
        values[size : len(codes)] = 0  # behind the parameter's end; it must not raise the absmax
        moments.append((values[: len(codes)], code_map, codes, absmax))
    update.apply(piece.start, scratch.exp_avg[:size], scratch.exp_avg_sq[:size], scratch.denominator[:size])
    for values, code_map, codes, absmax in moments:
        code_map.quantize(values, codes, absmax)
