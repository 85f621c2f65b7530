"""How fast data become examples, and in how much memory.

    python tools/bench/data.py MODEL_DIR TEXT ROWS.jsonl --json tools/bench/results/data.json

Tokenizes plain text, prompt and completion rows, and the same rows as conversations, each in a fresh process
without a cache, and opens a store that is there already. Input is repeated to `--mib`, so that memory shows
whether it grows with the file: compare with a run of another size. Rows need the keys question and answer.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import Report, machine

SEQ_LEN = 512


def measure(model: Path, data: Path, template: str | None, cache: str) -> dict[str, float]:
    """Load `data` in this process: tokens, seconds on the clock and of processors, growth of the peak."""
    from nf4.data.options import DataOptions
    from nf4.data.plan import Batches, BatchOptions
    from nf4.data.reading import load_sources
    from nf4.text.tokenizer import Tokenizer

    settings = {}
    for name in ("config", "tokenizer_config", "generation_config"):
        path = model / f"{name}.json"
        settings[name] = json.loads(path.read_bytes()) if path.exists() else None
    tokenizer = Tokenizer((model / "tokenizer.json").read_bytes(), **settings)
    tokenizer.encode_batch(["a warm start of the threads"] * 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = DataOptions(seq_len=SEQ_LEN, cache=cache, template=template, as_chat=template is not None)
    started, used = time.perf_counter(), processor_seconds()
    sources = load_sources([(data, 1.0)], tokenizer, options)
    seconds, used = time.perf_counter() - started, processor_seconds() - used
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    started = time.perf_counter()
    batches = Batches(sources, BatchOptions(batch=4, seq_len=SEQ_LEN, packing="best-fit"), seed=0)
    count = batches.steps
    batches.step(0)
    planned = time.perf_counter() - started
    return {
        "tokens": sources[0].dataset.lengths.sum().item(),
        "seconds": seconds,
        "used": used,
        "growth": growth * 1024,
        "planned": planned,
        "steps": count,
    }


def processor_seconds() -> float:
    """Of this process and of those that it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def repeated(source: Path, target: Path, mib: float, between: bytes) -> Path:
    """A file of at least `mib` MiB: the source again and again."""
    content = source.read_bytes().strip(b"\n") + between
    with target.open("wb") as out:
        while out.tell() < mib * 2**20:
            out.write(content)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, help="directory with tokenizer.json and its settings")
    parser.add_argument("text", type=Path, help="documents separated by <|doc|> lines")
    parser.add_argument("rows", type=Path, help="JSONL with question and answer")
    parser.add_argument("--mib", type=float, nargs="+", default=[16, 64], help="sizes of the input")
    parser.add_argument("--rounds", type=int, default=3, help="processes a figure; the fastest counts")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--measure", nargs=3, metavar=("FILE", "TEMPLATE", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        data, template, cache = args.measure
        print(json.dumps(measure(args.model, Path(data), template or None, cache)))
        return

    rows: list[list[str | float | int | None]] = []
    with tempfile.TemporaryDirectory(prefix="nf4-bench-") as folder:
        for mib in args.mib:
            text = repeated(args.text, Path(folder, "text.txt"), mib, b"\n<|doc|>\n")
            table = repeated(args.rows, Path(folder, "rows.jsonl"), mib, b"\n")
            cache = str(Path(folder, f"cache{mib}"))
            for name, data, template, place in (
                ("plain text", text, "", "none"),
                ("question and answer", table, "", "none"),
                ("the same as conversations", table, "plain", "none"),
                ("plain text, found in the cache", text, "", cache),
            ):
                command = [sys.executable, __file__, str(args.model), str(args.text), str(args.rows)]
                command += ["--measure", str(data), template, place]
                if place != "none":
                    subprocess.run(command, check=True, capture_output=True)
                runs = [json.loads(subprocess.check_output(command)) for _ in range(args.rounds)]
                best = min(runs, key=lambda run: run["seconds"])
                tokens = best["tokens"]
                rows.append(
                    [
                        name,
                        round(data.stat().st_size / 2**20, 1),
                        tokens,
                        tokens / best["seconds"] / 1e6,
                        best["used"] / best["seconds"],
                        tokens / best["used"] / 1e6,
                        max(run["growth"] for run in runs) / 2**20,
                        tokens / best["planned"] / 1e6,
                    ]
                )
    Report(
        title=f"Files to examples of at most {SEQ_LEN} tokens, best of {args.rounds} processes",
        columns=[
            "data",
            "MiB",
            "tokens",
            "M tokens/s",
            "cores used",
            "M tokens/s a core",
            "peak memory +MiB",
            "packing M tokens/s",
        ],
        rows=rows,
        machine=machine("nf4", "tokenizers"),
        notes=[
            "Reading, tokenizing, labels and the checked store together; what was cut off is not counted.",
            "Packing: best fit of an epoch, and the first step's batch.",
        ],
    ).finish(args.json)


if __name__ == "__main__":
    main()
