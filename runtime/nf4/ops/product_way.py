"""Which way a product with a packed weight takes on an NVIDIA GPU, and in panels of which height.

The tables are measured, by tools/bench/gpu_kernels.py; shapes between the measured ones take the way of
their neighbours.
"""

from __future__ import annotations

import enum
import math

import torch

SLOW_FEW_ROWS = 8  # where only the kernel for any shape can run
# Without Hopper's: it takes 16 rows at a time, and three times that mostly costs less than decoding.
FEW_ROWS = 48
FEW_ROWS_BESIDE_WGMMA = 16
# Up to how many rows Hopper's product is faster than decoding and cuBLAS, by elements of the weight: the
# larger it is, the less its start weighs. Measured on an H200 with bfloat16.
WGMMA_ROWS = ((1 << 25, 256), (1 << 27, 512), (1 << 62, 1024))
WORKSPACE_BYTES = 512 << 20  # at most, unless one row takes more; larger weights go by panels of rows
# From this many rows on, the product of a panel fills the GPU, so panels may be small enough to stay in the
# L2 cache between decoding and multiplying.
CACHED_PANEL_ROWS = 4096
CACHED_PANEL_BYTES = 32 << 20


class Way(enum.Enum):
    """How a product is made."""

    FEW_ROWS = "few rows"
    WGMMA = "wgmma"
    DECODE = "decode and cuBLAS"


def way(dtype: torch.dtype, num_rows: int, rows: int, columns: int, *, aligned: bool, wgmma: bool) -> Way:
    """How x [num_rows, columns] of `dtype` is multiplied by a weight [rows, columns].

    Args:
        aligned: x and the codes lie at multiples of 16 bytes.
        wgmma: the device has Hopper's product.
    """
    if dtype == torch.float32 or columns % 64 or not aligned:
        return Way.FEW_ROWS if num_rows <= SLOW_FEW_ROWS else Way.DECODE
    if not wgmma:
        return Way.FEW_ROWS if num_rows <= FEW_ROWS else Way.DECODE
    if num_rows <= FEW_ROWS_BESIDE_WGMMA:
        return Way.FEW_ROWS
    most = next(most for elements, most in WGMMA_ROWS if rows * columns < elements)
    return Way.WGMMA if num_rows <= most else Way.DECODE


def panel_height(dtype: torch.dtype, num_rows: int, rows: int, columns: int) -> int:
    """How many of a weight's rows are decoded at once for a product with x [num_rows, columns]."""
    row_bytes = columns * dtype.itemsize
    most = max(1, WORKSPACE_BYTES // row_bytes)
    height = math.ceil(rows / math.ceil(rows / most))
    if num_rows >= CACHED_PANEL_ROWS and rows * row_bytes > 2 * CACHED_PANEL_BYTES:
        # cuBLAS works in tiles of up to 256 outputs; 2^22 outputs are about one tile for each SM.
        cached = max(CACHED_PANEL_BYTES // row_bytes, (1 << 22) // num_rows)
        height = min(height, math.ceil(cached / 256) * 256)
    return height
