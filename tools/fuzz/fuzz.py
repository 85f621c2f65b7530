"""Fuzzes the readers of strangers' files; see docs/hostile-input.md.

usage: python tools/fuzz/fuzz.py --count 100000 [--seed 0] [--jobs 2] [--json OUT]     random, structure-aware
       python tools/fuzz/fuzz.py --atheris container -max_total_time=600               guided by coverage
       python tools/fuzz/fuzz.py --replay container build/fuzz/violation-...           one input again

An input for which something does not hold is written to build/fuzz/ and ends the run with status 1. The same
count and seed make the same inputs, whatever the number of jobs. Coverage-guided runs need
`pip install atheris`; the arguments behind the target are libFuzzer's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mutators
import properties

CORPUS = Path(__file__).parent / "corpus"
FOUND = Path(__file__).parents[2] / "build" / "fuzz"
BATCH = 500

Mutator = Callable[[bytes, random.Random], bytes]

# target -> (its seeds, its mutator, its share of the inputs)
TARGETS: dict[str, tuple[str, Mutator, int]] = {
    "container": ("container", mutators.container, 6),
    "source": ("source", mutators.source, 6),
    "strict": ("source", mutators.source, 2),
    "index": ("index.json", mutators.document, 1),
    "config": ("config.json", mutators.document, 1),
}
_ORDER = [name for name, (_, _, share) in TARGETS.items() for _ in range(share)]


def seeds(target: str) -> list[bytes]:
    """The corpus of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / TARGETS[target][0]).iterdir())]


