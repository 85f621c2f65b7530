"""`--adapter`: low-rank corrections of what rounding leaves over, as a PEFT adapter that belongs to the file.

For a weight W that is stored as Q, the adapter is the B A of a given rank with the least error at the layer's
output, (W - Q - B A) H (W - Q - B A)T, by the singular values of (W - Q) H^(1/2) (QERA, arXiv 2410.06040).
Q is then rounded again towards W - B A, and B A found anew: each makes room for the other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nf4format.adapter import BASE_FINGERPRINT, BASE_SOURCE, AdapterTensor, write_adapter
from nf4format.container import Nf4File

from .feedback import damped

ROUNDS = 2
"""How often a weight is rounded towards what its adapter leaves."""


@dataclass(frozen=True)
class LowRank:
    """A [rank, k] and B [n, rank], float32; B A is added to the weight."""

    a: np.ndarray
    b: np.ndarray

    def product(self) -> np.ndarray:
        """B A, float32 [n, k]."""
        return self.b @ self.a


class Corrections:
    """Finds corrections of one weight; H^(1/2) and its inverse are made once."""

    def __init__(self, moment: np.ndarray, rank: int) -> None:
        """`moment`: H, undamped, float32 [k, k]."""
        values, vectors = np.linalg.eigh(damped(moment).astype(np.float64))
        roots = np.sqrt(np.maximum(values, 1e-12 * max(float(values.max()), 1e-300)))
        self._root = (vectors * roots) @ vectors.T
        self._inverse_root = (vectors / roots) @ vectors.T
        self._rank = rank

    def of(self, difference: np.ndarray) -> LowRank:
        """The correction of a weight's error, float32 [n, k]. A and B share the singular values."""
        u, s, v = np.linalg.svd(difference.astype(np.float64) @ self._root, full_matrices=False)
        shared = np.sqrt(s[: self._rank])
        a = shared[:, None] * (v[: self._rank] @ self._inverse_root)
        return LowRank(a.astype(np.float32), (u[:, : self._rank] * shared).astype(np.float32))


def write_corrections(
    path: str | os.PathLike[str], out: str | os.PathLike[str], corrections: Mapping[str, LowRank], rank: int
) -> None:
    """Write the adapter of a finished file.

    Args:
        path: the adapter's directory; one that is there is replaced.
        out: the file, named in the adapter by its fingerprint: another one is refused when it is loaded.
        corrections: weight name -> its correction.

    Raises:
        WriteError: the directory cannot be written.
    """
    modules = {name: name.removesuffix(".weight") for name in corrections}
    tensors: dict[str, AdapterTensor] = {}
    for name, correction in corrections.items():
        for kind, array in (("lora_A", correction.a), ("lora_B", correction.b)):
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            tensors[f"base_model.model.{modules[name]}.{kind}.weight"] = (flat, "F32", array.shape)
    config = {
        "base_model_name_or_path": os.fspath(out),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(modules.values()),
        "task_type": "CAUSAL_LM",
    }
    with Nf4File.open(out, mmap=False) as file:
        metadata = {BASE_FINGERPRINT: file.fingerprint, BASE_SOURCE: file.source_fingerprint}
    write_adapter(path, config, tensors, metadata)
