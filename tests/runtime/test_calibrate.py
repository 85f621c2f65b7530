"""`nf4 calibrate` against hooks on transformers' own model."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nf4.calibration.run import CalibrateOptions, calibrate
from nf4.cli import group
from nf4.errors import LoadError
from nf4format.errors import WriteError
from nf4format.stats import Stats
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

SENTENCE = "the cat sat on the mat; the dog and the frog were there too. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{SENTENCE[i % 17 :]}{i}" for i in range(120)))
    return path


@pytest.fixture
def make_model(make_checkpoint: Callable[..., Path], tokenizer_json: bytes) -> Callable[..., Path]:
    def make(family: str = "llama", **fields: object) -> Path:
        folder = make_checkpoint(family, **fields)
        (folder / "tokenizer.json").write_bytes(tokenizer_json)
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        return folder

    return make


def options(text: Path, **values: object) -> CalibrateOptions:
    return CalibrateOptions(data=[text], seq_len=24, tokens=240, **values)  # type: ignore[arg-type]


def hooked_moments(folder: Path, text: Path) -> dict[str, np.ndarray]:
    """Mean of x xT of every linear layer of transformers' model, float64."""
    from transformers import AutoModelForCausalLM

    from nf4.calibration.original import OriginalFile
    from nf4.text.perplexity import encode_documents, windows_of
    from nf4.text.tokenizer import Tokenizer

    with OriginalFile(folder) as file:
        tokenizer = Tokenizer.from_file(file)  # type: ignore[arg-type]
    windows = windows_of(encode_documents(tokenizer, text.read_text()), 24, tokenizer.bos_id)
    windows = windows[torch.arange(10) * len(windows) // 10]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).double()
            found[f"{name}.weight"] = (x.T @ x / len(x)).numpy()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(name))
    with torch.inference_mode():
        model(windows)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_moments_are_those_of_transformers_layers(
    make_model: Callable[..., Path], text: Path, tmp_path: Path, family: str
) -> None:
    folder = make_model(family, dtype="float32")
    result = calibrate(folder, tmp_path / "stats", options(text, full=True))
    assert (result.tokens, result.windows, result.seq_len) == (240, 10, 24)
    expected = hooked_moments(folder, text)
    with Stats([tmp_path / "stats"]) as stats:
        assert set(stats.weights) == set(expected)
        for name, known in stats.weights.items():
            np.testing.assert_allclose(known.moment(), expected[name], rtol=2e-4, atol=1e-5, err_msg=name)
            assert known.tokens == 240


