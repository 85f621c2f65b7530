"""The GPU kernels beside bitsandbytes, cuBLAS and torch, with the limits of the same run.

    python tools/bench/gpu_kernels.py --json tools/bench/results/gpu_kernels.json

Times are medians of CUDA-graph replays of back-to-back calls that walk through at least 12 weights (more of
small ones), so that a weight has left the L2 cache when its turn comes. Weights are random bytes in our
layout; bitsandbytes gets the same bytes. Results are compared with float64 before anything is timed.

Decoding is given as a share of what a large device-to-device copy moves, bytes read and written; products as
time over that of cuBLAS with the weight in bfloat16, each by the way that `nf4.ops` takes for that many rows.
bitsandbytes' product is its matmul_4bit, whatever way that takes.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from report import Report, machine

from nf4 import _cuda
from nf4.ops import cuda as ops_cuda
from nf4.ops import product_way
from nf4format.codebook import NESTED_MAP, NF4_LEVELS

SHAPES = ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192))
ROWS = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 4096, 8192)
PEER_ROWS = (1, 8, 16, 64, 256, 1024, 4096)
BFLOAT16 = 1  # type code
COLD_BYTES = 400_000_000  # of packed weights in rotation, several times an L2 cache

Row = list[str | float | int | None]


class Weight:
    """Random codes and scales of both signs, on the GPU."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.k = n, k
        blocks = math.ceil(n * k / 64)
        self.codes = torch.randint(0, 256, (math.ceil(n * k / 2),), dtype=torch.uint8, device="cuda")
        self.absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda")
        self.nested_absmax = torch.rand(math.ceil(blocks / 256), device="cuda") * 0.02 + 0.005
        self.nested_map = torch.from_numpy(NESTED_MAP.copy()).cuda()
        self.offset = torch.tensor(0.0457).item()
        self.levels = torch.from_numpy(NF4_LEVELS.copy()).cuda()
        tensors = (self.codes, self.absmax, self.levels, self.nested_absmax, self.nested_map)
        self.packed = (*(tensor.data_ptr() for tensor in tensors), self.offset)
        for tensor in tensors:
            ops_cuda.mark_constant(tensor)

    def dequantize(self, out: torch.Tensor) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        _cuda.dequantize(*self.packed, 0, out.numel(), out.data_ptr(), BFLOAT16, True, stream)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        nested = (self.nested_absmax, self.nested_map, self.offset)
        return ops_cuda.linear(x, self.codes, self.absmax, self.levels, *nested, self.n)

    def way(self, num_rows: int) -> str:
        wgmma = _cuda.linear_wgmma_workspace(num_rows, self.n, self.k) > 0
        return product_way.way(torch.bfloat16, num_rows, self.n, self.k, aligned=True, wgmma=wgmma).value

    def exact(self) -> torch.Tensor:
        """float64 [n, k], from the rule spelled out in torch operations."""
        scale = self.nested_map[self.absmax.int()]
        scale = scale * self.nested_absmax.repeat_interleave(256)[: scale.numel()] + self.offset
        codes = torch.stack([self.codes >> 4, self.codes & 15], 1).flatten()[: self.n * self.k].int()
        return (
            (self.levels[codes] * scale.repeat_interleave(64)[: codes.numel()]).double().view(self.n, self.k)
        )

    def state(self, functional: Any) -> Any:
        """The same weight as bitsandbytes describes it."""
        nested = functional.QuantState(
            absmax=self.nested_absmax, code=self.nested_map, blocksize=256, dtype=torch.float32
        )
        return functional.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.n, self.k)),
            code=self.levels,
            blocksize=64,
            quant_type="nf4",
            dtype=torch.bfloat16,
            offset=torch.tensor(self.offset, device="cuda"),
            state2=nested,
        )


def replay_time(call: Callable[[int], object], copies: int, *, repeats: int = 15) -> float:
    """Microseconds of one call: the median over replays of a graph of at least 12 calls in rotation."""
    rounds = max(1, 12 // copies)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(copies):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for i in range(copies):
                call(i)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (copies * rounds))
    return statistics.median(times)


