"""Hugging Face directories: what opens, how it is read, and everything that must not."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from nf4format.checkpoint import EMBEDDED_FILES, Checkpoint
from nf4format.errors import FormatError

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ARRAYS = {
    "embed": np.arange(600, dtype=np.float32).reshape(20, 30),
    "layers.0.weight": np.arange(64, dtype=np.float16).reshape(8, 8),
    "layers.0.bias": np.arange(8, dtype=np.float16),
    "steps": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float32),
}
Edit = Callable[[Path], Any]


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    folder = tmp_path / "single"
    folder.mkdir()
    save_file(ARRAYS, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same tensors in two shards with an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = list(ARRAYS)
    parts = {SHARDS[0]: names[:2], SHARDS[1]: names[2:]}
    for shard, part in parts.items():
        save_file({name: ARRAYS[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


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


def index(**weights: Any) -> Edit:
    """Replace or (with None) remove entries of the weight_map."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        content["weight_map"] |= {name.replace("__", "."): shard for name, shard in weights.items()}
        content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v is not None}
        (folder / INDEX).write_text(json.dumps(content))

    return edit


def write(name: str, content: str | bytes) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return edit


def remove(*names: str) -> Edit:
    return lambda folder: [(folder / name).unlink() for name in names]


def only(*names: str) -> Edit:
    """Empty files of these names instead of any weights."""

    def edit(folder: Path) -> None:
        remove(INDEX, *SHARDS)(folder)
        for name in names:
            (folder / name).write_bytes(b"")

    return edit


