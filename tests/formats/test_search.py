"""The searching encoder: how much less it loses, that bitsandbytes decodes it alike, and special values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nf4format import blocks, reference
from nf4format.blocks import Dtype, NonFinite, PackedTensor
from nf4format.codebook import NESTED_MAP, NF4_LEVELS, NF4_THRESHOLDS
from nf4format.encode import Constants
from nf4format.levels import LEVELS, check_levels, thresholds_of

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")


def gaussian(size: int, dtype: Dtype = "float32", seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(size, dtype=np.float32) * np.float32(0.02)
    return reference.from_float32(values, dtype)


def searched(values: np.ndarray, dtype: Dtype = "float32", levels: np.ndarray = NF4_LEVELS) -> PackedTensor:
    codes, absmax, nested = blocks.quantize_search(values, dtype, levels=levels, threads=2)
    return PackedTensor(values.shape, dtype, codes, absmax, levels, nested, NESTED_MAP, 0.0)


def block_errors(values: np.ndarray, packed: PackedTensor) -> np.ndarray:
    """Squared error of each block, float64, of whole blocks."""
    difference = blocks.dequantize(packed, "float32").astype(np.float64) - values
    return np.square(difference).reshape(-1, 64).sum(axis=1)


def test_error_on_gaussian_blocks() -> None:
    values = gaussian(64 * 20_000)
    before, after = (
        block_errors(values, blocks.quantize(values, "float32")),
        block_errors(values, searched(values)),
    )
    assert after.sum() / before.sum() < 0.815
    worse = after / before
    assert (worse > 1).mean() < 0.04
    assert worse.max() < 1.05


def test_error_on_heavy_tails() -> None:
    values = np.random.default_rng(1).standard_t(5, 64 * 8000).astype(np.float32)
    before, after = blocks.quantize(values, "float32"), searched(values)
    assert block_errors(values, after).sum() / block_errors(values, before).sum() < 0.87


def test_real_weights(shared: Path) -> None:
    from safetensors import safe_open

    before, after = [], []
    for file in sorted((shared / "models" / "wiki-llama-16m").glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in [name for name in tensors.keys() if "_proj" in name]:  # noqa: SIM118
                values = tensors.get_tensor(name).float().numpy().reshape(-1)
                before.append(block_errors(values, blocks.quantize(values, "float32")))
                after.append(block_errors(values, searched(values)))
    plain, ours = np.concatenate(before), np.concatenate(after)
    assert ours.sum() / plain.sum() < 0.82
    assert (ours > plain).mean() < 0.04
    assert (ours / plain).max() < 1.05


def test_blocks_beside_larger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scales lie where the grid is coarse: it is shifted, and fewer of them lose."""
    values = gaussian(64 * 256 * 12, seed=5).reshape(12, 256, 64)
    values[:, 100] *= 7
    values = values.reshape(-1)
    before = block_errors(values, blocks.quantize(values, "float32"))
    shifted = searched(values)
    monkeypatch.setattr(reference, "GRID_SHIFTS", np.empty(0, np.float32))
    codes, absmax, nested = reference.quantize_search(values, "float32")
    unshifted = PackedTensor(values.shape, "float32", codes, absmax, NF4_LEVELS, nested, NESTED_MAP, 0.0)
    assert (shifted.nested_absmax >= nested).all()
    assert (shifted.nested_absmax > nested).any()
    ours, without = block_errors(values, shifted) / before, block_errors(values, unshifted) / before
    assert (ours > 1.05).sum() < (without > 1.05).sum() / 4
    assert ours.max() < without.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 65, 64 * 256, 64 * 300 + 5])
