"""What lies where in the pages of optimizer state.

All parameters, in the order of their groups, make a line of elements, cut into pages. With 32-bit states page
k holds the moments of elements k*E .. (k+1)*E of the line, E = page_bytes / 8::

    | exp_avg, fp32, of E elements | exp_avg_sq, fp32, of the same E elements |

so a page belongs to many small parameters or a part of a large one. With 8-bit states E is the largest
multiple of 256 that fits, at 520 bytes for 256 elements::

    | exp_avg, uint8 [E] | exp_avg_sq, uint8 [E] | exp_avg_absmax, fp32 [E/256] | exp_avg_sq_absmax, alike |

and every parameter begins a block of 256, so that no block belongs to two parameters or lies in two pages.
What is behind a parameter's end in its last block has codes that nobody reads. Parameters of fewer than 4096
elements keep 32-bit states, as in bitsandbytes: they weigh nothing, and biases and norms need the precision.
They have pages of their own, behind those of 8-bit states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import TrainError
from .blockwise import BLOCK

LEAST_8BIT = 4096  # elements of a parameter that has 8-bit states


class Piece(NamedTuple):
    """Elements [start, stop) of a parameter, whose moments begin at element `at` of a page."""

    param: int
    start: int
    stop: int
    at: int


class Field(NamedTuple):
    """A tensor in a page, and of a parameter's saved state: an item for each `elements` elements."""

    name: str
    dtype: torch.dtype
    elements: int

    @property
    def dtype_name(self) -> str:
        """As safetensors calls it."""
        return {torch.float32: "F32", torch.uint8: "U8"}[self.dtype]

    def shape(self, p: Tensor) -> tuple[int, ...]:
        """Of the whole tensor for a parameter."""
        return tuple(p.shape) if self.elements == 1 else (-(-p.numel() // self.elements),)

    def items(self, start: int, stop: int) -> slice:
        """Those of elements [start, stop), where `start` begins an item."""
        return slice(start // self.elements, -(-stop // self.elements))


FIELDS = {
    32: (Field("exp_avg", torch.float32, 1), Field("exp_avg_sq", torch.float32, 1)),
    8: (
        Field("exp_avg", torch.uint8, 1),
        Field("exp_avg_sq", torch.uint8, 1),
        Field("exp_avg_absmax", torch.float32, BLOCK),
        Field("exp_avg_sq_absmax", torch.float32, BLOCK),
    ),
}
"""By the bits of states, in the order in which they lie in a page. The first two are torch's names."""

UNIT_BYTES = {32: 8, 8: 2 * BLOCK + 8}
"""The smallest page: one element with 32-bit states, one block with 8-bit states."""

# Large enough for the full speed of a disk, and of a GPU's link; small enough for a tight budget.
DEFAULT_PAGE_BYTES = {"cpu": 4 << 20, "cuda": 8 << 20}
PAGE_ALIGNMENT = 8  # bytes


def page_elements(bits: int, page_bytes: int) -> int:
    """How many elements a page has room for."""
    units = page_bytes // UNIT_BYTES[bits]
    return units * BLOCK if bits == 8 else units


@dataclass(frozen=True)
class StateLayout:
    """Which pieces of which parameters lie in which page.

    Attributes:
        page_bytes: of every page.
        pages: the pieces in each, by its number.
        num_quantized: pages from 0 on that hold 8-bit states; the others hold 32-bit ones.
    """

    page_bytes: int
    pages: list[list[Piece]]
    num_quantized: int = 0

    @classmethod
    def cut(cls, sizes: Sequence[int], page_bytes: int, state_bits: int = 32) -> StateLayout:
        """Lay parameters of these sizes end to end and cut the line into pages."""
        bits = [bits_of(size, state_bits) for size in sizes]
        quantized = _cut(sizes, [b == 8 for b in bits], page_elements(8, page_bytes), BLOCK)
        plain = _cut(sizes, [b == 32 for b in bits], page_elements(32, page_bytes), 1)
        return cls(page_bytes, quantized + plain, len(quantized))

    def bits(self, page: int) -> int:
        """Of the states in a page."""
        return 8 if page < self.num_quantized else 32

    def fields(self, page: int, memory: Tensor) -> dict[str, Tensor]:
        """Views of a page's memory (uint8 [page_bytes]), flat, each for all the elements of the page."""
        bits, begin, views = self.bits(page), 0, {}
        elements = page_elements(bits, self.page_bytes)
        for field in FIELDS[bits]:
            end = begin + elements // field.elements * field.dtype.itemsize
            views[field.name] = memory[begin:end].view(field.dtype)
            begin = end
        return views


def bits_of(size: int, state_bits: int) -> int:
    """The bits of a parameter's states, from its number of elements and those asked for."""
    return 8 if state_bits == 8 and size >= LEAST_8BIT else 32


def _cut(sizes: Sequence[int], chosen: Sequence[bool], page_elements: int, align: int) -> list[list[Piece]]:
    pages: list[list[Piece]] = []
    at = page_elements
    for index, size in enumerate(sizes):
        start = 0
        while chosen[index] and start < size:
            if at >= page_elements:
                pages.append([])
                at = 0
            stop = min(size, start + page_elements - at)
            pages[-1].append(Piece(index, start, stop, at))
            at += -(-(stop - start) // align) * align
            start = stop
    return pages


def check_page_bytes(page_bytes: int, sizes: Sequence[int], state_bits: int) -> None:
    """Refuse pages that cannot hold the states of parameters of these sizes.

    Raises:
        TrainError: too small, or no multiple of 8.
    """
    least = max(UNIT_BYTES[bits_of(size, state_bits)] for size in sizes)
    if page_bytes < least or page_bytes % PAGE_ALIGNMENT:
        expected = f"a multiple of {PAGE_ALIGNMENT}, at least {least}"
        raise TrainError("", "bad page size", expected=expected, got=page_bytes)


def default_page_bytes(
    sizes: Sequence[int], state_bits: int, device: torch.device, budget_bytes: int | None
) -> int:
    """The page size for parameters of these sizes where none is asked for (see `PagedAdamW`)."""
    need = {32: 0, 8: 0}
    for size in sizes:
        bits = bits_of(size, state_bits)
        need[bits] += UNIT_BYTES[bits] * (size if bits == 32 else -(-size // BLOCK))
    least = max(UNIT_BYTES[bits] for bits in need if need[bits])
    most = min(DEFAULT_PAGE_BYTES[device.type], max(need.values()))
    if budget_bytes is not None:
        most = min(most, budget_bytes // 4 // PAGE_ALIGNMENT * PAGE_ALIGNMENT)
    return max(least, most)
