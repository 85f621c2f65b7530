"""Training steps of a model of Llama-3.1-8B's shape on one GPU: ours beside PEFT and PEFT with Liger.

    python tools/bench/gpu_train.py --json tools/bench/results/gpu_train.json

Writes a random checkpoint of that shape (16 GB) to a temporary directory inside --dir, compiles it, and runs
every arm (see train_arms.py) in a process of its own on the same random tokens: the same weights, adapter,
batches and settings. Time is the median of single steps, the GPU's work included; memory is the allocator's
peak over the timed steps, and what CUDA graphs hold beside it. The limit is a bfloat16 matrix product of the
same run.

    --cells 4x2048 1x512      batch x tokens, in the order given
    --arms nf4 peft-liger     which arms; ours also as nf4-offload, layer inputs kept in host memory; PEFT
                              also as peft-float32, the curve that the others approximate
    --model DIR --text FILE   another checkpoint, and its own tokens of a text instead of random ones: losses
                              that fall show whether the arms learn alike
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import train_arms
from gpu_kernels import matmul_limit
from report import Report, machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from make_checkpoint import SHAPES, make_checkpoint

ARMS = ("nf4", "nf4-offload", "peft", "peft-liger")
MORE_ARMS = ("peft-float32",)
RANDOM_BATCHES = 4  # different ones, in rotation


def load_arm(arm: str, folder: Path, rate: float) -> train_arms.Step:
    """The arm over the checkpoint, packed file and adapter in `folder`."""
    adapter = folder / "adapter"
    if arm.startswith("nf4"):
        switches = {"offload_checkpoints": True} if arm.endswith("-offload") else {}
        return train_arms.ours(folder / "model.nf4", adapter, rate, **switches)
    dtype = torch.float32 if arm == "peft-float32" else torch.bfloat16
    return train_arms.peft(folder / "model", adapter, rate, liger=arm == "peft-liger", dtype=dtype)


def make_batches(folder: Path, text: Path | None, batch: int, length: int, steps: int) -> list[torch.Tensor]:
    """Ids [batch, length]: consecutive windows of a text, one a step, or a few random ones."""
    if text is None:
        vocabulary = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
        generator = torch.Generator().manual_seed(1)
        shape = (RANDOM_BATCHES, batch, length)
        return list(torch.randint(0, vocabulary, shape, generator=generator))
    from nf4.text.tokenizer import Tokenizer
    from nf4format.container import Nf4File

    with Nf4File.open(folder / "model.nf4") as file:
        ids = torch.tensor(Tokenizer.from_file(file).encode(text.read_text(encoding="utf-8")))
    windows = ids[: len(ids) // (batch * length) * batch * length].view(-1, batch, length)
    return list(windows[:steps])


def measure(arm: str, arguments: argparse.Namespace) -> None:
    """Print one line of JSON a cell: times, memory, losses and gradient norms."""
    folder, warm, steps = arguments.folder, arguments.warm, arguments.steps
    started = time.perf_counter()
    step = load_arm(arm, folder, arguments.rate)
    torch.cuda.synchronize()
    load_seconds = time.perf_counter() - started
    for cell in arguments.cells:
        batch, length = map(int, cell.split("x"))
        batches = make_batches(folder, arguments.text, batch, length, warm + steps)
        on_gpu = [ids.cuda() for ids in batches]
        history = [step(on_gpu[i % len(on_gpu)]) for i in range(warm)]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for i in range(warm, warm + steps):
            began = time.perf_counter()
            history.append(step(on_gpu[i % len(on_gpu)]))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        result = {
            "arm": arm,
            "cell": cell,
            "seconds": statistics.median(times),
            "slowest": max(times),
            "tokens_per_second": batch * length / statistics.median(times),
            "peak_bytes": torch.cuda.max_memory_allocated() + graph_bytes(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "load_seconds": load_seconds,
            "losses": [loss for loss, _ in history],
            "norms": [norm for _, norm in history],
        }
        print(json.dumps(result), flush=True)


def graph_bytes() -> int:
    """Bytes in the pools of CUDA graphs that no tensor holds: replays work in them, and the allocator leaves
    them out of what is allocated."""
    segments = torch.cuda.memory_snapshot()
    of_graphs = [segment for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in of_graphs)


def prepare(folder: Path, model: Path | None, shape: str, num_bytes: int) -> None:
    """Checkpoint (`model`, or a random one), packed file and adapter in `folder`, unless they are there."""
    from qcompile.options import CompileOptions
    from qcompile.pipeline import compile_checkpoint

    if (folder / "adapter").exists():
        return
    began = time.perf_counter()
    if model is not None:
        (folder / "model").symlink_to(model.resolve())
    else:
        make_checkpoint(folder / "model", num_bytes, shape=shape)
    made = time.perf_counter()
    compile_checkpoint(folder / "model", folder / "model.nf4", CompileOptions(level=0, force=True))
    compiled = time.perf_counter()
    train_arms.make_adapter(folder / "model.nf4", folder / "adapter")
    print(
        f"checkpoint made in {made - began:.0f} s, compiled in {compiled - made:.0f} s,"
        f" adapter in {time.perf_counter() - compiled:.0f} s",
        file=sys.stderr,
    )


def operations(folder: Path, length: int) -> float:
    """Floating point operations of one token's step, layers computed twice in the forward direction."""
    config = json.loads((folder / "model" / "config.json").read_text())
    hidden, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    linears = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    inputs_and_outputs = layers * (2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner))
    adapter = train_arms.RANK * inputs_and_outputs
    head = config["vocab_size"] * hidden
    attention = 2 * length * hidden * layers
    return 6 * linears + 4 * head + 4.5 * attention + 8 * adapter


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        default=list(ARMS),
        choices=(*ARMS, *MORE_ARMS),
        help="the last is compared with",
    )
    parser.add_argument("--cells", nargs="+", default=["1x512", "4x2048"])
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--rate", type=float, default=train_arms.RATE, help="learning rate (default %(default)g)"
    )
    parser.add_argument("--text", type=Path, help="train on this text instead of random tokens")
    parser.add_argument("--model", type=Path, help="this checkpoint instead of a random one")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--gib", type=float, default=14.9, help="of a random checkpoint (default: 32 layers)")
    parser.add_argument("--dir", type=Path, help="where to work (default: the system's temporary directory)")
    parser.add_argument("--folder", type=Path, help="keep checkpoint and packed file here, to use them again")
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments)
        return
    with tempfile.TemporaryDirectory(prefix="nf4-bench-", dir=arguments.dir) as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, arguments.model, arguments.shape, int(arguments.gib * 2**30))
        results = [result for arm in arguments.arms for result in run_arm(arm, folder, arguments)]
        per_token = {cell: operations(folder, int(cell.split("x")[1])) for cell in arguments.cells}
    report(results, per_token, arguments)


