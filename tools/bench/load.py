"""`nf4.load` of packed files of several sizes: time and memory must follow the layers, not the bytes.

    python tools/bench/load.py tiny:0.0155 llama-2-7b:4 --json tools/bench/results/load.json

Makes synthetic Llama-shaped checkpoints in a temporary directory (inside --dir), compiles them, and loads
each file in fresh processes: one small model first, so that code and libraries are in memory, then the file,
timed. The sizes asked for by default have ten layers narrow, one layer wide, ten layers wide.
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

from report import Report, machine

from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

MAKE_CHECKPOINT = Path(__file__).parents[1] / "make_checkpoint.py"


def resident(field: str) -> int:
    """Bytes of this process in memory by kind, RssAnon or RssFile (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")


def measure(small: str, path: str) -> dict[str, float]:
    """Load `path` in this process: seconds, growth of memory in bytes, layers."""
    import nf4

    nf4.load(small)
    before = {field: resident(field) for field in ("RssAnon", "RssFile")}
    started = time.perf_counter()
    model = nf4.load(path)
    seconds = time.perf_counter() - started
    growth = {field: resident(field) - value for field, value in before.items()}
    return {"seconds": seconds, "layers": model.config.num_hidden_layers, **growth}


def packed_file(folder: Path, gib: float, shape: str) -> tuple[int, Path]:
    """(bytes of the checkpoint, the packed file), in `folder`; the checkpoint is removed."""
    model, out = folder / f"{shape}-{gib}", folder / f"{shape}-{gib}.nf4"
    make = [sys.executable, str(MAKE_CHECKPOINT), str(model), "--gib", str(gib), "--shape", shape]
    subprocess.run(make, check=True)
    compile_checkpoint(model, out, CompileOptions())
    shards = list(model.glob("*.safetensors"))
    source_bytes = sum(shard.stat().st_size for shard in shards)
    for shard in shards:
        shard.unlink()
    return source_bytes, out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = ["tiny:0.0155", "llama-2-7b:0.5", "llama-2-7b:4"]
    about = "shape and GiB of a checkpoint; see tools/make_checkpoint.py"
    parser.add_argument("sizes", nargs="*", default=default, metavar="SHAPE:GIB", help=about)
    parser.add_argument("--rounds", type=int, default=5, help="processes a file (default 5)")
    parser.add_argument("--dir", type=Path, help="where to work (default: the system's temporary directory)")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--measure", nargs=2, metavar=("SMALL", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return

    rows: list[list[str | float | int | None]] = []
    with tempfile.TemporaryDirectory(prefix="nf4-bench-", dir=args.dir) as folder:
        _, small = packed_file(Path(folder), 0.001, "tiny")
        for size in args.sizes:
            shape, _, gib = size.partition(":")
            source_bytes, path = packed_file(Path(folder), float(gib), shape)
            command = [sys.executable, __file__, "--measure", str(small), str(path)]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(args.rounds)]
            row: list[str | float | int | None] = [shape, source_bytes / 2**30, path.stat().st_size / 1e9]
            row += [int(runs[0]["layers"])]
            row += [1e3 * statistics.median(run["seconds"] for run in runs)]
            row += [statistics.median(run[field] for run in runs) / 1e6 for field in ("RssAnon", "RssFile")]
            rows.append(row)
            path.unlink()
    Report(
        title=f"nf4.load, median of {args.rounds} processes",
        columns=["shape", "checkpoint GiB", "file GB", "layers", "ms", "RssAnon +MB", "RssFile +MB"],
        rows=rows,
        machine=machine("nf4", "torch"),
        notes=[
            "Files are in the page cache. RssFile counts mapped pages that were touched: not one weight is."
        ],
    ).finish(args.json)


if __name__ == "__main__":
    main()
