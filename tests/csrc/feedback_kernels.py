"""The kernels of -O2 and -O3 compiled for the CPU, with the methods of nf4format._cuda_encode.Feedback."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from nf4format.levels import thresholds_of
from qcompile.feedback_cuda import Kernels

ROOT = Path(__file__).parents[2]
SOURCES = (
    "tests/csrc/feedback_on_host.cpp",
    "csrc/cuda/feedback_tables.cpp",
    "csrc/cuda/encode_tables.cpp",
    "csrc/cpu/search_tables.cpp",
)


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "feedback.so"
        subprocess.run(
            [compiler, *flags, *(str(ROOT / name) for name in SOURCES), "-o", str(out)], check=True
        )
        return ctypes.CDLL(str(out))


class HostFeedback:
    """What `Kernels` wants for its native part; addresses are the host's, streams go nowhere."""

    def __init__(self, levels: np.ndarray) -> None:
        self._levels, self._thresholds = levels, thresholds_of(levels)

    def _call(self, name: str, *arguments: int) -> None:
        tables = (self._levels.ctypes.data, self._thresholds.ctypes.data)
        getattr(_library(), name)(*(ctypes.c_int64(value) for value in (*tables, *arguments[:-1])))

    def search(self, *arguments: int) -> None:
        self._call("search", *arguments)

    def carry(self, *arguments: int) -> None:
        self._call("carry", *arguments)

    def descend(self, *arguments: int) -> None:
        self._call("descend", *arguments)


def host_kernels(levels: np.ndarray) -> Kernels:
    """Kernels for tensors on the CPU."""
    return Kernels(HostFeedback(levels), levels, torch.device("cpu"))
