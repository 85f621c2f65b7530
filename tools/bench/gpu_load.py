"""A packed file into a GPU's memory, beside the limits of the same run and other loaders.

    python tools/bench/gpu_load.py --json tools/bench/results/gpu_load.json
    python tools/bench/gpu_load.py --transformers     also transformers with bitsandbytes, on the same bytes

Makes a packed file of Llama-3.1-8B's shape with random content in a temporary directory (inside --dir).
Limits: copies from pinned memory, and reads from the page cache into pinned memory by 16 threads. Ours:
nf4.load as a whole, from the path to the finished model, every sum checked; and its part that reads, checks
and copies, with sums and without. safetensors' load_file opens the same file. Then the same with the file not
in the page cache, beside what the disk gives to direct reads by as many threads.

A round's GPU memory and pinned memory are allocated anew, inside the time. Starting CUDA is never counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from make_random_file import make_random_file
from report import Report, machine
from safetensors.torch import load_file

import nf4
from nf4.upload import Slab
from nf4format.container import Nf4File

READERS = min(16, len(os.sched_getaffinity(0)))  # more do not read a page cache faster
PIECES = (1 << 20, 4 << 20)  # of reads; the better one is the limit
DISK_BYTES = 2 << 30  # read to learn what the disk gives

Row = list[str | float | int | None]


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, the GPU's work included, what it returns freed afterwards."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    del result
    return seconds


def median_time(call: Callable[[], object], rounds: int) -> float:
    """Median over rounds; the first is not counted."""
    return statistics.median([timed(call) for _ in range(rounds + 1)][1:])


def pinned_copy_limit(rounds: int) -> float:
    """Bytes a second from 1 GiB of pinned memory to the GPU."""
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    return source.numel() / median_time(lambda: target.copy_(source, non_blocking=True), rounds)


def read_all(fd: int, size: int, buffers: list[memoryview]) -> None:
    """The first `size` bytes, by as many threads as there are buffers, each into its own."""
    step = len(buffers[0])
    offsets = range(0, size - step + 1, step)

    def read(reader: int) -> None:
        for offset in offsets[reader :: len(buffers)]:
            os.preadv(fd, [buffers[reader]], offset)

    with ThreadPoolExecutor(len(buffers)) as pool:
        list(pool.map(read, range(len(buffers))))


def read_limit(path: Path, rounds: int) -> float:
    """Bytes a second from the page cache into pinned memory, with the better of PIECES."""
    size, rates = path.stat().st_size, []
    fd = os.open(path, os.O_RDONLY)
    for piece in PIECES:
        memory = torch.empty(READERS, piece, dtype=torch.uint8, pin_memory=True)
        buffers = [row.numpy().data for row in memory]
        rates.append(size // piece * piece / median_time(lambda b=buffers: read_all(fd, size, b), rounds))
    os.close(fd)
    return max(rates)


def drop_from_cache(path: Path) -> None:
    """Out of the page cache; it must be on the disk already."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def disk_limit(path: Path, rounds: int) -> float | None:
    """Bytes a second of direct reads, with the better of PIECES; None where the file system has none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    size, rates = min(DISK_BYTES, path.stat().st_size), []
    for piece in PIECES:
        buffers = [memoryview(mmap.mmap(-1, piece)) for _ in range(READERS)]  # page-aligned
        for _ in range(rounds):
            drop_from_cache(path)
            seconds = timed(lambda b=buffers: read_all(fd, size, b))
            rates.append(size // piece * piece / seconds)
    os.close(fd)
    return max(rates)


def upload(path: Path, *, check: bool) -> float:
    """Seconds to allocate, read, check and copy what nf4.load moves, nothing else."""
    device = torch.device("cuda", torch.cuda.current_device())
    with Nf4File.open(path, mmap=False) as file:
        region = file.region

        def move() -> Slab:
            slab = Slab(path, file.fileno(), region, device, check=check)
            slab.wait()
            return slab

        return timed(move)


def resident(field: str) -> int:
    """Bytes from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")


def measure(arm: str, path: Path) -> dict[str, float]:
    """One load in a process that has only started CUDA: seconds, growth of host memory in bytes."""
    torch.zeros(1, device="cuda")
    if arm == "transformers":
        import bitsandbytes  # noqa: F401
        from transformers import AutoModelForCausalLM

        def load() -> object:
            return AutoModelForCausalLM.from_pretrained(path, device_map={"": 0}, dtype=torch.bfloat16)

    else:
        import nf4.loading

        def load() -> object:
            return nf4.load(path, device="cuda")

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    seconds = timed(load)
    return {"seconds": seconds, "growth": resident("VmHWM") - before}


