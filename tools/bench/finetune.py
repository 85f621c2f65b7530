"""Fine-tune the 4-bit and the original weights of one checkpoint alike, and compare where they end.

Both are compiled, one as usual and one with nothing quantized; each gets the same LoRA adapter, text,
order and seed. The last part of the text is held out. Prints a table, writes it as JSON.

    python tools/bench/finetune.py MODEL_DIR TEXT --json finetune.json
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
from nf4.lora import LoraConfig
from nf4.text.tokenizer import Tokenizer
from nf4.training.options import TrainOptions
from nf4.training.train import train
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

BASES = {"original": CompileOptions(exclude=("*",)), "nf4": CompileOptions()}
HELD_OUT = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face checkpoint directory")
    parser.add_argument("text", type=Path, help="plain text to train on")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        results = {name: run(name, arguments, Path(folder)) for name in BASES}
    original, packed = results["original"], results["nf4"]
    Report(
        title=f"LoRA fine-tuning of {arguments.model.name} on {arguments.text.name}",
        columns=["base", "file MB", "perplexity before", "after", "after / original", "tokens/s"],
        rows=[
            [
                name,
                round(result["file_bytes"] / 1e6, 1),
                f"{result['before']:.2f}",
                f"{result['after']:.2f}",
                f"{result['after'] / original['after']:.4f}",
                round(result["tokens_per_second"]),
            ]
            for name, result in results.items()
        ],
        machine=machine("nf4", "torch", gpu=arguments.device == "cuda")
        | {"threads": str(torch.get_num_threads())},
        notes=[
            f"{packed['tokens']:,} tokens each; the same data, order, seed and adapter (rank "
            f"{arguments.rank} on all linear layers, rate {arguments.lr:g});"
            f" {arguments.dtype}, {arguments.device}.",
            f"Perplexity on the last {HELD_OUT:.0%} of the text, which is held out.",
        ],
    ).finish(arguments.json)


def run(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile, fine-tune and evaluate one base."""
    file = folder / f"{name}.nf4"
    compile_checkpoint(arguments.model, file, BASES[name])
    text = arguments.text.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - HELD_OUT))
    parts = {"train.txt": text[:cut], "held_out.txt": text[cut:]}
    for part, content in parts.items():
        (folder / part).write_text(content, encoding="utf-8")
    model = nf4.load(file, dtype=arguments.dtype, device=arguments.device)
    assert model.source is not None
    summary = train(
        model,
        Tokenizer.from_file(model.source),
        TrainOptions(
            data=(folder / "train.txt",),
            eval_data=(folder / "held_out.txt",),
            out=folder / f"{name}-adapter",
            lora=LoraConfig(rank=arguments.rank, alpha=2.0 * arguments.rank),
            lr=arguments.lr,
            steps=arguments.steps,
            batch=arguments.batch,
            accumulate=arguments.accumulate,
            seq_len=arguments.seq_len,
            seed=arguments.seed,
        ),
        progress=sys.stderr.isatty(),
        say=lambda line: print(f"{name}: {line}", file=sys.stderr),
    )
    if summary.stopped_by:
        sys.exit(f"stopped by {summary.stopped_by}: no comparison")
    losses = list(summary.evaluations.values())
    return {
        "file_bytes": file.stat().st_size,
        "before": math.exp(losses[0]),
        "after": math.exp(losses[-1]),
        "tokens": summary.tokens,
        "tokens_per_second": summary.tokens_per_second,
    }


if __name__ == "__main__":
    main()
