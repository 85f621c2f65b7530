"""--verify finds what the sums alone cannot: wrong values under right sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nf4format import encode
from nf4format.blocks import dequantize, quantize
from qcompile.errors import CompileError
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint
from qcompile.quality import SEGMENT
from qcompile.verify import allowed_difference

UP = "model.layers.0.mlp.up_proj.weight"


Write = Callable[..., Path]
Tensors = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def model(write_checkpoint: Write, random_tensors: Tensors) -> Path:
    shapes = {UP.replace(".", "__"): (300, 301), "model__norm__weight": (7,)}
    return write_checkpoint(random_tensors(**shapes))


def _with_encoder(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, np.ndarray], None]) -> None:
    """Let the encoder change codes before they are written: (index of the first value, codes)."""

    def changed(source, write_codes, threads, scales):  # type: ignore[no-untyped-def]
        def write(start: int, codes: np.ndarray) -> None:
            change(start, codes)
            write_codes(start, codes)

        return encode.encode_absmax(source, write, threads, scales)

    monkeypatch.setitem(encode.ENCODERS, 0, changed)


def test_one_wrong_code_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(start: int, codes: np.ndarray) -> None:
        codes[40000] ^= 0xF0

    _with_encoder(monkeypatch, flip)
    out = tmp_path / "out.nf4"
    with pytest.raises(CompileError, match=rf"'{UP}': value 80000 decodes wrongly, expected about"):
        compile_checkpoint(model, out, CompileOptions(verify=True))
    assert list(tmp_path.iterdir()) == [model]
    compile_checkpoint(model, out)  # without --verify it goes unseen: sums are right


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bound_holds_for_what_the_codec_makes_and_is_tight(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    spread = torch.exp(2 * torch.randn(2 * SEGMENT // 64, 1, generator=generator))
    values = (torch.randn(len(spread), 64, generator=generator) * spread * 0.01).reshape(-1)[:-17].to(dtype)
    raw = values.view(torch.uint16) if dtype is torch.bfloat16 else values
    packed = quantize(raw.numpy(), str(dtype).removeprefix("torch."))  # type: ignore[arg-type]
    decoded = dequantize(packed, "float32")
    for start in (0, SEGMENT):
        part = slice(start, min(start + SEGMENT, len(values)))
        original = values[part].float().numpy()
        share = np.abs(decoded[part] - original) / allowed_difference(packed, original, start)
        assert 0.7 < share.max() <= 1
