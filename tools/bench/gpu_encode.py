"""The CUDA encoder of qcompile beside the link that weights come over, and beside the CPU's.

    python tools/bench/gpu_encode.py --json tools/bench/results/gpu_encode.json

Limit: copies from pinned memory to the GPU, nothing else. Then the encoder as qcompile uses it, each thread
taking a tensor and giving it away in chunks, up to codes and constants in ordinary host memory: from pinned
memory, where qcompile reads files to, and from ordinary memory, copied into pinned memory on the way.
Last the CPU's encoder with as many threads. The tensors' total is larger than any cache; Gaussian values.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from report import Report, machine

from nf4format.blocks import Dtype
from nf4format.codebook import NF4_LEVELS
from nf4format.encode import ENCODERS, Encoder, Room
from nf4format.encode_cuda import CudaEncoder
from nf4format.tensor_reader import CHUNK_BYTES

TENSOR_VALUES = 32 << 20
LARGE_CHUNK = 8 << 20

Row = list[str | float | int | None]


class InMemory:
    """A tensor in host memory, as a source of chunks."""

    def __init__(self, values: np.ndarray, dtype: Dtype, chunk_bytes: int) -> None:
        self._values, self.dtype, self.num_values = values, dtype, values.size
        self._chunk = chunk_bytes // values.itemsize

    def chunks(self, room: Room | None = None) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, self.num_values, self._chunk):
            yield start, self._values[start : start + self._chunk]


class Arrived(InMemory):
    """Its chunks are in the encoder's pinned memory already: what a slot got first stays there."""

    filled: ClassVar[set[int]] = set()

    def chunks(self, room: Room | None = None) -> Iterator[tuple[int, np.ndarray]]:
        assert room
        for start, values in super().chunks():
            place = np.frombuffer(room(), values.dtype)[: values.size]
            if place.ctypes.data not in self.filled:
                self.filled.add(place.ctypes.data)
                place[:] = values
            yield start, place


def random_tensors(count: int, dtype: Dtype, threads: int) -> list[np.ndarray]:
    """Gaussian values, float32 or the bits of bfloat16."""

    def one(seed: int) -> np.ndarray:
        values = np.random.default_rng(seed).standard_normal(TENSOR_VALUES, dtype=np.float32)
        values *= np.float32(0.02)
        return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(count)))


def pinned_copy_limit(rounds: int) -> float:
    """Bytes a second from 1 GiB of pinned memory to the GPU."""
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    return source.numel() / median_time(copy, rounds)


def median_time(call: Callable[[], object], rounds: int) -> float:
    """Median over rounds; the first is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


class Outputs:
    """Where results go: made once, so that the system's making of pages is not what is measured."""

    def __init__(self, count: int) -> None:
        self.codes = [np.zeros(TENSOR_VALUES // 2, np.uint8) for _ in range(count)]
        self.scales = [np.zeros(TENSOR_VALUES // 64, np.float32) for _ in range(count)]


def encode_all(
    encoder: Encoder, sources: list[InMemory], outputs: Outputs, pool: ThreadPoolExecutor, threads_each: int
) -> None:
    def encode(index: int) -> None:
        codes = outputs.codes[index]

        def write_codes(start: int, chunk: np.ndarray) -> None:
            codes[start // 2 : start // 2 + chunk.size] = chunk

        encoder(sources[index], write_codes, lambda: threads_each, outputs.scales[index])

    list(pool.map(encode, range(len(sources))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=4, help="of weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    link = pinned_copy_limit(arguments.rounds)
    rows: list[Row] = [["limit: copies from pinned memory", link / 1e9, link / 2e9, 1.0]]
    for dtype in ("bfloat16", "float32"):
        item = 2 if dtype == "bfloat16" else 4
        count = max(2, int(arguments.gib * 2**30) // (TENSOR_VALUES * item))
        tensors, outputs = random_tensors(count, dtype, cores), Outputs(count)
        total = count * TENSOR_VALUES
        for level in (1, 0):
            most = min(max(arguments.threads), cores)
            arms = [(Arrived, threads, CHUNK_BYTES) for threads in arguments.threads if threads <= cores]
            arms += [(Arrived, most, LARGE_CHUNK), (InMemory, most, CHUNK_BYTES)]
            if dtype == "float32":
                arms = [(Arrived, most, CHUNK_BYTES)]
            for kind, threads, chunk_bytes in arms:
                Arrived.filled.clear()
                sources = [kind(values, dtype, chunk_bytes) for values in tensors]
                with (
                    CudaEncoder(level, NF4_LEVELS, chunk_bytes=chunk_bytes, tensors=threads) as encoder,
                    ThreadPoolExecutor(threads) as pool,
                ):
                    run = partial(encode_all, encoder, sources, outputs, pool, 1)
                    seconds = median_time(run, arguments.rounds)
                memory = "pinned" if kind is Arrived else "ordinary"
                where = f"-O{level}, {dtype} in {memory} memory"
                name = f"{where}, {threads} threads, {chunk_bytes >> 20} MiB chunks"
                rate = total * item / seconds
                rows.append([name, rate / 1e9, total / seconds / 1e9, rate / link])
        if dtype == "bfloat16":
            few = [InMemory(values, dtype, CHUNK_BYTES) for values in tensors[: max(2, count // 8)]]
            for level in (1, 0):
                with ThreadPoolExecutor(min(cores, len(few))) as pool:
                    each = max(1, cores // len(few))
                    seconds = median_time(partial(encode_all, ENCODERS[level], few, outputs, pool, each), 1)
                values = len(few) * TENSOR_VALUES / seconds
                rows.append(
                    [f"-O{level}, {dtype}, the CPU, {cores} cores", values * item / 1e9, values / 1e9, None]
                )
    Report(
        f"Encoding {arguments.gib:g} GiB of weights in host memory on a GPU",
        ["what", "GB/s of weights", "10^9 weights/s", "of the limit"],
        rows,
        machine("torch", gpu=True),
        [
            f"Median of {arguments.rounds} rounds, from host memory to host memory; reading files and hashing"
            " are not included.",
            "The limit's weights are bfloat16.",
        ],
    ).finish(arguments.json)


if __name__ == "__main__":
    main()
