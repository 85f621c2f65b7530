"""-O2 and -O3 with torch against the numpy code: kernels compiled for the CPU, and on a GPU if there is one.

Within a panel the two agree to the bit; products of matrices may be summed in another order, and then a few
codes differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated_cases import NAMES, SHAPES, collect, inputs, moment_of, stops_after_two_tensors, weight
from encode_cases import LEVEL_TABLES, cases
from feedback_kernels import host_kernels
from safetensors import safe_open

import qcompile.device
import qcompile.rounder_cuda
from nf4format.adapter import read_adapter
from nf4format.blocks import dequantize, quantize, scale_search
from nf4format.codebook import NF4_LEVELS
from nf4format.container import Nf4File
from nf4format.encode import ENCODERS
from nf4format.encode_cuda import DeviceError
from nf4format.levels import thresholds_of
from qcompile import absorb, absorb_cuda, feedback, feedback_cuda, pipeline
from qcompile.device import Encoding
from qcompile.errors import CompileError
from qcompile.feedback_cuda import Kernels
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint
from qcompile.rounder_cuda import TorchRounder

Write = Callable[..., Path]
ON = [pytest.param("host"), pytest.param("gpu", marks=pytest.mark.cuda)]
RAGGED = [(96, 128), (40, 172), (7, 100), (20, 320), (3, 70), (64, 3)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices are small: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kernels_on(where: str, levels: np.ndarray) -> Kernels:
    if where == "host":
        return host_kernels(levels)
    native = pytest.importorskip("nf4format._cuda_encode", reason="built without GPU kernels")
    made = native.Feedback(0, levels.ctypes.data, thresholds_of(levels).ctypes.data)
    return Kernels(made, levels, torch.device("cuda"))


def known_of(moment: np.ndarray, kernels: Kernels) -> feedback_cuda.Known:
    k = len(moment)
    packed = kernels.constant(moment[np.triu_indices(k)])
    return feedback_cuda.known(feedback_cuda.unpacked(packed, k))


def on_cpu(rounded: feedback_cuda.Rounded, kernels: Kernels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return rounded.codes.cpu().numpy().T, rounded.absmax.cpu().numpy(), rounded.nested_absmax.cpu().numpy()


@pytest.mark.parametrize("table", LEVEL_TABLES)
@pytest.mark.parametrize("where", ON)
def test_the_weighted_search_has_the_cpus_bits(where: str, table: str) -> None:
    levels = LEVEL_TABLES[table]
    kernels = kernels_on(where, levels)
    rng = np.random.default_rng(3)
    for case, values in cases("float32"):
        for period in (1, 7, 64, 200):
            weights = rng.standard_exponential(period).astype(np.float32) ** 3
            weights[rng.random(period) < 0.1] = 0
            expected = scale_search(values, weights, levels=levels)
            flat = feedback_cuda.padded(kernels.constant(values))
            found = kernels.search(flat, values.size, kernels.constant(weights))
            for array, want in zip(found, expected, strict=True):
                assert array.cpu().numpy().tobytes() == want.tobytes(), (case, period)


@pytest.mark.parametrize("k", [128, 100, 64])
@pytest.mark.parametrize("where", ON)
def test_errors_carried_within_a_panel_have_the_cpus_bits(where: str, k: int) -> None:
    kernels = kernels_on(where, NF4_LEVELS)
    w, moment = weight(50, k, seed=k), moment_of(inputs(k))
    moment_there = known_of(moment, kernels)
    h, order = feedback.damped(moment), moment_there.order.cpu().numpy()
    absmax, nested = scale_search(w.reshape(-1), np.ascontiguousarray(np.diagonal(h)))
    of_blocks = np.repeat(nested, 256)[: absmax.size]
    rounding = feedback.Rounding(w, absmax, of_blocks, NF4_LEVELS)
    rounding.carry_errors(order, moment_there.factor.cpu().numpy())
    panel = feedback_cuda._Panel(
        *(kernels.constant(array) for array in (w, absmax, of_blocks)), moment_there, kernels
    )
    panel.carry_errors()
    np.testing.assert_array_equal(panel.codes.cpu().numpy(), rounding.codes)


@pytest.mark.parametrize("table", ["nf4", "int4"])
@pytest.mark.parametrize("shape", RAGGED)
@pytest.mark.parametrize("where", ON)
def test_weights_are_rounded_as_by_numpy(where: str, shape: tuple[int, int], table: str) -> None:
    levels = LEVEL_TABLES[table]
    kernels = kernels_on(where, levels)
    w, moment = weight(*shape, seed=sum(shape)), moment_of(inputs(shape[1]))
    w[1] = 0  # blocks of zeros
    expected = feedback.round_weight(w, moment, levels, threads=1)
    moment_there, w_there = known_of(moment, kernels), kernels.constant(w)
    found = feedback_cuda.round_weight(w_there, moment_there, kernels)
    codes, absmax, nested = on_cpu(found, kernels)
    np.testing.assert_array_equal(nested, expected.nested_absmax)
    assert (codes != expected.codes).mean() < 0.01
    assert (absmax != expected.absmax).mean() < 0.03
    ours = feedback_cuda.output_error(w_there, found, moment_there, kernels)
    difference = feedback_cuda.decoded_difference(w_there, found, kernels).cpu().numpy()
    assert ours == pytest.approx(feedback.output_error(difference, moment), rel=1e-4)
    theirs = feedback_cuda.output_error(
        w_there,
        feedback_cuda.Rounded(
            kernels.constant(expected.codes.T), kernels.constant(expected.absmax), found.nested_absmax
        ),
        moment_there,
        kernels,
    )
    assert ours == pytest.approx(theirs, rel=5e-3)
    panels = feedback_cuda.round_weight(w_there, moment_there, kernels, panel_values=shape[1] * 16)
    assert (panels.codes != found.codes).float().mean() < 0.01
    again = feedback_cuda.round_weight(w_there, known_of(moment, kernels), kernels)
    assert all(torch.equal(a, b) for a, b in zip(vars(found).values(), vars(again).values(), strict=True))


@pytest.mark.parametrize("where", ON)
def test_parts_are_those_of_numpy(where: str) -> None:
    """Factor, target, errors of the output and of -O0, packed codes, and features that are never read."""
    kernels = kernels_on(where, NF4_LEVELS)
    for n, k in ((33, 100), (300, 128)):
        w, x = weight(n, k), inputs(k)
        y = x + 0.1 * np.random.default_rng(0).standard_normal(x.shape)
        moment, cross = moment_of(y), (x.T @ y / len(x)).astype(np.float32)
        there, w_there = known_of(moment, kernels), kernels.constant(w)
        h = feedback.damped(moment)
        np.testing.assert_array_equal(there.h.cpu().numpy(), h)
        order = np.argsort(-np.diagonal(h), kind="stable")
        np.testing.assert_array_equal(there.order.cpu().numpy(), order)
        factor = feedback.inverse_factor(h, order)
        np.testing.assert_allclose(there.factor.cpu().numpy(), factor, rtol=1e-4, atol=1e-6 * factor.max())
        target = feedback_cuda.target_weight(w_there, there, kernels.constant(cross))
        wanted = feedback.target_weight(w, moment, cross)
        np.testing.assert_allclose(target.cpu().numpy(), wanted, rtol=1e-4, atol=1e-5)
        size = feedback_cuda.output_size(w_there, there)
        assert size == pytest.approx(feedback.output_error(w, moment), rel=1e-4)
        plain = dequantize(quantize(w, "float32")).reshape(w.shape) - w
        found = feedback_cuda.plain_error(w_there, there, kernels)
        assert found == pytest.approx(feedback.output_error(plain, moment), rel=1e-4)
        rounded = feedback_cuda.Rounded(kernels.constant(np.full((n, k), 3, np.uint8)), *[w_there] * 2)
        packed = feedback_cuda.packed_codes(rounded, kernels).cpu().numpy()
        np.testing.assert_array_equal(packed, [0x33] * (n * k // 2))
    odd = feedback_cuda.Rounded(kernels.constant(np.full((3, 5), 3, np.uint8)), *[w_there] * 2)
    assert feedback_cuda.packed_codes(odd, kernels).tolist() == [0x33] * 7 + [0x37]
    x[:, 5] = 0
    for moment in (moment_of(x), np.zeros((128, 128), np.float32)):
        rounded = feedback_cuda.round_weight(w_there, known_of(moment, kernels), kernels)
        assert feedback_cuda.decoded_difference(w_there, rounded, kernels).isfinite().all()


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (30, 30)])
@pytest.mark.parametrize("where", ON)
def test_corrections_are_those_of_numpy(where: str, shape: tuple[int, int]) -> None:
    kernels = kernels_on(where, NF4_LEVELS)
    difference, moment = weight(*shape), moment_of(inputs(shape[1]))
    expected = absorb.Corrections(moment, 5).of(difference)
    corrections = absorb_cuda.Corrections(known_of(moment, kernels), 5)
    found = corrections.of(kernels.constant(difference))
    np.testing.assert_allclose(found.product().cpu().numpy(), expected.product(), atol=1e-5)
    shared = np.linalg.norm(expected.b, axis=0)
    np.testing.assert_allclose(np.linalg.norm(found.b.cpu().numpy(), axis=0), shared, rtol=1e-3)
    assert not corrections.of(kernels.constant(np.zeros_like(difference))).product().any()


@pytest.mark.cuda
def test_kernels_on_a_gpu_have_the_bits_of_those_compiled_for_the_cpu() -> None:
    """One block of coordinate descent on the same inputs, with scales that move and with some that stay."""
    rng = np.random.default_rng(17)
    for k, n in ((64, 1000), (61, 77)):
        w, h = weight(n, k, seed=n).T, feedback.damped(moment_of(inputs(k)))
        scales = rng.uniform(0.05, 0.2, n if k == 64 else (k, n)).astype(np.float32)
        codes = rng.integers(0, 16, (k, n)).astype(np.uint8)
        arrays = [w, h @ w, h, scales, codes, np.zeros_like(w), np.zeros_like(w)]
        if k == 64:  # entries and nested_absmax
            arrays += [rng.integers(100, 256, n).astype(np.uint8), np.full(n, 0.2, np.float32)]
        results = []
        for where in ("host", "gpu"):
            kernels = kernels_on(where, NF4_LEVELS)
            tensors = [kernels.constant(array).contiguous() for array in arrays]
            kernels.descend(*tensors)
            results.append([tensor.cpu().numpy().tobytes() for tensor in tensors])
        assert results[0] == results[1]


@pytest.fixture
def model(write_checkpoint: Write) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (0.05 * torch.randn(shape, generator=generator)).bfloat16()
        for name, shape in zip(NAMES, SHAPES, strict=True)
    }
    return write_checkpoint({**tensors, "norm.weight": torch.ones(128)})


@pytest.fixture(params=ON)
def torch_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device to give: the GPU, or torch on the CPU, with kernels compiled for it, in its place."""
    if request.param == "host":

        @contextmanager
        def open_host(options: CompileOptions, jobs: int, tell: Any) -> Iterator[Encoding]:
            if options.device == "cpu":
                with qcompile.device.open_device(options, jobs, tell) as encoding:
                    yield encoding
                return
            with TorchRounder(host_kernels(options.level_table()), tensors=jobs) as rounder:
                yield Encoding(ENCODERS[1], rounder)

        monkeypatch.setattr(pipeline, "open_device", open_host)
    else:
        pytest.importorskip("nf4format._cuda_encode", reason="built without GPU kernels")
    return "cuda"


