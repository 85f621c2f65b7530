"""Small .nf4 files and tensor files made on the spot, without the codec: random codes, valid constants."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nf4format.atomic import AtomicFile
from nf4format.codebook import NESTED_MAP, NF4_LEVELS
from nf4format.container import config_sha256, seal
from nf4format.header import tensor_bytes
from nf4format.layout import QUANT_STATE, KeptSpec, Layout, PackedSpec, plan_layout, quant_state_json

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
ALIASES = {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small .nf4 file of random content and returns its path."""

    def build(
        name: str = "model.nf4",
        *,
        packed: Sequence[PackedSpec] = PACKED,
        kept: Sequence[KeptSpec] = KEPT,
        files: Mapping[str, bytes] = FILES,
        aliases: Mapping[str, str] = ALIASES,
        overrides: Mapping[str, bytes] | None = None,
        seed: int = 0,
    ) -> Path:
        """`overrides`: tensor name -> the bytes to store instead of valid ones."""
        metadata = {
            "nf4.aliases": json.dumps(dict(aliases)),
            "nf4.config_sha256": config_sha256(files["config.json"]),
            "nf4.options": "{}",
            "nf4.producer": "tests",
            "nf4.source_sha256": "0" * 64,
        }
        layout = plan_layout(packed, kept, {key: len(data) for key, data in files.items()}, metadata)
        content = random_content(layout, files, seed) | dict(overrides or {})
        path = tmp_path / name
        with AtomicFile(path) as file:
            file.preallocate(layout.file_bytes)
            for tensor, data in content.items():
                file.pwrite(data, layout.entries[tensor].begin)
            seal(file, layout, {"nf4.source_sha256": "ab" * 32}, threads=2)
        return path

    return build


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


@pytest.fixture
def tensor_file(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a safetensors file from raw pieces: a header (object or text) and data."""

    def build(header: Any, data: bytes = b"", name: str = "model.safetensors", length: int = -1) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(struct.pack("<Q", len(text) if length < 0 else length) + text + data)
        return path

    return build
