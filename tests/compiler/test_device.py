"""--device: the CPU where no GPU is, one line about it, and an error where a GPU was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import qcompile.device
from nf4format.encode import ENCODERS
from nf4format.encode_cuda import DeviceError
from qcompile.cli import command
from qcompile.errors import CompileError
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

NO_GPU = "no GPU here"


@pytest.fixture
def model(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama", num_hidden_layers=1)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise DeviceError("", NO_GPU, remedy="encode on the CPU")

    monkeypatch.setattr(qcompile.device, "CudaEncoder", refuse)


class Borrowed:
    """Stands for the GPU's encoder; may fail at a tensor."""

    opened: list[Borrowed]

    def __init__(self, level: int, levels: object, *, chunk_bytes: int, tensors: int) -> None:
        self.level, self.calls, self.closed = level, 0, False
        Borrowed.opened.append(self)

    def __enter__(self) -> Borrowed:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def __call__(self, *arguments: object, **named: object) -> object:
        self.calls += 1
        if self.calls == 3:
            raise DeviceError("", "it fell off the bus")
        return ENCODERS[self.level](*arguments, **named)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_gpu")
def test_auto_falls_back_with_one_line(model: Path, tmp_path: Path) -> None:
    told: list[str] = []
    for device in ("cpu", "auto"):
        options = CompileOptions(device=device)
        compile_checkpoint(model, tmp_path / f"{device}.nf4", options, tell=told.append)
    assert told == [f"encoding on the CPU: {NO_GPU}; encode on the CPU"]
    assert (tmp_path / "cpu.nf4").read_bytes() == (tmp_path / "auto.nf4").read_bytes()


@pytest.mark.usefixtures("no_gpu")
def test_the_command_says_it_unless_quiet(model: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(model), str(tmp_path / "a.nf4"), "--device", "auto"])
    assert result.exit_code == 0
    assert f"qcompile: encoding on the CPU: {NO_GPU}" in result.stderr
    result = CliRunner().invoke(command, [str(model), str(tmp_path / "b.nf4"), "--device", "auto", "-q"])
    assert result.exit_code == 0
    assert not result.stderr


@pytest.mark.usefixtures("no_gpu")
def test_cuda_without_a_gpu_is_an_error_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "a.nf4"
    out.parent.mkdir()
    with pytest.raises(CompileError, match=f"--device cuda: {NO_GPU}; encode on the CPU"):
        compile_checkpoint(model, out, CompileOptions(device="cuda"))
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("level", [0, 1])
def test_a_gpu_that_fails_on_the_way(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    Borrowed.opened = []
    monkeypatch.setattr(qcompile.device, "CudaEncoder", Borrowed)
    out = tmp_path / "out" / "a.nf4"
    out.parent.mkdir()
    with pytest.raises(CompileError, match="--device cuda: it fell off the bus"):
        compile_checkpoint(model, out, CompileOptions(device="cuda", level=level, jobs=1))
    assert not list(out.parent.iterdir())
    assert [(encoder.level, encoder.closed) for encoder in Borrowed.opened] == [(level, True)]


def test_the_device_is_not_recorded() -> None:
    assert CompileOptions(device="cuda").recorded() == CompileOptions().recorded()
