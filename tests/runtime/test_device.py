"""Which device is chosen, and what is said where a GPU cannot be used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nf4.device import resolve, runs_on
from nf4.errors import LoadError
from nf4.ops import cuda as ops_cuda


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (["90"], (9, 0), True),
        (["90"], (10, 0), True),
        (["90"], (8, 9), False),
        (["80-real"], (8, 6), True),
        (["80-real"], (9, 0), False),
        (["86-real", "90-virtual"], (8, 0), False),
        (["86-real", "90-virtual"], (12, 0), True),
        (["90a"], (9, 0), True),
        (["90a"], (10, 0), False),
        (["100-real"], (10, 3), True),
        (["native"], (9, 0), False),
    ],
)
def test_which_gpus_a_build_runs_on(archs: list[str], capability: tuple[int, int], expected: bool) -> None:
    assert runs_on(archs, capability) is expected


def fake_gpu(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A machine with one H200 and kernels for it, as far as the questions of `resolve` go."""
    facts = {"cuda": "13.0", "available": True, "capability": (9, 0), "archs": ["90"], "driver": 13000}
    facts |= changes
    monkeypatch.setattr(torch.version, "cuda", facts["cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: facts["available"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: facts["capability"])

    def kernels() -> SimpleNamespace:
        if facts["archs"] is None:
            raise ImportError
        info = {"archs": facts["archs"], "runtime": 13000}
        return SimpleNamespace(build_info=lambda: info, driver_version=lambda: facts["driver"])

    monkeypatch.setattr(ops_cuda, "kernels", kernels)


PROBLEMS = {
    "torch without CUDA": ({"cuda": None}, r"torch was built without CUDA; install a CUDA build"),
    "no kernels": ({"archs": None}, r"no GPU kernels \(nf4\._cuda\); install it again where nvcc"),
    "old driver": ({"driver": 12080}, r"driver is too old: expected CUDA 13\.0, got 12\.8; install a newer"),
    "old GPU": (
        {"capability": (7, 5)},
        r"Some GPU of compute capability 7\.5 is not supported, expected 8\.0",
    ),
    "other archs": (
        {"capability": (8, 6)},
        r"built for 90, got Some GPU of compute capability 8\.6; .*NF4_CUDA_ARCHS=86",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_gpu_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    changes, message = PROBLEMS[case]
    fake_gpu(monkeypatch, **changes)
    with pytest.raises(LoadError, match=rf"^model\.nf4: device cuda: .*{message}"):
        resolve("cuda", "model.nf4")
    with pytest.warns(UserWarning, match=rf"running on the CPU: .*{message}"):
        assert resolve("auto") == torch.device("cpu")


def test_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    assert resolve("auto") == resolve("cuda") == resolve(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert resolve("cpu") == torch.device("cpu")
    with pytest.raises(LoadError, match=r"device cuda:1: expected an index below 1, got 1"):
        resolve("cuda:1")
    with pytest.raises(LoadError, match=r"device, expected auto, cpu or cuda, got \?\?"):
        resolve("??")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve("auto") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert resolve("auto") == torch.device("cpu")
    with pytest.raises(LoadError, match=r"device cuda: .*; .*use the CPU"):
        resolve("cuda")
