"""--report and --levels: what the files say, and that a file with other levels is read by its own table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nf4format.blocks import dequantize
from nf4format.codebook import NF4_LEVELS
from nf4format.container import Nf4File
from nf4format.errors import FormatError, Nf4Error
from nf4format.levels import LEVELS, read_levels
from qcompile.cli import command
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint
from qcompile.report import check_report_path, report_html, report_json

Write = Callable[..., Path]
Tensors = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def model(write_checkpoint: Write) -> Path:
    generator = torch.Generator().manual_seed(0)
    return write_checkpoint(
        {
            "layers.0.up_proj.weight": torch.randn(200, 320, generator=generator).bfloat16(),
            "layers.0.down_proj.weight": torch.randn(320, 200, generator=generator).bfloat16(),
            "norm.weight": torch.ones(320),
        }
    )


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_json_report(model: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out.nf4", tmp_path / "report.json"
    _run(model, out, "--report", path, "--quiet")
    report = json.loads(path.read_text())
    assert [tensor["name"] for tensor in report["tensors"]] == list(Nf4File.open(out).packed_names)
    assert report["plain_ratio"] < 0.84
    with Nf4File.open(out) as packed_file:
        for tensor in report["tensors"]:
            packed = packed_file.packed(tensor["name"])
            assert tensor["shape"] == list(packed.shape)
            assert tensor["measured"] == tensor["parameters"] == packed.size
            assert tensor["ratio"] == pytest.approx(tensor["after"] / tensor["before"])
            assert 0.75 < tensor["ratio"] < 0.87
            assert tensor["before"] == pytest.approx(0.0085, rel=0.03)  # of Gaussian weights
            assert 0.4 < tensor["negative_scales"] < 0.6
            assert tensor["seconds"] > 0
    total = sum(t["after"] * t["parameters"] for t in report["tensors"])
    assert total / sum(t["before"] * t["parameters"] for t in report["tensors"]) == pytest.approx(
        report["plain_ratio"], rel=0.01
    )


class _Cells(HTMLParser):
    """Every element closed, and the text of the cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells[-1] += data


def test_html_report(model: Path, tmp_path: Path) -> None:
    _run(model, tmp_path / "out.nf4", "--report", tmp_path / "report.html", "--quiet")
    page = _Cells()
    text = (tmp_path / "report.html").read_text()
    page.feed(text)
    assert not page.open
    assert "layers.0.up_proj.weight" in page.cells
    assert "-O1" in page.cells
    assert not re.search(r"src=|href=|@import|url\(", text)  # it needs nothing else


def test_names_cannot_break_the_page(model: Path, tmp_path: Path) -> None:
    data = report_json(compile_checkpoint(model, tmp_path / "out.nf4"))
    data["tensors"][0]["name"] = '<script>alert("x")</script>&'
    page = _Cells()
    page.feed(report_html(data))
    assert '<script>alert("x")</script>&' in page.cells


def test_a_report_that_cannot_be_written_is_refused_first(model: Path, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "report.txt", r"expected \.json or \.html, got \.txt"),
        (tmp_path / "no" / "r.json", "its directory does not exist"),
    ):
        with pytest.raises(Nf4Error, match=message):
            _run(model, tmp_path / "out.nf4", "--report", path)
    assert not (tmp_path / "out.nf4").exists()
    check_report_path("report.html")


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("levels", ["fp4", "fp4-e3m0", "int4"])
def test_other_levels(model: Path, tmp_path: Path, levels: str, level: int) -> None:
    out = tmp_path / "out.nf4"
    summary = compile_checkpoint(model, out, CompileOptions(level=level, levels=levels, verify=True))
    with Nf4File.open(out) as packed_file:
        assert packed_file.metadata["nf4.levels"] == levels
        assert packed_file.other_levels == set(packed_file.packed_names)
        for name in packed_file.packed_names:
            packed = packed_file.packed(name)
            np.testing.assert_array_equal(packed.quant_map, LEVELS[levels])
            assert np.isfinite(dequantize(packed, "float32")).all()
    assert summary.levels == levels
    assert 0.7 < summary.plain_ratio < 5  # these suit a Gaussian less than NF4 does
    assert f"levels {levels}" in report_html(report_json(summary))


def test_levels_of_a_file(model: Path, tmp_path: Path) -> None:
    table = tmp_path / "levels.txt"
    table.write_text("# AF4-like\n" + ", ".join(str(2.5 * value) for value in reversed(NF4_LEVELS.tolist())))
    np.testing.assert_array_equal(read_levels(table), NF4_LEVELS)
    table.write_text(" ".join(str(value) for value in np.linspace(-1, 0.875, 16)))
    text = _run(model, tmp_path / "out.nf4", "--levels", table)
    assert "of -O0's" in text
    with Nf4File.open(tmp_path / "out.nf4") as packed_file:
        assert packed_file.metadata["nf4.levels"] == "custom"
        assert json.loads(packed_file.metadata["nf4.options"])["levels"] == "custom"
        quant_map = packed_file.packed("layers.0.up_proj.weight").quant_map
        np.testing.assert_array_equal(quant_map, np.linspace(-1, 0.875, 16).astype(np.float32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3", "expected 16 numbers, got 3"),
        ("x " * 16, "not a number among the levels"),
        ("nan " * 16, "finite values, not all zero"),
        ("0 " * 16, "finite values, not all zero"),
        ("1 " * 16, r"the first in \[-1, -0\.5\]"),
        ("1" * 100_000, "too large"),
        ("\xff\xfe", "not a number"),
        ("1e400 " * 16, "finite values"),
    ],
)
def test_files_that_hold_no_levels_are_refused(model: Path, tmp_path: Path, text: str, message: str) -> None:
    table = tmp_path / "levels.txt"
    table.write_text(text)
    with pytest.raises(FormatError, match=message):
        compile_checkpoint(model, tmp_path / "out.nf4", CompileOptions(levels=str(table)))
    assert not (tmp_path / "out.nf4").exists()


def test_a_name_that_is_no_table_is_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nf5: No such file"):
        compile_checkpoint(model, tmp_path / "out.nf4", CompileOptions(levels="nf5"))
