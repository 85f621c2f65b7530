"""Every case of the table of bad inputs, through the command lines, in bounded time and memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_inputs.cases import ROWS, Case, all_cases

from nf4format.container import Nf4File

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "hostile-input.md"
CASES = all_cases()

LIMIT_S = 1.0
LIMIT_BYTES = 64 << 20  # and the header
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")  # memory and time are then the sanitizers'
# Written by several lines: each place that is damaged has its own.
SEVERAL_LINES = ("damage", "verify against", "while in use")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of every case, all run in one process of their own."""
    path = tmp_path_factory.mktemp("bad_inputs") / "results.jsonl"
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "runner.py", path],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONFAULTHANDLER": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    found = [json.loads(line) for line in path.read_text().splitlines()]
    last = found[-1]["id"] if found else "none"
    assert done.returncode == 0, f"ended {done.returncode} after {last}: {done.stderr[-2000:]}"
    return {result["id"]: result for result in found}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_verdict(case: Case, results: dict[str, dict[str, Any]]) -> None:
    if case.not_root and not os.geteuid():
        pytest.skip("root may do this")
    if SANITIZED and case.row == "chat template, run":
        pytest.skip("a template's process has no address space for a sanitizer")
    result = results[case.id]
    assert set(result["changed"]) <= case.writes, "something was written"
    for run in result["runs"]:
        assert not isinstance(run["status"], str), run["status"]  # a traceback
        if not SANITIZED:
            assert run["seconds"] < LIMIT_S, run["command"]
            assert run["growth"] < LIMIT_BYTES + result["header"], run["command"]
        if case.says is None:
            assert run["status"] == 0, run["err"]
            continue
        assert (run["status"], run["out"]) == (1, ""), run["command"]
        lines = run["err"].splitlines()
        assert len(lines) == 1 or case.row in SEVERAL_LINES, run["err"]
        for line in lines:
            assert line.startswith(f"{run['command'].split()[0]}: ")
            assert line.isprintable()
            assert len(line) < 2000
            assert "; " in line, "says what to do"
        assert re.search(case.says, run["err"]), run["err"]


def test_cases_are_told_apart() -> None:
    names = [case.id for case in CASES]
    assert len(set(names)) == len(names) > 350
    assert {case.row for case in CASES} == ROWS.keys()


def table() -> str:
    """The table of docs/hostile-input.md, from the list of cases."""
    lines = ["| what | for example | verdict | cases |", "|---|---|---|---|"]
    for row, examples in ROWS.items():
        cases = [case for case in CASES if case.row == row]
        refused = sum(case.says is not None for case in cases)
        verdict = "refused" if refused == len(cases) else "accepted" if not refused else "by case"
        lines.append(f"| {row} | {examples} | {verdict} | {len(cases)} |")
    return "\n".join(lines) + "\n"


def test_the_page_has_this_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition("<!-- cases -->\n")
    shown, end, behind = rest.partition("<!-- end -->")
    if os.environ.get("NF4_WRITE_DOCS"):
        PAGE.write_text(f"{before}<!-- cases -->\n{table()}{end}{behind}", encoding="utf-8")
    else:
        assert shown == table(), "run this test with NF4_WRITE_DOCS=1"


@pytest.mark.parametrize(
    "name",
    ["version: version 2", "header length: 17 MiB of spaces", "values: NaN", "tokenizer, run: nested deeply"],
)
def test_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    """As a user runs it: no traceback, no signal, one line, nothing on standard output."""
    case = next(case for case in CASES if case.id == name)
    case.prepare(tmp_path)
    before = sorted(tmp_path.iterdir())
    command = case.commands[0]
    done = subprocess.run(
        [sys.executable, "-c", f"from {command[0]}.cli import main; main()", *command[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"{command[0]}: .*{case.says}.*; .*\n", done.stderr)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_the_tables_are_made_from_is_good(tmp_path: Path) -> None:
    """The cases would prove nothing if what they change were refused itself."""
    from bad_inputs.kit import write_good

    with Nf4File.open(write_good(tmp_path / "good.nf4")) as file:
        assert file.verify() == []
