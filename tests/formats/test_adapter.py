"""PEFT adapter directories: written bytes, strict reading, PEFT and safetensors as other readers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from nf4format.adapter import BASE_FINGERPRINT, read_adapter, write_adapter
from nf4format.errors import FormatError, WriteError

CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "/etc/passwd",
}
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
A = np.arange(32, dtype=np.float32)
B = np.arange(24, dtype=np.uint16)  # bfloat16 bit patterns
TENSORS = {
    f"{PREFIX}.lora_B.weight": (B, "BF16", (6, 4)),
    f"{PREFIX}.lora_A.weight": (A, "F32", (4, 8)),
}
CONFIG_FILE, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    write_adapter(path, CONFIG, TENSORS, {BASE_FINGERPRINT: "ab" * 32})
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_round_trip(adapter: Path) -> None:
    again = read_adapter(adapter)
    assert again.config == CONFIG
    assert again.metadata == {"format": "pt", BASE_FINGERPRINT: "ab" * 32}
    assert {name: (dtype, shape) for name, (_, dtype, shape) in again.tensors.items()} == {
        name: (dtype, shape) for name, (_, dtype, shape) in TENSORS.items()
    }
    for name, (data, _, _) in TENSORS.items():
        assert again.tensors[name][0].tobytes() == data.tobytes()
    assert sorted(contents(adapter)) == [CONFIG_FILE, WEIGHTS]


def test_safetensors_reads_it(adapter: Path) -> None:
    torch = pytest.importorskip("torch")
    with safe_open(adapter / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt", BASE_FINGERPRINT: "ab" * 32}
        a, b = (file.get_tensor(f"{PREFIX}.lora_{side}.weight") for side in "AB")
    assert torch.equal(a, torch.from_numpy(A.reshape(4, 8)))
    assert (b.dtype, tuple(b.shape)) == (torch.bfloat16, (6, 4))
    assert b.view(torch.uint16).numpy().tobytes() == B.tobytes()


def test_what_peft_writes_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 8))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "1"]))
    wrapped.save_pretrained(tmp_path / "theirs")
    theirs = read_adapter(tmp_path / "theirs")
    assert (theirs.config["r"], len(theirs.tensors)) == (4, 4)
    state = peft.get_peft_model_state_dict(wrapped)
    for name, (data, dtype, shape) in theirs.tensors.items():
        assert (dtype, shape) == ("F32", tuple(state[name].shape))
        assert data.tobytes() == state[name].detach().numpy().tobytes()
    write_adapter(tmp_path / "ours", theirs.config, theirs.tensors, theirs.metadata)
    loaded = peft.PeftModel.from_pretrained(
        torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 8)), tmp_path / "ours"
    )
    for name, value in peft.get_peft_model_state_dict(loaded).items():
        assert torch.equal(value, state[name])


def test_same_input_same_bytes(adapter: Path, tmp_path: Path) -> None:
    backwards = dict(reversed(TENSORS.items()))
    write_adapter(
        tmp_path / "again", dict(reversed(CONFIG.items())), backwards, {BASE_FINGERPRINT: "ab" * 32}
    )
    for name in (CONFIG_FILE, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()


def test_replacing_keeps_other_files(adapter: Path) -> None:
    (adapter / "log.jsonl").write_text("{}\n")
    write_adapter(adapter, {**CONFIG, "r": 2}, {"x": (np.zeros(3, np.float32), "F32", (3,))})
    assert sorted(contents(adapter)) == [CONFIG_FILE, WEIGHTS, "log.jsonl"]
    assert list(read_adapter(adapter).tensors) == ["x"]


def test_a_failing_write_leaves_the_old_adapter(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(adapter)

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WriteError, match="cannot be written: input/output error"):
        write_adapter(adapter, {**CONFIG, "r": 2}, TENSORS)
    assert contents(adapter) == before
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_wrong_arrays_are_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x: expected 12 bytes for F32 \\[3\\], got 8"):
        write_adapter(tmp_path / "a", CONFIG, {"x": (np.zeros(2, np.float32), "F32", (3,))})
    with pytest.raises(ValueError, match="is not a tensor name"):
        write_adapter(tmp_path / "a", CONFIG, {"../x": (np.zeros(3, np.float32), "F32", (3,))})
    assert list(tmp_path.iterdir()) == []


Edit = Callable[[Path], Any]


def config(**changes: Any) -> Edit:
    return lambda path: (path / CONFIG_FILE).write_text(json.dumps({**CONFIG, **changes}))


def pickled(path: Path) -> None:
    (path / WEIGHTS).rename(path / "adapter_model.bin")


def cut(path: Path) -> None:
    os.truncate(path / WEIGHTS, (path / WEIGHTS).stat().st_size - 1)


def endless(path: Path) -> None:
    (path / CONFIG_FILE).unlink()
    (path / CONFIG_FILE).symlink_to("/dev/zero")


BAD: dict[str, tuple[Edit, str]] = {
    "config missing": (
        lambda path: (path / CONFIG_FILE).unlink(),
        "adapter_config.json: the file is missing; give",
    ),
    "config not JSON": (
        lambda path: (path / CONFIG_FILE).write_text("r: 4"),
        "adapter_config.json: not JSON",
    ),
    "config endless": (endless, "adapter_config.json: expected a regular file"),
    "not LoRA": (config(peft_type="VERA"), "peft_type, expected 'LORA', got 'VERA'"),
    "rank 0": (config(r=0), "r, expected an integer from 1 to 65536, got 0"),
    "rank 10^9": (config(r=10**9), "r, expected an integer from 1 to 65536, got 1000000000"),
    "rank a string": (config(r="4"), "r, expected an integer .* got '4'"),
    "rank true": (config(r=True), "r, expected an integer .* got True"),
    "alpha a string": (config(lora_alpha="8"), "lora_alpha, expected a number, got '8'"),
    "alpha missing": (config(lora_alpha=None), "lora_alpha, expected a number, got None"),
    "weights missing": (lambda path: (path / WEIGHTS).unlink(), "adapter_model.safetensors: no such file"),
    "weights pickled": (pickled, "expected adapter_model.safetensors, got adapter_model.bin; pickled"),
    "weights cut short": (cut, "adapter_model.safetensors: the file is cut short"),
    "weights empty": (
        lambda path: (path / WEIGHTS).write_bytes(b"\2\0\0\0\0\0\0\0{}"),
        "the adapter holds no tensors",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(adapter: Path, case: str) -> None:
    edit, pattern = BAD[case]
    edit(adapter)
    with pytest.raises(FormatError, match=pattern) as caught:
        read_adapter(adapter)
    assert str(caught.value).startswith(str(adapter))


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such adapter directory; check"):
        read_adapter(tmp_path / "nothing")
