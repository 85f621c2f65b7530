"""qcompile -O2 on a GPU: a model of Llama-3.1-8B's shape, from files to a file, and where the time goes.

    python tools/bench/gpu_calibrated.py --json tools/bench/results/gpu_calibrated.json

Makes a synthetic checkpoint and whole statistics, each layer's by themselves, of correlated random inputs, in
a temporary directory inside --dir (40 GB for 32 layers). Then the command runs, from start to exit; and once
more inside of this process on --split-layers layers, with the GPU's time between steps taken by events.
--cpu-layers N compares with the CPU on a checkpoint of N layers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Report, machine
from safetensors import safe_open

from nf4format.stats import EntrySpec, StatsWriter
from qcompile import feedback_cuda
from qcompile.feedback_cuda import Kernels
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint
from qcompile.rounder_cuda import TorchRounder

sys.path.append(str(Path(__file__).parents[1]))
from make_checkpoint import layer_tensors, make_checkpoint, make_config

TOKENS = 4096  # of random inputs
SHAPE = "llama-3.1-8b"
READERS = {  # of a layer: what reads the same
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def make_model(folder: Path, layers: int) -> dict[str, Any]:
    """A checkpoint of so many layers; returns its configuration."""
    config = make_config(SHAPE, 0)
    per_layer = 2 * sum(int(np.prod(shape)) for shape in layer_tensors(0, config).values())
    outside = 2 * (2 * config["vocab_size"] + 1) * config["hidden_size"]
    make_checkpoint(folder, outside + layers * per_layer, shape=SHAPE)
    return json.loads((folder / "config.json").read_text())


def make_stats(model: Path, config: dict[str, Any], out: Path, threads: int) -> list[str]:
    """Statistics of every layer, a file each; returns their paths."""
    files = sorted(model.glob("*.safetensors"))
    sums: dict[str, str] = {}

    def hash_file(path: Path) -> None:
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                data = tensors.get_tensor(name).view(torch.uint8).numpy()
                sums[name] = hashlib.sha256(data.data).hexdigest()

    def write_layer(layer: int) -> str:
        shapes = layer_tensors(layer, config)
        entries = []
        for first, readers in READERS.items():
            names = [f"model.layers.{layer}.{reader}.weight" for reader in readers]
            features = shapes[names[0]][1]
            entries.append(
                EntrySpec(f"layers.{layer}.{first}", features, {name: sums[name] for name in names})
            )
        path = out / f"stats-{layer}.safetensors"
        with StatsWriter(path, entries, {"data_sha256": "0" * 64}, tokens=TOKENS, full=True) as writer:
            for index, entry in enumerate(entries):
                with on_gpu:
                    moment = random_moment(entry.features, seed=[layer, index]).cpu().numpy()
                writer.put(entry.name, moment)
        return str(path)

    on_gpu = threading.Lock()
    out.mkdir()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(hash_file, files))
    with ThreadPoolExecutor(min(threads, 8)) as pool:  # a moment of 0.8 GB each
        return list(pool.map(write_layer, range(config["num_hidden_layers"])))


def random_moment(features: int, seed: list[int]) -> torch.Tensor:
    """Second moments of inputs that are correlated and of uneven sizes: float32 [features, features]."""
    generator = torch.Generator("cuda").manual_seed(1000 * seed[0] + seed[1])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    mixing = normal(features // 8, features) * torch.exp(0.5 * normal(features))
    x = normal(TOKENS, features // 8) @ mixing * (features // 8) ** -0.5
    x += 0.3 * normal(TOKENS, features)
    return x.T @ x / TOKENS


class Split:
    """The GPU's time by steps, of calls in its one thread; and the host's outside of it."""

    def __init__(self) -> None:
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)
        self.seconds: dict[str, float] = defaultdict(float)

    def on_gpu(self, step: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = call(*arguments, **named)
            end.record()
            self._events[step].append((begin, end))
            return result

        return timed

    def on_host(self, step: str, call: Callable[..., Any]) -> Callable[..., Any]:
        lock = threading.Lock()

        @wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            result = call(*arguments, **named)
            with lock:
                self.seconds[step] += time.perf_counter() - begin
            return result

        return timed

    def finish(self) -> None:
        torch.cuda.synchronize()
        for step, pairs in self._events.items():
            self.seconds[step] = sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3


@contextmanager
def splitting() -> Iterator[Split]:
    """Steps of the encoder, timed."""
    split = Split()
    targets = [
        (feedback_cuda, "known", "GPU: statistics unpacked, factors", split.on_gpu),
        (Kernels, "search", "GPU: search for scales", split.on_gpu),
        (feedback_cuda._Panel, "carry_errors", "GPU: errors carried", split.on_gpu),
        (Kernels, "carry", "of it the kernel", split.on_gpu),
        (feedback_cuda._Panel, "descend", "GPU: coordinate descent", split.on_gpu),
        (Kernels, "descend", "of it the kernel ", split.on_gpu),
        (feedback_cuda, "_total_error", "GPU: errors at outputs", split.on_gpu),
        (TorchRounder, "_work", "the thread that has the GPU work", split.on_host),
        (TorchRounder, "_load", "reading, hashing, copying to the GPU: all threads", split.on_host),
    ]
    before = [(owner, name, owner.__dict__[name]) for owner, name, _, _ in targets]
    try:
        for owner, name, step, timed in targets:
            setattr(owner, name, timed(step, owner.__dict__[name]))
        yield split
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


def run_command(model: Path, stats: list[str], out: Path, device: str) -> tuple[float, dict[str, Any], int]:
    """Seconds, summary, and the largest resident size in bytes, mapped files and CUDA included."""
    arguments = [sys.executable, "-m", "qcompile", str(model), str(out), "-O2", "--device", device, "--force"]
    arguments += [argument for path in stats for argument in ("--stats", path)]
    started = time.perf_counter()
    done = subprocess.run(
        [*arguments, "-q", "--json", "-"], check=True, stdout=subprocess.PIPE, env={**os.environ}
    )
    seconds = time.perf_counter() - started
    return seconds, json.loads(done.stdout), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--split-layers", type=int, default=4)
    parser.add_argument("--cpu-layers", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="where files go (default: the system's temporary directory)")
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    rows: list[list[str | float | int | None]] = []
    notes = [
        "The command from start to exit, files in the page cache, fsync included. Every layer has weights "
        "and whole statistics of its own.",
        "Steps overlap: the GPU works on a weight while threads read the next ones. Shares are of the run's "
        "time.",
    ]

    def tell(text: str) -> None:
        print(f"{time.perf_counter() - started:7.1f} s  {text}", flush=True)

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        for layers in dict.fromkeys([arguments.layers, arguments.split_layers, arguments.cpu_layers]):
            if not layers:
                continue
            model, out = Path(folder) / f"model-{layers}", Path(folder) / "out.nf4"
            config = make_model(model, layers)
            tell(f"{layers} layers: weights")
            stats = make_stats(model, config, Path(folder) / f"stats-{layers}", threads)
            size = sum(path.stat().st_size for path in model.iterdir()) / 1e9
            stats_size = sum(Path(path).stat().st_size for path in stats) / 1e9
            tell(f"statistics: {size:.1f} GB and {stats_size:.1f} GB")
            torch.cuda.empty_cache()
            if layers in {arguments.layers, arguments.cpu_layers}:
                seconds, summary, resident = run_command(model, stats, out, "cuda")
                what = f"qcompile -O2 --device cuda, {layers} layers"
                rows.append([what, seconds, 1.0])
                tell(f"{what}: {seconds:.1f} s, output error {summary['output_ratio']}")
                if layers == arguments.layers:
                    notes.append(
                        f"{size:.1f} GB of weights, {stats_size:.1f} GB of statistics; output error "
                        f"{summary['output_ratio']:.4f} of -O0's; the process held up to "
                        f"{resident / 1e9:.1f} GB of memory, pages of files that it maps included."
                    )
                with out.open("rb") as file:
                    digest = (
                        hashlib.file_digest(file, "sha256").hexdigest()
                        if hasattr(hashlib, "file_digest")
                        else ""
                    )
                tell(f"file {digest[:16]}")
            if layers == arguments.split_layers:
                options = CompileOptions(level=2, stats=tuple(stats), device="cuda", force=True)
                torch.cuda.reset_peak_memory_stats()
                with splitting() as split:
                    seconds = compile_checkpoint(model, out, options).seconds
                    split.finish()
                rows.append([f"inside, {layers} layers", seconds, 1.0])
                rows += [[step, value, value / seconds] for step, value in split.seconds.items()]
                peak = torch.cuda.max_memory_allocated() / 1e9
                notes.append(f"Largest size of the GPU's tensors: {peak:.1f} GB.")
                tell("split")
            if layers == arguments.cpu_layers:
                seconds, summary, _ = run_command(model, stats, out, "cpu")
                rows.append([f"qcompile -O2 on the CPU, {layers} layers", seconds, None])
                tell(f"CPU: {seconds:.1f} s, output error {summary['output_ratio']}")
    Report(
        f"-O2 of a model of Llama-3.1-8B's shape, {arguments.layers} layers",
        ["what", "seconds", "share"],
        rows,
        machine("torch", gpu=True),
        notes,
    ).finish(arguments.json)


if __name__ == "__main__":
    main()
