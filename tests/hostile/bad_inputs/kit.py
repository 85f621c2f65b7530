"""What cases are made from: a good tiny checkpoint, the .nf4 file it compiles to, and edits of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nf4format.container import config_sha256
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

from .draft import Draft

HIDDEN, VOCAB, FEED_FORWARD = 64, 48, 128
Q = "model.layers.0.self_attn.q_proj.weight"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
WORDS = {f"w{index}": index for index in range(VOCAB)}


def tokenizer(vocabulary: dict[str, int]) -> bytes:
    """A tokenizer.json of whole words."""
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    return json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}).encode()


def weights() -> dict[str, np.ndarray]:
    """Gaussian float16 weights of a Llama of one layer."""
    rng = np.random.default_rng(0)
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
        Q: (HIDDEN, HIDDEN),
        f"{layer}self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
        f"{layer}self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
        f"{layer}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{layer}mlp.gate_proj.weight": (FEED_FORWARD, HIDDEN),
        f"{layer}mlp.up_proj.weight": (FEED_FORWARD, HIDDEN),
        f"{layer}mlp.down_proj.weight": (HIDDEN, FEED_FORWARD),
        f"{layer}input_layernorm.weight": (HIDDEN,),
        f"{layer}post_attention_layernorm.weight": (HIDDEN,),
    }
    return {name: (0.1 * rng.standard_normal(shape)).astype(np.float16) for name, shape in shapes.items()}


def write_checkpoint(
    folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | bytes = CONFIG
) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    (folder / "tokenizer.json").write_bytes(tokenizer(WORDS))


@cache
def good() -> bytes:
    """The tiny Llama as a .nf4 file."""
    with TemporaryDirectory() as place:
        write_checkpoint(Path(place, "model"), weights())
        compile_checkpoint(Path(place, "model"), Path(place, "good.nf4"), CompileOptions(jobs=1))
        return Path(place, "good.nf4").read_bytes()


def write_good(path: Path) -> Path:
    path.write_bytes(good())
    return path


def edited(path: Path, edit: Callable[[Draft], object]) -> None:
    """The good file, changed, with sums that fit."""
    draft = Draft(write_good(path), Q)
    edit(draft)
    draft.write(path)


def embed(name: str, data: bytes) -> Callable[[Draft], None]:
    """Another embedded file, config.json with its hash."""

    def edit(draft: Draft) -> None:
        key = f"__file__/{name}"
        is_new = key not in draft.tensors
        draft.tensors[key] = ("U8", [len(data)], data)
        if is_new:
            draft.move(key, before="__file__/tokenizer.json")
        if name == "config.json":
            draft.metadata["nf4.config_sha256"] = config_sha256(data)

    return edit
