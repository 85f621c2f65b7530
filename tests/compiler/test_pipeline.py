"""Whole compilations, against the checkpoint itself, bitsandbytes and safetensors' own reader."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nf4format.blocks import dequantize
from nf4format.container import Nf4File
from qcompile import emit
from qcompile.errors import CompileError
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint, plan_checkpoint
from qcompile.scratch import Scratch

Write = Callable[..., Path]
Tensors = Callable[..., dict[str, torch.Tensor]]


def _source(model: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in model.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _check_against_bitsandbytes(model: Path, out: Path) -> int:
    """bitsandbytes decodes ours alike, -O0 has its own codes, kept bytes are unchanged; how many codes."""
    functional = pytest.importorskip("bitsandbytes.functional")
    compared = differing = 0
    with Nf4File.open(out) as packed_file, safe_open(out, "pt") as peer:
        source = _source(model)
        level = json.loads(packed_file.metadata["nf4.options"])["level"]
        for name in packed_file.packed_names:
            weight = source.pop(name)
            if level == 0:
                codes, _ = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
                differing += int((codes != peer.get_tensor(name)).sum())
            compared += weight.numel()

            keys = {key: peer.get_tensor(key) for key in peer.keys() if key.startswith(f"{name}.")}  # noqa: SIM118
            state = functional.QuantState.from_dict(keys, device=torch.device("cpu"))
            decoded = functional.dequantize_4bit(peer.get_tensor(name), state)
            ours = dequantize(packed_file.packed(name))
            assert decoded.dtype == weight.dtype
            assert decoded.shape == weight.shape
            assert _bytes(decoded) == ours.tobytes()
        for name in packed_file.kept_names:
            raw, _, shape = packed_file.kept(name)
            weight = source.pop(name)
            assert raw.tobytes() == _bytes(weight) == _bytes(peer.get_tensor(name))
            assert shape == tuple(weight.shape)
        assert source.keys() == packed_file.aliases.keys()
    assert differing <= 1e-6 * compared  # bitsandbytes' CPU thresholds are an ulp off at four levels
    return compared


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("name", ["stories260K", "wiki-llama-16m"])
def test_real_checkpoints_agree_with_bitsandbytes(
    shared: Path, tmp_path: Path, name: str, level: int
) -> None:
    model, out = shared / "models" / name, tmp_path / "out.nf4"
    summary = compile_checkpoint(model, out, CompileOptions(level=level, verify=True))
    assert _check_against_bitsandbytes(model, out) == summary.packed_parameters
    with Nf4File.open(out) as packed_file:
        assert packed_file.file("tokenizer.json") == (model / "tokenizer.json").read_bytes()
        assert packed_file.config == json.loads((model / "config.json").read_text())
        assert packed_file.source_fingerprint == summary.source_sha256
    for group in summary.groups:  # a Gaussian loses 9.2%, and a searching encoder 8.3%
        if level == 0:
            assert 0.085 < group.relative_rms < 0.105
            assert group.plain_ratio == pytest.approx(1, abs=0.002)
        else:
            assert group.plain_ratio < 0.84
    if level == 1:
        assert summary.plain_ratio < 0.83
        assert 0.45 < summary.negative_scales < 0.55


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_families_and_dtypes(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, dtype: str
) -> None:
    model = make_checkpoint(family, dtype=dtype, num_hidden_layers=1)
    summary = compile_checkpoint(model, tmp_path / "out.nf4", CompileOptions(level=0, verify=True))
    assert _check_against_bitsandbytes(model, tmp_path / "out.nf4") == summary.packed_parameters
    assert summary.num_packed == 7


def test_any_architecture_compiles(write_checkpoint: Write, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "a.b": torch.randn(64, 64),
        "weight": torch.randn(65, 67),  # odd number of values, partial last block
        "strange.layer.weight": torch.randn(128, 100).half(),
        "vision.patch_embed.proj.weight": torch.randn(8, 3, 4, 4),
        "blocks.0.experts.w_up": torch.randn(4, 32, 64).bfloat16(),
        "blocks.0.experts.w_odd": torch.randn(4, 33, 33).bfloat16(),
        "mask": torch.tensor([0.0, -math.inf]),
        "ids": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "double": torch.randn(64, 64, dtype=torch.float64),
        "zeros.weight": torch.zeros(64, 64),
        "scalar": torch.tensor(3.0),
        "empty.weight": torch.zeros(0, 64),
    }
    model, out = write_checkpoint(tensors), tmp_path / "out.nf4"
    compile_checkpoint(model, tmp_path / "plain.nf4", CompileOptions(level=0, verify=True))
    _check_against_bitsandbytes(model, tmp_path / "plain.nf4")
    compile_checkpoint(model, out, CompileOptions(verify=True))
    _check_against_bitsandbytes(model, out)
    with Nf4File.open(out) as packed_file:
        assert set(packed_file.packed_names) == {
            "weight",
            "strange.layer.weight",
            "blocks.0.experts.w_up",
            "zeros.weight",
        }
        assert packed_file.packed("blocks.0.experts.w_up").shape == (4, 32, 64)
        assert not dequantize(packed_file.packed("zeros.weight")).any()


def test_exclude_everything_gives_a_file_with_nothing_packed(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model, out = make_checkpoint(num_hidden_layers=1), tmp_path / "out.nf4"
    summary = compile_checkpoint(model, out, CompileOptions(exclude=("*",), verify=True))
    assert (summary.num_packed, summary.groups) == (0, ())
    assert "written and verified" in summary.text()
    assert _check_against_bitsandbytes(model, out) == 0


def test_codes_lie_in_execution_order(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compile_checkpoint(make_checkpoint("llama"), tmp_path / "out.nf4")
    with Nf4File.open(tmp_path / "out.nf4") as packed_file:
        parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
        parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        expected = [f"model.layers.{layer}.{part}.weight" for layer in range(3) for part in parts]
        assert list(packed_file.packed_names) == expected
        begins = [packed_file.header.entries[name].begin for name in expected]
        assert begins == sorted(begins)


@pytest.mark.parametrize("quantize", [False, True])
def test_tied_weights_are_stored_once(
    write_checkpoint: Write, random_tensors: Tensors, tmp_path: Path, quantize: bool
) -> None:
    tensors = random_tensors(
        model__embed_tokens__weight=(100, 64), model__layers__0__mlp__up_proj__weight=(128, 64)
    )
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    config = {"tie_word_embeddings": True}
    model, out = write_checkpoint(tensors, config, shards=2), tmp_path / "out.nf4"
    options = CompileOptions(quantize_embeddings=quantize, verify=True)
    assert compile_checkpoint(model, out, options).num_aliases == 1
    with Nf4File.open(out) as packed_file:
        assert packed_file.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
        if quantize:
            assert packed_file.packed("lm_head.weight").shape == (100, 64)
        else:
            assert packed_file.kept("lm_head.weight")[0].tobytes() == _bytes(tensors["lm_head.weight"])

    untied = write_checkpoint(tensors, {"tie_word_embeddings": False}, name="untied")
    assert compile_checkpoint(untied, tmp_path / "untied.nf4").num_aliases == 0


def test_tied_weights_that_differ_are_an_error(
    write_checkpoint: Write, random_tensors: Tensors, tmp_path: Path
) -> None:
    tensors = random_tensors(model__embed_tokens__weight=(100, 64), lm_head__weight=(100, 64))
    model = write_checkpoint(tensors, {"text_config": {"tie_word_embeddings": True}})
    with pytest.raises(CompileError, match=r"'lm_head.weight': .*tie_word_embeddings.*false") as caught:
        compile_checkpoint(model, tmp_path / "out.nf4")
    assert caught.value.tensor == "lm_head.weight"
    assert not (tmp_path / "out.nf4").exists()


@pytest.fixture
def sizable(write_checkpoint: Write, random_tensors: Tensors) -> Callable[..., Path]:
    """Tensors of several chunks and segments, in one file or in shards."""

    def make(shards: int) -> Path:
        tensors = random_tensors(
            model__embed_tokens__weight=(3000, 256),
            model__layers__0__self_attn__q_proj__weight=(700, 1001),
            model__layers__0__mlp__up_proj__weight=(1500, 1024),
            model__layers__0__mlp__down_proj__weight=(64, 64),
            model__norm__weight=(256,),
        )
        return write_checkpoint(tensors, shards=shards, name=f"model{shards}")

    return make


@pytest.mark.parametrize("level", [0, 1])
def test_same_bytes_whatever_the_jobs_shards_and_file_names(
    sizable: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    def options(**values: Any) -> CompileOptions:
        return CompileOptions(level=level, **values)

    compile_checkpoint(sizable(1), tmp_path / "one.nf4", options(jobs=1))
    compile_checkpoint(tmp_path / "model1", tmp_path / "eight.nf4", options(jobs=8, verify=True))
    monkeypatch.setattr(emit, "Scratch", partial(Scratch, budget_bytes=0))  # as for the largest tensors
    compile_checkpoint(sizable(3), tmp_path / "shards.nf4", options(jobs=3))
    expected = (tmp_path / "one.nf4").read_bytes()
    assert (tmp_path / "eight.nf4").read_bytes() == expected
    assert (tmp_path / "shards.nf4").read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "eight.nf4",
        "one.nf4",
        "shards.nf4",
    ]
    _check_against_bitsandbytes(tmp_path / "model1", tmp_path / "one.nf4")


def test_recorded_options_distinguish_files_and_others_do_not(sizable: Callable[..., Path]) -> None:
    model = sizable(1)

    def options(**values: Any) -> str:
        return plan_checkpoint(model, CompileOptions(**values)).layout.metadata["nf4.options"]

    assert options() == options(jobs=3, force=True, verify=True) == options(level=1) != options(level=0)
    assert options(exclude=("*up*", "*down*")) == options(exclude=("*down*", "*up*", "*up*")) != options()
    assert json.loads(options(quantize_head=True))["quantize_head"] is True


def test_sampled_error_is_close_to_the_whole(sizable: Callable[..., Path], tmp_path: Path) -> None:
    model = sizable(1)
    sampled = compile_checkpoint(model, tmp_path / "a.nf4")
    whole = compile_checkpoint(model, tmp_path / "b.nf4", CompileOptions(verify=True))
    assert whole.measured_parameters == whole.packed_parameters > sampled.measured_parameters
    for one, other in zip(sampled.groups, whole.groups, strict=True):
        assert one.relative_rms == pytest.approx(other.relative_rms, rel=0.01)
    with Nf4File.open(tmp_path / "a.nf4") as packed_file:  # the same, in float64
        name = "model.layers.0.mlp.up_proj.weight"
        decoded = dequantize(packed_file.packed(name), "float32").astype(np.float64)
        original = _source(model)[name].reshape(-1).double().numpy()
    bits = torch.from_numpy(decoded).bfloat16().double().numpy()  # summaries measure the file's own dtype
    expected = math.sqrt(((bits - original) ** 2).sum() / (original**2).sum())
    measured = {group.group: group.relative_rms for group in whole.groups}["up_proj"]
    assert measured == pytest.approx(expected, rel=1e-5)


def test_progress_tells_of_every_byte_once(sizable: Callable[..., Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    summary = compile_checkpoint(
        sizable(1), tmp_path / "out.nf4", CompileOptions(verify=True), lambda *step: seen.append(step)
    )
    assert sum(step for step, _ in seen) == summary.source_bytes
    assert {total for _, total in seen} == {summary.source_bytes}


def test_memory_does_not_grow_with_the_model(write_checkpoint: Write, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from qcompile.pipeline import CompileOptions, compile_checkpoint\n"
        "compile_checkpoint(sys.argv[1], sys.argv[2], CompileOptions(jobs=2))\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(next(line.split()[1] for line in status.splitlines() if line.startswith('VmHWM')))"
    )
    peaks = []
    for mib in (4, 160):
        tensors = {
            f"layers.{i}.up_proj.weight": torch.ones(2048, 2048).bfloat16() for i in range(mib // 8 or 1)
        }
        model = write_checkpoint(tensors, name=f"model{mib}")
        command = [sys.executable, "-c", program, str(model), str(tmp_path / f"{mib}.nf4")]
        peaks.append(int(subprocess.run(command, capture_output=True, check=True).stdout) * 1024)
    assert peaks[1] - peaks[0] < 16 << 20
    assert peaks[1] < 160 << 20