def test_compilations_are_as_good_as_the_cpus(model: Path, tmp_path: Path, torch_device: str) -> None:
    first = collect(model, tmp_path / "first.safetensors")
    second = collect(model, tmp_path / "second.safetensors", cross=True)
    for options in (
        CompileOptions(level=2, stats=(first,)),
        CompileOptions(level=3, stats=(second,)),
        CompileOptions(level=2, stats=(first,), levels="fp4"),
        CompileOptions(level=2, stats=(first,), adapter=str(tmp_path / "adapter"), rank=8),
    ):
        cpu = compile_checkpoint(model, tmp_path / "cpu.nf4", replace(options, force=True))
        files, told = [], list[str]()
        for jobs in (1, 4) if options.level == 2 and options.levels == "nf4" else (4,):
            there = replace(options, device=torch_device, verify=True, force=True, jobs=jobs)
            summary = compile_checkpoint(model, tmp_path / "out.nf4", there, tell=told.append)
            files.append((tmp_path / "out.nf4").read_bytes())
        assert not told
        assert files[0] == files[-1]
        for tensor, other in zip(summary.tensors, cpu.tensors, strict=True):
            assert tensor.output is not None and other.output is not None
            assert tensor.output.before == pytest.approx(other.output.before, rel=1e-4)
            assert tensor.output.after == pytest.approx(other.output.after, rel=5e-3)
    adapter = read_adapter(tmp_path / "adapter")
    with Nf4File.open(tmp_path / "out.nf4") as packed_file:
        assert adapter.metadata["nf4.base_fingerprint"] == packed_file.fingerprint


