"""Steps: order by seed and epoch, weights, grouping, packing, and what cannot be."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from nf4.data.dataset import DataReport, Example, FileReport, ListDataset, Source
from nf4.data.plan import Batches, BatchOptions
from nf4.errors import TrainError

SEQ_LEN = 32


def source(count: int, first: int = 100, weight: float = 1.0, seed: int = 0) -> Source:
    """Examples of random lengths; their first token tells them apart."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        ids = np.full(rng.integers(2, SEQ_LEN + 1), first + i, dtype=np.int32)
        examples.append(Example(ids, np.arange(len(ids)) > 0))
    return Source(ListDataset(examples), weight)


def plan(
    *sources: Source, seed: int = 7, steps: int | None = None, epochs: float = 1.0, **options: Any
) -> Batches:
    chosen = {"batch": 3, "accumulate": 2, "seq_len": SEQ_LEN, **options}
    return Batches(sources, BatchOptions(**chosen), seed, steps=steps, epochs=epochs)


def shown(batches: Batches, steps: range | None = None) -> list[list[list[int]]]:
    """For each step, each micro-batch, the examples."""
    return [[list(batch.examples) for batch in batches.step(k)] for k in steps or range(batches.steps)]


def flat(nested: list[list[list[int]]]) -> list[int]:
    return [index for step in nested for batch in step for index in batch]


KINDS = [{}, {"group_by_length": True}, {"packing": "best-fit"}]


