"""The CPU kernels beside bitsandbytes and torch, in one process, with the memory limits of the same run.

    python tools/bench/cpu_kernels.py --json tools/bench/results/cpu_kernels.json

A round times each contender once, one after the other; the table has the median over rounds and the best. On
a busy machine compare the best: contenders with OpenMP threads suffer more from others than ours do. Weights
are Gaussian, --size squared, block 64 with double quantization; results are checked before anything is timed.

bitsandbytes appears as a user meets it: functional.quantize_4bit and dequantize_4bit, matmul_4bit, and
nn.Linear4bit in evaluation, which on a CPU with AVX-512 BF16 repacks the weight once and then multiplies in
bfloat16, whatever its dtype. On a CPU its dequantize_4bit always makes a new tensor, and new memory costs
more than decoding. So ours is shown both ways, and beside it the C kernel of bitsandbytes by itself, which
writes where it is told, from scales that are already decoded.

The memory limit of a row is the time to read and write its bytes at the best rate that plain loops over 256
MiB reach. Caches move data faster than memory, so a row whose data stay in the last-level cache can pass it:
the product is therefore also timed over copies of the weight that together exceed the cache.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Report, machine

from nf4format import _native, blocks, reference
from nf4format.blocks import ARRAY_DTYPES, Dtype, PackedTensor

Call = Callable[[], Any]
PAUSE_SECONDS = 0.02  # OpenMP threads of the contender before spin for some milliseconds
WARM_SECONDS = 0.02
LIMIT_BYTES = 256 << 20  # well beyond a last-level cache
COLD_BYTES = 192 << 20  # of weight copies to take turns, likewise


def interleaved(contenders: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each contender, by round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            time.sleep(PAUSE_SECONDS)
            # Until the contender before has left no trace in caches, and the scheduler, which wakes a pool's
            # threads on the core of their caller, has moved them to cores of their own.
            warm = time.perf_counter() + WARM_SECONDS
            call()
            while time.perf_counter() < warm:
                call()
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """An array at a cache line, as torch's are; written once, so that its pages exist."""
    memory = np.ones(size * dtype.itemsize + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size * dtype.itemsize].view(dtype)


