"""qcompile against `cp -r` of the same checkpoint: wall time with fsync on both, and peak anonymous memory.

    python tools/bench/compile.py --gib 4 --json tools/bench/results/compile.json

Makes a synthetic Llama-shaped checkpoint in a temporary directory (inside --dir, which decides the disk),
then takes turns: copy, compile at each level, and again. Before each turn the source is read once, so that
all find it in the page cache, and dirty pages of earlier turns are on the disk.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from report import Report, machine

MAKE_CHECKPOINT = Path(__file__).parents[1] / "make_checkpoint.py"


def warm(folder: Path) -> None:
    """Read every file once, and let the disk come to rest."""
    buffer = bytearray(4 << 20)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    os.sync()


def copy(source: Path, target: Path) -> None:
    """`cp -r`, then fsync of every file and of the directory."""
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in [*target.iterdir(), target]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def run_sampled(command: list[str]) -> int:
    """Run a command; returns its peak anonymous memory in bytes: RssAnon of /proc/PID/status every 5 ms."""
    peak = 0
    with subprocess.Popen(command) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with status {process.returncode}")
    return peak


def timed(action: Callable[[], int | None]) -> tuple[float, int]:
    """Seconds, and what the action returned."""
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result or 0


def hashing_rate() -> float:
    """SHA-256 of one core, in GB/s: the dearest step of a compilation."""
    block = bytes(64 << 20)
    started = time.perf_counter()
    hashlib.sha256(block).digest()
    return len(block) / (time.perf_counter() - started) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint (default 4)")
    parser.add_argument("--shape", default="llama-2-7b", help="of whose layers; see tools/make_checkpoint.py")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument(
        "--options",
        default="-O0;-O1",
        help='of qcompile, a row each: --options="-O1;-O1 --device cuda" (default: %(default)s)',
    )
    parser.add_argument("--dir", type=Path, help="where to work (default: the system's temporary directory)")
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()

    copies: list[float] = []
    compiles: dict[str, list[float]] = {options: [] for options in args.options.split(";")}
    peaks: list[int] = []
    with tempfile.TemporaryDirectory(prefix="nf4-bench-", dir=args.dir) as folder:
        model, copied, out = (Path(folder, name) for name in ("model", "copied", "out.nf4"))
        make = [sys.executable, MAKE_CHECKPOINT, model, "--gib", str(args.gib), "--shape", args.shape]
        subprocess.run(make, check=True)
        source_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        for turn in range(args.rounds):
            warm(model)
            copies.append(timed(lambda: copy(model, copied))[0])
            shutil.rmtree(copied)
            print(f"turn {turn + 1}: cp -r {copies[-1]:.2f} s", file=sys.stderr)
            for options, times in compiles.items():
                warm(model)
                command = [sys.executable, "-m", "qcompile", str(model), str(out), "--quiet"]
                seconds, peak = timed(partial(run_sampled, command + options.split()))
                times.append(seconds)
                peaks.append(peak)
                file_bytes = out.stat().st_size
                out.unlink()
                print(f"turn {turn + 1}: qcompile {options} {seconds:.2f} s", file=sys.stderr)

    copy_s = statistics.median(copies)
    Report(
        title=f"qcompile of a {source_bytes / 2**30:.2f} GiB {args.shape}-shaped bf16 checkpoint, "
        f"median of {args.rounds} turns",
        columns=["", "median s", "best s", "worst s", "input GB/s", "GB written", "times cp -r"],
        rows=[
            _row("cp -r, fsync", copies, source_bytes, source_bytes, copy_s),
            *(
                _row(f"qcompile {options}", times, source_bytes, file_bytes, copy_s)
                for options, times in compiles.items()
            ),
        ],
        machine=machine("nf4", "numpy"),
        notes=[
            f"Peak anonymous memory of qcompile: {max(peaks) / 2**20:.0f} MiB "
            "(RssAnon of /proc/PID/status, sampled every 5 ms).",
            "The source is in the page cache; both times include fsync, and starting Python is included.",
            f"For scale: SHA-256 on one core {hashing_rate():.2f} GB/s; the copy wrote "
            f"{source_bytes / copy_s / 1e9:.2f} GB/s.",
        ],
    ).finish(args.json)


def _row(
    name: str, seconds: list[float], read: int, written: int, copy_s: float
) -> list[str | float | int | None]:
    median = statistics.median(seconds)
    return [name, median, min(seconds), max(seconds), read / median / 1e9, written / 1e9, median / copy_s]


if __name__ == "__main__":
    main()
