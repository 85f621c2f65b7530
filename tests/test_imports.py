"""Imports run one way: nf4format <- qcompile, nf4format <- nf4; and the format package knows no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "nf4format": ROOT / "formats" / "nf4format",
    "qcompile": ROOT / "compiler" / "qcompile",
    "nf4": ROOT / "runtime" / "nf4",
}
FORBIDDEN = {
    "nf4format": {"qcompile", "nf4", "torch", "transformers", "click", "tqdm"},
    "qcompile": {"nf4", "torch", "transformers"},
    "nf4": {"qcompile"},
}
# Work with torch on a GPU: imported by functions, once a GPU is asked for.
WITH_TORCH = {f"qcompile.{name}" for name in ("absorb_cuda", "feedback_cuda", "rounder_cuda")}
# The extras: nothing in the three packages may need them to be imported.
EXTRAS = {"transformers", "peft", "bitsandbytes", "accelerate", "scipy", "pyarrow"}
EXTRAS |= {"matplotlib", "yaml", "tomli", "wandb", "tensorboard"}


def imported_packages(source: str) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every absolute import in `source`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_cross_borders_one_way(package: str) -> None:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imported_packages(path.read_text(encoding="utf-8"))
        if name in FORBIDDEN[package] | EXTRAS or (name == package)  # inside a package, imports are relative
        if not (name == "torch" and f"{package}.{path.stem}" in WITH_TORCH)
    ]
    assert not wrong


def test_the_check_sees_a_forbidden_import() -> None:
    source = "import os\nif True:\n    from nf4.model.decoder import CausalLM\n"
    assert ("nf4" in {name for _, name in imported_packages(source)}) is True


@pytest.mark.parametrize("package", ["nf4format", "qcompile"])
def test_importing_the_offline_side_does_not_load_torch(package: str) -> None:
    modules = [
        ".".join([package, *path.relative_to(PACKAGES[package]).with_suffix("").parts]).removesuffix(
            ".__init__"
        )
        for path in sorted(PACKAGES[package].rglob("*.py"))
    ]
    modules = [module for module in modules if module not in WITH_TORCH]
    code = f"import {', '.join(modules)}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", ["qcompile", "nf4"])
def test_help_and_version_start_without_torch(command: str) -> None:
    code = (
        f"import sys; from {command}.cli import main; sys.argv = ['{command}', '--help']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
