"""The one form of a benchmark's result: a table on the screen, a JSON file, a table in the README.

    python tools/bench/report.py        rewrites the README's tables from tools/bench/results/*.json

A table in the README stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is the result's
file name.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from os import cpu_count
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


@dataclass
class Report:
    """One benchmark run.

    Attributes:
        title: what was measured, in a line.
        columns: heads of the table.
        rows: one list of cells a row, as long as `columns`; numbers are kept as numbers.
        machine: where it ran (see `machine`).
        notes: how it was measured; what a reader must know to repeat or doubt it.
    """

    title: str
    columns: list[str]
    rows: list[list[str | float | int | None]]
    machine: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def finish(self, json_path: str | Path | None) -> None:
        """Print the table; write the JSON file when a path is given."""
        print(f"\n{self.title}\n{'; '.join(f'{k} {v}' for k, v in self.machine.items())}\n")
        cells = [self.columns, *[[_cell(value) for value in row] for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        for row in cells:
            print(
                "  ".join(
                    text.ljust(w) if i == 0 else text.rjust(w)
                    for i, (text, w) in enumerate(zip(row, widths, strict=True))
                )
            )
        for note in self.notes:
            print(f"  {note}")
        if json_path is not None:
            Path(json_path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def machine(*packages: str, gpu: bool = False) -> dict[str, str]:
    """CPU model, cores, Python, and the versions of `packages`; the GPU's name in front if asked for."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        model = found[1]
    described = {"CPU": model, "cores": str(cpu_count()), "Python": platform.python_version()}
    if gpu:
        import torch

        described = {"GPU": torch.cuda.get_device_name(), **described}
    for package in packages:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = "absent"
    return described


def markdown(report: dict) -> str:
    """A result file's table, with its machine and notes, as Markdown."""
    lines = [f"*{report['title']}* ({'; '.join(f'{k} {v}' for k, v in report['machine'].items())})", ""]
    lines.append("| " + " | ".join(report["columns"]) + " |")
    lines.append("|--|" + "--:|" * (len(report["columns"]) - 1))
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in report["rows"]]
    if report["notes"]:
        lines += ["", *[f"{note}  " for note in report["notes"][:-1]], report["notes"][-1]]
    return "\n".join(lines)


def with_tables(readme: str) -> str:
    """The README's text with every table made anew from its result file."""

    def table(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{match[1]}.json").read_text(encoding="utf-8"))
        return f"<!-- table: {match[1]} -->\n{markdown(result)}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", table, readme, flags=re.DOTALL)


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value


def main() -> None:
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = with_tables(old)
    path.write_text(new, encoding="utf-8")
    print("README.md: tables rewritten" if new != old else "README.md: tables were up to date")


if __name__ == "__main__":
    sys.exit(main())
