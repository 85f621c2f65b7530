"""Levels 2 and 3: each step against its definition, whole compilations, and statistics that do not serve."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from calibrated_cases import NAMES, SHAPES, collect, inputs, moment_of, stops_after_two_tensors, weight
from safetensors import safe_open

from nf4format.adapter import read_adapter
from nf4format.blocks import dequantize, quantize
from nf4format.codebook import BLOCK, NESTED_BLOCK, NESTED_MAP, NF4_LEVELS
from nf4format.container import Nf4File
from qcompile import absorb, feedback
from qcompile.errors import CompileError
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint
from qcompile.report import write_report
from qcompile.rounder import decoded

Write = Callable[..., Path]


@pytest.mark.parametrize("shape", [(96, 128), (40, 172), (7, 100)])
def test_output_error_falls_far_below_that_of_nearest_rounding(shape: tuple[int, int]) -> None:
    w, x = weight(*shape), inputs(shape[1])
    held_out = inputs(shape[1], seed=0)[:500] + 0.1 * np.random.default_rng(5).standard_normal(
        (500, shape[1])
    )
    rounded = feedback.round_weight(w, moment_of(x), NF4_LEVELS, threads=2)
    plain = dequantize(quantize(w, "float32")).reshape(w.shape)
    difference = decoded(rounded, w.shape, NF4_LEVELS) - w
    for h in (moment_of(x), moment_of(held_out)):
        assert feedback.output_error(difference, h) < 0.6 * feedback.output_error(plain - w, h)


def test_output_error_is_that_of_the_outputs() -> None:
    w, x, d = weight(8, 64), inputs(64), weight(8, 64, seed=2)
    outputs = x @ (w + d).T.astype(np.float64) - x @ w.T.astype(np.float64)
    expected = np.square(outputs).sum() / len(x)
    assert feedback.output_error(d, moment_of(x)) == pytest.approx(expected, rel=1e-4)


def test_errors_are_carried_as_the_definition_says() -> None:
    """The recursion of optimal brain surgery in float64: one column after the other, the inverse updated."""
    w, h = weight(5, 64), feedback.damped(moment_of(inputs(64)))
    rounding = feedback.Rounding(w, np.full(5, 255, np.uint8), np.full(5, 0.13, np.float32), NF4_LEVELS)
    order = np.argsort(-np.diagonal(h), kind="stable")
    rounding.carry_errors(order, feedback.inverse_factor(h, order))
    rest, inverse = w.astype(np.float64), np.linalg.inv(h.astype(np.float64))
    for column in order:
        scaled = rest[:, column] / 0.13
        codes = abs(scaled[:, None] - NF4_LEVELS).argmin(axis=1)
        np.testing.assert_array_equal(rounding.codes[column], codes)
        error = (rest[:, column] - NF4_LEVELS[codes] * np.float64(np.float32(0.13))) / inverse[column, column]
        rest -= error[:, None] * inverse[column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]


@pytest.mark.parametrize("k", [128, 100])
def test_descent_never_raises_the_cost_and_stays_on_the_grid(k: int) -> None:
    w, h = weight(30, k), feedback.damped(moment_of(inputs(k)))
    absmax, nested = feedback.scale_search(w.reshape(-1), np.ascontiguousarray(np.diagonal(h)))
    of_blocks = np.repeat(nested, NESTED_BLOCK)[: absmax.size]
    rounding = feedback.Rounding(w, absmax, of_blocks, NF4_LEVELS)
    order = np.argsort(-np.diagonal(h), kind="stable")
    rounding.carry_errors(order, feedback.inverse_factor(h, order))

    def cost() -> float:
        scales = NESTED_MAP[rounding.entries] * of_blocks
        spread = np.repeat(scales, BLOCK)[: w.size].reshape(w.shape)
        np.testing.assert_array_equal(spread.T, rounding._scales)
        return feedback.output_error(NF4_LEVELS[rounding.codes.T] * spread - w, h)

    costs = [cost()]
    for _ in range(4):
        rounding.descend(h)
        costs.append(cost())
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(costs))
    assert costs[-1] < (0.97 if k % BLOCK == 0 else 0.98) * costs[0]  # scales move in whole blocks only


@pytest.mark.parametrize("k", [128, 100])
def test_rows_may_be_worked_on_in_panels(k: int) -> None:
    w, moment = weight(300, k), moment_of(inputs(k))
    whole = feedback.round_weight(w, moment, NF4_LEVELS, threads=1)
    panels = feedback.round_weight(w, moment, NF4_LEVELS, threads=1, panel_values=64 * k)
    np.testing.assert_array_equal(whole.nested_absmax, panels.nested_absmax)
    assert (whole.codes != panels.codes).mean() < 0.01  # products of other sizes are rounded otherwise
    costs = [feedback.output_error(decoded(one, w.shape, NF4_LEVELS) - w, moment) for one in (whole, panels)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-3)


def test_the_target_makes_up_for_what_came_before() -> None:
    """Least squares from y to the original's output, with the same damping, from the data themselves."""
    w, x = weight(6, 32).astype(np.float64), inputs(32)
    y = x + 0.3 * np.random.default_rng(3).standard_normal(x.shape)
    damping = feedback.DAMPING * np.square(y).mean()
    # Minimise |W x - V y|^2 / tokens + damping |V - W|^2.
    h, c = y.T @ y / len(y), x.T @ y / len(y)
    expected = np.linalg.solve((h + damping * np.eye(32)).T, (w @ c + damping * w).T).T
    half = feedback.target_weight(w.astype(np.float32), h.astype(np.float32), c.astype(np.float32))
    found = w + (half - w) / feedback.PAYBACK
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    for target in (half, found):
        assert np.square(x @ w.T - y @ target.T).sum() < np.square((x - y) @ w.T).sum()


