"""The arithmetic of the CUDA encoder, compiled for the CPU: its bytes are those of the CPU's encoder.

So most of what could differ is found where there is no GPU; test_cuda_encode.py has the rest.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from encode_cases import DTYPES, LEVEL_TABLES, cases

from nf4format import blocks
from nf4format.blocks import Dtype
from nf4format.levels import thresholds_of

ROOT = Path(__file__).parents[2]
SOURCES = ("tests/csrc/encode_on_host.cpp", "csrc/cuda/encode_tables.cpp", "csrc/cpu/search_tables.cpp")
CODES = {"float32": 0, "bfloat16": 1, "float16": 2}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("encode") / "encode.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    subprocess.run([compiler, *flags, *(str(ROOT / name) for name in SOURCES), "-o", str(out)], check=True)
    loaded = ctypes.CDLL(str(out))
    loaded.has_bins.restype = ctypes.c_bool
    return loaded


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def on_host(
    library: ctypes.CDLL, values: np.ndarray, dtype: Dtype, levels: np.ndarray, *, searched: bool
) -> list[np.ndarray]:
    num_blocks = -(-values.size // 64)
    padded = np.zeros(num_blocks * 64, values.dtype)
    padded[: values.size] = values
    codes = np.empty(num_blocks * 32, np.uint8)
    scales = np.empty(num_blocks, np.uint8 if searched else np.float32)
    nested = np.empty(-(-num_blocks // 256), np.float32)
    thresholds = thresholds_of(levels)  # must outlive the call
    library.encode_on_host(
        pointer(levels), pointer(thresholds), pointer(padded), CODES[dtype],
        ctypes.c_int64(num_blocks), pointer(codes), pointer(scales), pointer(nested) if searched else None,
    )  # fmt: skip
    return [codes[: -(-values.size // 2)], scales, *([nested] if searched else [])]


@pytest.mark.parametrize("name", LEVEL_TABLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("searched", [False, True])
def test_bytes_are_the_cpu_encoders(library: ctypes.CDLL, dtype: Dtype, name: str, searched: bool) -> None:
    levels = LEVEL_TABLES[name]
    encode = blocks.quantize_search if searched else blocks.quantize_codes
    for case, values in cases(dtype):
        expected = encode(values, dtype, levels=levels, threads=2)
        for array, want in zip(
            on_host(library, values, dtype, levels, searched=searched), expected, strict=True
        ):
            assert array.tobytes() == want.tobytes(), case


def test_both_ways_to_look_levels_up_are_tested(library: ctypes.CDLL) -> None:
    found = set()
    for levels in LEVEL_TABLES.values():
        thresholds = thresholds_of(levels)
        found.add(library.has_bins(pointer(levels), pointer(thresholds)))
    assert found == {False, True}
