"""Which way a product on a GPU takes, and in panels of which height; no GPU is needed to decide."""

from __future__ import annotations

import itertools

import pytest
import torch

from nf4.ops.product_way import FEW_ROWS, WORKSPACE_BYTES, Way, panel_height, way

BFLOAT16 = torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "columns", "aligned", "wgmma"),
    [
        (torch.float32, 4096, True, True),
        (BFLOAT16, 4100, True, True),
        (BFLOAT16, 4096, False, True),
        (BFLOAT16, 4096, True, False),
    ],
)
def test_hopper_s_product_is_taken_only_where_it_can_run(dtype, columns, aligned, wgmma):
    for num_rows in (1, 8, 9, 16, 17, FEW_ROWS, FEW_ROWS + 1, 512, 1 << 20):
        assert way(dtype, num_rows, 4096, columns, aligned=aligned, wgmma=wgmma) is not Way.WGMMA


@pytest.mark.parametrize("rows", [64, 4096, 28672, 128256])
def test_rows_go_from_few_to_wgmma_to_decoding(rows):
    """One change each: a way that returns would be a gap in the table."""
    ways = [way(BFLOAT16, m, rows, 8192, aligned=True, wgmma=True) for m in range(1, 3000)]
    changes = [ways[0]] + [b for a, b in itertools.pairwise(ways) if a is not b]
    assert changes == [Way.FEW_ROWS, Way.WGMMA, Way.DECODE]


@pytest.mark.parametrize("rows", [1, 100, 4096, 28672, 128256])
@pytest.mark.parametrize("columns", [64, 4096, 14336])
@pytest.mark.parametrize("num_rows", [1, 1024, 4096, 100_000])
def test_panels_cover_the_weight_within_the_workspace(rows, columns, num_rows):
    height = panel_height(BFLOAT16, num_rows, rows, columns)
    assert 1 <= height <= rows
    assert height * columns * 2 <= WORKSPACE_BYTES


def test_panels_for_many_rows_fit_the_l2_cache_and_fill_the_gpu():
    assert panel_height(BFLOAT16, 1024, 14336, 4096) == 14336
    assert panel_height(BFLOAT16, 4096, 14336, 4096) == 4096
    assert panel_height(BFLOAT16, 4096, 4096, 4096) == 4096  # 32 MB fit whole
    assert panel_height(BFLOAT16, 4096, 8192, 8192) == 2048
    assert panel_height(BFLOAT16, 4096, 4096, 14336) == 1280
    assert panel_height(BFLOAT16, 8192, 4096, 14336) == 1280
