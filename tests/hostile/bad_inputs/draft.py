"""Small .nf4 files of random codes and valid constants, made without the codec; and taken apart again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nf4format.atomic import AtomicFile
from nf4format.codebook import NESTED_MAP, NF4_LEVELS
from nf4format.container import config_sha256, seal
from nf4format.dtypes import element_bytes
from nf4format.header import Header, TensorEntry, encode_header, header_json, read_header, tensor_bytes
from nf4format.layout import PAGE, QUANT_STATE, KeptSpec, Layout, PackedSpec, plan_layout, quant_state_json
from nf4format.sums import SUMS_NAME, compute_sums, sums_bytes

CONFIG = b'{"model_type": "llama", "hidden_size": 64}'
FILES = {"config.json": CONFIG, "tokenizer.json": b'{"model": {"type": "BPE"}}'}
PACKED = (
    PackedSpec("model.layers.0.q_proj.weight", (128, 96), "bfloat16"),
    PackedSpec("model.layers.0.ragged.weight", (7, 19), "float16"),  # odd count, short last block
    PackedSpec("model.layers.0.experts.weight", (2, 64, 192), "float32"),
)
KEPT = (
    KeptSpec("model.embed_tokens.weight", "BF16", (50, 64)),
    KeptSpec("model.norm.weight", "F32", (3,)),
    KeptSpec("steps", "I64", (3,)),
    KeptSpec("scalar", "F64", ()),
    KeptSpec("flags", "BOOL", (5,)),
)
RawTensor = tuple[str, list[int], bytes]
ALIASES = {"lm_head.weight": "model.embed_tokens.weight"}


def pack(
    path: Path,
    *,
    packed: Sequence[PackedSpec] = PACKED,
    kept: Sequence[KeptSpec] = KEPT,
    files: Mapping[str, bytes] = FILES,
    aliases: Mapping[str, str] = ALIASES,
    overrides: Mapping[str, bytes] | None = None,
    seed: int = 0,
) -> Path:
    """Write a small .nf4 file of random content. `overrides`: tensor name -> other bytes than valid ones."""
    metadata = {
        "nf4.aliases": json.dumps(dict(aliases)),
        "nf4.config_sha256": config_sha256(files["config.json"]),
        "nf4.options": "{}",
        "nf4.producer": "tests",
        "nf4.source_sha256": "0" * 64,
    }
    layout = plan_layout(packed, kept, {key: len(data) for key, data in files.items()}, metadata)
    content = random_content(layout, files, seed) | dict(overrides or {})
    with AtomicFile(path) as file:
        file.preallocate(layout.file_bytes)
        for tensor, data in content.items():
            file.pwrite(data, layout.entries[tensor].begin)
        seal(file, layout, {"nf4.source_sha256": "ab" * 32}, threads=2)
    return path


def random_content(layout: Layout, files: Mapping[str, bytes], seed: int) -> dict[str, bytes]:
    """Bytes of every tensor of a layout but pads and sums."""
    rng = np.random.default_rng(seed)
    content: dict[str, bytes] = {}
    for spec in layout.packed:
        sized = {suffix: layout.entries[spec.name + suffix] for suffix in ("", ".absmax")}
        for suffix, entry in sized.items():
            content[spec.name + suffix] = rng.bytes(entry.end - entry.begin)
        count = layout.entries[spec.name + ".nested_absmax"].shape[0]
        content[spec.name + ".nested_absmax"] = rng.random(count, np.float32).tobytes()
        content[spec.name + ".quant_map"] = NF4_LEVELS.tobytes()
        content[spec.name + ".nested_quant_map"] = NESTED_MAP.tobytes()
        state = layout.entries[spec.name + QUANT_STATE]
        offset = float(np.float32(rng.random()))
        content[state.name] = quant_state_json(spec, offset, state.end - state.begin)
    for kept in layout.kept:
        content[kept.name] = rng.bytes(tensor_bytes(kept.dtype, kept.shape))
        if kept.dtype == "BOOL":
            content[kept.name] = bytes(value & 1 for value in content[kept.name])
    for name, data in files.items():
        content[f"__file__/{name}"] = data
    return content


class Draft:
    """A .nf4 file taken apart: change it, then write it with fresh offsets and sums.

    Attributes:
        tensors: name -> (dtype, shape, bytes), in file order.
        metadata: as in the file.
        page: what the data region is aligned to.
        fresh_sums: replace the table of sums when writing.
    """

    def __init__(self, path: Path, weight: str) -> None:
        content = path.read_bytes()
        header = read_header(path, strict=True)
        self.metadata = dict(header.metadata)
        self.tensors: dict[str, RawTensor] = {
            name: (entry.dtype, list(entry.shape), content[entry.begin : entry.end])
            for name, entry in header.entries.items()
        }
        self.page = PAGE
        self._weight = weight
        self.fresh_sums = True

    def state(self, **changes: object) -> None:
        """Change fields of the weight's quant_state; a field set to ... is removed."""
        self.state_of(self._weight, **changes)

    def state_of(self, weight: str, **changes: object) -> None:
        """As `state`, of any weight."""
        name = weight + QUANT_STATE
        fields = json.loads(self.tensors[name][2]) | changes
        text = json.dumps({key: value for key, value in fields.items() if value is not ...}).encode()
        self.tensors[name] = ("U8", [len(text)], text)

    def state_text(self, text: bytes) -> None:
        self.tensors[self._weight + QUANT_STATE] = ("U8", [len(text)], text)

    def move(self, name: str, before: str) -> None:
        tensor = self.tensors.pop(name)
        items = list(self.tensors.items())
        at = list(self.tensors).index(before)
        self.tensors = dict([*items[:at], (name, tensor), *items[at:]])

    def rename(self, old: str, new: str) -> None:
        self.tensors = {new if name == old else name: tensor for name, tensor in self.tensors.items()}

    def write(self, path: Path) -> None:
        self.tensors = _with_pads(self.tensors)
        if self.fresh_sums and SUMS_NAME in self.tensors:
            covered = sum(len(data) for name, (_, _, data) in self.tensors.items() if name != SUMS_NAME)
            size = sums_bytes(covered, sum(name.startswith("__file__/") for name in self.tensors))
            self.tensors[SUMS_NAME] = ("U8", [size], bytes(size))
        planned, position = [], 0
        for name, (dtype, shape, data) in self.tensors.items():
            planned.append(TensorEntry(name, dtype, tuple(shape), position, position + len(data)))
            position += len(data)
        start = -(-(8 + len(header_json(self.metadata, planned, 0))) // self.page) * self.page
        entries = {e.name: replace(e, begin=e.begin + start, end=e.end + start) for e in planned}
        header = encode_header(self.metadata, entries.values(), start)
        path.write_bytes(header + b"".join(data for _, _, data in self.tensors.values()))
        if self.fresh_sums and list(self.tensors)[-1] == SUMS_NAME:
            with path.open("r+b") as file:
                table = compute_sums(file.fileno(), Header(entries, self.metadata, start, start + position))
                file.seek(entries[SUMS_NAME].begin)
                file.write(table)


def _with_pads(tensors: dict[str, RawTensor]) -> dict[str, RawTensor]:
    """Pads wherever a changed size would leave what follows misaligned."""
    padded: dict[str, RawTensor] = {}
    position = 0
    for name, tensor in tensors.items():
        gap = -position % element_bytes(tensor[0])
        if gap:
            padded[f"__pad__.9{len(padded)}"] = ("U8", [gap], bytes(gap))
        padded[name] = tensor
        position += gap + len(tensor[2])
    return padded