def measure_limits(rounds: int, threads: int) -> dict[str, float]:
    """Best GB/s by kind and number of threads; a copy counts both sides."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "limits.so")
        compiler = os.environ.get("CXX", "c++")
        source = Path(__file__).with_name("memory_limits.cpp")
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        run = ctypes.CDLL(str(library)).run
    run.restype = ctypes.c_double
    run.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    a, b = (aligned(LIMIT_BYTES, np.dtype(np.uint8)) for _ in range(2))
    limits = {}
    for kind, name in enumerate(("read", "write", "write past the caches", "copy")):
        for count in dict.fromkeys((1, threads)):
            seconds = min(run(kind, count, a.ctypes.data, b.ctypes.data, LIMIT_BYTES) for _ in range(rounds))
            limits[f"{name}, {count} thread{'s' * (count > 1)}"] = (
                LIMIT_BYTES * (2 if name == "copy" else 1) / seconds / 1e9
            )
    return limits


def bitsandbytes_state(packed: PackedTensor, dtype: Dtype) -> Any:
    """The same constants as bitsandbytes holds them."""
    from bitsandbytes.functional import QuantState

    nested = QuantState(
        absmax=torch.tensor(packed.nested_absmax),
        blocksize=256,
        code=torch.tensor(packed.nested_quant_map),
        dtype=torch.float32,
    )
    return QuantState(
        absmax=torch.tensor(packed.absmax),
        shape=torch.Size(packed.shape),
        code=torch.tensor(packed.quant_map),
        blocksize=64,
        quant_type="nf4",
        dtype=getattr(torch, dtype),
        offset=torch.tensor(packed.nested_offset),
        state2=nested,
    )


def to_torch(array: np.ndarray, dtype: Dtype) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


class Bench:
    """The shared inputs, and for each operation its contenders, checked; "bitsandbytes" is the measure."""

    def __init__(self, size: int, threads: int) -> None:
        self.size, self.threads = size, threads
        gaussian = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32) * np.float32(0.02)
        self.weights: dict[Dtype, np.ndarray] = {
            "float32": gaussian,
            "bfloat16": reference.from_float32(gaussian, "bfloat16"),
        }
        self.packed = blocks.quantize(self.weights["bfloat16"], "bfloat16", threads=threads)

    def quantize(self, dtype: Dtype) -> dict[str, Call]:
        from bitsandbytes.functional import quantize_4bit

        values = self.weights[dtype]
        tensor = to_torch(values, dtype)
        theirs, _ = quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
        ours = blocks.quantize(values, dtype)
        assert (ours.codes != theirs.numpy().reshape(-1)).sum() <= 2e-6 * ours.codes.size
        return {
            "1 thread": lambda: blocks.quantize(values, dtype),
            f"{self.threads} threads": lambda: blocks.quantize(values, dtype, threads=self.threads),
            "bitsandbytes": lambda: quantize_4bit(tensor, quant_type="nf4", compress_statistics=True),
        }

    def dequantize(self, dtype: Dtype) -> dict[str, Call]:
        from bitsandbytes.cextension import lib
        from bitsandbytes.functional import dequantize_4bit

        packed, state = self.packed, bitsandbytes_state(self.packed, dtype)
        codes = torch.tensor(packed.codes).reshape(-1, 1)
        out = aligned(packed.size, ARRAY_DTYPES[dtype])

        scales = torch.from_numpy(reference.decode_absmax(packed))
        kernel = getattr(
            lib, "cdequantize_blockwise_cpu_nf4_" + {"bfloat16": "bf16", "float32": "fp32"}[dtype]
        )
        given = torch.zeros(packed.shape, dtype=getattr(torch, dtype))

        def c_kernel() -> None:
            pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (codes, scales, given))
            kernel(*pointers, ctypes.c_longlong(64), *(ctypes.c_longlong(size) for size in packed.shape))

        def new_tensor() -> torch.Tensor:
            fresh = blocks.dequantize(packed, dtype, threads=self.threads)
            return to_torch(fresh, dtype).view(packed.shape)

        c_kernel()
        assert torch.equal(new_tensor(), dequantize_4bit(codes, state))
        assert torch.equal(new_tensor(), given)
        return {
            "1 thread": lambda: blocks.dequantize(packed, dtype, out=out),
            f"{self.threads} threads": lambda: blocks.dequantize(
                packed, dtype, out=out, threads=self.threads
            ),
            f"{self.threads} threads, new tensor": new_tensor,
            "bitsandbytes": lambda: dequantize_4bit(codes, state),
            "bitsandbytes, C kernel alone": c_kernel,
        }

    def linear(self, dtype: Dtype, m: int) -> dict[str, Call]:
        import bitsandbytes

        packed, state = self.packed, bitsandbytes_state(self.packed, dtype)
        x = reference.from_float32(
            np.random.default_rng(m).standard_normal((m, self.size), dtype=np.float32), dtype
        )
        tensor = to_torch(x, dtype)
        codes = torch.tensor(packed.codes).reshape(-1, 1)
        dense = to_torch(self.weights[dtype], dtype)
        module = self.eval_module(dtype)
        copies = [
            PackedTensor(**{**vars(packed), "codes": packed.codes.copy()})
            for _ in range(COLD_BYTES // packed.codes.nbytes)
        ]
        turns = itertools.cycle(copies)
        module(tensor)  # converts its weight
        module_turns = itertools.cycle([copy.deepcopy(module) for _ in copies])

        exact = reference.linear(reference.to_float32(x, dtype), packed)
        ours = blocks.linear(x, dtype, packed, "float32")
        assert np.linalg.norm(ours - exact) < 2e-4 * np.linalg.norm(exact)
        theirs = bitsandbytes.matmul_4bit(tensor, codes.t(), state).float().numpy()
        assert np.linalg.norm(theirs - exact) < 2e-2 * np.linalg.norm(exact)

        def cold() -> np.ndarray:
            return blocks.linear(x, dtype, next(turns), threads=self.threads)

        return {
            "1 thread": lambda: blocks.linear(x, dtype, packed),
            f"{self.threads} threads": lambda: blocks.linear(x, dtype, packed, threads=self.threads),
            f"{self.threads} threads, weight not in cache": cold,
            "bitsandbytes": lambda: bitsandbytes.matmul_4bit(tensor, codes.t(), state),
            "bitsandbytes, Linear4bit in evaluation": lambda: module(tensor),
            "bitsandbytes, Linear4bit in evaluation, weight not in cache": lambda: next(module_turns)(tensor),
            f"torch, {dtype} weight": lambda: torch.nn.functional.linear(tensor, dense),
        }

    def eval_module(self, dtype: Dtype) -> torch.nn.Module:
        """Linear4bit with the same weight; its first forward pass converts it for inference."""
        import bitsandbytes

        kind = getattr(torch, dtype)
        module = bitsandbytes.nn.Linear4bit(
            self.size, self.size, bias=False, compute_dtype=kind, quant_type="nf4"
        )
        weight = to_torch(self.weights[dtype], dtype)
        module.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
        return module.to("cpu").eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=int, default=4096, help="rows and columns of the weight (default: 4096)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each contender (default: 15)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="default: torch's number"
    )
    parser.add_argument("--json", metavar="PATH", help="write the result there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    load = os.getloadavg()[0]

    limits = measure_limits(arguments.rounds, arguments.threads)
    read = max(rate for name, rate in limits.items() if name.startswith("read"))
    write = max(rate for name, rate in limits.items() if name.startswith("write"))
    bench = Bench(arguments.size, arguments.threads)
    packed = bench.packed
    packed_bytes = packed.codes.nbytes + packed.absmax.nbytes + packed.nested_absmax.nbytes

    def limit_ms(read_bytes: float, written_bytes: float) -> float:
        return (read_bytes / read + written_bytes / write) / 1e6

    operations: list[tuple[str, dict[str, Call], float]] = []
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32")
    for dtype in dtypes:
        values_bytes = packed.size * ARRAY_DTYPES[dtype].itemsize
        operations.append((f"quantize {dtype}", bench.quantize(dtype), limit_ms(values_bytes, packed_bytes)))
        operations.append(
            (f"dequantize {dtype}", bench.dequantize(dtype), limit_ms(packed_bytes, values_bytes))
        )
    for dtype in dtypes:
        for m in (1, 8):
            operations.append(
                (f"product {dtype}, M = {m}", bench.linear(dtype, m), limit_ms(packed_bytes, 0))
            )

    rows: list[list[str | float | int | None]] = []
    for name, contenders, limit in operations:
        times = interleaved(contenders, arguments.rounds)
        peer = statistics.median(times["bitsandbytes"])
        for contender, row in times.items():
            median = statistics.median(row)
            rows.append([f"{name}: {contender}", median, min(row), peer / median, limit / median])

    info = _native.build_info()
    Report(
        title=f"CPU kernels, weight {arguments.size} x {arguments.size}, median of {arguments.rounds} rounds",
        columns=["", "median ms", "best ms", "times as fast as bitsandbytes", "of memory limit"],
        rows=rows,
        machine={
            **machine("nf4", "bitsandbytes", "torch", "numpy"),
            "instruction set": info["isa"],
            "compiler": info["compiler"],
            "threads": str(arguments.threads),
            "load at start": f"{load:.1f}",
        },
        notes=[
            "Memory limits, GB/s: " + ", ".join(f"{name} {rate:.1f}" for name, rate in limits.items()) + ".",
            "Rows without a name of another project are ours. Their products are off by 5e-5 of the norm for "
            "bfloat16 and 2e-7 for float32; Linear4bit in evaluation multiplies both in bfloat16.",
        ],
    ).finish(arguments.json)


if __name__ == "__main__":
    main()
