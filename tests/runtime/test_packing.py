"""Best-fit decreasing, against the textbook's loop over examples and bins."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf4.data.packing import best_fit


def textbook(lengths: list[int], capacity: int) -> list[list[int]]:
    """The lengths in each bin: longest first, into the fullest bin that has room."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        open_bins = [one for one in bins if sum(one) + length <= capacity]
        if open_bins:
            max(open_bins, key=sum).append(length)
        else:
            bins.append([length])
    return bins


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 24).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_bins_are_those_of_the_textbook(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    items, bounds = best_fit(np.array(lengths, dtype=np.int32), capacity)
    assert sorted(items.tolist()) == list(range(len(lengths)))
    bins = [[lengths[i] for i in items[a:b]] for a, b in itertools.pairwise(bounds)]
    # Bins that are equally full are interchangeable: which of them takes an example changes no other choice.
    assert sorted(map(sum, bins)) == sorted(map(sum, textbook(lengths, capacity)))


def test_equal_lengths_go_in_the_order_given() -> None:
    items, bounds = best_fit(np.array([3, 3, 6, 3, 3, 3]), 9)
    assert items.tolist() == [2, 0, 1, 3, 4, 5]
    assert bounds.tolist() == [0, 2, 5, 6]


@pytest.mark.parametrize("lengths", [[0, 4], [5, 9]])
def test_lengths_out_of_range_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="expected 1 to 8"):
        best_fit(np.array(lengths), 8)


def test_a_million_examples_take_little_time_and_leave_little_room() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.0, 1_000_000), 2, 2048).astype(np.int32)
    began = time.perf_counter()
    items, bounds = best_fit(lengths, 2048)
    assert time.perf_counter() - began < 5  # 0.1 s on two cores; a loop over examples in Python needs more
    filled = np.add.reduceat(lengths[items], bounds[:-1])
    assert filled.max() <= 2048
    assert filled.mean() > 0.99 * 2048