def test_diagonals_alone_give_the_cpus_bytes(model: Path, tmp_path: Path, torch_device: str) -> None:
    stats = collect(model, tmp_path / "stats.safetensors", full=False)
    for device in ("cpu", torch_device):
        options = CompileOptions(level=2, stats=(stats,), device=device)
        compile_checkpoint(model, tmp_path / f"{device}.nf4", options)
    assert (tmp_path / "cpu.nf4").read_bytes() == (tmp_path / f"{torch_device}.nf4").read_bytes()


def test_resumed_on_the_same_device_only(
    model: Path, tmp_path: Path, torch_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = collect(model, tmp_path / "stats.safetensors")
    options = CompileOptions(level=2, stats=(stats,), resume=True, jobs=1, device=torch_device)
    out = tmp_path / "out.nf4"
    straight = compile_checkpoint(model, out, options)
    expected = out.read_bytes()
    out.unlink()
    with stops_after_two_tensors(monkeypatch):
        compile_checkpoint(model, out, options)
    with pytest.raises(CompileError, match="on another device"):
        compile_checkpoint(model, out, replace(options, device="cpu"))
    summary = compile_checkpoint(model, out, options)
    assert summary.resumed_bytes > 0
    assert out.read_bytes() == expected
    assert [tensor.output for tensor in summary.tensors] == [tensor.output for tensor in straight.tensors]


def test_what_cannot_be_rounded_is_refused(
    model: Path, tmp_path: Path, write_checkpoint: Write, torch_device: str
) -> None:
    stats = collect(model, tmp_path / "stats.safetensors")
    out = tmp_path / "out.nf4"
    options = CompileOptions(level=2, stats=(stats,), device=torch_device)
    with safe_open(model / "model.safetensors", "pt") as tensors:
        weights = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    other = write_checkpoint({**weights, NAMES[1]: weights[NAMES[1]] + 1}, name="other")
    with pytest.raises(CompileError, match="statistics of another model, expected SHA-256"):
        compile_checkpoint(other, out, options)
    weights[NAMES[1]][3, 7] = float("inf")
    broken = write_checkpoint(weights, name="broken")
    broken_stats = collect(broken, tmp_path / "broken.safetensors")
    with pytest.raises(CompileError, match=r"got inf at index \[3, 7\]"):
        compile_checkpoint(broken, out, replace(options, stats=(broken_stats,)))
    assert not out.exists()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_moments_of_nothing_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    import calibrated_cases

    monkeypatch.setattr(calibrated_cases, "moment_of", lambda x: -moment_of(x))
    stats = collect(model, tmp_path / "stats.safetensors")
    with pytest.raises(CompileError, match="positive definite"):
        compile_checkpoint(
            model, tmp_path / "out.nf4", CompileOptions(level=2, stats=(stats,), device=device)
        )


class NoEncoder:
    """A GPU that torch cannot use."""

    def __init__(self, *arguments: object, **named: object) -> None:
        self.closed = False

    def __enter__(self) -> NoEncoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True


def test_a_torch_without_cuda(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = collect(model, tmp_path / "stats.safetensors")
    monkeypatch.setattr(qcompile.device, "CudaEncoder", NoEncoder)

    def refuse() -> None:
        raise DeviceError("", "torch cannot use a GPU", remedy="encode on the CPU")

    monkeypatch.setattr(qcompile.rounder_cuda, "_native", refuse)
    told: list[str] = []
    for device in ("cpu", "auto"):
        options = CompileOptions(level=2, stats=(stats,), device=device)
        compile_checkpoint(model, tmp_path / f"{device}.nf4", options, tell=told.append)
    assert told == ["encoding on the CPU: torch cannot use a GPU; encode on the CPU"]
    assert (tmp_path / "cpu.nf4").read_bytes() == (tmp_path / "auto.nf4").read_bytes()
    with pytest.raises(CompileError, match="--device cuda: torch cannot use a GPU"):
        compile_checkpoint(model, tmp_path / "no.nf4", CompileOptions(level=2, stats=(stats,), device="cuda"))


@pytest.mark.cuda
def test_a_gpu_that_fails_on_the_way(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = collect(model, tmp_path / "stats.safetensors")

    def fail(*arguments: object, **named: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")

    monkeypatch.setattr(feedback_cuda, "unpacked", fail)
    with pytest.raises(CompileError, match=r"--device cuda: the GPU failed \(CUDA out of memory"):
        compile_checkpoint(
            model, tmp_path / "out.nf4", CompileOptions(level=2, stats=(stats,), device="cuda")
        )
