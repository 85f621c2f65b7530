"""Threads change no bit, survive fork, and serve several Python threads at once."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nf4format import blocks, reference
from nf4format.levels import LEVELS

N, K = 384, 1024
VALUES = np.random.default_rng(0).standard_normal((N, K), dtype=np.float32)
PACKED = blocks.quantize(VALUES, "float32")
X = reference.from_float32(np.random.default_rng(1).standard_normal((5, K), dtype=np.float32), "bfloat16")


def everything(threads: int) -> bytes:
    """All results of all kernels as bytes."""
    codes, absmax = blocks.quantize_codes(VALUES.reshape(-1), "float32", threads=threads)
    searched = blocks.quantize_search(VALUES.reshape(-1), "float32", levels=LEVELS["fp4"], threads=threads)
    weights = blocks.dequantize(PACKED, "bfloat16", threads=threads, start=3)
    fast = blocks.linear(X, "bfloat16", PACKED, "float32", threads=threads)
    plain = blocks.linear(VALUES[:3], "float32", PACKED, threads=threads)
    return b"".join(array.tobytes() for array in (codes, absmax, *searched, weights, fast, plain))


EXPECTED = everything(1)


@pytest.mark.parametrize("threads", [2, 3, 8, 1000])
def test_results_do_not_depend_on_threads(threads: int) -> None:
    for _ in range(5):
        assert everything(threads) == EXPECTED


def test_straddling_rows_do_not_depend_on_threads() -> None:
    packed = blocks.quantize(VALUES[:100, :172].copy(), "float32")
    x = np.ascontiguousarray(VALUES[:4, :172])
    one = blocks.linear(x, "float32", packed, threads=1)
    assert blocks.linear(x, "float32", packed, threads=4).tobytes() == one.tobytes()


def test_concurrent_callers() -> None:
    with ThreadPoolExecutor(6) as callers:
        assert all(result == EXPECTED for result in callers.map(everything, [2] * 40))


def check_in_child() -> bool:
    """Fork, run everything in the child, and return whether it came out right in time."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a deadlock ends the child, and the test, with a status that is not 0
        os._exit(0 if everything(2) == EXPECTED and everything(3) == EXPECTED else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside threads is what is tested
def test_fork() -> None:
    assert everything(2) == EXPECTED
    assert check_in_child()
    stop = threading.Event()

    def keep_the_pool_busy() -> None:
        while not stop.is_set():
            blocks.dequantize(PACKED, threads=2)

    busy = threading.Thread(target=keep_the_pool_busy)
    busy.start()
    try:
        assert all(check_in_child() for _ in range(8))
    finally:
        stop.set()
        busy.join()
    assert everything(2) == EXPECTED


def test_flushing_of_subnormals_by_the_caller_changes_nothing() -> None:
    import torch

    values = VALUES.reshape(-1)[:4096] * np.float32(3e-38)
    codes, absmax = blocks.quantize_codes(values, "float32")
    packed = blocks.quantize(values, "float32")
    weights = blocks.dequantize(packed)
    tiny = np.finfo(np.float32).tiny
    assert ((weights != 0) & (abs(weights) < tiny)).any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        flushed = blocks.quantize_codes(values, "float32")
        again = blocks.quantize(values, "float32")
        decoded = blocks.dequantize(packed)
    finally:
        torch.set_flush_denormal(False)
    assert flushed[0].tobytes() == codes.tobytes()
    assert flushed[1].tobytes() == absmax.tobytes()
    assert again.absmax.tobytes() == packed.absmax.tobytes()
    assert again.nested_absmax.tobytes() == packed.nested_absmax.tobytes()
    assert decoded.tobytes() == weights.tobytes()
