"""AdamW on a GPU: resident beside torch's fused one, with 8-bit states beside bitsandbytes, paged beside the
limit of the link to the host.

    python tools/bench/gpu_optimizer.py --results tools/bench/results

writes gpu_optimizer.json, gpu_optimizer_8bit.json and gpu_paging.json there.

Parameters have the shapes of LoRA adapters of Llama-3.1-8B on all linear layers, 448 tensors. Times of steps:
"back to back" is the mean over many calls without a pause between them, medians of several rounds, host and
GPU together; "GPU alone" the same calls replayed as a CUDA graph; "from idle" one call on an idle GPU until
it has ended. torch's optimizer steps with gradients that stay in place, as ours.

8-bit states: bitsandbytes' AdamW8bit and PagedAdamW8bit take the same steps; what they keep as state is read
from their tensors. Their steps are not captured in graphs.

Evicted: a pool of a few pages, so that each step moves almost all state to the GPU and back. Both directions
can move at once, so the least time is the larger of bytes in and bytes out over what pinned copies in that
direction alone reach in the same run; copies in both directions at once are shown beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from report import Report, machine

from nf4.paging.optim import PagedAdamW
from nf4.paging.pinned_arena import PinnedArena

LAYERS, HIDDEN, KEY, INTERMEDIATE = 32, 4096, 1024, 14336
LINEARS = [
    (HIDDEN, HIDDEN), (HIDDEN, KEY), (HIDDEN, KEY), (HIDDEN, HIDDEN),
    (HIDDEN, INTERMEDIATE), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN),
]  # fmt: skip
MIB = 1 << 20
POOL_PAGES = 8
PARTS = ("resident", "8bit", "paged")

Row = list[str | float | int | None]


def lora_parameters(rank: int) -> list[torch.nn.Parameter]:
    """fp32, with gradients; A [rank, in] and B [out, rank] of each linear layer."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = []
    for _ in range(LAYERS):
        for inputs, outputs in LINEARS:
            for shape in ((rank, inputs), (outputs, rank)):
                p = torch.nn.Parameter(torch.randn(shape, device="cuda", generator=generator) * 0.02)
                p.grad = torch.randn(shape, device="cuda", generator=generator) * 1e-3
                made.append(p)
    return made


def back_to_back(call: Callable[[], object], calls: int = 20, rounds: int = 5) -> float:
    """Milliseconds a call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def gpu_alone(call: Callable[[], object]) -> float:
    """Milliseconds a call in a replayed graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    return back_to_back(graph.replay, calls=3) / 10


def from_idle(call: Callable[[], object]) -> float:
    """Milliseconds from the call on an idle GPU to its end."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def copy_limit() -> float:
    """Bytes a second, read and written, of a large copy on the GPU."""
    source, target = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda")
    return 2 * source.numel() / (back_to_back(lambda: target.copy_(source)) / 1e3)


def link_limits() -> tuple[float, float, float]:
    """Bytes a second of pinned copies: to the GPU, from it, and each of both at once."""
    size = 256 * MIB
    arena = PinnedArena(2, size)
    inside = torch.empty(2, size, dtype=torch.uint8, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]

    def copies(inward: bool, outward: bool) -> Callable[[], None]:
        def call() -> None:
            current = torch.cuda.current_stream()
            for wanted, stream, target, source in (
                (inward, streams[0], inside[0], arena.pages[0]),
                (outward, streams[1], arena.pages[1], inside[1]),
            ):
                if wanted:
                    stream.wait_stream(current)
                    with torch.cuda.stream(stream):
                        target.copy_(source, non_blocking=True)
            for stream in streams:
                current.wait_stream(stream)

        return call

    rates = [
        size / back_to_back(copies(*which), calls=4, rounds=3) * 1e3
        for which in ((True, False), (False, True), (True, True))
    ]
    torch.cuda.synchronize()
    arena.close()
    return rates[0], rates[1], rates[2]


def measure_resident(rank: int, copy: float) -> list[Row]:
    rows: list[Row] = []
    params = lora_parameters(rank)
    count = sum(p.numel() for p in params)
    least = 28 * count / copy * 1e3
    theirs = torch.optim.AdamW(params, lr=1e-4, fused=True)
    captured = torch.optim.AdamW(params, lr=1e-4, fused=True, capturable=True)
    ours = PagedAdamW(params, lr=1e-4)

    def clip_by_torch() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)

    factor = torch.ones((), device="cuda")
    work: list[tuple[str, Callable[[], object], Callable[[], object], float | None]] = [
        ("step, torch fused", theirs.step, captured.step, least),
        ("step, ours", ours.step, ours.step, least),
        ("norm and clipping, torch", clip_by_torch, clip_by_torch, None),
        ("norm, ours", ours.gradient_norm, ours.gradient_norm, 4 * count / copy * 1e3),
    ]
    clipped = partial(ours.step, gradient_factor=factor)
    work.append(("step that clips, ours", clipped, clipped, least))
    for name, call, for_graph, limit in work:
        alone = gpu_alone(for_graph)
        times = [back_to_back(call), alone, from_idle(call)]
        rows.append([f"{count / 1e6:,.0f} M: {name}", *times, limit and limit / alone])
    ours.close()
    return rows


def measure_8bit(rank: int, copy: float) -> list[Row]:
    """Steps over resident states; bitsandbytes' rows only where it is installed."""
    params = lora_parameters(rank)
    count = sum(p.numel() for p in params)
    rows: list[Row] = []

    def add(name: str, step: Callable[[], object], state_bytes: int, least: float | None) -> None:
        alone = gpu_alone(step) if least else None
        times = [back_to_back(step), alone, from_idle(step)]
        share = least / alone if least and alone else None
        rows.append([f"{count / 1e6:,.0f} M: {name}", *times, share, state_bytes / 1e6])

    for bits, element_bytes in ((32, 28.0), (8, 16 + 16 / 256)):
        ours = PagedAdamW(params, lr=1e-4, state_bits=bits)
        least = element_bytes * count / copy * 1e3
        add(f"ours, {bits} bits", ours.step, ours.pager.capacity_bytes, least)
        ours.close()
    try:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
    except ImportError:
        print("bitsandbytes is not installed: its rows are left out", flush=True)
        return rows
    for kind in (AdamW8bit, PagedAdamW8bit):
        theirs = kind(params, lr=1e-4, weight_decay=1e-2)
        theirs.step()
        torch.cuda.synchronize()
        values = [value for state in theirs.state.values() for value in state.values()]
        # By address, because all parameters share the maps.
        kept = {value.data_ptr(): value.nbytes for value in values if isinstance(value, torch.Tensor)}
        add(f"bitsandbytes {kind.__name__}", theirs.step, sum(kept.values()), None)
    return rows


