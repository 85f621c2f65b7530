"""What the operators of `nf4.ops` take, held to sizes, types and device before any kernel sees an address."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nf4format.codebook import BLOCK, NESTED_BLOCK

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of both native modules


class PackedOperand:
    """A packed weight [rows, columns] as addresses of tensors on one device.

    Attributes:
        codes, absmax, quant_map, nested_absmax, nested_quant_map: addresses.
        nested_offset: a float.

    Raises:
        ValueError: a tensor has another dtype or size, is not contiguous, or lies on another device.
    """

    def __init__(self, packed: Sequence[Any], rows: int, columns: int, device: torch.device) -> None:
        codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset = packed
        size = rows * columns
        blocks = math.ceil(size / BLOCK)
        _check("codes", codes, torch.uint8, math.ceil(size / 2), device)
        _check("absmax", absmax, torch.uint8, blocks, device)
        _check("quant_map", quant_map, torch.float32, 16, device)
        _check("nested_absmax", nested_absmax, torch.float32, math.ceil(blocks / NESTED_BLOCK), device)
        _check("nested_quant_map", nested_quant_map, torch.float32, 256, device)
        self.rows, self.columns = rows, columns
        self.codes = codes.data_ptr()
        self.absmax = absmax.data_ptr()
        self.quant_map = quant_map.data_ptr()
        self.nested_absmax = nested_absmax.data_ptr()
        self.nested_quant_map = nested_quant_map.data_ptr()
        self.nested_offset = float(nested_offset)


def matrix(name: str, tensor: Tensor) -> Tensor:
    """[..., K] as contiguous [M, K] of a dtype that the kernels know."""
    floating(name, tensor.dtype)
    rows = math.prod(tensor.shape[:-1])
    return tensor.reshape(rows, tensor.shape[-1]).contiguous()


def floating(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, if the kernels know it; ValueError otherwise."""
    if dtype not in DTYPE_CODES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {dtype}")
    return dtype


def _check(name: str, tensor: Tensor, dtype: torch.dtype, size: int, device: torch.device) -> None:
    fits = tensor.dtype == dtype and tensor.numel() == size and tensor.is_contiguous()
    if not fits or tensor.device != device:
        got = f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
        raise ValueError(f"{name}: expected contiguous {dtype} of {size} elements on {device}, got {got}")