def test_decodes_to_the_bits_of_bitsandbytes(dtype: Dtype, size: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed = searched(gaussian(size, dtype, seed=size), dtype)
    nested = functional.QuantState(
        absmax=torch.tensor(packed.nested_absmax),
        blocksize=256,
        code=torch.tensor(packed.nested_quant_map),
        dtype=torch.float32,
    )
    state = functional.QuantState(
        absmax=torch.tensor(packed.absmax),
        shape=torch.Size(packed.shape),
        code=torch.tensor(packed.quant_map),
        blocksize=64,
        quant_type="nf4",
        dtype=getattr(torch, dtype),
        offset=torch.tensor(0.0),
        state2=nested,
    )
    theirs = functional.dequantize_4bit(torch.tensor(packed.codes).reshape(-1, 1), state)
    ours = torch.from_numpy(reference.to_float32(blocks.dequantize(packed), dtype))
    assert torch.equal(theirs.float().reshape(-1), ours)


def test_codes_are_the_nearest_for_the_decoded_scale() -> None:
    values = gaussian(64 * 600, seed=3)
    packed = searched(values)
    scale = np.repeat(reference.decode_absmax(packed), 64).astype(np.float64)
    code = np.stack([packed.codes >> 4, packed.codes & 15], axis=1).reshape(-1)
    error = abs(values - NF4_LEVELS[code] * scale)
    least = abs(values[:, None] - NF4_LEVELS.astype(np.float64) * scale[:, None]).min(axis=1)
    assert (error - least).max() < 1e-6 * abs(values).max()
    assert 0.4 < (reference.decode_absmax(packed) < 0).mean() < 0.6


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_whole_groups_and_threads_give_the_same_bytes(dtype: Dtype) -> None:
    values = gaussian(64 * 256 * 5 + 1000, dtype)
    whole = blocks.quantize_search(values, dtype, threads=1)
    for threads in (2, 7):
        again = blocks.quantize_search(values, dtype, threads=threads)
        assert all(one.tobytes() == other.tobytes() for one, other in zip(whole, again, strict=True))
    step = 64 * 256 * 2
    parts = [blocks.quantize_search(values[i : i + step], dtype) for i in range(0, values.size, step)]
    for index, array in enumerate(whole):
        assert np.concatenate([part[index] for part in parts]).tobytes() == array.tobytes()


def test_zero_and_vanishing_blocks_beside_large_ones() -> None:
    values = gaussian(64 * 300)
    values[64:128] = 0
    values[640:704] *= np.float32(1e-30)  # below the smallest entry of the map
    values[64 * 280 :] = 0
    decoded = blocks.dequantize(searched(values))
    assert not decoded[64:128].any()
    assert not decoded[64 * 280 :].any()
    assert abs(decoded[640:704]).max() <= 1e-6 * abs(values).max()
    assert (searched(np.zeros(64, np.float32)).codes == 0x77).all()
    assert searched(np.zeros(64 * 256 + 1, np.float32)).nested_absmax.tolist() == [0.0, 0.0]
    assert searched(np.empty(0, np.float32)).codes.size == 0


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e18, 2.5e38])
def test_any_magnitude(scale: float) -> None:
    values = (np.random.default_rng(0).uniform(-1, 1, 64 * 40) * scale).astype(np.float32)
    decoded = blocks.dequantize(searched(values))
    assert np.isfinite(decoded).all()
    # Subnormal scales have few bits; 0.3 is what the smallest multiplier takes off the largest value.
    assert abs(decoded.astype(np.float64) - values).max() <= max(0.35 * scale, 1e-38)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_found(value: float) -> None:
    for size, positions in ((64, [63]), (200_000, [150_001, 70_003]), (65, [64]), (3, [1, 2])):
        values = gaussian(size)
        values[positions] = value
        with pytest.raises(NonFinite) as caught:
            blocks.quantize_search(values, "float32", threads=2)
        assert caught.value.index == min(positions)


def test_share_of_negative_scales() -> None:
    entries = np.full(300, 255, np.uint8)
    entries[:30] = 0
    entries[270:] = 0
    assert Constants(entries, np.ones(2, np.float32), 0.0).negative_scales() == 60 / 300
    assert Constants(entries, np.ones(2, np.float32), 2.0).negative_scales() == 0
    assert Constants(np.empty(0, np.uint8), np.empty(0, np.float32), 0.0).negative_scales() == 0


def test_tables_of_levels() -> None:
    for levels in LEVELS.values():
        check_levels(levels)
        assert (levels[0], levels[15]) == (-1, 1)
    assert thresholds_of(NF4_LEVELS.copy()) is NF4_THRESHOLDS
    assert LEVELS["fp4"][9:].tolist() == pytest.approx([0.5 / 6, 1 / 6, 0.25, 1 / 3, 0.5, 4 / 6, 1])
    np.testing.assert_array_equal(LEVELS["int4"][7:9], [0, 0])


@pytest.mark.parametrize("name", list(LEVELS))
def test_search_gains_on_every_table(name: str) -> None:
    values, levels = gaussian(64 * 2000, seed=9), LEVELS[name]
    codes, absmax = blocks.quantize_codes(values, "float32", levels=levels)
    plain = PackedTensor(values.shape, "float32", codes, *_second_level(absmax, levels))
    assert (
        block_errors(values, searched(values, levels=levels)).sum() < 0.9 * block_errors(values, plain).sum()
    )


def _second_level(absmax: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, ...]:
    entries, nested, offset = blocks.quantize_absmax(absmax)
    return entries, levels, nested, NESTED_MAP, offset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda levels: levels[:15], r"float32 \[16\], got float32 \[15\]"),
        (lambda levels: levels.astype(np.float64), r"got float64 \[16\]"),
        (lambda levels: levels[::-1].copy(), "ascending"),
        (lambda levels: levels * np.float32(np.nan), "finite"),
        (lambda levels: levels * np.float32(1.5), r"got -1.5 and 1.5"),
        (np.abs, "ascending"),
        (lambda levels: np.sort(np.abs(levels)), "expected the first in"),
    ],
)
def test_levels_that_do_not_serve_are_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        blocks.quantize_search(gaussian(64), "float32", levels=change(NF4_LEVELS))
