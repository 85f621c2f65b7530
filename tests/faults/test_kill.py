"""SIGKILL and Ctrl-C at random moments: the output is absent, old or new, whole; --resume ends in its bytes.

A handful of each here; NF4_LONG_TESTS=1 makes it 300 kills.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
IS_LONG = bool(os.environ.get("NF4_LONG_TESTS"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("writer", "few", "many", "number"),
    [
        ("qcompile", 6, 60, signal.SIGKILL),
        ("qcompile --force", 4, 40, signal.SIGKILL),
        ("qcompile --resume --force", 6, 60, signal.SIGKILL),
        ("adapter", 6, 80, signal.SIGKILL),
        ("train", 2, 60, signal.SIGKILL),
        ("qcompile", 4, 40, signal.SIGINT),
        ("qcompile --resume", 4, 40, signal.SIGINT),
        ("adapter", 6, 60, signal.SIGINT),
    ],
)
def test_random_moments(writer: str, few: int, many: int, number: int, tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    command = [str(tmp_path), writer, str(many if IS_LONG else few), str(seed), str(int(number))]
    result = subprocess.run(
        [sys.executable, str(HERE / "kill.py"), *command], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (seed, result.stderr)
    print(result.stdout.strip())
    seen = json.loads(result.stdout)["seen"]
    assert seen.keys() <= {"absent", "old", "new", "ended before", "went on to the end"}


def test_killed_process_goes_on(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The command itself, from its start on."""
    model, out = make_checkpoint("llama"), tmp_path / "out" / "out.nf4"
    out.parent.mkdir()
    command = [sys.executable, "-m", "qcompile", str(model)]
    subprocess.run([*command, str(tmp_path / "straight.nf4"), "-q"], check=True)
    for _ in range(3):
        with subprocess.Popen([*command, str(out), "-q", "--resume"]) as process:
            time.sleep(random.uniform(0.1, 0.6))
            process.kill()
        assert not out.exists() or out.read_bytes() == (tmp_path / "straight.nf4").read_bytes()
    subprocess.run([*command, str(out), "-q", "--resume", "--force"], check=True)
    assert out.read_bytes() == (tmp_path / "straight.nf4").read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["out.nf4"]
