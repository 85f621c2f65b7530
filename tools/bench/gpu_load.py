"""A packed file into a GPU's memory, beside the limits of the same run and safetensors' loader.

    python tools/bench/gpu_load.py --gib 8 --json tools/bench/results/gpu_load.json

Makes a synthetic checkpoint of Llama-2-7B's layers in a temporary directory (inside --dir), compiles it, and
times, in one process after a first round that is not counted: ours (nf4.load, which checks every sum, and the
part of it that reads and copies), safetensors' load_file of the same file to the GPU, and the two limits:
copies from pinned memory, and reads by as many threads as ours uses. The file is in the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from load import packed_file
from report import Report, machine
from safetensors.torch import load_file

import nf4
from nf4.upload import MOST_READERS, Slab
from nf4format.container import Nf4File


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median over rounds, the GPU's work included; the first round is not counted."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        del result
    return statistics.median(times[1:])


def pinned_copy_limit(rounds: int) -> float:
    """Bytes a second from 1 GiB of pinned memory to the GPU."""
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    return source.numel() / seconds(lambda: target.copy_(source, non_blocking=True), rounds)


def read_limit(file: Nf4File, readers: int, rounds: int) -> float:
    """Bytes a second of reading the chunks by that many threads, each into one buffer of its own."""
    chunks = file.chunks()
    buffers = [memoryview(bytearray(max(c.end - c.begin for c in chunks))) for _ in range(readers)]

    def read(reader: int) -> None:
        for chunk in chunks[reader::readers]:
            file.read_into(buffers[reader][: chunk.end - chunk.begin], chunk.begin)

    with ThreadPoolExecutor(readers) as pool:
        return sum(c.end - c.begin for c in chunks) / seconds(
            lambda: list(pool.map(read, range(readers))), rounds
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--gib", type=float, default=8.0, help="of the checkpoint (default 8)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", type=Path, help="where to work (default: the system's temporary directory)")
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()
    readers = min(MOST_READERS, os.cpu_count() or 1)
    device = torch.device("cuda", torch.cuda.current_device())
    with tempfile.TemporaryDirectory(prefix="nf4-bench-", dir=arguments.dir) as folder:
        _, path = packed_file(Path(folder), arguments.gib, "llama-2-7b")
        with Nf4File.open(path) as file:
            size = file.weights_end - file.header.data_start
            limits = {
                "limit: copies from pinned memory": pinned_copy_limit(arguments.rounds),
                f"limit: reads by {readers} threads": read_limit(file, readers, arguments.rounds),
            }
            slab = size / seconds(lambda: Slab(file, device), arguments.rounds)
        ours = size / seconds(lambda: nf4.load(path, device=device), arguments.rounds)
        theirs = size / seconds(lambda: load_file(path, device="cuda"), arguments.rounds)
    least = min(limits.values())
    named = limits | {
        "ours, read, check and copy": slab,
        "ours, nf4.load": ours,
        "safetensors load_file": theirs,
    }
    Report(
        f"Loading {size / 1e9:.2f} GB of packed weights to a GPU",
        ["what", "GB/s", "of the lower limit"],
        [[name, rate / 1e9, rate / least] for name, rate in named.items()],
        {"GPU": torch.cuda.get_device_name(), **machine("torch", "safetensors")},
        [f"Median of {arguments.rounds} rounds in one process; the file is in the page cache."],
    ).finish(arguments.json)


if __name__ == "__main__":
    main()