def run_arm(arm: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The arm's results, one a cell; none, with its error on stderr, where it fails."""
    command = [sys.executable, __file__, "--measure", arm, "--folder", str(folder)]
    command += ["--warm", str(arguments.warm), "--steps", str(arguments.steps), "--rate", str(arguments.rate)]
    command += ["--text", str(arguments.text)] if arguments.text else []
    done = subprocess.run(
        [*command, "--cells", *arguments.cells], check=False, stdout=subprocess.PIPE, text=True
    )
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for result in results:
        print(json.dumps(result), file=sys.stderr)
    if done.returncode:
        print(f"{arm}: exit status {done.returncode}", file=sys.stderr)
    return results


def report(results: list[dict[str, Any]], per_token: dict[str, float], arguments: argparse.Namespace) -> None:
    """Print and write the table."""
    limit = matmul_limit()
    found = {(result["arm"], result["cell"]): result for result in results}
    peer = arguments.arms[-1]
    rows: list[list[str | float | int | None]] = []
    for cell in arguments.cells:
        baseline = found.get((peer, cell))
        for arm in arguments.arms:
            result = found.get((arm, cell))
            if result is None:
                rows.append([f"{arm}, {cell}", *[None] * 7])
                continue
            rate = result["tokens_per_second"]
            rows.append(
                [
                    f"{arm}, {cell}",
                    round(rate),
                    round(rate / baseline["tokens_per_second"], 2) if baseline else None,
                    round(rate * per_token[cell] / limit, 3),
                    round(result["peak_bytes"] / 2**30, 2),
                    round(result["peak_bytes"] / baseline["peak_bytes"], 2) if baseline else None,
                    round(result["reserved_bytes"] / 2**30, 2),
                    curve_gap(result, baseline) if baseline else None,
                ]
            )
    name = arguments.model.name if arguments.model else f"{arguments.shape} shape"
    Report(
        f"QLoRA training step, {name}, rank {train_arms.RANK} on all linears, checkpointed",
        [
            "arm, batch x tokens",
            "tokens/s",
            f"over {peer}",
            "of the matmul limit",
            "peak GiB",
            f"over {peer}",
            "reserved GiB",
            "largest loss gap",
        ],
        rows,
        machine("torch", "transformers", "peft", "bitsandbytes", "liger_kernel", gpu=True),
        [
            f"Limit in this run: bf16 product {limit / 1e12:,.0f} TFLOP/s. Median of {arguments.steps} steps"
            f" after {arguments.warm}; peak: most allocated over those steps, weights and what CUDA graphs"
            " work in included; reserved: what the allocator took from the GPU.",
            f"Loss gap: largest relative difference from {peer}'s loss of the same step, over all"
            f" {arguments.warm + arguments.steps} steps from the same adapter on the same tokens"
            " (the second cell goes on from where the first ended).",
            "The same checkpoint, adapter, tokens and AdamW settings in every arm, one process each.",
        ],
    ).finish(arguments.json)


def curve_gap(result: dict[str, Any], baseline: dict[str, Any]) -> float:
    """Largest relative difference between two loss curves."""
    pairs = zip(result["losses"], baseline["losses"], strict=True)
    return max(abs(own - theirs) / theirs for own, theirs in pairs)


if __name__ == "__main__":
    main()
