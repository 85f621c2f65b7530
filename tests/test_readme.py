"""The README's tree names every file there is, and no other."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Shown as folders: their files mirror the source and need no line of their own.
SUMMARISED = ("tests/", "tools/bench/results/", "tools/fuzz/corpus/")


def tree_paths(readme: str) -> set[str]:
    """Paths of the annotated tree: two spaces a level, folders end in '/', comments after two spaces."""
    block = re.search(r"```tree\n(.*?)```", readme, re.DOTALL)
    assert block, "the README has a code block marked `tree`"
    paths: set[str] = set()
    folders: list[str] = []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip(" "))) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            path = "".join(folders[:depth]) + name
            paths.add(path)
            if name.endswith("/"):
                folders[depth:] = [name]
    return paths


def test_tree_and_files_agree() -> None:
    listed = tree_paths((ROOT / "README.md").read_text(encoding="utf-8"))
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    files = {path for path in tracked if (ROOT / path).exists() and not path.startswith((*SUMMARISED, "."))}
    files = {path for path in files if not path.endswith(("py.typed", ".gitkeep"))}
    listed_files = {path for path in listed if not path.endswith("/")}
    assert listed_files - files == set(), "listed in the README, but not there"
    assert files - listed_files == set(), "there, but not listed in the README"
    for folder in (path for path in listed if path.endswith("/")):
        assert (ROOT / folder).is_dir(), folder


def test_local_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_tables_come_from_the_results() -> None:
    spec = importlib.util.spec_from_file_location("report", ROOT / "tools" / "bench" / "report.py")
    assert spec and spec.loader
    report = importlib.util.module_from_spec(spec)
    sys.modules["report"] = report  # dataclasses look their module up
    spec.loader.exec_module(report)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table:" in readme
    assert report.with_tables(readme) == readme, "run python tools/bench/report.py"
