"""Cases of checkpoint directories and of the compiler's output."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from . import directories
from .cases import COMPILE, DRY_RUN, Case
from .directories import INDEX, SHARDS, write_sharded
from .headers import text
from .kit import CONFIG, Q, tokenizer, weights, write_checkpoint

OUT = frozenset({"out.nf4"})
_ROWS = {
    "shard missing": "index and shards",
    "shard linked out": "links",
    "config linked out": "links",
    "index and single file": "index and shards",
    "tokenizer of 1 TB": "oversized files",
    "only pickles": "other weights",
    "only .pth": "other weights",
    "shards without an index": "other weights",
    "an adapter": "other weights",
    "no weights": "other weights",
    "tensor in two shards": "index and shards",
}
_ENTRY_CASES = "index leads, index absolute, index with, index of a, index of too"


def cases() -> Iterator[Case]:
    yield from _directories()
    yield from _more_directories()
    yield from _configs()
    yield from _tensors()
    yield from _outputs()


def _row(name: str) -> str:
    if name in _ROWS:
        return _ROWS[name]
    if name.startswith(("index lists",)):
        return "index and shards"
    if name == "index with a duplicate":
        return "index content"
    if name.startswith(tuple(_ENTRY_CASES.split(", "))):
        return "index entries"
    return {"index": "index content", "shard": "shards", "unknown": "shards", "duplicate": "shards"}.get(
        name.split(" ", maxsplit=1)[0], "config.json"
    )


def _directories() -> Iterator[Case]:
    def prepare(edit: directories.Edit, folder: Path) -> None:
        write_sharded(folder / "sharded")
        edit(folder / "sharded")

    command = ("qcompile", "sharded", "out.nf4")
    for name, (edit, says) in directories.BAD.items():
        yield Case(_row(name), name, partial(prepare, edit), (command, (*command, "--dry-run")), says)
    more: list[tuple[str, str, directories.Edit, str | None]] = [
        (
            "index entries",
            "of two cases",
            directories.index(steps=SHARDS[1].upper()),
            "not the name of a shard",
        ),
        (
            "index entries",
            "of an escape sequence",
            directories.index(steps="\x1b[2J.safetensors"),
            "not the name",
        ),
        ("index entries", "right to left", directories.index(steps="\u202e.safetensors"), "lists it in"),
        ("index entries", "of a list", directories.index(steps=[SHARDS[0]]), "not the name of a shard"),
        ("index metadata", "total_size of -1", _total_size(-1), None),
        ("index metadata", "total_size of 10^30", _total_size(10**30), None),
        ("index metadata", "metadata null", _total_size(None), None),
        ("links", "link inside", _link_inside, None),
        ("links", "hard link to a file outside", _hard_link, None),
        (
            "oversized files",
            "tokenizer of 500 MB",
            _sparse("tokenizer.json", 500 << 20),
            "the file is too large",
        ),
        (
            "oversized files",
            "template of 5 MB",
            _sparse("chat_template.jinja", 5 << 20),
            "the file is too large",
        ),
    ]
    for row, name, edit, says in more:
        writes = OUT if says is None else frozenset()
        yield Case(row, name, partial(prepare, edit), (command,), says, writes=writes)


def _total_size(value: Any) -> directories.Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        content["metadata"] = {"total_size": value} if value is not None else None
        (folder / INDEX).write_text(json.dumps(content))

    return edit


def _link_inside(folder: Path) -> None:
    (folder / SHARDS[0]).rename(folder / "first")
    (folder / SHARDS[0]).symlink_to("first")


def _hard_link(folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / SHARDS[0]).rename(outside)
    os.link(outside, folder / SHARDS[0])


def _sparse(name: str, size: int) -> directories.Edit:
    def edit(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return edit


def _more_directories() -> Iterator[Case]:
    for name, prepare, says in [
        ("no such directory", lambda folder: None, "no such directory; check the path"),
        (
            "a file",
            lambda folder: (folder / "model").write_text("x"),
            "expected a checkpoint directory, got a file",
        ),
        ("an empty directory", lambda folder: (folder / "model").mkdir(), "there are no weights"),
    ]:
        yield Case("other weights", name, prepare, (COMPILE, DRY_RUN), says)


def _model(config: dict[str, Any] | bytes, files: dict[str, bytes], folder: Path) -> None:
    write_checkpoint(folder / "model", weights(), config)
    for name, data in files.items():
        (folder / "model" / name).write_bytes(data)


def _configs() -> Iterator[Case]:
    """What the compiler takes from config.json, and what it must not."""
    for name, config, says in [
        ("GPTQ", {"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
        (
            "in a nested part",
            {"text_config": {"quantization_config": {"quant_method": "awq"}}},
            "already quantized",
        ),
        ("not an object", {"quantization_config": "gptq"}, "already quantized"),
        ("a method of 1 MB", {"quantization_config": {"quant_method": "\x1b" * 10**6}}, "already quantized"),
        ("compression_config", {"compression_config": {"format": "int4"}}, "already quantized"),
    ]:
        yield Case("quantized already", name, partial(_model, config, {}), (COMPILE, DRY_RUN), says)
    remote = {
        "auto_map": {"AutoModel": "evil.Model"},
        "trust_remote_code": True,
        "custom_pipelines": {"x": "evil.py"},
    }
    evil = {"evil.py": b"raise SystemExit(7)"}
    prepare = partial(_model, {**CONFIG, **remote}, evil)
    yield Case("remote code", "auto_map", prepare, (COMPILE, ("nf4", "inspect", "out.nf4")), None, writes=OUT)
    for name, changes in {
        "layers 10^9": {"num_hidden_layers": 10**9},
        "layers of text": {"num_hidden_layers": "32"},
        "vocabulary -1": {"vocab_size": -1},
        "hidden 1e9": {"hidden_size": 1e9},
        "experts of text": {"num_experts": "many", "num_local_experts": [8]},
        "experts 10^30": {"num_experts": 10**30},
        "model_type a list": {"model_type": ["llama"]},
        "torch_dtype odd": {"torch_dtype": {"x": 1}},
        "Infinity": {"time_step_limit": [0.0, float("inf")]},
    }.items():
        row = "configuration, compiled"
        yield Case(row, name, partial(_model, {**CONFIG, **changes}, {}), (COMPILE,), None, writes=OUT)
    for name, data in {
        "not JSON": b"{",
        "ids above the vocabulary": tokenizer({f"w{i}": i + 10**6 for i in range(40)}),
        "nested deeply": b"[" * 10**5,
        "not UTF-8": b"\xff\xfe",
    }.items():
        prepare = partial(
            _model, CONFIG, {"tokenizer.json": data, "chat_template.jinja": b"{% for x in range(9**9) %}"}
        )
        yield Case("tokenizer, compiled", name, prepare, (COMPILE,), None, writes=OUT)


def _tensors() -> Iterator[Case]:
    def changed(changes: dict[str, np.ndarray], folder: Path, config: dict[str, Any] = CONFIG) -> None:
        write_checkpoint(folder / "model", {**weights(), **changes}, config)

    def with_value(value: float, index: tuple[int, ...], name: str = Q) -> dict[str, np.ndarray]:
        weight = weights()[name].copy()
        weight[index] = value
        return {name: weight}

    norm = "model.norm.weight"
    for case, changes, says in [
        (
            "NaN",
            with_value(np.nan, (63, 7)),
            rf"tensor '{Q}': expected finite values, got nan at index \[63, 7\]",
        ),
        ("infinity", with_value(np.inf, (0, 0)), r"expected finite values, got inf at index \[0, 0\]"),
        ("minus infinity", with_value(-np.inf, (5, 5)), "got -inf"),
        (
            "NaN in a kept tensor",
            with_value(np.nan, (9,), norm),
            rf"'{norm}': expected no NaN, got nan at index \[9\]",
        ),
    ]:
        yield Case("values", case, partial(changed, changes), (COMPILE,), says)
    square = np.zeros((64, 64), np.float32)
    tiny = np.full((64, 64), 1e-40, np.float32)
    for case, changes in {
        "infinity in a kept tensor": with_value(np.inf, (9,), norm),
        "all zero": {Q: square.astype(np.float16)},
        "minus zero": {Q: -square.astype(np.float16)},
        "denormals": {Q: tiny},
        "largest finite": {Q: np.full((64, 64), 3.4e38, np.float32)},
        "a partial block": {"model.layers.0.x.weight": np.ones((63, 65), np.float32)},
        "rows not of whole blocks": {"model.layers.0.x.weight": np.ones((300, 7), np.float32)},
        "empty": {"model.layers.0.x.weight": np.zeros((0, 64), np.float32)},
        "rank 0, 1 and 3": {
            "a": np.float32([3.0]).reshape(()),
            "b.weight": np.ones(500, np.float32),
            "c.weight": np.ones((30, 30, 30), np.float32),
        },
        "experts of nothing": {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((4, 0, 64), np.float32)},
        "F64, I8 and BOOL": {
            "x.weight": np.ones((64, 64)),
            "y.weight": np.ones((64, 64), np.int8),
            "z.weight": np.ones((64, 64), bool),
        },
    }.items():
        yield Case("odd values", case, partial(changed, changes), ((*COMPILE, "--verify"),), None, writes=OUT)

    def eight_bit(folder: Path) -> None:
        write_checkpoint(folder / "model", weights())
        header = {"x.weight": {"dtype": "F8_E4M3", "shape": [64, 64], "data_offsets": [0, 4096]}}
        body = text(header)
        content = len(body).to_bytes(8, "little") + body + bytes(4096)
        (folder / "model" / "model.safetensors").write_bytes(content)

    says = "tensor 'x.weight': cannot quantize this dtype, expected F32, BF16 or F16, got F8_E4M3"
    yield Case("unpackable dtypes", "F8", eight_bit, (COMPILE, DRY_RUN), says)
    for name in ("__file__/config.json", "__nf4__.sums", "__pad__.0"):
        prepare = partial(changed, {name: np.ones(3, np.float32)})
        yield Case("reserved names", name, prepare, (COMPILE, DRY_RUN), f"'{name}': the name is reserved")
    for suffix in (".quant_state.bitsandbytes__nf4", ".qweight"):
        prepare = partial(changed, {f"x{suffix}": np.ones(3, np.uint8)})
        yield Case("quantized already", f"tensor {suffix}", prepare, (COMPILE, DRY_RUN), "already quantized")
    tied = {**CONFIG, "tie_word_embeddings": True}
    says = "config.json says tie_word_embeddings, and the weights differ"
    yield Case(
        "tied weights", "a head that differs", partial(changed, {}, config=tied), (COMPILE, DRY_RUN), says
    )


def _outputs() -> Iterator[Case]:
    def model_and(more: Callable[[Path], object], folder: Path) -> None:
        _model(CONFIG, {}, folder)
        more(folder)

    def nothing(folder: Path) -> None:
        pass

    def to(out: str, *options: str) -> tuple[str, ...]:
        return ("qcompile", "model", out, *options)

    shard = "model/model.safetensors"
    for row, name, more, command, says in [
        (
            "output place",
            "a directory",
            lambda f: (f / "out.nf4").mkdir(),
            to("out.nf4", "--force"),
            "is a directory",
        ),
        (
            "output place",
            "a missing directory",
            nothing,
            to("nowhere/out.nf4"),
            "there is no directory .*; create",
        ),
        ("output place", "below a file", nothing, to("model/config.json/out.nf4"), "not a directory"),
        (
            "output place",
            "a device",
            lambda f: (f / "out.nf4").symlink_to("/dev/full"),
            to("out.nf4", "--force"),
            "device",
        ),
        (
            "output place",
            "a FIFO",
            lambda f: os.mkfifo(f / "out.nf4"),
            to("out.nf4", "--force"),
            "device, pipe",
        ),
        ("output place", "a too long name", nothing, to("x" * 300), "name.*(too long|longer)"),
        (
            "output exists",
            "a file",
            lambda f: (f / "out.nf4").write_text("precious"),
            to("out.nf4"),
            "exists already",
        ),
        (
            "output exists",
            "a broken link",
            lambda f: (f / "out.nf4").symlink_to("none"),
            to("out.nf4"),
            "exists already",
        ),
        ("output exists", "the input", nothing, to(shard, "--force"), "is a file of the checkpoint itself"),
        (
            "output exists",
            "the input, linked",
            lambda f: (f / "out.nf4").symlink_to(shard),
            to("out.nf4", "--force"),
            "itself",
        ),
        (
            "output exists",
            "the input, hard-linked",
            lambda f: os.link(f / shard, f / "out.nf4"),
            to("out.nf4", "--force"),
            "itself",
        ),
        ("output exists", "config.json", nothing, to("model/config.json", "--force"), "itself"),
    ]:
        yield Case(row, name, partial(model_and, more), (command,), says)
    yield Case(
        "output place",
        "no permission",
        partial(model_and, lambda f: (f / "closed").mkdir(mode=0o500)),
        (to("closed/out.nf4"),),
        "permission denied; choose a place",
        not_root=True,
    )
    yield from _against()


def _against() -> Iterator[Case]:
    def prepare(edit: Callable[[Path], object], folder: Path) -> None:
        from .kit import write_good

        _model(CONFIG, {}, folder)
        write_good(folder / "model.nf4")
        edit(folder / "model")

    def save(tensors: dict[str, np.ndarray]) -> Callable[[Path], object]:
        return lambda model: save_file(tensors, model / "model.safetensors", {"format": "pt"})

    other = weights()
    other[Q] = other[Q] + np.float16(0.01)
    fewer = {name: tensor for name, tensor in weights().items() if name != Q}
    renamed = {("x" if name == Q else name): tensor for name, tensor in weights().items()}
    norm = weights()
    norm["model.norm.weight"] = norm["model.norm.weight"] + np.float16(1)
    command = ("nf4", "verify", "model.nf4", "--against", "model")
    for name, edit, says in [
        ("another weight", save(other), f"'{Q}'"),
        ("another kept tensor", save(norm), "'model.norm.weight'"),
        ("a tensor less", save(fewer), f"'{Q}'"),
        ("a tensor of another name", save(renamed), f"'{Q}'|'x'"),
        ("another tokenizer", lambda model: (model / "tokenizer.json").write_bytes(b"{}"), "tokenizer.json"),
        ("another config", lambda model: (model / "config.json").write_bytes(b"{}"), "config.json"),
        ("a damaged checkpoint", lambda model: os.truncate(model / "model.safetensors", 900), "cut short"),
        ("no checkpoint", lambda model: (model / "model.safetensors").unlink(), "no weights"),
    ]:
        yield Case("verify against", name, partial(prepare, edit), (command,), says)
    yield Case(
        "verify against",
        "its own",
        partial(prepare, lambda model: None),
        (command, (*command, "--deep")),
        None,
    )