def test_features_that_are_never_read_do_no_harm() -> None:
    x = inputs(128)
    x[:, 5] = 0
    for moment in (moment_of(x), np.zeros((128, 128), np.float32)):
        rounded = feedback.round_weight(weight(16, 128), moment, NF4_LEVELS, threads=1)
        assert np.isfinite(decoded(rounded, (16, 128), NF4_LEVELS)).all()


@pytest.fixture
def model(write_checkpoint: Write) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (0.05 * torch.randn(shape, generator=generator)).bfloat16()
        for name, shape in zip(NAMES, SHAPES, strict=True)
    }
    return write_checkpoint({**tensors, "norm.weight": torch.ones(128)})


def test_compilation_at_level_2(model: Path, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    stats = collect(model, tmp_path / "stats.safetensors")
    out = tmp_path / "out.nf4"
    summary = compile_checkpoint(model, out, CompileOptions(level=2, stats=(stats,), verify=True, jobs=1))
    compile_checkpoint(model, tmp_path / "again.nf4", CompileOptions(level=2, stats=(stats,), jobs=3))
    assert out.read_bytes() == (tmp_path / "again.nf4").read_bytes()
    assert summary.output_ratio is not None
    assert summary.output_ratio < 0.6
    assert "squared error of the layers' outputs 0." in summary.text()
    with Nf4File.open(out) as packed_file, safe_open(out, "pt") as peer:
        options = json.loads(packed_file.metadata["nf4.options"])
        assert options["stats"] == [{"data_sha256": "0" * 64, "tokens": "1000"}]
        for tensor in summary.tensors:
            packed = packed_file.packed(tensor.name)
            keys = {key: peer.get_tensor(key) for key in peer.keys() if key.startswith(f"{tensor.name}.")}  # noqa: SIM118
            state = functional.QuantState.from_dict(keys, device=torch.device("cpu"))
            theirs = functional.dequantize_4bit(peer.get_tensor(tensor.name), state)
            assert theirs.view(torch.uint16).numpy().tobytes() == dequantize(packed).tobytes()
            assert tensor.output is not None
            assert tensor.output.after < 0.7 * tensor.output.before


@pytest.mark.parametrize("level", [2, 3])
def test_stopped_and_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    stats = collect(model, tmp_path / "stats.safetensors", cross=level == 3)
    out, options = tmp_path / "out.nf4", CompileOptions(level=level, stats=(stats,), resume=True, jobs=1)
    straight = compile_checkpoint(model, out, options)
    expected = out.read_bytes()
    out.unlink()
    with stops_after_two_tensors(monkeypatch):
        compile_checkpoint(model, out, options)
    other = collect(model, tmp_path / "other.safetensors", cross=level == 3)  # the same, collected again
    with pytest.raises(CompileError, match="made from other weights"):
        compile_checkpoint(model, out, replace(options, stats=(other,)))
    summary = compile_checkpoint(model, out, options)
    assert summary.resumed_bytes > 0
    assert out.read_bytes() == expected
    assert [tensor.output for tensor in summary.tensors] == [tensor.output for tensor in straight.tensors]
    assert summary.output_ratio == straight.output_ratio


def test_errors_by_held_out_statistics(model: Path, tmp_path: Path) -> None:
    first, other = collect(model, tmp_path / "first"), collect(model, tmp_path / "other", seed=3)
    report = tmp_path / "report.json"
    ratios = []
    for level, stats in ((0, ()), (1, ()), (2, (first,))):
        options = CompileOptions(level=level, stats=stats, held_out=(other,), force=True)
        summary = compile_checkpoint(model, tmp_path / "out.nf4", options)
        ratios.append(summary.held_out_ratio)
        assert "by the statistics held out" in summary.text()
        write_report(str(report), summary)
    assert json.loads(report.read_text())["held_out_ratio"] == ratios[2]
    assert ratios[0] == pytest.approx(1, abs=0.01)
    assert ratios[2] < ratios[1] < 0.95  # type: ignore[operator]
    # By the encoder's own statistics, held out ones say what it says itself.
    options = CompileOptions(level=2, stats=(first,), held_out=(first,), force=True)
    same = compile_checkpoint(model, tmp_path / "out.nf4", options)
    assert same.held_out_ratio == pytest.approx(same.output_ratio, rel=0.02)


def test_compilation_at_level_3_and_with_other_levels(model: Path, tmp_path: Path) -> None:
    stats = collect(model, tmp_path / "second.safetensors", cross=True)
    compile_checkpoint(model, tmp_path / "out.nf4", CompileOptions(level=3, stats=(stats,), verify=True))
    options = CompileOptions(level=3, stats=(stats,), levels="int4", verify=True)
    compile_checkpoint(model, tmp_path / "int4.nf4", options)
    assert (tmp_path / "out.nf4").read_bytes() != (tmp_path / "int4.nf4").read_bytes()


def test_diagonals_alone_give_the_weighted_search(model: Path, tmp_path: Path) -> None:
    stats = collect(model, tmp_path / "stats.safetensors", full=False)
    out = tmp_path / "out.nf4"
    summary = compile_checkpoint(model, out, CompileOptions(level=2, stats=(stats,), verify=True))
    assert summary.output_ratio is None
    compile_checkpoint(model, tmp_path / "plain.nf4", CompileOptions(level=1))
    h = moment_of(inputs(128, 1000))
    with safe_open(model / "model.safetensors", "pt") as tensors:
        w = tensors.get_tensor(NAMES[0]).float().numpy()
    weighted = []
    for path in (out, tmp_path / "plain.nf4"):
        with Nf4File.open(path) as packed_file:
            difference = dequantize(packed_file.packed(NAMES[0]), "float32").reshape(w.shape) - w
            weighted.append((np.square(difference).sum(axis=0) * np.diagonal(h)).sum())
    assert weighted[0] < 0.95 * weighted[1]


def test_several_files_of_layers_and_of_data(model: Path, tmp_path: Path) -> None:
    both = collect(model, tmp_path / "both.safetensors")
    first = collect(model, tmp_path / "first.safetensors", names=NAMES[:2])
    more = collect(model, tmp_path / "more.safetensors", seed=7)
    summary = compile_checkpoint(model, tmp_path / "a.nf4", CompileOptions(level=2, stats=(both,)))
    again = compile_checkpoint(model, tmp_path / "b.nf4", CompileOptions(level=2, stats=(both, more)))
    assert summary.output_ratio is not None and again.output_ratio is not None
    with pytest.raises(CompileError, match=r"'layers.0.down_proj.weight': no statistics of this weight"):
        compile_checkpoint(model, tmp_path / "c.nf4", CompileOptions(level=2, stats=(first,)))
    options = CompileOptions(level=2, stats=(first,), exclude=("*down*",))
    compile_checkpoint(model, tmp_path / "c.nf4", options)


def test_a_correction_is_the_best_of_its_rank() -> None:
    """At the output: what is left are the singular values behind the rank, of the error times a root of H."""
    x, difference = inputs(64), weight(40, 64)
    moment = moment_of(x)
    found = absorb.Corrections(moment, 5).of(difference).product()
    h = feedback.damped(moment)
    # The singular values of D X are those of D H^(1/2), if H is X XT.
    root = np.linalg.cholesky(h.astype(np.float64))
    values = np.linalg.svd(difference @ root, compute_uv=False)
    left = feedback.output_error(difference - found, h)
    assert left == pytest.approx(np.square(values[5:]).sum(), rel=1e-3)
    assert np.linalg.matrix_rank(found, tol=1e-5) == 5


def test_an_adapter_takes_up_what_is_left_over(model: Path, tmp_path: Path) -> None:
    stats = collect(model, tmp_path / "stats.safetensors")
    plain = compile_checkpoint(model, tmp_path / "plain.nf4", CompileOptions(level=2, stats=(stats,)))
    options = CompileOptions(level=2, stats=(stats,), adapter=str(tmp_path / "adapter"), rank=8, verify=True)
    summary = compile_checkpoint(model, tmp_path / "out.nf4", options)
    assert summary.output_ratio is not None and plain.output_ratio is not None
    assert summary.output_ratio < 0.8 * plain.output_ratio
    adapter = read_adapter(tmp_path / "adapter")
    assert (adapter.config["r"], adapter.config["lora_alpha"]) == (8, 8)
    assert adapter.config["target_modules"] == sorted(name.removesuffix(".weight") for name in NAMES)
    with Nf4File.open(tmp_path / "out.nf4") as packed_file:
        assert adapter.metadata["nf4.base_fingerprint"] == packed_file.fingerprint
        with safe_open(model / "model.safetensors", "pt") as tensors:
            for name, (n, k) in zip(NAMES, SHAPES, strict=True):
                w = tensors.get_tensor(name).float().numpy()
                parts = {}
                for kind, shape in (("A", (8, k)), ("B", (n, 8))):
                    data, dtype, found = adapter.tensors[
                        f"base_model.model.{name.removesuffix('.weight')}.lora_{kind}.weight"
                    ]
                    assert (dtype, found) == ("F32", shape)
                    parts[kind] = data.view(np.float32).reshape(shape)
                base = dequantize(packed_file.packed(name), "float32").reshape(w.shape)
                h = moment_of(inputs(k, 1000))
                without = feedback.output_error(base - w, h)
                assert feedback.output_error(base + parts["B"] @ parts["A"] - w, h) < 0.8 * without


def test_adapters_that_cannot_be_are_refused(model: Path, tmp_path: Path) -> None:
    stats = collect(model, tmp_path / "stats.safetensors")
    diagonal = collect(model, tmp_path / "diagonal.safetensors", full=False)
    adapter = str(tmp_path / "adapter")
    for options, message in (
        (CompileOptions(adapter=adapter), "needs -O2 and whole moments"),
        (CompileOptions(level=2, stats=(diagonal,), adapter=adapter), "needs -O2 and whole moments"),
        (CompileOptions(level=2, stats=(stats,), adapter=adapter, rank=65), "at most 64, got 65"),
        (CompileOptions(level=2, stats=(stats,), adapter=adapter, resume=True), "leave out --resume"),
        (CompileOptions(level=2, stats=(stats,), adapter=str(tmp_path / "no" / "a")), "does not exist"),
    ):
        with pytest.raises(CompileError, match=message):
            compile_checkpoint(model, tmp_path / "out.nf4", options)
    assert not (tmp_path / "out.nf4").exists()


def test_statistics_that_do_not_serve_are_refused(
    model: Path, tmp_path: Path, write_checkpoint: Write
) -> None:
    first = collect(model, tmp_path / "first.safetensors")
    second = collect(model, tmp_path / "second.safetensors", cross=True)
    out = tmp_path / "out.nf4"
    for options, message in (
        (CompileOptions(level=2), "-O2: needs statistics; nf4 calibrate"),
        (CompileOptions(level=1, stats=(first,)), "-O1 uses no statistics"),
        (CompileOptions(level=3, stats=(first,)), "-O3 needs a second pass"),
        (CompileOptions(level=2, stats=(second,)), "-O2 rounds by the original's own"),
    ):
        with pytest.raises(CompileError, match=message):
            compile_checkpoint(model, out, options)
    other = write_checkpoint(
        {name: torch.randn(shape).bfloat16() for name, shape in zip(NAMES, SHAPES, strict=True)}, name="other"
    )
    with pytest.raises(CompileError, match=r"statistics of another model, expected SHA-256"):
        compile_checkpoint(other, out, CompileOptions(level=2, stats=(first,)))
    assert not out.exists()
