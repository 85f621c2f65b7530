"""Checkpoint directories that must not compile: index, shards, config.json, links, sizes, pickles."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

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


def write_single(folder: Path) -> None:
    """A checkpoint of one file."""
    folder.mkdir()
    save_file(ARRAYS, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")


def write_sharded(folder: Path) -> None:
    """The same tensors in two shards with an index."""
    folder.mkdir()
    names = list(ARRAYS)
    parts = {SHARDS[0]: names[:2], SHARDS[1]: names[2:]}
    for shard, part in parts.items():
        save_file({name: ARRAYS[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')


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
        f"/{INDEX}: too many keys, expected at most 200000 tensors, got 250001",
    ),
    "index of 200,500 entries": (
        write(INDEX, json.dumps({"weight_map": dict.fromkeys(map(str, range(200_500)), SHARDS[0])})),
        f"/{INDEX}: weight_map, expected at most 200000 tensors, got 200500",
    ),
    "index of 10^6 entries": (
        write(INDEX, '{"weight_map":{' + ",".join(f'"{i}":"a.safetensors"' for i in range(10**6)) + "}}"),
        f"/{INDEX}: too many keys, expected at most 200000 tensors, got 1000001",
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
    "config of 5 million lists": (
        write("config.json", b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"),
        "/config.json: more than 500000 commas, colons and brackets",
    ),
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
