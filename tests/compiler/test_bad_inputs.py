"""Bad input: one line with the remedy, status 1, the output as it was, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nf4format.encode import ENCODERS, Constants, encode_search
from nf4format.errors import Nf4Error
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

Write = Callable[..., Path]
Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture
def model(write_checkpoint: Write) -> Path:
    """Two shards: q_proj in the first, k_proj and the norm in the second."""
    torch.manual_seed(0)
    tensors = {Q: torch.randn(256, 128), K: torch.randn(128, 128), "model.norm.weight": torch.ones(128)}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    return write_checkpoint(tensors, shards=2)


@pytest.fixture
def refused(model: Path, tmp_path: Path) -> Callable[..., str]:
    """Compile the model, expect an error; returns the message. An output that existed must be untouched."""

    def compile_refused(**options: object) -> str:
        out = tmp_path / "out.nf4"
        for existing in (False, True):
            if existing:
                out.write_bytes(b"precious")
            with pytest.raises(Nf4Error) as caught:
                compile_checkpoint(model, out, CompileOptions(force=existing, **options))  # type: ignore[arg-type]
            assert "\n" not in str(caught.value)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.nf4"][: 1 + existing]
        assert out.read_bytes() == b"precious"
        return str(caught.value)

    return compile_refused


def _patch_bytes(model: Path, name: str, element: int, bits: int) -> None:
    """Overwrite one bfloat16 value of a tensor in its shard."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = model / index["weight_map"][name]
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + length])[name]["data_offsets"][0] + 8 + length + 2 * element
    data[begin : begin + 2] = np.uint16(bits).tobytes()
    shard.write_bytes(data)


def test_missing_shard(model: Path, refused: Callable[..., str]) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: the file is missing; download" in refused()


def test_truncated_shard(model: Path, refused: Callable[..., str]) -> None:
    shard = model / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "cut short" in refused()


def test_shard_that_is_something_else(model: Path, refused: Callable[..., str]) -> None:
    (model / "model-00001-of-00002.safetensors").write_bytes(b"<!DOCTYPE html><html>not found</html>")
    assert "HTML page" in refused()


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_pointing_outside(model: Path, refused: Callable[..., str], target: str) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q] = target
    path.write_text(json.dumps(index))
    assert "names may not lead out of its directory" in refused()


def test_unknown_dtype(model: Path, refused: Callable[..., str]) -> None:
    shard = model / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"BF16"', b'"XY16"'))
    message = refused()
    assert "XY16" in message
    assert "BF16" in message


@pytest.mark.parametrize(
    ("name", "bits", "shown"), [(Q, 0x7FC0, "nan"), (Q, 0xFF80, "-inf"), (Q, 0x7F80, "inf")]
)
def test_nan_and_infinity_in_a_packed_weight(
    model: Path, refused: Callable[..., str], name: str, bits: int, shown: str
) -> None:
    _patch_bytes(model, name, 128 * 255 + 7, bits)
    assert f"tensor '{name}': expected finite values, got {shown} at index [255, 7]" in refused()


def test_nan_in_a_kept_tensor_is_refused_and_infinity_is_not(
    model: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    _patch_bytes(model, "model.norm.weight", 5, 0x7F80)
    compile_checkpoint(model, tmp_path / "infinity.nf4")
    (tmp_path / "infinity.nf4").unlink()
    _patch_bytes(model, "model.norm.weight", 5, 0x7FC1)
    assert "tensor 'model.norm.weight': expected no NaN, got nan at index [5]" in refused()


def test_nan_beyond_the_first_chunk(write_checkpoint: Write, tmp_path: Path) -> None:
    weight = torch.ones(1024, 1024)
    weight[1000, 3] = torch.nan
    folder = write_checkpoint({Q: weight}, name="large")
    with pytest.raises(Nf4Error, match=r"nan at index \[1000, 3\]"):
        compile_checkpoint(folder, tmp_path / "out.nf4")


def test_already_quantized(model: Path, refused: Callable[..., str]) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (model / "config.json").write_text(json.dumps(config))
    assert "already quantized" in refused()


def test_output_of_this_compiler_as_input(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()
    compile_checkpoint(model, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    with pytest.raises(Nf4Error, match="already quantized"):
        compile_checkpoint(folder, tmp_path / "out.nf4")


def test_pattern_that_matches_nothing(refused: Callable[..., str]) -> None:
    assert "--exclude q_proj matches no tensor" in refused(exclude=("q_proj",))


def test_reserved_tensor_name(write_checkpoint: Write, tmp_path: Path) -> None:
    folder = write_checkpoint({"__file__/config.json": torch.ones(3)}, name="reserved")
    with pytest.raises(Nf4Error, match=r"'__file__/config.json': the name is reserved"):
        compile_checkpoint(folder, tmp_path / "out.nf4")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_full_disk(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    assert "space" in refused()


def test_file_size_limit(model: Path, tmp_path: Path) -> None:
    """A real limit of the kernel, in another process."""
    out = tmp_path / "out.nf4"
    result = subprocess.run(
        [sys.executable, "-m", "qcompile", str(model), str(out)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith(f"qcompile: {out}: ")
    assert "ulimit -f" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [model]


def test_missing_directory(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Nf4Error, match=r"there is no directory .*nowhere; create it"):
        compile_checkpoint(model, tmp_path / "nowhere" / "out.nf4")


def test_existing_output_without_force(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.nf4"
    out.write_bytes(b"precious")
    with pytest.raises(Nf4Error, match=r"exists already; .*--force"):
        compile_checkpoint(model, out)
    assert out.read_bytes() == b"precious"
    compile_checkpoint(model, out, CompileOptions(force=True))
    assert out.read_bytes() != b"precious"


def test_output_is_a_directory(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Nf4Error, match="is a directory"):
        compile_checkpoint(model, tmp_path, CompileOptions(force=True))


def test_output_may_lie_inside_the_model_but_never_replace_a_part_of_it(model: Path, tmp_path: Path) -> None:
    compile_checkpoint(model, model / "out.nf4")
    before = {path.name: path.read_bytes() for path in model.iterdir() if path.name != "out.nf4"}
    link = tmp_path / "link.nf4"
    link.symlink_to(model / "model-00001-of-00002.safetensors")
    for out in (model / "model-00001-of-00002.safetensors", model / "config.json", link):
        with pytest.raises(Nf4Error, match="a file of the checkpoint itself"):
            compile_checkpoint(model, out, CompileOptions(force=True))
    assert {path.name: path.read_bytes() for path in model.iterdir() if path.name != "out.nf4"} == before


def test_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Nf4Error, match="no such directory"):
        compile_checkpoint(tmp_path / "nothing", tmp_path / "out.nf4")


def test_checkpoint_written_to_while_it_is_compiled(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_and_touch(*arguments: object, **options: object) -> Constants:
        os.utime(model / "model-00001-of-00002.safetensors", (1, 1))
        return encode_search(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setitem(ENCODERS, 1, encode_and_touch)
    with pytest.raises(Nf4Error, match="changed while it was read"):
        compile_checkpoint(model, tmp_path / "out.nf4")
    assert list(tmp_path.iterdir()) == [model]
