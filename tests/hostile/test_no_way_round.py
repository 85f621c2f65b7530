"""There is one way in: no pickle, no code of strangers, no network, no second reader of tensor files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_inputs.kit import write_good

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for package in ("formats/nf4format", "compiler/qcompile", "runtime/nf4")
    for path in (ROOT / package).rglob("*.py")
)
# Modules that run what they read, or fetch it.
FORBIDDEN = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code", "xmlrpc",
    "urllib", "http", "ftplib", "smtplib", "telnetlib", "requests", "httpx", "aiohttp", "huggingface_hub",
}  # fmt: skip
CALLS = {"eval", "exec", "compile"}
TORCH_CALLS = {"torch.load", "torch.save", "torch.hub.load", "np.load", "numpy.load", "torch.jit.load"}


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def violations(source: str) -> list[str]:
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in FORBIDDEN or (name == "safetensors" or name.startswith("safetensors.")):
                found.append(f"{node.lineno}: imports {name}")
    for line, name in calls(tree):
        if name in CALLS or name in TORCH_CALLS or name.endswith((".from_pretrained", ".read_pickle")):
            found.append(f"{line}: calls {name}")
        if re.search(r"allow_pickle\s*=\s*True", name):
            found.append(f"{line}: allows pickles")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_runs_or_fetches(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8")) == []


def test_the_check_sees() -> None:
    for source in (
        "import pickle",
        "from urllib.request import urlopen",
        "import safetensors.torch",
        "torch.load(path)",
        "eval(text)",
        "AutoTokenizer.from_pretrained(path)",
    ):
        assert violations(source), source


def test_header_bytes_are_taken_apart_in_one_place() -> None:
    """Whoever reads the length of a header reads a file of his own: that is the validator's."""
    readers = {
        path.name
        for path in SOURCES
        for _, name in calls(ast.parse(path.read_text(encoding="utf-8")))
        if name in ("struct.unpack", "struct.unpack_from", "int.from_bytes")
    }
    # region: a glance at the length, before a load that the validator decides. The others have formats of
    # their own: the table of sums, and those of the training data and its runs.
    others = {path.name for path in SOURCES if {"data", "training", "paging"} & set(path.parts)}
    assert readers <= {"header.py", "region.py", "sums.py"} | others, readers


def test_no_network_no_process_no_pickle_while_a_model_is_made_and_run(tmp_path: Path) -> None:
    """Watched from inside, by Python's audit events, in an environment that would be noticed."""
    write_good(tmp_path / "model.nf4")
    program = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from pathlib import Path
from bad_inputs import kit
import torch, nf4, nf4.cli, qcompile.cli
from nf4.text import generate, tokenizer
torch.set_num_threads(1)
kit.write_checkpoint(Path("model"), kit.weights())

def watch(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "pickle.")):
        raise SystemExit(f"{{event}} {{arguments}}")

sys.addaudithook(watch)
for main, *command in (
    (qcompile.cli.main, "model", "out.nf4", "--verify"),
    (nf4.cli.main, "inspect", "out.nf4"),
    (nf4.cli.main, "verify", "out.nf4", "--deep", "--against", "model"),
    (nf4.cli.main, "generate", "out.nf4", "-p", "w1 w2", "--max-new-tokens", "3", "--device", "cpu"),
    (nf4.cli.main, "export", "out.nf4", "hf"),
):
    sys.argv = ["x", *command]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
