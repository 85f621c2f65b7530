"""The constants against where they come from: normal quantiles, bitsandbytes, and the C++ copy."""

import hashlib
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from nf4format.codebook import NESTED_MAP, NF4_LEVELS, NF4_THRESHOLDS, NF4_THRESHOLDS_CPU

# As dQuantizeNF4 of bitsandbytes spells them.
CUDA_LITERALS = [
    "-0.8480964004993439", "-0.6106329262256622", "-0.4599952697753906", "-0.33967943489551544",
    "-0.23460740596055984", "-0.13791173323988914", "-0.045525018125772476", "0.03979014977812767",
    "0.1202552504837513", "0.2035212516784668", "0.2920137718319893", "0.3893125355243683",
    "0.5016634166240692", "0.6427869200706482", "0.8614784181118011",
]  # fmt: skip


def bits(values: np.ndarray) -> list[int]:
    return values.view(np.uint32).tolist()


def nearest_float32(literal: str) -> np.float32:
    """The decimal rounded once to float32, as a C compiler does; through float64 it could round twice."""
    guess = np.float32(literal)
    candidates = [np.nextafter(guess, np.float32(-2)), guess, np.nextafter(guess, np.float32(2))]
    return min(candidates, key=lambda value: abs(Fraction(float(value)) - Fraction(literal)))


def test_levels_are_normal_quantiles() -> None:
    from scipy.stats import norm

    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([negative, [0.0], positive]))
    np.testing.assert_allclose(NF4_LEVELS, levels / levels.max(), rtol=0, atol=2e-7)


def test_levels_are_those_of_bitsandbytes() -> None:
    from bitsandbytes.functional import get_4bit_type

    assert bits(NF4_LEVELS) == bits(get_4bit_type("nf4", device="cpu").numpy())
    assert NF4_LEVELS[7] == 0.0


def test_thresholds_are_the_decimal_literals_rounded_once() -> None:
    assert bits(NF4_THRESHOLDS) == bits(np.array([nearest_float32(text) for text in CUDA_LITERALS]))


def test_cpu_thresholds_are_float32_midpoints() -> None:
    midpoints = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / np.float32(2)
    assert bits(NF4_THRESHOLDS_CPU) == bits(midpoints)


def test_the_two_threshold_tables_differ_by_one_ulp_in_four_places() -> None:
    ulps = NF4_THRESHOLDS.view(np.int32) - NF4_THRESHOLDS_CPU.view(np.int32)
    assert ulps.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, -1, 0, -1]


def test_nested_map() -> None:
    digest = hashlib.sha256(NESTED_MAP.astype("<f4").tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert (np.diff(NESTED_MAP) > 0).all()
    assert NESTED_MAP[127] == 0.0


def test_constants_are_read_only() -> None:
    for table in (NF4_LEVELS, NF4_THRESHOLDS, NF4_THRESHOLDS_CPU, NESTED_MAP):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0


def test_cpp_tables_are_the_same() -> None:
    header = Path(__file__).parents[2] / "csrc" / "cpu" / "codebook.h"
    tables = {}
    for name, body in re.findall(r"constexpr float (\w+)\[\d+\] = \{([^}]*)\}", header.read_text()):
        numbers = [text.strip().removesuffix("f") for text in body.split(",") if text.strip()]
        tables[name] = np.array([float.fromhex(number) for number in numbers], np.float32)
    assert bits(tables["kThresholds"]) == bits(NF4_THRESHOLDS)
    assert bits(tables["kNestedMap"]) == bits(NESTED_MAP)
