"""Weights, correlated inputs, statistics of these, and compilations that stop, for levels 2 and 3."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from nf4format.stats import EntrySpec, StatsWriter
from qcompile import emit

NAMES = ("layers.0.q_proj.weight", "layers.0.k_proj.weight", "layers.0.down_proj.weight")
SHAPES = ((96, 128), (64, 128), (128, 172))


def inputs(features: int, tokens: int = 2000, seed: int = 0) -> np.ndarray:
    """Correlated in one way, of uneven sizes: float64 [tokens, features]."""
    rng = np.random.default_rng(1000)
    mixing = rng.standard_normal((features // 4, features)) * np.exp(rng.standard_normal(features))
    rng = np.random.default_rng(seed)
    return rng.standard_normal((tokens, features // 4)) @ mixing + 0.3 * rng.standard_normal(
        (tokens, features)
    )


def moment_of(x: np.ndarray) -> np.ndarray:
    return (x.T @ x / len(x)).astype(np.float32)


def weight(n: int, k: int, seed: int = 1) -> np.ndarray:
    return (0.05 * np.random.default_rng(seed).standard_normal((n, k))).astype(np.float32)


def collect(
    model: Path,
    out: Path,
    *,
    names: tuple[str, ...] = NAMES,
    full: bool = True,
    cross: bool = False,
    seed: int = 0,
) -> str:
    """Statistics as `nf4 calibrate` writes them."""
    groups = [(names[:2], 128), (names[2:], 172)] if len(names) == 3 else [(names, 128)]
    with safe_open(model / "model.safetensors", "pt") as tensors:
        sums = {
            name: hashlib.sha256(tensors.get_tensor(name).view(torch.uint8).numpy().tobytes()).hexdigest()
            for name in names
        }
    entries = [
        EntrySpec(group[0], features, {name: sums[name] for name in group}) for group, features in groups
    ]
    with StatsWriter(
        out, entries, {"data_sha256": f"{seed:064x}"}, tokens=1000, full=full, cross=cross, overwrite=True
    ) as writer:
        for entry in entries:
            x = inputs(entry.features, 1000, seed)
            y = x + 0.1 * np.random.default_rng(seed).standard_normal(x.shape)
            moment = moment_of(y if cross else x)
            writer.put(
                entry.name,
                moment if full else np.ascontiguousarray(np.diagonal(moment)),
                (x.T @ y / len(x)).astype(np.float32) if cross else None,
            )
    return str(out)


@contextmanager
def stops_after_two_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compilation in this block has to stop when it comes to its third tensor."""
    real, left = emit._Emitter.emit, iter([None] * 2)

    def emit_two(self: Any, decision: Any) -> Any:
        next(left)
        return real(self, decision)

    with monkeypatch.context() as patch:
        patch.setattr(emit._Emitter, "emit", emit_two)
        with pytest.raises(StopIteration):
            yield