@contextmanager
def checks() -> Iterator[dict[str, Any]]:
    """Target -> what checks an input of it."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as place:
        folders = [Path(place, name) for name in ("index", "config")]
        for folder in folders:
            folder.mkdir()
        _write_model(folders[0], sharded=True)
        _write_model(folders[1], sharded=False)
        yield {
            "container": properties.Container(),
            "source": properties.Source(),
            "strict": properties.Source(strict=True),
            "index": properties.Directory(folders[0], "model.safetensors.index.json"),
            "config": properties.Directory(folders[1], "config.json"),
        }


def _write_model(folder: Path, *, sharded: bool) -> None:
    """A checkpoint of the corpus: its mixed tensors, in two shards or one file."""
    (folder / "config.json").write_bytes((CORPUS / "config.json" / "llama.json").read_bytes())
    if not sharded:
        (folder / "model.safetensors").write_bytes((CORPUS / "source" / "mixed.safetensors").read_bytes())
        return
    from make_corpus import SHARDS, tensor_file

    parts = {
        SHARDS[0]: {"a": ("F32", [2, 2], bytes(16))},
        SHARDS[1]: {"b.weight": ("BF16", [3], bytes(6)), "e": ("U8", [0, 4], b"")},
    }
    for name, tensors in parts.items():
        (folder / name).write_bytes(tensor_file(tensors))


def input_of(seed: int, index: int, corpora: dict[str, list[bytes]]) -> tuple[str, bytes]:
    """Target and bytes of the input `index` of a run."""
    rng = random.Random(f"{seed}:{index}")
    target = _ORDER[index % len(_ORDER)]
    return target, TARGETS[target][1](rng.choice(corpora[target]), rng)


def check_range(seed: int, begin: int, end: int, by_target: dict[str, Any]) -> None:
    """Check the inputs [begin, end) of a run. Raises properties.Violation, the input kept in a file."""
    corpora = {target: seeds(target) for target in TARGETS}
    for index in range(begin, end):
        target, data = input_of(seed, index, corpora)
        try:
            by_target[target](data)
        except properties.Violation as violation:
            raise properties.Violation(f"{keep(target, data)}: {violation}") from violation


def keep(target: str, data: bytes) -> Path:
    """Write an input under build/fuzz and return its path."""
    FOUND.mkdir(parents=True, exist_ok=True)
    path = FOUND / f"violation-{target}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


def _work(seed: int, count: int, next_batch: Any, told: Any, results: Any) -> None:
    """One process: draws batches until there are none."""
    try:
        with checks() as by_target:
            while True:
                with next_batch.get_lock():
                    begin = next_batch.value
                    next_batch.value = begin + BATCH
                if begin >= count:
                    break
                told.value = begin
                check_range(seed, begin, min(begin + BATCH, count), by_target)
            results.put({name: (check.tally, check.tally.facts()) for name, check in by_target.items()})
    except properties.Violation as violation:
        results.put(str(violation))


def run(count: int, seed: int, jobs: int) -> tuple[dict[str, Any], list[str]]:
    """Random inputs in several processes; the figures, and what does not hold."""
    started = time.perf_counter()
    next_batch = multiprocessing.Value("q", 0)
    told = [multiprocessing.Value("q", 0) for _ in range(jobs)]
    results: Any = multiprocessing.Queue()
    workers = [
        multiprocessing.Process(target=_work, args=(seed, count, next_batch, told[job], results))
        for job in range(jobs)
    ]
    for worker in workers:
        worker.start()
    gathered: list[Any] = []
    while len(gathered) < jobs:
        try:
            gathered.append(results.get(timeout=1))
        except Exception:  # queue.Empty: look whether a process died without a word
            dead = [job for job, worker in enumerate(workers) if worker.exitcode not in (None, 0)]
            if dead and results.empty():
                first = told[dead[0]].value
                code = workers[dead[0]].exitcode
                died = f"a process died ({code}) in inputs {first} to {first + BATCH}"
                gathered += [died] * len(dead)
    for worker in workers:
        worker.join()
    violations = [item for item in gathered if isinstance(item, str)]
    done = [item for item in gathered if not isinstance(item, str)]
    return {
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "jobs": jobs,
        **_sum(done),
    }, violations


def _sum(done: list[dict[str, Any]]) -> dict[str, Any]:
    targets = {}
    for name in TARGETS:
        refused: Counter[str] = Counter()
        for item in done:
            refused += item[name][0].refused
        parts = [item[name][1] for item in done]
        targets[name] = {
            "inputs": sum(part["inputs"] for part in parts),
            "accepted": sum(part["accepted"] for part in parts),
            "kinds_of_refusal": len(refused),
            "slowest_ms": max((part["slowest_ms"] for part in parts), default=0),
        }
    peak = max((part["peak_rss_mib"] for item in done for _, part in item.values()), default=0)
    return {
        "inputs": sum(target["inputs"] for target in targets.values()),
        "peak_rss_mib": peak,
        "targets": targets,
    }


def guided(target: str, arguments: list[str]) -> None:
    """libFuzzer's loop over a target, by atheris: inputs that reach new code of ours are kept."""
    import atheris

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        try:
            if rng.random() < 0.5:
                return TARGETS[target][1](data, rng)[:max_size]
        except Exception:  # not a file that can be taken apart
            pass
        return atheris.Mutate(data, max_size)

    with checks() as by_target:

        def one(data: bytes) -> None:
            by_target[target](data)

        FOUND.mkdir(parents=True, exist_ok=True)
        fresh = FOUND / f"corpus-{target}"
        fresh.mkdir(exist_ok=True)
        for module in ("header", "strictjson", "profile", "sums", "container", "checkpoint"):
            for function in _functions(f"nf4format.{module}"):
                atheris.instrument_func(function)
        options = [f"-artifact_prefix={FOUND}/", "-max_len=65536", *arguments]
        atheris.Setup(
            [sys.argv[0], str(fresh), str(CORPUS / TARGETS[target][0]), *options], one, custom_mutator=change
        )
        atheris.Fuzz()


def _functions(module: str) -> list[Any]:
    import importlib
    import inspect

    loaded = importlib.import_module(module)
    plain = [item for _, item in inspect.getmembers(loaded, inspect.isfunction) if item.__module__ == module]
    classes = [item for _, item in inspect.getmembers(loaded, inspect.isclass) if item.__module__ == module]
    return plain + [item for kind in classes for _, item in inspect.getmembers(kind, inspect.isfunction)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--atheris", choices=TARGETS)
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"))
    options, rest = parser.parse_known_args()
    if options.atheris:
        guided(options.atheris, rest)
        return
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if options.replay:
        target, path = options.replay
        with checks() as by_target:
            print("accepted" if by_target[target](Path(path).read_bytes()) else "refused")
        return
    facts, violations = run(options.count, options.seed, options.jobs)
    print(json.dumps(facts, indent=1))
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    for violation in violations:
        print(f"fuzz: {violation}", file=sys.stderr)
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