def copy_limit() -> float:
    """Bytes read and written a second by copies of 1 GiB inside the GPU's memory."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.numel() / statistics.median(times[2:])


def matmul_limit() -> float:
    """Floating point operations a second of a bfloat16 product of 8192-square matrices by cuBLAS."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    out = torch.empty_like(a)
    return 2e6 * 8192**3 / replay_time(lambda i: torch.mm(a, b, out=out), 1, repeats=5)


def measure_shape(n: int, k: int, copy: float, bnb: Any) -> list[Row]:
    """Rows of the table for one weight shape."""
    copies = max(12, min(24, math.ceil(COLD_BYTES / (n * k // 2))))
    weights = [Weight(n, k) for _ in range(copies)]
    dense = [torch.empty(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    states = [weight.state(bnb.functional) for weight in weights] if bnb else []
    shape, moved = f"{n} x {k}", n * k * (0.5 + 1 / 64 + 4 / 16384 + 2)

    exact = weights[0].exact()
    weights[0].dequantize(dense[0])
    torch.cuda.synchronize()
    if not torch.equal(dense[0], exact.float().bfloat16()):
        raise SystemExit(f"{shape}: decoding gives wrong bits")
    ours = replay_time(lambda i: weights[i].dequantize(dense[i]), copies)
    theirs = None
    if bnb:
        theirs = replay_time(
            lambda i: bnb.functional.dequantize_4bit(weights[i].codes.view(-1, 1), states[i], out=dense[i]),
            copies,
        )
    share = moved * 1e6 / ours / copy
    rows: list[Row] = [[f"decode {shape}", ours, share, theirs, theirs / ours if theirs else None]]
    for i in range(copies):
        weights[i].dequantize(dense[i])
    for m in ROWS:
        x = torch.randn(m, k, device="cuda").bfloat16()
        expected = x.double() @ exact.T
        error = float((weights[0].linear(x).double() - expected).norm() / expected.norm())
        if not error < 2.6e-3:
            raise SystemExit(f"{shape}, M = {m}: relative error {error:.2e}")
        repeats = 5 if m * n * k > 1 << 38 else 15

        y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        cublas = replay_time(lambda i, x=x, y=y: torch.mm(x, dense[i].T, out=y), copies, repeats=repeats)
        ours = replay_time(lambda i, x=x: weights[i].linear(x), copies, repeats=repeats)
        theirs = None
        if bnb and m in PEER_ROWS:
            theirs = replay_time(
                lambda i, x=x: bnb.matmul_4bit(x, weights[i].codes.view(-1, 1).t(), states[i]),
                copies,
                repeats=repeats,
            )
        label = f"product {shape}, M = {m}, {weights[0].way(m)}"
        rows.append([label, ours, ours / cublas, theirs, theirs / ours if theirs else None])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", help="write the table here")
    arguments = parser.parse_args()
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        print(f"bitsandbytes does not import, its columns stay empty: {error}")
        bnb = None
    torch.manual_seed(0)
    copy, matmul = copy_limit(), matmul_limit()
    rows: list[Row] = []
    for n, k in SHAPES:
        rows += measure_shape(n, k, copy, bnb)
        torch.cuda.empty_cache()
    facts = {"GPU": torch.cuda.get_device_name(), **machine("torch", "bitsandbytes")}
    facts["nvcc"] = _cuda.build_info()["nvcc"]
    report = Report(
        "GPU kernels, bfloat16, cold weights, graph replay",
        ["work", "us", "of the copy limit / over cuBLAS", "peer us", "peer / ours"],
        rows,
        facts,
        [
            f"Limits in this run: copy {copy / 1e9:,.0f} GB/s, bf16 product {matmul / 1e12:,.0f} TFLOP/s.",
            "Decoding: share of the copy limit, more is better. Products: time over cuBLAS with"
            " bfloat16 weights, less is better; after M the way that was taken.",
            "Peer: bitsandbytes.",
        ],
    )
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
