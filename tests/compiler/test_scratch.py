"""Scales of any size and number stay within the budget."""

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nf4format.errors import WriteError
from qcompile.scratch import Scratch


def test_threads_wait_for_the_budget(tmp_path: Path) -> None:
    num_values = 64 * 1000  # 5000 bytes each
    scratch = Scratch(tmp_path, budget_bytes=12000)
    lock = threading.Lock()
    holding = most = 0

    def work(_: int) -> None:
        nonlocal holding, most
        with scratch.scales(num_values) as scales:
            with lock:
                holding += 1
                most = max(most, holding)
            scales[:] = 1
            time.sleep(0.005)
            with lock:
                holding -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(24)))
    assert most == 2


def test_a_tensor_beyond_the_budget_gets_a_file_and_room_for_its_bytes(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, budget_bytes=100)
    with scratch.scales(64 * 1000 + 1) as scales:
        assert (scales.shape, scales.dtype) == ((1001,), np.float32)
        scales[:] = np.arange(1001)
        assert scales.sum() == 500500
    assert list(tmp_path.iterdir()) == []


def test_room_is_given_back_after_an_error(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, budget_bytes=1000)
    with pytest.raises(KeyError), scratch.scales(64 * 200):
        raise KeyError
    taken = threading.Event()

    def take() -> None:
        with scratch.scales(64 * 200):
            taken.set()

    threading.Thread(target=take, daemon=True).start()
    assert taken.wait(timeout=30)


def test_a_full_disk_is_an_error_and_no_bus_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    scratch = Scratch(tmp_path, budget_bytes=0)
    for _ in range(2):  # nothing stays taken
        with pytest.raises(WriteError, match="no space left"), scratch.scales(1000):
            pass
    assert list(tmp_path.iterdir()) == []
