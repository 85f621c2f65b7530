"""Every instruction set that the build and this CPU have, held to the same tests: hence to equal bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nf4format import _native

INFO = _native.build_info()


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NF4_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("isa", INFO["isas"])
def test_kernels_of(isa: str) -> None:
    if isa == INFO["isa"]:
        pytest.skip(f"{isa} is what they run by themselves")
    probe = run(isa, "-c", "from nf4format import _native; _native.build_info()")
    if "NF4_CPU_ISA: expected" in probe.stderr:
        pytest.skip(f"this CPU has no {isa}")
    tests = [str(Path(__file__).with_name(name)) for name in ("test_kernels.py", "test_io.py")]
    result = run(isa, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *tests)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def test_an_unknown_instruction_set_is_refused() -> None:
    result = run("mmx", "-c", "from nf4format import _native; _native.build_info()")
    assert result.returncode == 1
    assert "NF4_CPU_ISA: expected an instruction set of this build and this CPU" in result.stderr
    assert "got 'mmx'" in result.stderr
