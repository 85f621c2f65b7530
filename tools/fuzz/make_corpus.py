"""Writes the corpus that fuzzing starts from: small good files, and odd ones that reach rare branches.

usage: python tools/fuzz/make_corpus.py     (only when the format changes; the same bytes every time)
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from nf4format.atomic import AtomicFile
from nf4format.blocks import quantize
from nf4format.codebook import NF4_LEVELS
from nf4format.container import config_sha256, seal
from nf4format.layout import OTHER_LEVELS, QUANT_STATE, KeptSpec, PackedSpec, plan_layout, quant_state_json

CORPUS = Path(__file__).parent / "corpus"
CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "vocab_size": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "eos_token_id": [1, 2],
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def packed_file(
    path: Path,
    packed: list[PackedSpec],
    kept: list[KeptSpec],
    files: dict[str, bytes],
    levels: np.ndarray = NF4_LEVELS,
) -> None:
    """A .nf4 file of Gaussian weights, by the real encoder."""
    metadata = {
        "nf4.aliases": json.dumps({"lm_head.weight": kept[0].name} if kept else {}),
        "nf4.config_sha256": config_sha256(files["config.json"]),
        "nf4.options": '{"level":0}',
        "nf4.source_sha256": "0" * 64,
    }
    if levels is not NF4_LEVELS:
        metadata[OTHER_LEVELS] = "custom"
    layout = plan_layout(packed, kept, {name: len(data) for name, data in files.items()}, metadata)
    rng = np.random.default_rng(0)
    with AtomicFile(path) as file:
        file.preallocate(layout.file_bytes)
        for spec in packed:
            weight = quantize(rng.standard_normal(spec.shape).astype(np.float16), "float16")
            state = layout.entries[spec.name + QUANT_STATE]
            parts = {
                "": weight.codes,
                ".absmax": weight.absmax,
                ".quant_map": levels,
                ".nested_absmax": weight.nested_absmax,
                ".nested_quant_map": weight.nested_quant_map,
            }
            for suffix, data in parts.items():
                file.pwrite(data.tobytes(), layout.entries[spec.name + suffix].begin)
            text = quant_state_json(spec, weight.nested_offset, state.end - state.begin)
            file.pwrite(text, state.begin)
        for kept_spec in kept:
            entry = layout.entries[kept_spec.name]
            file.pwrite(bytes(range(1, 1 + entry.end - entry.begin)), entry.begin)
        for name, data in files.items():
            file.pwrite(data, layout.entries[f"__file__/{name}"].begin)
        seal(file, layout)


def tensor_file(tensors: dict[str, tuple[str, list[int], bytes]], metadata: Any = None) -> bytes:
    """A safetensors file of these tensors: name -> (dtype, shape, bytes)."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def main() -> None:
    for folder in ("container", "source", "index.json", "config.json"):
        (CORPUS / folder).mkdir(parents=True, exist_ok=True)
    config = json.dumps(CONFIG).encode()
    tokenizer = b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'
    files = {"config.json": config, "tokenizer.json": tokenizer}
    q, experts = PackedSpec("q_proj.weight", (8, 16), "float16"), PackedSpec("experts", (3, 5, 7), "float16")
    kept = [KeptSpec("embed.weight", "BF16", (4, 2)), KeptSpec("norm", "F32", (3,)), KeptSpec("n", "I64", ())]
    packed_file(CORPUS / "container" / "one.nf4", [q], kept, files)
    packed_file(CORPUS / "container" / "odd.nf4", [experts], [], {"config.json": b"{}"})
    even = np.linspace(-1, 1, 16, dtype=np.float32)
    packed_file(CORPUS / "container" / "levels.nf4", [q], [], {"config.json": b"{}"}, even)
    packed_file(CORPUS / "container" / "kept.nf4", [], kept, {"config.json": b"{}"})
    source = CORPUS / "source"
    mixed = {
        "a": ("F32", [2, 2], bytes(range(16))),
        "b.weight": ("BF16", [3], bytes(range(6))),
        "e": ("U8", [0, 4], b""),
    }
    (source / "mixed.safetensors").write_bytes(tensor_file(mixed, {"format": "pt"}))
    (source / "plain.safetensors").write_bytes(
        tensor_file({"x": ("F4", [4], b"\1\2"), "y": ("U8", [], b"\3")})
    )
    (source / "empty.safetensors").write_bytes(tensor_file({}))
    index = {
        "metadata": {"total_size": 22},
        "weight_map": {"a": SHARDS[0], "b.weight": SHARDS[1], "e": SHARDS[1]},
    }
    (CORPUS / "index.json" / "two.json").write_text(json.dumps(index))
    moe = {
        **CONFIG,
        "model_type": "qwen3",
        "num_experts": 4,
        "head_dim": 4,
        "layer_types": ["full_attention"],
    }
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    nested = {"text_config": CONFIG, "quantization_config": None, "auto_map": {"AutoModel": "evil.Model"}}
    for name, value in {
        "llama": CONFIG,
        "qwen3": moe,
        "llama3": {**CONFIG, "rope_scaling": llama3},
        "nested": nested,
    }.items():
        (CORPUS / "config.json" / f"{name}.json").write_text(json.dumps(value))


if __name__ == "__main__":
    main()