def measure_paged(
    rank: int, page_mib: float, pool_pages: int, rates: tuple[float, float, float], state_bits: int = 32
) -> Row:
    params = lora_parameters(rank)
    count = sum(p.numel() for p in params)
    page_bytes = int(page_mib * MIB)
    began = time.perf_counter()
    optimizer = PagedAdamW(
        params, lr=1e-4, state_bits=state_bits, page_bytes=page_bytes, budget_bytes=pool_pages * page_bytes
    )
    made = time.perf_counter() - began
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    before = vars(optimizer.pager.stats).copy()
    steps = 8
    milliseconds = back_to_back(optimizer.step, calls=steps, rounds=3)
    after = vars(optimizer.pager.stats)
    calls = 3 + 3 * steps
    moved = {
        name: (after[name] - before[name]) / calls for name in ("bytes_in", "bytes_out", "stall_seconds")
    }
    least = max(moved["bytes_in"] / rates[0], moved["bytes_out"] / rates[1]) * 1e3
    both = max(moved["bytes_in"], moved["bytes_out"]) / rates[2] * 1e3
    host_began = time.perf_counter()
    optimizer.step()
    host = time.perf_counter() - host_began
    torch.cuda.synchronize()
    optimizer.close()
    bits = "" if state_bits == 32 else f", {state_bits} bits"
    name = f"{count / 1e6:,.0f} M{bits}: pages of {page_mib:g} MiB, pool of {pool_pages}"
    stall = moved["stall_seconds"] * 1e3
    print(
        f"{name}: pinned in {made:.2f} s, host {host * 1e3:.2f} ms a step, stall {stall:.2f} ms", flush=True
    )
    megabytes = [moved[key] / 1e6 for key in ("bytes_in", "bytes_out")]
    return [name, milliseconds, *megabytes, least / milliseconds, both / milliseconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--results", type=Path, help="directory for the tables")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    arguments = parser.parse_args()
    copy, rates = copy_limit(), link_limits()
    torch.cuda.empty_cache()  # or what stays for good settles in the middle of a large free block
    facts = machine("torch", gpu=True)
    to_gpu, from_gpu, each = (rate / 1e9 for rate in rates)
    limits = (
        f"Limits in this run: copy on the GPU {copy / 1e9:,.0f} GB/s; pinned copies to the GPU {to_gpu:.1f},"
        f" from it {from_gpu:.1f}, both at once {each:.1f} GB/s each."
    )
    print(limits, flush=True)

    def finish(name: str, report: Report) -> None:
        report.finish(arguments.results and arguments.results / f"{name}.json")

    if "resident" in arguments.parts:
        report = Report(
            "AdamW on a GPU, all state resident: LoRA of rank 16 and 64 on Llama-3.1-8B, 448 tensors",
            ["work", "back to back ms", "GPU alone ms", "from idle ms", "GPU alone: of the copy limit"],
            measure_resident(16, copy) + measure_resident(64, copy),
            facts,
            [limits, "Limit of a step: 28 bytes a parameter; of the norm: 4."],
        )
        finish("gpu_optimizer", report)
    if "8bit" in arguments.parts:
        report = Report(
            "AdamW with 8-bit states on a GPU, all resident: LoRA of rank 16 and 64 on Llama-3.1-8B",
            ["work", "back to back ms", "GPU alone ms", "from idle ms", "of the copy limit", "state MB"],
            measure_8bit(16, copy) + measure_8bit(64, copy),
            machine("torch", "bitsandbytes", gpu=True),
            [
                limits,
                "Of the copy limit: GPU alone, over 28 bytes a parameter with 32-bit states, 16.06 with 8-bit"
                " ones.",
            ],
        )
        finish("gpu_optimizer_8bit", report)
    if "paged" in arguments.parts:
        cases = [(16, mib, POOL_PAGES) for mib in (2, 4, 8)]
        cases += [(16, 8, 4), (16, 8, 16), (64, 8, 4), (64, 8, POOL_PAGES), (64, 8, 80)]
        report = Report(
            "AdamW on a GPU, state evicted in each step",
            ["parameters, pages", "ms a step", "MB in", "MB out", "of the limit", "of both at once"],
            [measure_paged(*case, rates) for case in cases]
            + [measure_paged(*case, rates, state_bits=8) for case in ((16, 8, 4), (64, 8, POOL_PAGES))],
            facts,
            [
                limits,
                "Limit: the larger of bytes in and out over the rate of that direction alone. Both at once:"
                " over the rate that copies in both directions reach together.",
            ],
        )
        finish("gpu_paging", report)


if __name__ == "__main__":
    main()
