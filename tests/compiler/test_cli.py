"""The command: options, what it prints where, exit statuses, interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nf4format.container import Nf4File
from qcompile.cli import command


@pytest.fixture
def model(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("qwen2", num_hidden_layers=2, shards=2)


def _run(*arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def _process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qcompile", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_teaches() -> None:
    text = _run("--help").output
    for word in ("Examples:", "--dry-run", "--exclude '*.self_attn.*'", "-O0", "-O1", "4.127 bits"):
        assert word in text


def test_dry_run_tells_the_plan_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = _run(model, tmp_path / "out.nf4", "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before
    lines = result.output.splitlines()
    q_proj = next(line for line in lines if "layers.1.self_attn.q_proj.weight" in line)
    assert re.match(r"nf4 .* 128x128 +BF16 +32,768 +9,\d\d\d +linear weight$", q_proj)
    bias = next(line for line in lines if "layers.1.self_attn.q_proj.bias" in line)
    assert re.match(r"kept .* 128 +BF16 +256 +256 +bias$", bias)
    assert any(line.startswith("packed  14 tensors, ") for line in lines)
    assert any(re.match(r"bits    \d+\.\d\d\d a parameter$", line) for line in lines)


def test_dry_run_predicts_the_file(model: Path, tmp_path: Path) -> None:
    plan = json.loads(_run(model, tmp_path / "out.nf4", "--dry-run", "--json", "-").output)
    _run(model, tmp_path / "out.nf4", "--quiet")
    assert plan["file_bytes"] == (tmp_path / "out.nf4").stat().st_size
    with Nf4File.open(tmp_path / "out.nf4") as packed_file:
        assert {t["name"] for t in plan["tensors"] if t["action"] == "nf4"} == set(packed_file.packed_names)
        assert {t["name"] for t in plan["tensors"] if t["action"] == "kept"} == set(packed_file.kept_names)


def test_summary(model: Path, tmp_path: Path) -> None:
    result = _run(model, tmp_path / "out.nf4", "--verify", "--json", tmp_path / "summary.json")
    text = result.output
    assert f"{tmp_path}/out.nf4: written and verified" in text
    assert "tensors  14 packed, 13 kept" in text
    assert re.search(r"error .*measured on all of them\n +q_proj 0\.08", text)
    assert re.search(r"squared error 0\.8\d\d of -O0's \(-1\d\.\d%\); \d\d% of the scales are negative", text)
    assert re.search(r"time +\d+\.\d\d s, \d+\.\d\d GB/s", text)
    data = json.loads((tmp_path / "summary.json").read_text())
    assert data["file_bytes"] == (tmp_path / "out.nf4").stat().st_size
    assert data["bits_per_parameter"] == pytest.approx(8 * data["file_bytes"] / data["num_parameters"])
    assert [group["group"] for group in data["groups"]][:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_quiet_prints_nothing_and_patterns_add_up(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.nf4"
    patterns = ["--include", "*_proj*", "--exclude", "*q_proj*", "--exclude", "*layers.0*"]
    assert _run(model, out, "--quiet", "-O0", "--jobs", 1, *patterns).output == ""
    with Nf4File.open(out) as packed_file:
        prefix = "model.layers.1."
        assert set(packed_file.packed_names) == {
            *(f"{prefix}self_attn.{part}_proj.weight" for part in "kvo"),
            *(f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        }
        assert json.loads(packed_file.metadata["nf4.options"])["exclude"] == ["*layers.0*", "*q_proj*"]


def test_head_and_embeddings(model: Path, tmp_path: Path) -> None:
    _run(model, tmp_path / "out.nf4", "--quantize-head", "--quantize-embeddings", "--verify")
    with Nf4File.open(tmp_path / "out.nf4") as packed_file:
        assert packed_file.packed_names[0] == "model.embed_tokens.weight"
        assert packed_file.packed_names[-1] == "lm_head.weight"


def test_same_bytes_in_another_process_directory_locale_and_hash_seed(model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "with another name"
    moved.parent.mkdir()
    _run(model, tmp_path / "out.nf4", "--quiet")
    model.rename(moved)
    result = _process(moved, moved / "out.nf4", PYTHONHASHSEED="42", LC_ALL="C", TZ="Asia/Tokyo")
    assert result.returncode == 0
    assert (moved / "out.nf4").read_bytes() == (tmp_path / "out.nf4").read_bytes()


def test_errors_are_one_line_and_status_1(model: Path, tmp_path: Path) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()
    result = _process(model, tmp_path / "out.nf4")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"qcompile: .*-00002-of-00002.safetensors: the file is missing; .*\n", result.stderr)


def test_wrong_usage_is_status_2(tmp_path: Path) -> None:
    result = _process(tmp_path, "out.nf4", "-O7")
    assert result.returncode == 2
    assert "'7' is not" in result.stderr


# That another thread takes the signal does not wake the main thread.
OTHER_THREAD = """
import signal, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("before", ["", OTHER_THREAD], ids=["main thread", "other thread"])
def test_interrupted_leaves_nothing(model: Path, tmp_path: Path, signum: int, before: str) -> None:
    out = tmp_path / "out.nf4"
    # A level that waits forever after its first chunk, so that the signal surely comes in the middle.
    program = """
import itertools, os, time
from nf4format import encode
from qcompile import cli
def slow(source, *arguments, **options):
    for _ in itertools.count():
        next(iter(source.chunks()))
        os.write(1, b"encoding\\n")  # at once: several threads write
        time.sleep(0.05)
encode.ENCODERS[1] = slow
cli.main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", before + program, str(model), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "encoding\n"
        assert len(list(tmp_path.glob(".out.nf4*"))) == 1
        process.send_signal(signum)
        started = time.monotonic()
        _, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert process.returncode == 130
    assert errors.lstrip("\n") == "qcompile: interrupted; nothing was written\n"  # click ends the ^C line
    assert list(tmp_path.iterdir()) == [model]
