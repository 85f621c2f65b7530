"""A packed file of a model's shape with random content and right sums, in seconds: for measuring loading."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nf4format.codebook import NESTED_MAP, NF4_LEVELS
from nf4format.container import config_sha256
from nf4format.embedded import CONFIG_FILE, FILE_PREFIX
from nf4format.layout import (
    QUANT_STATE,
    KeptSpec,
    Layout,
    PackedSpec,
    plan_layout,
    quant_state_json,
)
from nf4format.sums import compute_sums

sys.path.append(str(Path(__file__).parents[1]))
from make_checkpoint import make_config, model_tensors

RUN_BYTES = 32 << 20  # made and written at a time by one thread
KEPT = ("model.embed_tokens.weight", "lm_head.weight")  # as the compiler's default policy has it


def make_random_file(path: Path, shape: str, num_bytes: int, threads: int) -> None:
    """Write `path`: what the compiler would make of a bfloat16 checkpoint of `num_bytes`, but random.

    Codes and absmax bytes are uniform, kept values between 0.008 and 0.06 in magnitude. The file is then in
    the page cache and on the disk.
    """
    config = make_config(shape, num_bytes)
    text = json.dumps(config).encode()
    layout = _layout(config, text)
    with path.open("w+b") as file, ThreadPoolExecutor(threads) as pool:
        fd = file.fileno()
        os.posix_fallocate(fd, 0, layout.file_bytes)
        for done in [pool.submit(_write_run, fd, *run) for run in _random_runs(layout)]:
            done.result()
        for spec in layout.packed:
            _write_constants(fd, layout, spec)
        _write_norms(fd, layout)
        os.pwrite(fd, text, layout.entries[FILE_PREFIX + CONFIG_FILE].begin)
        header = layout.header_bytes()
        os.pwrite(fd, compute_sums(fd, layout, threads, header=header), layout.sums_begin)
        os.pwrite(fd, header, 0)
        os.fsync(fd)  # or writing it out would disturb what is measured


def _layout(config: dict, text: bytes) -> Layout:
    tensors = model_tensors(config)
    packed = [name for name, dims in tensors.items() if len(dims) == 2 and name not in KEPT]
    kept = [name for name in tensors if name not in packed]
    metadata = {
        "nf4.aliases": "{}",
        "nf4.config_sha256": config_sha256(text),
        "nf4.options": "{}",
        "nf4.producer": "random",
        "nf4.source_sha256": "0" * 64,
    }
    return plan_layout(
        [PackedSpec(name, tensors[name], "bfloat16") for name in packed],
        [KeptSpec(name, "BF16", tensors[name]) for name in kept],
        {CONFIG_FILE: len(text)},
        metadata,
    )


def _random_runs(layout: Layout) -> list[tuple[int, int, bool]]:
    """(begin, end, are bfloat16 values) of what is filled with random bytes."""
    names = [spec.name for spec in layout.packed]
    spans = [(layout.entries[name], False) for name in (*names, *(f"{name}.absmax" for name in names))]
    spans += [(layout.entries[name], True) for name in KEPT]
    return [
        (start, min(start + RUN_BYTES, entry.end), is_kept)
        for entry, is_kept in spans
        for start in range(entry.begin, entry.end, RUN_BYTES)
    ]


def _write_run(fd: int, begin: int, end: int, is_kept: bool) -> None:
    rng = np.random.Generator(np.random.SFC64(begin))
    words = rng.integers(0, 1 << 64, -(-(end - begin) // 8), np.uint64)
    if is_kept:
        words &= np.uint64(0x80FF80FF80FF80FF)  # sign, mantissa and the last bit of the exponent
        words |= np.uint64(0x3C003C003C003C00)
    data = words.view(np.uint8)[: end - begin]
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:].data, begin + done)


def _write_constants(fd: int, layout: Layout, spec: PackedSpec) -> None:
    state = layout.entries[spec.name + QUANT_STATE]
    nested = layout.entries[f"{spec.name}.nested_absmax"]
    offset = float(np.float32(0.02))
    parts = {
        ".quant_map": NF4_LEVELS.tobytes(),
        ".nested_quant_map": NESTED_MAP.tobytes(),
        ".nested_absmax": np.full(nested.shape, 0.01, np.float32).tobytes(),
        QUANT_STATE: quant_state_json(spec, offset, state.end - state.begin),
    }
    for suffix, data in parts.items():
        os.pwrite(fd, data, layout.entries[spec.name + suffix].begin)


def _write_norms(fd: int, layout: Layout) -> None:
    for spec in layout.kept:
        if len(spec.shape) == 1:
            os.pwrite(fd, np.full(spec.shape, 0x3F80, np.uint16).tobytes(), layout.entries[spec.name].begin)
