"""Whichever write, sync, rename, open, mapping or allocation fails, output is the old one or the new one.

The quick loops are part of the suite; NF4_LONG_TESTS=1 runs all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def injector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes calls fail, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler for the library that makes calls fail")
    library = tmp_path_factory.mktemp("faults") / "injector.so"
    source = str(HERE / "injector.c")
    command = [compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", str(library), source, "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"needs glibc's allocator: {result.stderr.strip().splitlines()[-1]}")
    return library


@pytest.mark.slow
def test_every_call_that_may_fail(injector: Path, tmp_path: Path) -> None:
    is_long = bool(os.environ.get("NF4_LONG_TESTS"))
    command = [sys.executable, str(HERE / "loop.py"), str(tmp_path), "full" if is_long else "quick"]
    environment = {**os.environ, "LD_PRELOAD": str(injector)}
    result = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=3600 if is_long else 300,
    )
    assert result.returncode == 0, result.stderr
    loops = [json.loads(line) for line in result.stdout.splitlines()]
    assert not [(loop["loop"], loop["problems"]) for loop in loops if loop["problems"]]
    failed = sum(loop["failed"] for loop in loops)
    print(f"{len(loops)} loops, {failed} calls failed, {sum(loop['seconds'] for loop in loops):.0f} s")
    # That calls do fail: more than a hundred writes, and at least one of each other kind.
    by_kind: dict[str, int] = {}
    for loop in loops:
        kind = loop["loop"].split(": ")[1].split()[0]
        by_kind[kind] = by_kind.get(kind, 0) + loop["failed"]
    assert by_kind["write"] > 100
    assert all(by_kind.values()), by_kind
