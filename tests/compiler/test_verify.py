"""--verify finds what the sums alone cannot: wrong values under right sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nf4format import encode
from nf4format.blocks import Dtype, PackedTensor, dequantize, quantize, quantize_search
from nf4format.codebook import NESTED_MAP, NF4_LEVELS
from qcompile.errors import CompileError
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint
from qcompile.quality import SEGMENT
from qcompile.verify import allowed_difference, allowed_difference_searched

UP = "model.layers.0.mlp.up_proj.weight"


Write = Callable[..., Path]
Tensors = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def model(write_checkpoint: Write, random_tensors: Tensors) -> Path:
    shapes = {UP.replace(".", "__"): (300, 301), "model__norm__weight": (7,)}
    return write_checkpoint(random_tensors(**shapes))


def _with_encoder(
    monkeypatch: pytest.MonkeyPatch, level: int, change: Callable[[int, np.ndarray], None]
) -> None:
    """Let the encoder change codes before they are written: (index of the first value, codes)."""

    def changed(source, write_codes, *arguments, **options):  # type: ignore[no-untyped-def]
        def write(start: int, codes: np.ndarray) -> None:
            change(start, codes)
            write_codes(start, codes)

        return encoder(source, write, *arguments, **options)

    encoder = encode.ENCODERS[level]
    monkeypatch.setitem(encode.ENCODERS, level, changed)


@pytest.mark.parametrize("level", [0, 1])
def test_one_wrong_code_is_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    def flip(start: int, codes: np.ndarray) -> None:
        codes[40000] ^= 0xF0

    _with_encoder(monkeypatch, level, flip)
    out = tmp_path / "out.nf4"
    with pytest.raises(CompileError, match=rf"'{UP}': value 80000 decodes wrongly, expected about"):
        compile_checkpoint(model, out, CompileOptions(level=level, verify=True))
    assert list(tmp_path.iterdir()) == [model]
    compile_checkpoint(model, out, CompileOptions(level=level))  # goes unseen: sums are right


def test_damage_on_the_way_to_the_disk_is_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcompile import pipeline

    seal = pipeline.seal

    def seal_and_damage(file, layout, *arguments, **options):  # type: ignore[no-untyped-def]
        seal(file, layout, *arguments, **options)
        file.pwrite(b"\x01", layout.entries["model.norm.weight"].begin)

    monkeypatch.setattr(pipeline, "seal", seal_and_damage)
    with pytest.raises(CompileError, match=rf"data is damaged \(bytes 4096 to .*{UP}"):
        compile_checkpoint(model, tmp_path / "out.nf4", CompileOptions(verify=True))
    assert list(tmp_path.iterdir()) == [model]


def _packed(raw: np.ndarray, dtype: Dtype, level: int) -> PackedTensor:
    if level == 0:
        return quantize(raw, dtype)
    codes, absmax, nested = quantize_search(raw, dtype)
    return PackedTensor(raw.shape, dtype, codes, absmax, NF4_LEVELS, nested, NESTED_MAP, 0.0)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bound_holds_for_what_the_codec_makes_and_is_tight(dtype: Dtype, level: int) -> None:
    generator = torch.Generator().manual_seed(1)
    spread = torch.exp(2 * torch.randn(2 * SEGMENT // 64, 1, generator=generator))
    values = (torch.randn(len(spread), 64, generator=generator) * spread * 0.01).reshape(-1)[:-17]
    values = values.to(getattr(torch, dtype))
    raw = (values.view(torch.uint16) if dtype == "bfloat16" else values).numpy()
    packed = _packed(raw, dtype, level)
    allowed = allowed_difference_searched if level else allowed_difference
    decoded = dequantize(packed, "float32")
    for start in (0, SEGMENT):
        part = slice(start, min(start + SEGMENT, len(values)))
        original = values[part].float().numpy()
        share = np.abs(decoded[part] - original) / allowed(packed, original, start)
        assert 0.7 < share.max() <= 1
        if level == 1:  # a scale that is much too small is no way around the bound
            shrunk = replace(packed, nested_absmax=packed.nested_absmax * np.float32(0.5))
            small = dequantize(shrunk, "float32")[part]
            assert (np.abs(small - original) > allowed(shrunk, original, start)).any()