def in_fresh_processes(arm: str, path: Path, rounds: int) -> dict[str, float]:
    """Medians over processes."""
    command = [sys.executable, __file__, "--measure", arm, str(path)]
    runs = [json.loads(subprocess.check_output(command).splitlines()[-1]) for _ in range(rounds)]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def export(path: Path) -> Path:
    """The same bytes as a directory that transformers loads."""
    from nf4.export import export_bnb

    with Nf4File.open(path) as file:
        export_bnb(file, path.parent / "exported")
    return path.parent / "exported"


def warm_rows(path: Path, size: int, rounds: int) -> tuple[list[Row], list[str]]:
    limits = {
        "limit: copies from pinned memory": pinned_copy_limit(rounds),
        f"limit: reads from page cache, {READERS} threads": read_limit(path, rounds),
    }
    least = min(limits.values())
    seconds = {
        "nf4.load, every sum checked": median_time(lambda: nf4.load(path, device="cuda"), rounds),
        "  of that: read, check and copy": statistics.median(upload(path, check=True) for _ in range(rounds)),
        "  the same without sums": statistics.median(upload(path, check=False) for _ in range(rounds)),
    }
    first = in_fresh_processes("nf4", path, min(3, rounds))
    seconds["nf4.load, first of a process"] = first["seconds"]
    seconds["safetensors load_file"] = median_time(lambda: load_file(path, device="cuda"), min(2, rounds))
    rows: list[Row] = [[name, rate / 1e9, rate / least, None] for name, rate in limits.items()]
    rows += [[name, size / s / 1e9, size / s / least, 1e3 * s] for name, s in seconds.items()]
    return rows, [f"Host memory grows by at most {first['growth'] / 2**20:.0f} MiB while nf4.load runs."]


def cold_rows(path: Path, size: int, rounds: int) -> list[Row]:
    limit = disk_limit(path, rounds)
    times = {}
    for name, load in {
        "nf4.load, not in the page cache": lambda: nf4.load(path, device="cuda"),
        "safetensors load_file, not in the page cache": lambda: load_file(path, device="cuda"),
    }.items():
        drop_from_cache(path)
        times[name] = timed(load)
    rows: list[Row] = []
    if limit:
        rows.append([f"limit: direct reads from the disk, {READERS} threads", limit / 1e9, 1.0, None])
    return rows + [
        [n, size / s / 1e9, size / s / limit if limit else None, 1e3 * s] for n, s in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=14.9, help="of the bfloat16 model (default: 32 layers)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold-rounds", type=int, default=1, help="of disk reads; 0 leaves the disk out")
    parser.add_argument(
        "--transformers", action="store_true", help="measure transformers with bitsandbytes too"
    )
    parser.add_argument("--dir", type=Path, help="where to work (default: the system's temporary directory)")
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--measure", nargs=2, metavar=("ARM", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return
    with tempfile.TemporaryDirectory(prefix="nf4-bench-", dir=arguments.dir) as folder:
        path = Path(folder) / "model.nf4"
        make_random_file(path, "llama-3.1-8b", int(arguments.gib * 2**30), READERS)
        with Nf4File.open(path, mmap=False) as file:
            size = file.weights_end - file.header.data_start
        rows, notes = warm_rows(path, size, arguments.rounds)
        if arguments.transformers:
            theirs = in_fresh_processes("transformers", export(path), 1)
            rate = size / theirs["seconds"]
            row = ["transformers and bitsandbytes, first of a process", rate / 1e9]
            rows.append([*row, None, 1e3 * theirs["seconds"]])
        if arguments.cold_rounds:
            rows += cold_rows(path, size, arguments.cold_rounds)
    Report(
        f"Loading {size / 1e9:.2f} GB of packed weights (Llama-3.1-8B's shape) to a GPU",
        ["what", "GB/s", "of the lower limit", "ms"],
        rows,
        machine("torch", "safetensors", gpu=True),
        [
            f"Median of {arguments.rounds} rounds in one process, or of processes where it says so; the file"
            " is in the page cache unless it says otherwise, and then the limit is the disk's.",
            "Allocation of device and pinned memory is inside the time; starting CUDA is not.",
            *notes,
        ],
    ).finish(arguments.json)


if __name__ == "__main__":
    main()
