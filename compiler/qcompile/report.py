"""`--report`: what a compilation did to each tensor, as JSON or as a page to read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from nf4format.atomic import write_bytes

from .errors import CompileError
from .summary import CompileSummary

SUFFIXES = (".json", ".html")


def check_report_path(path: str) -> None:
    """Refuse a path before anything is compiled.

    Raises:
        CompileError: it ends in neither .json nor .html, or its directory is not there.
    """
    if Path(path).suffix not in SUFFIXES:
        raise CompileError(
            path,
            "not a kind of report",
            expected=" or ".join(SUFFIXES),
            got=Path(path).suffix or "no ending",
            remedy="give --report report.json or --report report.html",
        )
    if not Path(path).absolute().parent.is_dir():
        raise CompileError(path, "its directory does not exist", remedy="make it first")


def write_report(path: str, summary: CompileSummary) -> None:
    """Write the report; it replaces an older one.

    Raises:
        WriteError: it cannot be written.
    """
    data = report_json(summary)
    text = json.dumps(data, indent=1) + "\n" if Path(path).suffix == ".json" else report_html(data)
    write_bytes(path, text.encode("utf-8"))


def report_json(summary: CompileSummary) -> dict[str, Any]:
    """Plain values: the summary, and `tensors`, one object for each packed tensor in execution order.

    Errors are relative: squared error over squared weight. `before` is -O0's, `after` the file's.
    """
    return {
        **summary.as_json(),
        "tensors": [{**asdict(tensor), "ratio": tensor.ratio} for tensor in summary.tensors],
    }


_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; width: 100%; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
th { position: sticky; top: 0; background: Canvas; }
.bar { background: #8882; width: 10em; }
.bar div { background: #4a7dbd; height: .8em; }
:root { color-scheme: light dark; }
"""


def report_html(data: dict[str, Any]) -> str:
    """A page that needs nothing else: totals, layer groups, tensors; the bar is the error over -O0's."""
    facts = {
        "Level": f"-O{data['level']}" + ("" if data["levels"] == "nf4" else f", levels {data['levels']}"),
        "Tensors": f"{data['num_packed']} packed, {data['num_kept']} kept",
        "Bytes": f"{data['source_bytes']:,} to {data['file_bytes']:,}",
        "Squared error over -O0's": f"{data['plain_ratio']:.4f}",
        "Negative scales": f"{data['negative_scales']:.1%}",
        "Measured": f"{data['measured_parameters']:,} of {data['packed_parameters']:,} parameters",
        "Time": f"{data['seconds']:.2f} s",
        "Weights": data["source_sha256"],
    }
    groups = _table(
        ["Layer group", "tensors", "parameters", "relative rms", "over -O0's", ""],
        (
            [
                group["group"],
                f"{group['tensors']}",
                f"{group['num_values']:,}",
                f"{group['relative_rms']:.5f}",
                f"{group['plain_ratio']:.4f}",
                _Bar(group["plain_ratio"]),
            ]
            for group in data["groups"]
        ),
    )
    tensors = _table(
        [
            "Tensor",
            "shape",
            "before",
            "after",
            "over -O0's",
            "",
            "output, over -O0's",
            "held out",
            "negative",
            "seconds",
        ],
        (
            [
                tensor["name"],
                " x ".join(map(str, tensor["shape"])),
                f"{tensor['before']:.6f}",
                f"{tensor['after']:.6f}",
                f"{tensor['ratio']:.4f}",
                _Bar(tensor["ratio"]),
                _output_ratio(tensor["output"]),
                _output_ratio(tensor["held_out"]),
                f"{tensor['negative_scales']:.1%}",
                f"{tensor['seconds']:.2f}",
            ]
            for tensor in data["tensors"]
        ),
    )
    title = escape(Path(data["out"]).name)
    facts_table = _table(["", ""], ([key, value] for key, value in facts.items()))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n{facts_table}\n"
        "<p>Errors are squared errors of the weights over their squares, before (-O0) and after.</p>\n"
        f"<h2>Layer groups</h2>\n{groups}\n<h2>Tensors</h2>\n{tensors}\n"
        f"{_evaluation(data['evaluation'])}</body></html>\n"
    )


def _evaluation(evaluation: dict[str, Any] | None) -> str:
    """KL and perplexity against the checkpoint; nothing without texts."""
    if evaluation is None:
        return ""
    rows: list[list[str | _Bar]] = [["checkpoint", "0", f"{evaluation['original_perplexity']:.4f}", "100.0%"]]
    for name, figures in ((evaluation["below_name"], evaluation["below"]), ("this file", evaluation["file"])):
        if figures:
            cells = [_with_error(figures["kl"], figures["kl_error"]), f"{figures['perplexity']:.4f}"]
            rows.append([name, *cells, f"{figures['same_choice']:.1%}"])
    texts = ", ".join(evaluation["texts"])
    told = f"{evaluation['tokens']:,} tokens in {evaluation['windows']} windows of {texts}."
    if evaluation["difference"] is not None:
        difference = _with_error(evaluation["difference"], evaluation["difference_error"])
        told += f" Difference in KL from {evaluation['below_name']}, paired by windows: {difference}."
    if evaluation["forced"]:
        told += " It is worse, and was forced."
    table = _table(["", "KL, nats a token", "perplexity", "same first choice"], rows)
    return f"<h2>Predictions</h2>\n{table}\n<p>{escape(told)}</p>\n"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.5f}" if error is None else f"{value:.5f} \u00b1 {error:.5f}"


class _Bar(float):
    """A share, drawn as a bar; more than 1 is a full one."""


def _output_ratio(output: dict[str, float] | None) -> str:
    return f"{output['after'] / output['before']:.4f}" if output and output["before"] else ""


def _table(head: list[str], rows: Iterable[list[str | _Bar]]) -> str:
    lines = ["<table>", "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _cell(value: str | _Bar) -> str:
    if isinstance(value, _Bar):
        return f'<div class="bar"><div style="width:{min(1.0, value):.1%}"></div></div>'
    return escape(value)
