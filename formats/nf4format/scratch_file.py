"""Numbers that need not fit in memory: in a file without a name, which the system may write out."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from .atomic import write_error


def float32_in_a_file(count: int, folder: Path) -> np.ndarray:
    """float32 [count], zeros, over a mapping of an unlinked file; gone with the last reference to it.

    Args:
        count: above 0.
        folder: on a disk with room.

    Raises:
        WriteError: there is no such room.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # The space is claimed now: a full disk is an error here, and a bus error in the mapping.
            os.posix_fallocate(file.fileno(), 0, 4 * count)
            return np.frombuffer(mmap.mmap(file.fileno(), 4 * count), np.float32)
    except OSError as error:
        raise write_error(folder, error) from error
