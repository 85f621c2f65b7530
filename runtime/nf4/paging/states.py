"""Optimizer state on its way out of the pages and back: whole, or piece by piece with a page in memory.

Each parameter that was updated has the tensors of `FIELDS` of its bits, in its own shape or one number for
each block; what is behind its end in the last block is in none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import TrainError
from .blockwise import BLOCK, signed_map, unsigned_map
from .layout import FIELDS, StateLayout, bits_of
from .pager import Pager

if TYPE_CHECKING:
    from .cuda_pager import CudaPager

Transfer = Callable[[str, int, memoryview], None]  # tensor, byte offset in it, bytes to take or to fill


def tensor_layout(
    params: Sequence[Tensor], steps: Sequence[int], state_bits: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """`<number of the parameter>.<field>` -> safetensors dtype, shape; of parameters that were updated."""
    return {
        f"{index}.{field.name}": (field.dtype_name, field.shape(p))
        for index, (p, step) in enumerate(zip(params, steps, strict=True))
        if step
        for field in FIELDS[bits_of(p.numel(), state_bits)]
    }


def write_pages(layout: StateLayout, pager: Pager | CudaPager, steps: Sequence[int], put: Transfer) -> None:
    """Give every piece of every tensor to `put`.

    Raises:
        TrainError: the page file failed.
    """
    for pages in pager.sweep(range(len(layout.pages)), write=False):
        for k, page in pages:
            _each_piece(layout, k, page.cpu(), steps, put)


def read_pages(layout: StateLayout, pager: Pager | CudaPager, steps: Sequence[int], get: Transfer) -> None:
    """Fill the pages from `get`; what belongs to no updated parameter becomes zeros.

    Raises:
        TrainError: the page file failed.
    """
    for pages in pager.sweep(range(len(layout.pages))):
        for k, page in pages:
            content = torch.zeros(layout.page_bytes, dtype=torch.uint8)
            _each_piece(layout, k, content, steps, get)
            page.copy_(content)


def _each_piece(
    layout: StateLayout, page: int, memory: Tensor, steps: Sequence[int], transfer: Transfer
) -> None:
    views = layout.fields(page, memory)
    for param, start, stop, at in layout.pages[page]:
        if steps[param]:
            for field in FIELDS[layout.bits(page)]:
                here = views[field.name][field.items(at, at + stop - start)]
                offset = field.items(start, stop).start * field.dtype.itemsize
                transfer(f"{param}.{field.name}", offset, here.numpy().data.cast("B"))


def steps_of(states: Mapping[int, Mapping[str, Any]], count: int) -> list[int]:
    """The updates that each of `count` parameters has had, from a state dictionary.

    Raises:
        TrainError: a number that none can be.
    """
    steps = [0] * count
    for index, state in states.items():
        step = float(state.get("step", 0))
        if not (0 <= step < 2**53 and step.is_integer()):
            raise TrainError("", f"step of parameter {index}", expected="a whole number", got=step)
        steps[index] = int(step)
    return steps


def flat_tensors(index: int, state: Mapping[str, Any], p: Tensor, state_bits: int) -> dict[str, Tensor]:
    """A parameter's saved state as the tensors of its fields here, flat; 8 and 32 bits become each other.

    Raises:
        TrainError: moments that are missing, have another shape or dtype, or belong to amsgrad.
    """
    if "max_exp_avg_sq" in state:
        raise TrainError(
            "", f"optimizer state of parameter {index} belongs to amsgrad, which is not supported"
        )
    bits = 8 if "exp_avg_absmax" in state else 32
    flat = {}
    for field in FIELDS[bits]:
        value, what = state.get(field.name), f"{field.name} of parameter {index}"
        if not isinstance(value, Tensor):
            raise TrainError("", what, expected=field.shape(p), got="nothing")
        if value.shape != field.shape(p):
            raise TrainError("", what, expected=field.shape(p), got=tuple(value.shape))
        if not (value.dtype == field.dtype or (bits == 32 and value.is_floating_point())):
            raise TrainError("", what, expected=str(field.dtype), got=str(value.dtype))
        flat[field.name] = value.detach().cpu().to(field.dtype).contiguous().view(-1)
    wanted = bits_of(p.numel(), state_bits)
    if wanted == bits:
        return flat
    return _as_blocks(flat) if wanted == 8 else _as_values(flat)


def _as_blocks(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    blocks: dict[str, Tensor] = {}
    for name, code_map in (("exp_avg", signed_map()), ("exp_avg_sq", unsigned_map())):
        size = len(flat[name])
        count = -(-size // BLOCK)
        values = torch.nn.functional.pad(flat[name], (0, count * BLOCK - size))
        codes, absmax = torch.empty(count * BLOCK, dtype=torch.uint8), torch.empty(count)
        code_map.quantize(values, codes, absmax)
        blocks |= {name: codes[:size], f"{name}_absmax": absmax}
    return blocks


def _as_values(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    values = {}
    for name, code_map in (("exp_avg", signed_map()), ("exp_avg_sq", unsigned_map())):
        size, absmax = len(flat[name]), flat[f"{name}_absmax"]
        codes = torch.nn.functional.pad(flat[name], (0, len(absmax) * BLOCK - size))
        room = torch.empty(len(codes))
        code_map.dequantize(codes, absmax, room)
        values[name] = room[:size]
    return values