def test_tied_head_counts_for_the_stored_weight(
    make_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = make_model("qwen2", tie_word_embeddings=True)
    calibrate(folder, tmp_path / "stats", options(text))
    with Stats([tmp_path / "stats"]) as stats:
        assert "model.embed_tokens.weight" in stats.weights
        assert "lm_head.weight" not in stats.weights


def test_ranges_of_layers_make_up_the_whole(
    make_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = make_model()
    calibrate(folder, tmp_path / "all", options(text, full=True))
    calibrate(folder, tmp_path / "first", options(text, full=True, layers=(0, 1)))
    calibrate(folder, tmp_path / "second", options(text, full=True, layers=(1, None)))
    with Stats([tmp_path / "all"]) as whole, Stats([tmp_path / "first", tmp_path / "second"]) as parts:
        assert set(whole.weights) == set(parts.weights)
        for name, known in whole.weights.items():
            np.testing.assert_array_equal(known.moment(), parts.weights[name].moment())
    for wrong in ((0, 9), (1, 1), (-1, 1)):
        with pytest.raises(LoadError, match="layers, expected a range within 0:3"):
            calibrate(folder, tmp_path / "wrong", options(text, layers=wrong))


def test_a_disk_without_room_for_activations(
    make_model: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model()
    hidden_size = json.loads((folder / "config.json").read_text())["hidden_size"]

    def full(fd: int, offset: int, size: int) -> None:
        if size == 4 * 240 * hidden_size:  # the residual stream's, not the output's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WriteError, match="no space left"):
        calibrate(folder, tmp_path / "out", options(text))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([folder.name, text.name])


def test_second_pass(make_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    folder = make_model(dtype="float32")
    compile_checkpoint(folder, tmp_path / "same.nf4", CompileOptions(exclude=("*",)))
    compile_checkpoint(folder, tmp_path / "packed.nf4")
    calibrate(folder, tmp_path / "first", options(text, full=True))
    calibrate(folder, tmp_path / "same", options(text, packed=tmp_path / "same.nf4"))
    calibrate(folder, tmp_path / "second", options(text, packed=tmp_path / "packed.nf4"))
    name = "model.layers.1.mlp.down_proj.weight"
    with Stats([tmp_path / "first"]) as first, Stats([tmp_path / "same"]) as same:
        for weight, known in same.weights.items():  # beside itself, all three moments are one
            expected = first.weights[weight].moment()
            np.testing.assert_allclose(known.moment(), expected, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(known.cross(), expected, rtol=1e-4, atol=1e-6)
        original = first.weights[name].moment()
    with Stats([tmp_path / "second"]) as second:
        known = second.weights[name]
        # E|x - y|^2 = trace(E xxT) - 2 trace(C) + trace(H): small, and above zero.
        distance = np.trace(original) - 2 * np.trace(known.cross()) + np.trace(known.moment())
        assert 0 < distance < 0.2 * np.trace(original)
    stats = (str(tmp_path / "second"),)
    compile_checkpoint(folder, tmp_path / "best.nf4", CompileOptions(level=3, stats=stats, verify=True))


@pytest.mark.cuda
def test_a_gpu_collects_what_a_cpu_does(make_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    folder = make_model(dtype="float32")
    compile_checkpoint(folder, tmp_path / "packed.nf4")
    for device in ("cpu", "cuda"):
        calibrate(folder, tmp_path / device, options(text, packed=tmp_path / "packed.nf4", device=device))
    with Stats([tmp_path / "cpu"]) as cpu, Stats([tmp_path / "cuda"]) as cuda:
        assert set(cpu.weights) == set(cuda.weights)
        for name, known in cpu.weights.items():
            other = cuda.weights[name]
            np.testing.assert_allclose(other.moment(), known.moment(), rtol=1e-3, atol=1e-4, err_msg=name)
            np.testing.assert_allclose(other.cross(), known.cross(), rtol=1e-3, atol=1e-4, err_msg=name)


def test_kept_weights_of_a_packed_file_serve_as_well(
    make_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = make_model()
    compile_checkpoint(folder, tmp_path / "kept.nf4", CompileOptions(exclude=("*",)))
    compile_checkpoint(folder, tmp_path / "packed.nf4")
    calibrate(folder, tmp_path / "a", options(text))
    calibrate(tmp_path / "kept.nf4", tmp_path / "b", options(text))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(LoadError, match="its weights are packed already"):
        calibrate(tmp_path / "packed.nf4", tmp_path / "c", options(text))


def test_command_and_its_file_in_the_compiler(
    make_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder, out = make_model(), tmp_path / "stats.safetensors"
    arguments = ["calibrate", folder, "--data", text, "--data", text, "--full", "--out", out, "--seq-len", 24]
    result = CliRunner().invoke(group, [str(a) for a in [*arguments, "--json", "-"]], catch_exceptions=False)
    facts = json.loads(result.output)
    assert (facts["layers"], facts["entries"], facts["seq_len"]) == ([0, 3], 13, 24)
    assert facts["bytes"] == out.stat().st_size
    summary = compile_checkpoint(folder, tmp_path / "o2.nf4", CompileOptions(level=2, stats=(str(out),)))
    assert summary.output_ratio is not None
    assert summary.output_ratio < 0.8


def test_merged_statistics_are_those_of_both_texts_at_once(
    make_model: Callable[..., Path], tmp_path: Path, tokenizer_json: bytes
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    texts = []
    for number, words in enumerate((["the", "cat", "sat"], ["dog", "and", "frog", "too"])):
        content = "the"
        while len(texts) == number:  # whole windows, so that the cut does not shift behind the first text
            content += " " + words[len(content) % len(words)]
            if len(content) > 400 and len(tokenizer.encode(content).ids) % 23 == 0:
                texts.append(tmp_path / f"{number}.txt")
                texts[-1].write_text(content)
    folder, run = make_model(dtype="float32"), CliRunner()
    fixed = ["--full", "--seq-len", 24, "--separator", "", "--threads", 1]
    for name, data in (("a", texts[:1]), ("b", texts[1:]), ("both", texts)):
        given = [item for text in data for item in ("--data", text)]
        words = ["calibrate", folder, *given, *fixed, "--out", tmp_path / name]
        run.invoke(group, [str(word) for word in words], catch_exceptions=False)
    words = ["calibrate", "--merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "merged"]
    result = run.invoke(group, [str(word) for word in words], catch_exceptions=False)
    assert "13 entries of 2 files" in result.output
    with Stats([tmp_path / "merged"]) as merged, Stats([tmp_path / "both"]) as both:
        assert merged.weights.keys() == both.weights.keys()
        for name, known in merged.weights.items():
            other = both.weights[name]
            assert (known.tokens, known.sha256) == (other.tokens, other.sha256)
            np.testing.assert_allclose(known.moment(), other.moment(), rtol=1e-4, atol=1e-6, err_msg=name)
    stats = (str(tmp_path / "merged"),)
    compile_checkpoint(folder, tmp_path / "out.nf4", CompileOptions(level=2, stats=stats, verify=True))


def test_options_that_do_not_go_with_merging(tmp_path: Path) -> None:
    for arguments, message in (
        (["a", "b", "--out", "c"], "several files of statistics go with --merge"),
        (["a", "--out", "c"], "Missing option '--data'"),
        (["--merge", "a", "--data", "t", "--out", "c"], "--merge takes files of statistics and --out alone"),
    ):
        result = CliRunner().invoke(group, ["calibrate", *arguments])
        assert result.exit_code == 2
        assert message in result.output


def test_the_compilers_adapter_runs_here_and_in_peft(
    make_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    import nf4
    from nf4.text.divergence import divergence
    from nf4format.adapter import read_adapter

    folder, out, adapter = make_model(dtype="float32"), tmp_path / "out.nf4", tmp_path / "adapter"
    calibrate(folder, tmp_path / "stats", options(text, full=True))
    stats = (str(tmp_path / "stats"),)
    compile_checkpoint(folder, out, CompileOptions(level=2, stats=stats, adapter=str(adapter), rank=4))
    compile_checkpoint(folder, tmp_path / "same.nf4", CompileOptions(exclude=("*",)))
    windows = torch.randint(0, 300, (20, 24), generator=torch.Generator().manual_seed(0))
    original = nf4.load(tmp_path / "same.nf4", dtype="float32")
    adapted = nf4.load(out, dtype="float32", adapter=adapter)
    without = divergence(original, nf4.load(out, dtype="float32"), windows)
    assert divergence(original, adapted, windows).kl < without.kl

    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(dense, adapter)
    name = "model.layers.1.mlp.down_proj"
    tensors = read_adapter(adapter).tensors
    a, b = (
        torch.from_numpy(tensors[f"base_model.model.{name}.lora_{kind}.weight"][0].copy()).view(torch.float32)
        for kind in "AB"
    )
    weight = model.base_model.model.get_submodule(name)
    expected = b.view(-1, 4) @ a.view(4, -1)
    assert torch.allclose(weight.get_delta_weight("default"), expected, atol=1e-6)


def test_eval_against_the_original(make_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    folder = make_model(dtype="float32")
    compile_checkpoint(folder, tmp_path / "packed.nf4")
    arguments = ["eval", tmp_path / "packed.nf4", text, "--window", 24, "--limit", 200, "--against", folder]
    run = CliRunner()
    words = [str(argument) for argument in arguments]
    facts = json.loads(run.invoke(group, [*words, "--json", "-"], catch_exceptions=False).output)
    assert 0 < facts["kl"] < 0.1
    assert facts["original_perplexity"] == pytest.approx(facts["perplexity"], rel=0.1)
    assert "KL          0.0" in run.invoke(group, words, catch_exceptions=False).output


def test_divergence_of_models(make_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    import nf4
    from nf4.text.divergence import divergence

    folder = make_model(dtype="float32")
    compile_checkpoint(folder, tmp_path / "same.nf4", CompileOptions(exclude=("*",)))
    compile_checkpoint(folder, tmp_path / "packed.nf4", CompileOptions(level=0))
    models = [nf4.load(tmp_path / name, dtype="float32") for name in ("same.nf4", "packed.nf4")]
    windows = torch.randint(0, 300, (5, 20), generator=torch.Generator().manual_seed(0))
    same = divergence(models[0], models[0], windows)
    assert (same.kl, same.same_choice, same.tokens) == (0.0, 1.0, 95)
    other = divergence(*models, windows)
    with torch.inference_mode():
        p, q = (torch.log_softmax(model(windows)[:, :-1].double(), -1) for model in models)
    labels = windows[:, 1:, None]
    assert other.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert other.original_nll == pytest.approx(float(-p.gather(-1, labels).mean()), rel=1e-5)
    assert other.nll == pytest.approx(float(-q.gather(-1, labels).mean()), rel=1e-5)
    assert other.kl_error > 0
