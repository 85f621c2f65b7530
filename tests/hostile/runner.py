"""Runs every case's commands in one process and writes what came of them, one JSON object a line.

One process, because a case takes milliseconds and importing torch seconds; a case that kills the process is
the first one missing from the output. usage: python runner.py RESULTS [PATTERN]
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from bad_inputs.cases import Case, all_cases

import nf4.cli
import qcompile.cli

MAIN = {"nf4": nf4.cli.main, "qcompile": qcompile.cli.main}
_MEMORY = re.compile(r"VmHWM:\s+(\d+) kB\nVmRSS:\s+(\d+) kB")


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Prepare a case and run its commands in its folder."""
    os.chdir(folder)
    case.prepare(folder)
    before = _tree(folder)
    runs = []
    for command in case.commands:
        with case.around(folder):
            runs.append(_measured(command))
    after = _tree(folder)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    top = sorted({Path(name).parts[0] for name in changed})
    return {"id": case.id, "runs": runs, "changed": top, "header": _header_bytes(folder)}


def _header_bytes(folder: Path) -> int:
    """Bytes of the longest header or text that a reader must take in to judge the case."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    lengths = [
        int.from_bytes(path.read_bytes()[:8], "little") for path in files if path.stat().st_size < 1 << 30
    ]
    return max((length for length in lengths if length <= 16 << 20), default=0)


def _measured(command: Sequence[str]) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    sys.argv = list(command)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew
    resident = _memory()[1]
    started, began = time.process_time(), time.perf_counter()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            MAIN[command[0]]()
            status: Any = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            status = traceback.format_exc()
    return {
        "command": " ".join(command),
        "status": status,
        "out": out.getvalue()[:4000],
        "err": err.getvalue()[:4000],
        "seconds": time.process_time() - started,
        "wall": time.perf_counter() - began,
        "growth": (_memory()[0] - resident) << 10,
    }


def _memory() -> tuple[int, int]:
    """Peak and present resident memory, KiB."""
    match = _MEMORY.search(Path("/proc/self/status").read_text())
    assert match
    return int(match[1]), int(match[2])


def _tree(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every entry below a folder with its size, time and mode."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        if not path.is_dir():  # a directory's time tells only what its entries tell
            found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns, status.st_mode)
    return found


def main(results: str, pattern: str = "") -> None:
    import torch

    from nf4.text import generate, perplexity, tokenizer  # noqa: F401 - loaded before anything is measured
    from nf4.training import train  # noqa: F401

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Path(results).open("w") as file, tempfile.TemporaryDirectory() as place:
        warm = [case for case in all_cases() if case.id == "verify against: its own"]
        for number, case in enumerate([*warm, *all_cases()]):
            if pattern not in case.id or (case.not_root and not os.geteuid()):
                continue
            folder = Path(place, str(number))
            folder.mkdir()
            result = run(case, folder)
            if number >= len(warm):
                file.write(json.dumps(result) + "\n")
                file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