def link_out(name: str) -> Edit:
    def edit(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return edit


def truncate(name: str, size: int) -> Edit:
    def edit(folder: Path) -> None:
        os.truncate(folder / name, (folder / name).stat().st_size - size)

    return edit


def header(name: str, change: Callable[[bytes], bytes]) -> Edit:
    """Rewrite the header text of a shard, keeping its data."""

    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        text = change(content[8 : 8 + length])
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return edit


def pipe(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return edit


def large(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, 1 << 40)  # sparse

    return edit


def both(folder: Path) -> None:
    save_file(ARRAYS, folder / "model.safetensors")


def twice(folder: Path) -> None:
    save_file({"steps": ARRAYS["steps"], "embed": ARRAYS["embed"]}, folder / SHARDS[1])


# id -> (edit of the sharded checkpoint, pattern; it must follow the directory's name)
BAD: dict[str, tuple[Edit, str]] = {
    "shard missing": (remove(SHARDS[1]), f"/{SHARDS[1]}: the file is missing; download"),
    "shard cut short": (
        truncate(SHARDS[0], 1),
        f"/{SHARDS[0]}: the file is cut short, expected .* got .*; download",
    ),
    "shard longer": (write(SHARDS[0], b""), f"/{SHARDS[0]}: too short for a header"),
    "shard is a git-lfs pointer": (
        write(SHARDS[0], "version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "shard is an HTML page": (write(SHARDS[0], "<!DOCTYPE html><html>"), f"{SHARDS[0]}: .*HTML page"),
    "shard is a pickle": (write(SHARDS[0], b"PK\x03\x04\0\0\0\0\0\0archive/data.pkl"), "PyTorch pickle"),
    "shard is a FIFO": (pipe(SHARDS[0]), "expected a regular file, got a FIFO"),
    "shard of zeros": (write(SHARDS[0], bytes(4096)), "never completed"),
    "unknown dtype": (
        header(SHARDS[0], lambda text: text.replace(b'"F16"', b'"F7"')),
        f"/{SHARDS[0]}: tensor 'layers.0.weight': unknown dtype 'F7', expected one of",
    ),
    "duplicate in a shard": (
        header(SHARDS[0], lambda text: text.rstrip()[:-1] + b',"embed":{}}'),
        f"/{SHARDS[0]}: in the header: key 'embed' appears twice",
    ),
    "index leads to a parent": (
        index(steps=f"../{SHARDS[1]}"),
        f"/{INDEX}: tensor 'steps': not the name of a shard",
    ),
    "index leads to a folder": (
        index(steps="sub/x.safetensors"),
        "not the name of a shard, .* got 'sub/x.safeten",
    ),
    "index absolute": (index(steps="/etc/passwd.safetensors"), "tensor 'steps': not the name of a shard"),
    "index with a backslash": (index(steps="..\\x.safetensors"), "not the name of a shard"),
    "index with a NUL": (index(steps="x\0.safetensors"), "not the name of a shard"),
    "index with a URL": (index(steps="https://host/x.safetensors"), "not the name of a shard"),
    "index of a pickle": (
        index(steps="pytorch_model.bin"),
        "ending in .safetensors, got 'pytorch_model.bin'",
    ),
    "index of a number": (index(steps=3), "not the name of a shard, .* got 3"),
    "index of too long a name": (index(steps="x" * 300 + ".safetensors"), "not the name of a shard"),
    "index with a bad tensor name": (
        index(**{"../x": SHARDS[0]}),
        f"/{INDEX}: tensor '../x': not a tensor name",
    ),
    "index lists what no shard has": (
        index(ghost=SHARDS[0]),
        f"/{SHARDS[0]}: tensor 'ghost': not in the shard",
    ),
    "index lists the other shard": (
        index(steps=SHARDS[0]),
        f"tensor 'steps': {INDEX} lists it in {SHARDS[0]}",
    ),
    "index lists less": (index(steps=None), f"/{SHARDS[1]}: tensor 'steps': {INDEX} does not list it"),
    "index lists one of two shards": (
        index(layers__0__bias=None, steps=None, empty=None),
        f"/{SHARDS[1]}: a shard that {INDEX} does not list; remove it",
    ),
    "tensor in two shards": (twice, f"/{SHARDS[1]}: tensor 'embed': it is also in {SHARDS[0]}"),
    "index and single file": (both, f": model.safetensors and {INDEX} are both there; remove"),
    "index not JSON": (write(INDEX, "{"), f"/{INDEX}: not JSON"),
    "index a list": (write(INDEX, "[]"), f"/{INDEX}: expected a JSON object, got list"),
    "index without weight_map": (
        write(INDEX, "{}"),
        f"/{INDEX}: weight_map, expected a non-empty object, got None",
    ),
    "index empty": (write(INDEX, '{"weight_map": {}}'), "weight_map, expected a non-empty object"),
    "index with a duplicate": (
        write(INDEX, f'{{"weight_map": {{"a": "{SHARDS[0]}", "\\u0061": "{SHARDS[1]}"}}}}'),
        f"/{INDEX}: key 'a' appears twice",
    ),
    "index of 250,000 entries": (
        write(INDEX, json.dumps({"weight_map": dict.fromkeys(map(str, range(250_000)), SHARDS[0])})),
        f"/{INDEX}: weight_map, expected at most 200000 tensors, got 250000",
    ),
    "index of 2000 shards": (
        write(INDEX, json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(2000)}})),
        "too many shards, expected at most 1000, got 2000",
    ),
    "index of 1 TB": (large(INDEX), f"/{INDEX}: the file is too large, expected at most"),
    "config missing": (remove("config.json"), "sharded: there is no config.json; give"),
    "config not JSON": (write("config.json", "{'a': 1}"), "/config.json: not JSON at character 1"),
    "config with NaN": (write("config.json", '{"rope_theta": NaN}'), "/config.json: NaN is not JSON"),
    "config with a huge number": (
        write("config.json", '{"x": 1e999}'),
        "/config.json: number 1e999 is out of",
    ),
    "config of long digits": (
        write("config.json", '{"x": ' + "9" * 10**6 + "}"),
        "/config.json: a number of 1000",
    ),
    "config with a duplicate": (
        write("config.json", '{"a": 1, "a": 2}'),
        "/config.json: key 'a' appears twice",
    ),
    "config nested deeply": (write("config.json", '{"a":' * 10_000 + "1" + "}" * 10_000), "deeper than 64"),
    "config a string": (write("config.json", '"llama"'), "/config.json: expected a JSON object, got str"),
    "config not UTF-8": (write("config.json", b'{"a": "\xff"}'), "/config.json: not UTF-8 at byte 7"),
    "config of 1 TB": (large("config.json"), "/config.json: the file is too large"),
    "config a FIFO": (pipe("config.json"), "/config.json: expected a regular file, got a FIFO"),
    "tokenizer of 1 TB": (
        large("tokenizer.json"),
        "/tokenizer.json: the file is too large, expected at most 268435456",
    ),
    "shard linked out": (
        link_out(SHARDS[0]),
        f"/{SHARDS[0]}: a symbolic link that leads out .* copy the file",
    ),
    "config linked out": (link_out("config.json"), "/config.json: a symbolic link that leads out"),
    "only pickles": (only("pytorch_model.bin"), "got pytorch_model.bin; pickled weights are never loaded"),
    "only .pth": (only("consolidated.00.pth"), "got consolidated.00.pth; pickled weights"),
    "shards without an index": (remove(INDEX), f"got {SHARDS[0]}; shards need their {INDEX}"),
    "an adapter": (only("adapter_config.json", "adapter_model.safetensors"), "a LoRA adapter; give the base"),
    "no weights": (only(), "there are no weights, expected model.safetensors or"),
}


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("case", BAD)
def test_refused(sharded: Path, case: str) -> None:
    edit, pattern = BAD[case]
    edit(sharded)
    started = time.perf_counter()
    open_before = open_descriptors()
    with pytest.raises(FormatError, match=pattern) as caught:
        Checkpoint.open(sharded)
    assert time.perf_counter() - started < 2
    assert open_descriptors() == open_before
    assert str(caught.value).startswith(str(sharded))
    assert "\n" not in str(caught.value)


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