@pytest.mark.parametrize("options", KINDS)
def test_each_epoch_shows_everything_once_in_an_order_given_by_the_seed(options: dict[str, Any]) -> None:
    batches = plan(source(50), epochs=3, batch=1, accumulate=1, **options)
    order = flat(shown(batches))
    epochs = [order[:50], order[50:100], order[100:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order == flat(shown(plan(source(50), epochs=3, batch=1, accumulate=1, **options)))
    assert order != flat(shown(plan(source(50), epochs=3, seed=8, batch=1, accumulate=1, **options)))


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_a_step_depends_on_nothing_but_its_number(options: dict[str, Any], weight: float) -> None:
    def make() -> Batches:
        return plan(source(41), source(17, 500, weight), steps=60, **options)

    forward = shown(make())
    batches, single = make(), {}
    for k in np.random.default_rng(1).permutation(60).tolist():
        single[k] = shown(batches, range(k, k + 1))[0]
    assert [single[k] for k in range(60)] == forward
    assert shown(make(), range(59, 60)) == forward[59:]  # a fresh one, as after a resume
    for a, b in zip(make().step(33), batches.step(33), strict=True):
        assert a.input_ids.equal(b.input_ids)
        assert a.labels.equal(b.labels)


def test_steps_are_full_across_epochs_and_epochs_end_exactly() -> None:
    by_steps = plan(source(20), steps=11)
    assert [[len(batch) for batch in step] for step in shown(by_steps)] == [[3, 3]] * 11
    by_epochs = plan(source(20), epochs=1.5)
    sizes = [[len(batch) for batch in step] for step in shown(by_epochs)]
    assert sizes == [[3, 3]] * 5
    assert plan(source(20), epochs=1.4).steps == math.ceil(28 / 6)
    assert [len(batch) for batch in shown(plan(source(20)))[-1]] == [2]
    assert shown(by_epochs) == shown(by_steps, range(5))
    with pytest.raises(IndexError):
        by_epochs.step(5)


def test_epochs_gone_by_are_told() -> None:
    batches = plan(source(20), epochs=2.5)
    assert [batches.epochs_after(k) for k in (0, 5, 8, 9)] == [0, 1.5, 2.4, 2.5]


def test_weights_repeat_and_choose() -> None:
    sources = (source(10), source(4, 200, 2.0), source(6, 300, 0.5), source(5, 400, 0.1))
    batches = plan(*sources, epochs=20, batch=1, accumulate=1)
    seen = [Counter[int]() for _ in range(20)]
    for k in range(batches.steps):
        seen[math.floor(batches.epochs_after(k))].update(batches.step(k)[0].examples)
    total = sum(seen, Counter())
    assert [total[i] for i in range(25)] == [20] * 10 + [40] * 4 + [10] * 6 + [2] * 5
    for epoch in seen:
        assert [epoch[i] for i in range(14)] == [1] * 10 + [2] * 4
        assert sum(epoch[i] for i in range(14, 20)) == 3
        assert sum(epoch[i] for i in range(20, 25)) in (0, 1)
    halves = [frozenset(i for i in range(14, 20) if epoch[i]) for epoch in seen]
    assert all(a | b == set(range(14, 20)) for a, b in zip(halves[::2], halves[1::2], strict=True))
    assert len(set(halves)) > 3


@pytest.mark.parametrize("packing", ["none", "best-fit"])
def test_what_a_step_holds_depends_on_batch_times_accumulate_only(packing: str) -> None:
    def rows(batch: int, accumulate: int) -> list[list[int]]:
        made = plan(source(70), epochs=2, packing=packing, batch=batch, accumulate=accumulate)
        return [sorted(i for rows in step for i in rows) for step in shown(made)]

    assert rows(1, 8) == rows(8, 1) == rows(2, 4)


def test_longest_come_first_and_grouping_saves_padding() -> None:
    sources = (source(500),)
    lengths = sources[0].dataset.lengths
    plain, grouped = plan(*sources, epochs=3), plan(*sources, epochs=3, group_by_length=True)
    for batches in (plain, grouped):
        assert lengths[batches.step(0)[0].examples[0]] == lengths.max()
        for k in range(batches.steps):
            order = [int(lengths[i]) for batch in batches.step(k) for i in batch.examples]
            assert order == sorted(order, reverse=True)
    waste = [1 - batches.volume().tokens / batches.volume().computed for batches in (plain, grouped)]
    assert waste[1] < waste[0] / 2
    # An epoch's border inside a micro-batch does not break the groups of the epochs behind it.
    spread = [
        np.ptp(lengths[list(batch.examples)]) for k in range(grouped.steps) for batch in grouped.step(k)
    ]
    assert np.median(spread[-100:]) <= np.median(spread[:100]) + 1
    # Steps are not all long or all short ones.
    per_step = [sum(batch.num_tokens for batch in grouped.step(k)) for k in range(80)]
    assert np.std(per_step) > 0
    first_batches = [lengths[grouped.step(k)[0].examples[0]] for k in range(1, 80)]
    assert len(set(first_batches)) > 8


def test_packed_rows_are_full_whole_and_of_a_micro_batch() -> None:
    batches = plan(source(300), packing="best-fit")
    lengths = batches.dataset.lengths
    bins = len([0 for k in range(batches.steps) for batch in batches.step(k)])
    assert bins == math.ceil(batches.rows / 3)
    for k in range(batches.steps):
        for batch in batches.step(k):
            assert batch.input_ids.shape == (1, int(lengths[list(batch.examples)].sum()))
            assert batch.input_ids.shape[1] <= 3 * SEQ_LEN
            assert batch.segments is not None
            assert batch.segments.bounds.diff().tolist() == lengths[list(batch.examples)].tolist()
            firsts = batch.input_ids[0, batch.segments.bounds[:-1].long()]
            assert firsts.tolist() == [100 + i for i in batch.examples]
    volume = batches.volume()
    assert volume == (batches.rows, 300, lengths.sum(), lengths.sum() - 300, lengths.sum())
    assert volume.tokens > 0.95 * volume.rows * SEQ_LEN


def test_volume_counts_what_steps_hold() -> None:
    for options in KINDS[:2]:
        batches = plan(source(100), **options)
        parts = [batch for k in range(batches.steps) for batch in batches.step(k)]
        tokens, labels, computed = (
            sum(batch.num_tokens for batch in parts),
            sum(batch.num_labels for batch in parts),
            sum(batch.input_ids.numel() for batch in parts),
        )
        assert batches.volume() == (100, 100, tokens, labels, computed)
    assert plan(source(100), steps=2).volume().rows == 12


def test_batches_name_their_examples() -> None:
    one, two = source(3).dataset, source(2, 500).dataset
    one.report = DataReport(
        (FileReport("a.jsonl", 1, 1, 0, 0, 1, 1), FileReport("b.jsonl", 2, 2, 0, 0, 1, 1))
    )
    batches = plan(Source(one, 1.0), Source(two, 1.0))
    places: dict[int, str] = {}
    for batch in batches.step(0):
        places |= zip(batch.examples, batches.places(batch), strict=True)
    assert places == {
        0: "a.jsonl, example 1",
        1: "b.jsonl, example 1",
        2: "b.jsonl, example 2",
        3: "example 1",
        4: "example 2",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "bad batch, expected 1 to .*, got 0"),
        ({"accumulate": 0}, "bad accumulate, expected 1 to"),
        ({"seq_len": 1}, "bad seq_len, expected 2 to"),
        ({"steps": 0}, "bad steps, expected 1 to"),
        ({"epochs": 0.0}, "bad epochs, expected above 0"),
        ({"epochs": math.nan}, "bad epochs, expected above 0"),
        ({"epochs": math.inf}, "bad epochs, expected above 0"),
        ({"batch": 2**20, "seq_len": 2**20}, "a micro-batch is too large, .* accumulate more"),
        ({"packing": "tight"}, "unknown packing, expected none or best-fit, got tight"),
        (
            {"packing": "best-fit", "group_by_length": True},
            "packing and grouping by length exclude each other",
        ),
        ({"seq_len": 8}, "example .*: unusable example, expected at most 8 tokens, .* got .* tokens"),
    ],
)
def test_options_that_cannot_be_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        plan(source(20), **options)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, 1e9, 1e-9])
def test_weights_out_of_range_are_told(weight: float) -> None:
    with pytest.raises(TrainError, match=r"weight, expected 0\.001 to 100"):
        plan(source(3, weight=weight))


def test_data_that_cannot_be_trained_on_is_told() -> None:
    def masked(*counts: int) -> Source:
        ids = np.arange(4, dtype=np.int32)
        return Source(ListDataset([Example(ids, np.arange(4) > 3 - count) for count in counts]), 1.0)

    with pytest.raises(TrainError, match="no examples to train on"):
        plan(masked())
    with pytest.raises(TrainError, match="every label is masked"):
        plan(masked(0, 0))
    with pytest.raises(TrainError, match=r"example 2: unusable example, .* got 4 tokens, 0 with loss"):
        plan(masked(1, 0))
