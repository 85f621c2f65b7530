"""Tables of 16 levels: what the codes of a weight stand for, as fractions of its block's scale.

NF4 is what the format is made for. The others are those that it was compared with (QLoRA, arXiv 2305.14314,
table 2), and any table of one's own: a file holds the levels of its weights, and decodes by them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .codebook import NF4_LEVELS, NF4_THRESHOLDS
from .errors import FormatError

_MAX_FILE_BYTES = 64 << 10


def _symmetric(magnitudes: list[float]) -> np.ndarray:
    """Magnitudes 0, ..., largest and their negatives, as fractions of the largest, ascending; 0 twice."""
    values = np.array([-value for value in reversed(magnitudes)] + magnitudes, np.float64) / magnitudes[-1]
    levels = (values + 0.0).astype(np.float32)  # + 0.0: no minus zero
    levels.flags.writeable = False
    return levels


LEVELS: dict[str, np.ndarray] = {
    "nf4": NF4_LEVELS,
    "fp4": _symmetric([0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    "fp4-e3m0": _symmetric([0, 0.25, 0.5, 1, 2, 4, 8, 16]),
    "int4": _symmetric([0, 1, 2, 3, 4, 5, 6, 7]),
}
"""float32 [16] each, ascending: 4-bit NormalFloat; floating point with 2 bits of exponent and 1 of mantissa
(E2M1), and with 3 of exponent (E3M0); integers -7 to 7. The last three have 15 values: zero has two codes."""


def levels_name(levels: np.ndarray) -> str:
    """The name in LEVELS of a table with the same bits, else "custom"."""
    named = (name for name, table in LEVELS.items() if table.tobytes() == levels.tobytes())
    return next(named, "custom")


def read_levels(path: str | os.PathLike[str]) -> np.ndarray:
    """Levels of one's own: a text file of 16 numbers in any order, between spaces, commas or line ends.

    They are sorted and divided by the largest magnitude. What stands between `#` and the end of a line is
    not read.

    Raises:
        FormatError: the file cannot be read, or holds something else.
    """
    remedy = "write 16 numbers, some below and some above zero"
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise FormatError(path, error.strerror or str(error), remedy=remedy) from error
    if len(data) > _MAX_FILE_BYTES:
        raise FormatError(path, "too large for a table of levels", remedy=remedy)
    lines = data.decode("utf-8", "replace").splitlines()
    words = " ".join(line.partition("#")[0] for line in lines).replace(",", " ").split()
    try:
        values = np.array([float(word) for word in words])
    except ValueError as error:
        raise FormatError(
            path, "not a number among the levels", got=ascii(str(error))[:80], remedy=remedy
        ) from error
    if values.size != 16:
        raise FormatError(
            path, "not a table of levels", expected="16 numbers", got=values.size, remedy=remedy
        )
    largest = np.abs(values).max()
    if not np.isfinite(largest) or largest == 0:
        raise FormatError(path, "levels", expected="finite values, not all zero", got=largest, remedy=remedy)
    levels = (np.sort(values / largest) + 0.0).astype(np.float32)
    try:
        check_levels(levels)
    except ValueError as error:
        raise FormatError(path, str(error), remedy=remedy) from error
    return levels


def check_levels(levels: np.ndarray) -> None:
    """Raise if a table cannot serve: what kernels of encoding rely on.

    Raises:
        ValueError: not float32 [16], not finite, not ascending, beyond [-1, 1], or without values at or
            beyond half of that on either side.
    """
    if levels.dtype != np.float32 or levels.shape != (16,) or not levels.flags.c_contiguous:
        raise ValueError(f"levels: expected float32 [16], got {levels.dtype} {list(levels.shape)}")
    if not np.isfinite(levels).all():
        raise ValueError("levels: expected finite values, got a NaN or an infinity")
    if (np.diff(levels) < 0).any():
        raise ValueError("levels: expected them in ascending order")
    if abs(levels).max() > 1 or levels[0] > -0.5 or levels[15] < 0.5:
        raise ValueError(
            "levels: expected the first in [-1, -0.5] and the last in [0.5, 1], "
            f"got {levels[0]} and {levels[15]}"
        )


def thresholds_of(levels: np.ndarray) -> np.ndarray:
    """float32 [15]: a scaled value has code i + 1 or more exactly when it is greater than threshold[i].

    Those of NF4 are NF4_THRESHOLDS; others are the midpoints in float32.
    """
    if levels is NF4_LEVELS or np.array_equal(levels.view(np.uint32), NF4_LEVELS.view(np.uint32)):
        return NF4_THRESHOLDS
    return (levels[:-1] + levels[1:]) / np.float32(2)
