"""Write a synthetic Llama-shaped checkpoint of a given size, to measure speed with.

    python tools/make_checkpoint.py OUT_DIR --gib 4                  Llama-2-7B's layers, as many as fit
    python tools/make_checkpoint.py OUT_DIR --gib 1 --shape llama-3.1-8b --shard-gib 0.25

Weights are Gaussian with the spread of trained ones, a different one for each row, so that codes and scales
look like a real model's. The same arguments give the same bytes. Memory stays bounded: values are made and
written in chunks, whatever the size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

# Model -> hidden size, inner size of the feed-forward part, heads, key/value heads, vocabulary.
SHAPES = {
    "llama-2-7b": (4096, 11008, 32, 32, 32000),
    "llama-3.1-8b": (4096, 14336, 32, 8, 128256),
    "tiny": (256, 688, 4, 2, 512),
}
CHUNK_VALUES = 4 << 20  # values made at a time: 16 MiB of float32


def layer_tensors(layer: int, config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one decoder layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    prefix = f"model.layers.{layer}."
    return {
        prefix + "input_layernorm.weight": (hidden,),
        prefix + "self_attn.q_proj.weight": (hidden, hidden),
        prefix + "self_attn.k_proj.weight": (kv, hidden),
        prefix + "self_attn.v_proj.weight": (kv, hidden),
        prefix + "self_attn.o_proj.weight": (hidden, hidden),
        prefix + "post_attention_layernorm.weight": (hidden,),
        prefix + "mlp.gate_proj.weight": (inner, hidden),
        prefix + "mlp.up_proj.weight": (inner, hidden),
        prefix + "mlp.down_proj.weight": (hidden, inner),
    }


def model_tensors(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the whole model, in its own order."""
    table = (config["vocab_size"], config["hidden_size"])
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for layer in range(config["num_hidden_layers"]):
        tensors |= layer_tensors(layer, config)
    return tensors | {"model.norm.weight": (config["hidden_size"],), "lm_head.weight": table}


def make_config(shape: str, num_bytes: int) -> dict:
    """config.json of a Llama of this shape with just enough layers to fill `num_bytes` in bfloat16."""
    hidden, inner, heads, kv_heads, vocabulary = SHAPES[shape]
    base = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }
    layer_bytes = 2 * sum(math.prod(dims) for dims in layer_tensors(0, base).values())
    outside_bytes = 2 * (2 * base["vocab_size"] + 1) * base["hidden_size"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        **base,
        "num_hidden_layers": max(1, math.ceil((num_bytes - outside_bytes) / layer_bytes)),
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def chunks(name: str, shape: tuple[int, ...], seed: list[int]) -> Iterator[bytes]:
    """The tensor's bytes (bfloat16), a few MiB at a time."""
    rng = np.random.Generator(np.random.SFC64(seed))
    if len(shape) == 1:
        yield to_bfloat16(1 + 0.1 * rng.standard_normal(shape, dtype=np.float32))
        return
    rows, columns = shape
    spread = 0.6 / math.sqrt(columns)
    step = max(1, CHUNK_VALUES // columns)
    for first in range(0, rows, step):
        values = rng.standard_normal((min(step, rows - first), columns), dtype=np.float32)
        values *= spread * np.exp(0.2 * rng.standard_normal((len(values), 1), dtype=np.float32))
        yield to_bfloat16(values)


def to_bfloat16(values: np.ndarray) -> bytes:
    """Round float32 to bfloat16, to nearest even."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16).tobytes()


def split_into_shards(tensors: dict[str, tuple[int, ...]], shard_bytes: int) -> list[list[str]]:
    """Consecutive tensors, up to `shard_bytes` together, as huggingface_hub splits them."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], seeds: dict[str, list[int]]) -> None:
    """One safetensors file, written front to back."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            for data in chunks(name, shape, seeds[name]):
                file.write(data)


def make_checkpoint(
    out: Path, num_bytes: int, *, shape: str = "llama-2-7b", shard_bytes: int = 1 << 30, seed: int = 0
) -> int:
    """Write the checkpoint into the directory `out` (made if need be); returns the bytes of its tensors."""
    config = make_config(shape, num_bytes)
    tensors = model_tensors(config)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    seeds = {name: [seed, index] for index, name in enumerate(tensors)}
    shards = split_into_shards(tensors, shard_bytes)
    files = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done in [
            pool.submit(write_shard, out / file, {name: tensors[name] for name in shard}, seeds)
            for file, shard in zip(files, shards, strict=True)
        ]:
            done.result()
    total = 2 * sum(math.prod(dims) for dims in tensors.values())
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="directory to write; made if need be")
    parser.add_argument("--gib", type=float, default=4.0, help="size of all weights, at least (default 4)")
    parser.add_argument(
        "--shape", choices=SHAPES, default="llama-2-7b", help="of whose layers (default llama-2-7b)"
    )
    parser.add_argument("--shard-gib", type=float, default=1.0, help="most of one file (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    total = make_checkpoint(
        args.out,
        int(args.gib * 2**30),
        shape=args.shape,
        shard_bytes=int(args.shard_gib * 2**30),
        seed=args.seed,
    )
    print(f"{args.out}: {total / 2**30:.2f} GiB of weights")


if __name__ == "__main__":
    main()
