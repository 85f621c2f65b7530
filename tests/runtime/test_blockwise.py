"""8-bit codes of optimizer states against a search over all levels, the paper's formula, and bitsandbytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nf4.paging.blockwise import BLOCK, DynamicMap, signed_map, unsigned_map

MAPS = [pytest.param(signed_map(), id="signed"), pytest.param(unsigned_map(), id="unsigned")]


def quantized(code_map: DynamicMap, values: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [n], float32 [n / 256]; the values are kept."""
    codes, absmax = torch.empty(len(values), dtype=torch.uint8), torch.empty(len(values) // BLOCK)
    code_map.quantize(values.clone(), codes, absmax)
    return codes, absmax


def dequantized(code_map: DynamicMap, codes: Tensor, absmax: Tensor) -> Tensor:
    values = torch.empty(len(codes))
    code_map.dequantize(codes, absmax, values)
    return values


def sample(code_map: DynamicMap, blocks: int = 400) -> Tensor:
    """Values over ten orders of magnitude, some of them 0."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(blocks * BLOCK, generator=generator)
    values *= 10.0 ** -torch.randint(0, 10, values.shape, generator=generator)
    values[torch.rand(values.shape, generator=generator) < 0.05] = 0
    return values.abs() if code_map is unsigned_map() else values


@pytest.mark.parametrize("code_map", MAPS)
def test_levels_are_the_dynamic_map_of_the_paper(code_map: DynamicMap) -> None:
    signed = code_map is signed_map()
    expected = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        expected += [*middles, *(-middles if signed else ())]
    np.testing.assert_allclose(code_map.levels.numpy(), sorted(expected), rtol=1e-6)


@pytest.mark.parametrize("code_map", MAPS)
def test_codes_are_the_nearest_and_the_largest_is_exact(code_map: DynamicMap) -> None:
    values = sample(code_map)
    codes, absmax = quantized(code_map, values)
    assert torch.equal(absmax, values.view(-1, BLOCK).abs().amax(1))
    scaled = (values.view(-1, BLOCK) / absmax[:, None]).view(-1)
    distances = (scaled.double()[:, None] - code_map.levels.double()).abs()
    chosen = distances.gather(1, codes.long()[:, None])[:, 0]
    is_nearest = chosen <= distances.amin(1) * (1 + 1e-6) + 1e-45
    if code_map is unsigned_map():  # above 0 never becomes 0
        assert (codes[scaled > 0] > 0).all()
        assert (codes[scaled == 0] == 0).all()
        tiny = (scaled > 0) & (scaled < code_map.levels[1] / 2)
        assert tiny.any()
        assert (codes[tiny] == 1).all()
        is_nearest |= tiny
    assert is_nearest.all()
    back = dequantized(code_map, codes, absmax)
    assert torch.equal(back, (code_map.levels[codes.long()].view(-1, BLOCK) * absmax[:, None]).view(-1))
    largest = scaled == 1
    assert torch.equal(back[largest], values[largest])


@pytest.mark.parametrize("code_map", MAPS)
def test_ties_go_to_the_lower_code(code_map: DynamicMap) -> None:
    values = torch.cat([code_map.borders, torch.ones(1)])
    codes, _ = quantized(code_map, values)
    assert torch.equal(codes[:-1], torch.arange(255, dtype=torch.uint8))
    above = torch.nextafter(code_map.borders, torch.tensor(2.0))
    codes, _ = quantized(code_map, torch.cat([above, torch.ones(1)]))
    assert torch.equal(codes[:-1], torch.arange(1, 256, dtype=torch.uint8))


@pytest.mark.parametrize("code_map", MAPS)
def test_blocks_of_zeros_and_of_the_smallest_numbers(code_map: DynamicMap) -> None:
    codes, absmax = quantized(code_map, torch.zeros(BLOCK))
    assert absmax.item() == 0
    assert dequantized(code_map, codes, absmax).tolist() == [0.0] * BLOCK
    smallest = torch.full((BLOCK,), 1e-44)
    assert torch.equal(dequantized(code_map, *quantized(code_map, smallest)), smallest)


@pytest.mark.parametrize("code_map", MAPS)
def test_search_tree_finds_the_same_codes(code_map: DynamicMap) -> None:
    values = torch.cat([sample(code_map), code_map.borders, torch.ones(1)])
    scaled = torch.cat([
        (rows / rows.abs().amax(1, keepdim=True)).view(-1) for rows in values.view(-1, 1, BLOCK)
    ])  # fmt: skip
    node, tree = torch.ones(len(values), dtype=torch.long), code_map.tree()
    for _ in range(8):
        node = 2 * node + (scaled > tree[node])
    assert torch.equal((node - 256).to(torch.uint8), quantized(code_map, values)[0])


@pytest.mark.parametrize("code_map", MAPS)
def test_bitsandbytes_has_the_same_map_blocks_and_nearly_the_same_codes(code_map: DynamicMap) -> None:
    """On a CPU bitsandbytes looks codes up in a table of 2^16 steps from -1 to 1, and is that much off."""
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed=code_map is signed_map())
    assert torch.equal(code_map.levels, theirs)
    values = sample(code_map)
    codes, absmax = quantized(code_map, values)
    their_codes, state = functional.quantize_blockwise(values, code=theirs, blocksize=BLOCK)
    assert torch.equal(absmax, state.absmax)
    state.absmax = absmax
    assert torch.equal(functional.dequantize_blockwise(codes, state), dequantized(code_map, codes, absmax))
    differ = codes != their_codes
    scaled = (values.view(-1, BLOCK) / absmax[:, None]).view(-1)[differ]
    ours, other = (code_map.levels[c[differ].long()] for c in (codes, their_codes))
    # Where the codes differ the value is within a step of the table from a border between them.
    assert ((scaled - other).abs() - (scaled - ours).abs()).max() < 2 * 2.0**-15
    coarse = values.view(-1, BLOCK).abs() > absmax[:, None] / 50
    assert (differ.view(-1, BLOCK) & coarse).sum() < 0.01 * coarse.sum()


@pytest.mark.cuda
@pytest.mark.parametrize("code_map", MAPS)
def test_bitsandbytes_on_a_gpu_has_the_same_codes(code_map: DynamicMap) -> None:
    """There it takes the nearest code, but divides less exactly, and breaks ties either way."""
    functional = pytest.importorskip("bitsandbytes.functional")
    values = sample(code_map, 4000)
    codes, absmax = quantized(code_map, values)
    theirs, state = functional.quantize_blockwise(values.cuda(), code=code_map.levels.cuda(), blocksize=BLOCK)
    assert torch.equal(absmax, state.absmax.cpu())
    scaled = (values.view(-1, BLOCK) / absmax[:, None]).view(-1)
    gap = (scaled[:, None] - code_map.borders).abs().amin(1)
    # Its search takes what is before the first level for -1, whatever the map says.
    may_differ = (gap <= 1e-6 * scaled.abs()) | (scaled < code_map.levels[1])
    assert torch.equal(codes[~may_differ], theirs.cpu()[~may_differ])
    assert may_differ.float().mean() < 0.7
