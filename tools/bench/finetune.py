"""Fine-tune the 4-bit and the original weights of one checkpoint alike, and compare where they end.

Both are compiled, one as usual and one with nothing quantized; each gets the same LoRA adapter, data, order
and seed. A part of the data is held out: of plain text the end, of rows some chosen by the seed. Prints a
table, writes it as JSON.

    python tools/bench/finetune.py MODEL_DIR TEXT --json finetune.json
    python tools/bench/finetune.py MODEL_DIR ROWS.jsonl --epochs 2 --layers all attention attention:48

    --layers    which layers get adapters: all linear ones, or attention's, of the rank given or of their own
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from report import Report, machine

import nf4
from nf4.data.options import DataOptions
from nf4.lora import LoraConfig
from nf4.text.tokenizer import Tokenizer
from nf4.training.options import TrainOptions
from nf4.training.train import train
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

BASES = {"original": CompileOptions(exclude=("*",)), "nf4": CompileOptions(level=0)}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
HELD_OUT = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face checkpoint directory")
    parser.add_argument("data", type=Path, help="what to train on: any file that nf4 train takes")
    parser.add_argument("--steps", type=int, help="(default 30, unless --epochs is given)")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--packing", default="none", choices=["none", "best-fit"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", nargs="+", default=["all"], metavar="all|attention[:RANK]")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each; figures are means")
    parser.add_argument("--map", action="append", default=[], metavar="FIELD=COLUMN", help="as nf4 train")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for layers in arguments.layers:
            for base in BASES:
                runs = [run(base, layers, seed, arguments, Path(folder)) for seed in arguments.seeds]
                results[base, layers] = {key: sum(r[key] for r in runs) / len(runs) for key in runs[0]}
    rows: list[list[str | float | int | None]] = [
        [
            base if arguments.layers == ["all"] else f"{base}, {layers}",
            round(result["file_bytes"] / 1e6, 1),
            round(result["parameters"]),
            f"{result['before']:.4f}",
            f"{result['after']:.4f}",
            f"{math.exp(result['after']):.2f}",
            f"{result['after'] / results['original', layers]['after']:.4f}",
            round(result["tokens_per_second"]),
        ]
        for (base, layers), result in results.items()
    ]
    first = next(iter(results.values()))
    held_out = "the last" if is_text(arguments.data) else "a random"
    Report(
        title=f"LoRA fine-tuning of {arguments.model.name} on {arguments.data.name}",
        columns=[
            "base" if arguments.layers == ["all"] else "base, adapted layers",
            "file MB",
            "trained",
            "held-out loss before",
            "after",
            "perplexity",
            "loss / original's",
            "tokens/s",
        ],
        rows=rows,
        machine=machine("nf4", "torch", gpu=arguments.device == "cuda")
        | {"threads": str(torch.get_num_threads())},
        notes=[
            f"{round(first['tokens']):,} tokens each; the same data, order, seed and adapter (rank"
            f" {arguments.rank}, or what stands behind the layers; alpha twice the rank; rate"
            f" {arguments.lr:g}); {arguments.dtype}, {arguments.device}."
            + (f" Means over {len(arguments.seeds)} seeds." if len(arguments.seeds) > 1 else ""),
            f"Held out: {held_out} {HELD_OUT:.0%} of the data. Loss: nats a token"
            + ("." if is_text(arguments.data) else ", of answers alone."),
        ],
    ).finish(arguments.json)


def is_text(data: Path) -> bool:
    """Whether there are no rows to draw from."""
    return data.suffix == ".txt"


def lora_config(layers: str, rank: int) -> LoraConfig:
    """The adapter that `--layers` means."""
    which, _, own_rank = layers.partition(":")
    if which not in ("all", "attention"):
        sys.exit(f"--layers: expected all or attention, got {which!r}")
    rank = int(own_rank or rank)
    targets: dict[str, Any] = {"targets": ATTENTION} if which == "attention" else {}
    return LoraConfig(rank=rank, alpha=2.0 * rank, **targets)


def split_text(path: Path, folder: Path) -> dict[str, Any]:
    """Options that train on a text but its end, and evaluate on that."""
    text = path.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - HELD_OUT))
    parts = {"train.txt": text[:cut], "held_out.txt": text[cut:]}
    for part, content in parts.items():
        (folder / part).write_text(content, encoding="utf-8")
    return {"data": (folder / "train.txt",), "eval_data": (folder / "held_out.txt",)}


def run(base: str, layers: str, seed: int, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Compile, fine-tune and evaluate one base."""
    file = folder / f"{base}.nf4"
    if not file.exists():
        compile_checkpoint(arguments.model, file, BASES[base])
    data: dict[str, Any] = {"data": (arguments.data,), "eval_fraction": HELD_OUT}
    if is_text(arguments.data):
        data = split_text(arguments.data, folder)
    steps = arguments.steps or (None if arguments.epochs else 30)
    model = nf4.load(file, dtype=arguments.dtype, device=arguments.device)
    assert model.source is not None
    name = f"{base}-{layers.replace(':', '-')}-{seed}"
    summary = train(
        model,
        Tokenizer.from_file(model.source),
        TrainOptions(
            **data,
            data_options=DataOptions(columns=dict(pair.split("=", 1) for pair in arguments.map)),
            out=folder / name,
            lora=lora_config(layers, arguments.rank),
            lr=arguments.lr,
            steps=steps,
            epochs=arguments.epochs or 1.0,
            batch=arguments.batch,
            accumulate=arguments.accumulate,
            seq_len=arguments.seq_len,
            packing=arguments.packing,
            seed=seed,
        ),
        progress=sys.stderr.isatty(),
        say=lambda line: print(f"{name}: {line}", file=sys.stderr),
    )
    if summary.stopped_by:
        sys.exit(f"stopped by {summary.stopped_by}: no comparison")
    losses = list(summary.evaluations.values())
    return {
        "file_bytes": file.stat().st_size,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "before": losses[0],
        "after": losses[-1],
        "tokens": summary.tokens,
        "tokens_per_second": summary.tokens_per_second,
    }


if __name__ == "__main__":
    main()
