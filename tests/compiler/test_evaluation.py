"""--eval-text: a level that predicts worse than the one below is refused, and nothing appears at OUT."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from nf4format.container import Nf4File
from nf4format.errors import FormatError
from nf4format.stats import EntrySpec, StatsWriter
from qcompile import eval_process
from qcompile.cli import command
from qcompile.errors import EvaluationError
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

# In the place of `nf4 eval`: KL of four windows by the file's level, from a file beside this program.
PRETENDER = """
import json, pathlib, sys
from nf4format.container import Nf4File
with Nf4File.open(sys.argv[2]) as file:
    level = str(json.loads(file.metadata["nf4.options"])["level"])
with open(sys.argv[1] + ".calls", "a") as calls:
    print(json.dumps([level, *sys.argv[2:]]), file=calls)
kl = json.loads(pathlib.Path(sys.argv[1]).read_text())[level]
print("2/4", "a warning", "4/4", sep="\\n", file=sys.stderr)
facts = {"window_kl": kl, "window_nll": [3.0] * len(kl), "window_original_nll": [2.9] * len(kl)}
print(json.dumps({**facts, "tokens": 8 * len(kl), "same_choice": 0.5}))
"""


@pytest.fixture
def model(write_checkpoint: Callable[..., Path]) -> Path:
    generator = torch.Generator().manual_seed(0)
    weight = (0.05 * torch.randn(64, 128, generator=generator)).bfloat16()
    return write_checkpoint({"layers.0.q_proj.weight": weight, "norm.weight": torch.ones(128)})


@pytest.fixture
def stats(model: Path, tmp_path: Path) -> str:
    name = "layers.0.q_proj.weight"
    with safe_open(model / "model.safetensors", "pt") as tensors:
        data = tensors.get_tensor(name).view(torch.uint8).numpy().tobytes()
    entry = EntrySpec("x", 128, {name: hashlib.sha256(data).hexdigest()})
    path = tmp_path / "stats.safetensors"
    x = np.random.default_rng(0).standard_normal((500, 128))
    with StatsWriter(path, [entry], {"data_sha256": "0" * 64}, tokens=500, full=True) as writer:
        writer.put("x", (x.T @ x / 500).astype(np.float32))
    return str(path)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat; the dog and the frog were there too. " * 30)
    return str(path)


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """pretend({level: KL of windows}) sets them; pretend() gives the calls: level, file, arguments."""
    table = tmp_path / "table.json"
    monkeypatch.setattr(eval_process, "COMMAND", (sys.executable, "-c", PRETENDER, str(table)))

    def set_or_ask(values: dict[int, list[float]] | None = None) -> list[list[str]]:
        if values is not None:
            table.write_text(json.dumps({str(level): kl for level, kl in values.items()}))
            return []
        return [json.loads(line) for line in Path(f"{table}.calls").read_text().splitlines()]

    return set_or_ask


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_level_that_helps(
    model: Path, stats: str, text: str, tmp_path: Path, pretend: Callable[..., Any]
) -> None:
    pretend({2: [0.1, 0.2, 0.1, 0.2], 1: [0.2, 0.3, 0.4, 0.5]})
    out, seen = tmp_path / "out.nf4", []
    options = CompileOptions(level=2, stats=(stats,), eval_texts=(text, text), eval_windows=4, jobs=1)
    summary = compile_checkpoint(model, out, options, watch=lambda done, total: seen.append((done, total)))
    found = summary.evaluation
    assert found is not None
    assert found.below is not None
    assert (found.windows, found.tokens, found.below_name, found.forced) == (8, 64, "-O1", False)
    assert (found.file.kl, found.below.kl) == pytest.approx((0.15, 0.35))
    assert found.difference == pytest.approx(-0.2)
    differences = np.array([0.1, 0.1, 0.3, 0.3] * 2)  # paired: less noise than the two sums have
    assert found.difference_error == pytest.approx(differences.std(ddof=1) / 8**0.5)
    assert found.file.perplexity == pytest.approx(np.exp(3))
    assert found.original_perplexity == pytest.approx(np.exp(2.9))
    assert seen == [(2, 4), (4, 4)] * 4
    calls = pretend()
    assert [call[0] for call in calls] == ["1", "1", "2", "2"]
    assert calls[0][calls[0].index("--against") + 1] == str(model)
    assert {"--windows", "4", "--threads", "1", "--device", "cpu", "--dtype", "float32"} <= set(calls[0])
    plain = tmp_path / "plain.nf4"
    compile_checkpoint(model, plain, CompileOptions(level=2, stats=(stats,), jobs=1))
    assert plain.read_bytes() == out.read_bytes()
    assert leftovers(tmp_path) == []


def test_a_level_that_does_not_is_refused_unless_forced(
    model: Path, stats: str, text: str, tmp_path: Path, pretend: Callable[..., Any]
) -> None:
    pretend({2: [0.2, 0.4], 1: [0.1, 0.2]})
    out = tmp_path / "out.nf4"
    out.write_bytes(b"what was there")
    options = {"level": 2, "stats": (stats,), "eval_texts": (text,), "force": True}
    message = (
        r"out\.nf4: its KL is worse than that of -O1; nothing was written, expected at most 0\.15000 nats a "
        r"token \(perplexity 20\.0855\), got 0\.30000 \(perplexity 20\.0855\), worse by 0\.15000 "
        r"\+- 0\.05000; take -O1, .* --force-level"
    )
    with pytest.raises(EvaluationError, match=message):
        compile_checkpoint(model, out, CompileOptions(**options))
    assert out.read_bytes() == b"what was there"
    assert leftovers(tmp_path) == []
    summary = compile_checkpoint(model, out, CompileOptions(**options, force_level=True))
    assert summary.evaluation is not None
    assert summary.evaluation.forced
    assert "difference in KL +0.15000 +- 0.05000; WORSE, and forced" in summary.text()
    with Nf4File.open(out) as file:
        assert json.loads(file.metadata["nf4.options"])["level"] == 2


def test_what_may_be_noise_is_called_so(
    model: Path, text: str, tmp_path: Path, pretend: Callable[..., Any]
) -> None:
    pretend({1: [0.1, 0.3], 0: [0.15, 0.2]})
    with pytest.raises(EvaluationError, match="it may be noise: give more --eval-windows"):
        compile_checkpoint(model, tmp_path / "out.nf4", CompileOptions(eval_texts=(text,)))
    pretend({1: [0.1, 0.3], 0: [0.1, 0.3]})  # as good is good enough
    compile_checkpoint(model, tmp_path / "out.nf4", CompileOptions(eval_texts=(text,)))


def test_a_refused_run_that_may_be_resumed_has_its_work_kept(
    model: Path, stats: str, text: str, tmp_path: Path, pretend: Callable[..., Any]
) -> None:
    pretend({2: [0.2], 1: [0.1]})
    out = tmp_path / "out.nf4"
    options = {"level": 2, "stats": (stats,), "eval_texts": (text,), "resume": True}
    with pytest.raises(EvaluationError, match="worse by"):
        compile_checkpoint(model, out, CompileOptions(**options))
    assert not out.exists()
    summary = compile_checkpoint(model, out, CompileOptions(**options, force_level=True))
    assert summary.resumed_bytes == summary.source_bytes
    assert leftovers(tmp_path) == []


def test_a_file_in_the_place_of_the_level_below(
    model: Path, stats: str, text: str, pretend: Callable[..., Any], write_checkpoint: Callable[..., Path]
) -> None:
    tmp_path = model.parent
    pretend({0: [0.3], 2: [0.1]})
    best, out = tmp_path / "best.nf4", tmp_path / "out.nf4"
    compile_checkpoint(model, best, CompileOptions(level=2, stats=(stats,)))

    def against(path: Path, **options: Any) -> None:
        options = {"level": 0, "eval_texts": (text,), "against_file": str(path), **options}
        compile_checkpoint(model, out, CompileOptions(**options))

    with pytest.raises(EvaluationError, match=r"worse than that of .*best\.nf4; nothing was written"):
        against(best)
    assert [call[0] for call in pretend()] == ["2", "0"]
    whole = tmp_path / "whole.nf4"
    compile_checkpoint(model, whole, CompileOptions(exclude=("*",)))
    with pytest.raises(EvaluationError, match="packs other weights"):
        against(whole)
    with pytest.raises(
        EvaluationError, match="has other levels than this compilation, expected int4, got nf4"
    ):
        against(best, levels="int4")
    with safe_open(model / "model.safetensors", "pt") as tensors:
        changed = {name: 2 * tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    other = tmp_path / "other.nf4"
    compile_checkpoint(write_checkpoint(changed, name="changed"), other, CompileOptions(level=0))
    with pytest.raises(EvaluationError, match="was compiled from another checkpoint"):
        against(other)
    with pytest.raises(FormatError, match="text"):
        against(Path(text))
    assert not out.exists()
    assert leftovers(tmp_path) == []


def test_texts_that_are_not_there_are_told_first(model: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(FormatError, match=str(path)):
            compile_checkpoint(model, tmp_path / "out.nf4", CompileOptions(eval_texts=(str(path),)))
    assert not (tmp_path / "out.nf4").exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "import sys; sys.exit('nf4: this family is not run')",
            "nf4 eval failed: nf4: this family is not run;",
        ),
        ("import os; os.abort()", "nf4 eval failed: it ended with status -6"),
        ("print('no JSON')", "gave no finite KL, expected numbers for each window, got b'no JSON"),
        ("print('{\"window_kl\": [NaN]}')", "gave no finite KL"),
        (
            'print(\'{"window_kl": [1], "window_nll": [1, 2], "window_original_nll": [1]}\')',
            "gave no finite KL",
        ),
        (None, "nonexistent: nf4 eval cannot be started: No such file or directory; install the runtime"),
    ],
)
def test_an_evaluation_that_fails(
    model: Path, text: str, monkeypatch: pytest.MonkeyPatch, program: str | None, message: str
) -> None:
    started = ("/nonexistent",) if program is None else (sys.executable, "-c", program)
    monkeypatch.setattr(eval_process, "COMMAND", started)
    tmp_path = model.parent
    with pytest.raises(EvaluationError, match=message):
        compile_checkpoint(model, tmp_path / "out.nf4", CompileOptions(eval_texts=(text,)))
    assert not (tmp_path / "out.nf4").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("level", [0, 1])  # while the file itself is evaluated, and the level below
def test_interrupted_while_evaluating(
    model: Path, text: str, tmp_path: Path, signum: int, level: int
) -> None:
    waiting = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w')); time.sleep(60)"
    pid = tmp_path / "pid"
    program = (
        "import sys\nfrom qcompile import cli, eval_process\n"
        f"eval_process.COMMAND = (sys.executable, '-c', {waiting!r}, {str(pid)!r})\ncli.main()"
    )
    arguments = [str(model), str(tmp_path / "out.nf4"), f"-O{level}", "--eval-text", text]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 30
        while not (pid.exists() and pid.read_text().endswith("\n")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signum)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; nothing was written" in error
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not (tmp_path / "out.nf4").exists()
    assert leftovers(tmp_path) == []


def test_reports_tell_it(model: Path, text: str, tmp_path: Path, pretend: Callable[..., Any]) -> None:
    pretend({1: [0.1, 0.2], 0: [0.3, 0.5]})
    for kind in ("json", "html"):
        arguments = [model, tmp_path / "out.nf4", "--force", "--eval-text", text, "--eval-windows", 2]
        arguments += ["--report", tmp_path / f"report.{kind}", "--json", tmp_path / "summary.json"]
        result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
        assert "-O0: KL 0.40000 +- 0.10000, perplexity 20.0855" in result.output
        assert "difference in KL -0.25000 +- 0.05000\n" in result.output
    for name in ("report.json", "summary.json"):
        found = json.loads((tmp_path / name).read_text())["evaluation"]
        assert found["file"]["kl"] == pytest.approx(0.15)
        assert found["texts"] == [text]
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Predictions</h2>" in page
    assert "-0.25000 ± 0.05000" in page


def test_options_that_need_a_text(model: Path, tmp_path: Path) -> None:
    for option in (["--force-level"], ["--against-file", "x.nf4"]):
        result = CliRunner().invoke(command, [str(model), str(tmp_path / "out.nf4"), *option])
        assert result.exit_code == 2
        assert "go with --eval-text" in result.output


def test_with_the_runtime(
    make_checkpoint: Callable[..., Path],
    tokenizer_json: bytes,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "nf4.py").write_text("raise SystemExit('a stranger in the working directory')")
    monkeypatch.chdir(tmp_path)
    folder = make_checkpoint("llama", dtype="float32")
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    out = tmp_path / "out.nf4"
    options = {"eval_texts": (text,), "eval_windows": 3, "jobs": 1}
    found = compile_checkpoint(folder, out, CompileOptions(level=1, **options)).evaluation
    assert found is not None
    assert found.below is not None
    assert 0 < found.file.kl < found.below.kl < 0.1
    assert found.original_perplexity == pytest.approx(found.file.perplexity, rel=0.1)
