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
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Model:
    """A checkpoint, statistics of it, and where its packed file goes."""

    path: Path
    stats: list[str]
    out: Path
    layers: int


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


STEPS: dict[str, tuple[Any, str, bool]] = {  # where it is done, and whether by the GPU
    "reading, hashing, copying to the GPU: sum of threads": (TorchRounder, "_load", False),
    "the thread that has the GPU work": (TorchRounder, "_work", False),
    "GPU: factors of H": (feedback_cuda, "known", True),
    "GPU: search for scales": (Kernels, "search", True),
    "GPU: errors carried": (feedback_cuda._Panel, "carry_errors", True),
    "- kernel, without products": (Kernels, "carry", True),
    "GPU: coordinate descent": (feedback_cuda._Panel, "descend", True),
    "- its kernel, without products": (Kernels, "descend", True),
    "GPU: errors at outputs": (feedback_cuda, "_total_error", True),
}


@contextmanager
def splitting() -> Iterator[Split]:
    """Steps of the encoder, timed."""
    split = Split()
    before = {step: owner.__dict__[name] for step, (owner, name, _) in STEPS.items()}
    try:
        for step, (owner, name, by_gpu) in STEPS.items():
            setattr(owner, name, (split.on_gpu if by_gpu else split.on_host)(step, before[step]))
        yield split
    finally:
        for step, (owner, name, _) in STEPS.items():
            setattr(owner, name, before[step])


def run_command(model: Model, device: str) -> tuple[float, dict[str, Any], int]:
    """Seconds, summary, and the largest resident size in bytes."""
    files = [str(model.path), str(model.out), *(f"--stats={path}" for path in model.stats)]
    summary = model.out.with_suffix(".json")
    command = [sys.executable, "-m", "qcompile", *files, "-O2", "--device", device, "--force", "-q"]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--json", str(summary)])
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"qcompile failed: {status}")
    return seconds, json.loads(summary.read_text()), 1024 * used.ru_maxrss


class Bench:
    """Stages of the benchmark; the table is written after each."""

    def __init__(self, folder: Path, layers: int, json_path: Path | None) -> None:
        self._folder, self._layers, self._json = folder, layers, json_path
        self._rows: list[list[str | float | int | None]] = []
        self._notes = [
            "The command from start to exit, files in the page cache, fsync included. Every layer has "
            "weights and whole statistics of its own.",
            "Steps overlap: the GPU works on a weight while threads read the next ones. Shares are of the "
            "run's time.",
        ]
        self._started = time.perf_counter()

    @contextmanager
    def model(self, layers: int) -> Iterator[Model]:
        """A checkpoint and its statistics, for the time of the block."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            path = Path(folder) / "model"
            config = make_model(path, layers)
            self._tell(f"{layers} layers: weights")
            stats = make_stats(path, config, Path(folder) / "stats", len(os.sched_getaffinity(0)))
            self._tell("statistics")
            torch.cuda.empty_cache()
            yield Model(path, stats, Path(folder) / "out.nf4", layers)

    def whole(self, model: Model, device: str) -> None:
        """The command, from start to exit."""
        seconds, summary, resident = run_command(model, device)
        where = "--device cuda" if device == "cuda" else "on the CPU, all cores"
        self._rows.append([f"qcompile -O2 {where}, {model.layers} layers", seconds, 1.0])
        size, stats_size = (
            sum(file.stat().st_size for file in files) / 1e9
            for files in (model.path.iterdir(), map(Path, model.stats))
        )
        self._notes.append(
            f"{model.layers} layers, {device}: {size:.1f} GB of weights, {stats_size:.1f} GB of statistics; "
            f"error at the outputs {summary['output_ratio']:.5f} of -O0's; up to {resident / 1e9:.1f} GB "
            "resident, pages of files included."
        )
        self._tell(f"{device}: {seconds:.1f} s")
        self._report()

    def split(self, model: Model) -> None:
        """Once more inside of this process, step by step."""
        options = CompileOptions(level=2, stats=tuple(model.stats), device="cuda", force=True)
        torch.cuda.reset_peak_memory_stats()
        with splitting() as split:
            seconds = compile_checkpoint(model.path, model.out, options).seconds
            split.finish()
        self._rows.append([f"without starting Python, {model.layers} layers", seconds, 1.0])
        self._rows += [[step, split.seconds[step], split.seconds[step] / seconds] for step in STEPS]
        peak = torch.cuda.max_memory_allocated() / 1e9
        self._notes.append(f"Largest size of the GPU's tensors: {peak:.1f} GB.")
        self._tell("split")
        self._report()

    def _tell(self, text: str) -> None:
        print(f"{time.perf_counter() - self._started:7.1f} s  {text}", flush=True)

    def _report(self) -> None:
        Report(
            f"-O2 of a model of Llama-3.1-8B's shape, {self._layers} layers",
            ["what", "seconds", "share"],
            self._rows,
            machine("torch", gpu=True),
            self._notes,
        ).finish(self._json)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--split-layers", type=int, default=4)
    parser.add_argument("--cpu-layers", type=int, default=0, help="0: no comparison with the CPU")
    parser.add_argument("--dir", type=Path, help="where files go (default: the system's temporary directory)")
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()
    bench = Bench(arguments.dir, arguments.layers, arguments.json)
    with bench.model(arguments.layers) as model:
        bench.whole(model, "cuda")
    with bench.model(arguments.split_layers) as model:
        bench.split(model)
    if arguments.cpu_layers:
        with bench.model(arguments.cpu_layers) as model:
            bench.whole(model, "cuda")
            bench.whole(model, "cpu")


if __name__ == "__main__":
    main()
