"""Hugging Face directories: what opens, how it is read, and everything that must not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_inputs.directories import ARRAYS, BAD, SHARDS, write_sharded, write_single
from safetensors import safe_open

from nf4format.checkpoint import EMBEDDED_FILES, Checkpoint
from nf4format.errors import FormatError


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    write_single(tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same tensors in two shards with an index."""
    write_sharded(tmp_path / "sharded")
    return tmp_path / "sharded"


def test_contents(single: Path, sharded: Path) -> None:
    (single / "README.md").write_text("not embedded")
    with Checkpoint.open(single) as one, Checkpoint.open(sharded) as two:
        assert one.config == two.config == {"model_type": "llama"}
        assert one.files == {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}
        assert one.shards == ("model.safetensors",)
        assert two.shards == SHARDS
        assert one.quantization_config is None
        for checkpoint in (one, two):
            assert set(checkpoint.tensors) == set(ARRAYS)
            for name, array in ARRAYS.items():
                tensor = checkpoint.tensors[name]
                assert tensor.shape == array.shape
                assert tensor.num_bytes == array.nbytes
                buffer = bytearray(array.nbytes + 5)
                assert checkpoint.read_into(name, buffer) == array.nbytes
                assert buffer[: array.nbytes] == array.tobytes()
            checkpoint.check_unchanged()


def test_byte_ranges(single: Path) -> None:
    data = ARRAYS["embed"].tobytes()
    with Checkpoint.open(single) as checkpoint:
        buffer = np.zeros(100, np.uint8)
        assert checkpoint.read_into("embed", buffer, 33) == 100
        assert buffer.tobytes() == data[33:133]
        assert checkpoint.read_into("embed", buffer, len(data) - 7) == 7
        assert checkpoint.read_into("embed", buffer, len(data)) == 0
        assert checkpoint.read_into("embed", buffer, len(data) + 99) == 0
        with pytest.raises(KeyError):
            checkpoint.read_into("nothing", buffer)


def test_quantized_already(single: Path) -> None:
    (single / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with Checkpoint.open(single) as checkpoint:
        assert checkpoint.quantization_config == {"quant_method": "gptq"}


def test_real_models(shared: Path) -> None:
    for model in ("wiki-llama-16m", "stories260K"):
        folder = shared / "models" / model
        with Checkpoint.open(folder) as checkpoint:
            assert set(checkpoint.files) == set(EMBEDDED_FILES) & {file.name for file in folder.iterdir()}
            for shard in checkpoint.shards:
                with safe_open(folder / shard, "pt") as other:
                    for name in other.keys():  # noqa: SIM118 - not a dict
                        tensor = checkpoint.tensors[name]
                        theirs = other.get_slice(name)
                        assert (tensor.dtype, list(tensor.shape)) == (theirs.get_dtype(), theirs.get_shape())


def cache_layout(source: Path, root: Path, blobs: Path) -> Path:
    """The directory as the Hugging Face cache keeps it: links in snapshots/<revision> to blobs/."""
    snapshot = root / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for file in source.iterdir():
        blob = blobs / f"blob-{file.name}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_cache_links_stay_in_their_repository(single: Path, sharded: Path, tmp_path: Path) -> None:
    mine = tmp_path / "models--a--b"
    with Checkpoint.open(cache_layout(sharded, mine, mine / "blobs")) as checkpoint:
        assert set(checkpoint.tensors) == set(ARRAYS)
    elsewhere = cache_layout(single, tmp_path / "models--c--d", tmp_path / "models--e--f" / "blobs")
    with pytest.raises(FormatError, match="a symbolic link that leads out of the directory"):
        Checkpoint.open(elsewhere)


def test_links_inside_the_directory(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights")
    (single / "model.safetensors").symlink_to("weights")
    with Checkpoint.open(single) as checkpoint:
        assert set(checkpoint.tensors) == set(ARRAYS)


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("case", BAD)
def test_refused_without_a_leak(sharded: Path, case: str) -> None:
    edit, pattern = BAD[case]
    edit(sharded)
    open_before = open_descriptors()
    with pytest.raises(FormatError, match=pattern) as caught:
        Checkpoint.open(sharded)
    assert open_descriptors() == open_before
    assert str(caught.value).startswith(str(sharded))


def test_not_a_directory(single: Path, tmp_path: Path) -> None:
    for path, message in {
        tmp_path / "missing": "no such directory",
        single / "model.safetensors": "expected a checkpoint directory, got a file",
        Path("a\0b"): "cannot be opened|no such directory",
    }.items():
        with pytest.raises(FormatError, match=message):
            Checkpoint.open(path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


@pytest.mark.parametrize("change", [append, replace, Path.unlink, Path.touch])
def test_changed_while_open(single: Path, change: Callable[[Path], None]) -> None:
    with Checkpoint.open(single) as checkpoint:
        checkpoint.check_unchanged()
        change(single / "model.safetensors")
        with pytest.raises(FormatError, match=r"model\.safetensors: the file changed while it was read"):
            checkpoint.check_unchanged()


def test_truncated_while_open(single: Path) -> None:
    with Checkpoint.open(single) as checkpoint:
        os.truncate(single / "model.safetensors", 500)
        with pytest.raises(FormatError, match=r"tensor 'embed': .*changed while it was read: it ends before"):
            checkpoint.read_into("embed", bytearray(2400))
