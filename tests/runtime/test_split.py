"""What is held out for evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from nf4.data.dataset import DataReport as Report
from nf4.data.dataset import Dataset, Example, FileReport, ListDataset, Source
from nf4.data.split import split
from nf4.errors import TrainError


def numbered(count: int, first: int = 10) -> Dataset:
    """Examples of two tokens, the second of which tells them apart."""
    labelled = np.array([False, True])
    ids = [np.array([1, first + i], dtype=np.int32) for i in range(count)]
    file = FileReport(f"{first}.jsonl", count + 3, count, 2, 1, 2 * count, count)
    return ListDataset([Example(i, labelled) for i in ids], Report((file,)))


def numbers(dataset: Dataset) -> list[int]:
    return [int(example.ids[1]) for example in dataset]


def test_split_is_given_by_the_seed_and_loses_nothing() -> None:
    def held(seed: int) -> list[int]:
        return numbers(split([Source(numbered(50), 1.0)], 0.1, seed)[1])

    (train,), evaluation = split([Source(numbered(50), 1.0)], 0.1, seed=3)
    assert len(evaluation) == 5
    assert sorted(numbers(train.dataset) + numbers(evaluation)) == list(range(10, 60))
    assert held(3) == numbers(evaluation)
    assert held(4) != held(3)
    assert len(split([Source(numbered(2), 1.0)], 0.01, seed=0)[1]) == 1


def test_sources_give_the_same_share_and_keep_their_weights() -> None:
    sources = [
        Source(numbered(60, 1000), 2.0),
        Source(numbered(1, 2000), 1.0),
        Source(numbered(40, 3000), 0.5),
    ]
    train, evaluation = split(sources, 0.1, seed=0)
    assert [source.weight for source in train] == [2.0, 1.0, 0.5]
    assert [len(source.dataset) for source in train] == [54, 1, 36]
    found = numbers(evaluation)
    assert [sum(first <= n < first + 1000 for n in found) for first in (1000, 3000)] == [6, 4]
    everything = found + [n for source in train for n in numbers(source.dataset)]
    assert sorted(everything) == sorted(n for source in sources for n in numbers(source.dataset))


def test_reports_and_places_follow_the_examples() -> None:
    (train,), evaluation = split([Source(numbered(50), 1.0)], 0.2, seed=3)
    for dataset, count in ((train.dataset, 40), (evaluation, 10)):
        assert dataset.report.files == (FileReport("10.jsonl", 53, count, 2, 1, 2 * count, count),)
        places = [dataset.place(i) for i in range(count)]
        assert places == [f"10.jsonl, example {number - 9}" for number in numbers(dataset)]


@pytest.mark.parametrize(
    ("counts", "fraction"),
    [
        ((1,), 0.5),
        ((10,), 0.99),
        ((10,), 0.0),
        ((10,), 1.0),
        ((10,), float("nan")),
        ((1, 1), 0.5),
        ((0,), 0.5),
    ],
)
def test_an_empty_side_is_refused(counts: tuple[int, ...], fraction: float) -> None:
    with pytest.raises(TrainError, match=r"cannot hold out .* at least one example on either side"):
        split([Source(numbered(count), 1.0) for count in counts], fraction, seed=0)
