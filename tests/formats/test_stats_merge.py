"""Merged statistics are those of all the data; what does not go together is refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nf4format.errors import FormatError, WriteError
from nf4format.stats import EntrySpec, Stats, StatsWriter
from nf4format.stats_merge import merge_stats

WEIGHTS = {"a": {"a.weight": "1", "b.weight": "2"}, "c": {"c.weight": "3"}}


def data(tokens: int, seed: int, features: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, features)) * np.arange(1, features + 1)


def write(
    path: Path,
    inputs: Mapping[str, np.ndarray],
    *,
    full: bool = True,
    cross: bool = False,
    weights: Mapping[str, Mapping[str, str]] = WEIGHTS,
    **metadata: str,
) -> Path:
    entries = [EntrySpec(name, x.shape[1], weights[name]) for name, x in inputs.items()]
    tokens = max(len(x) for x in inputs.values())
    with StatsWriter(path, entries, metadata, tokens=tokens, full=full, cross=cross) as writer:
        for name, x in inputs.items():
            moment = (x.T @ x / len(x)).astype(np.float32)
            y = x + np.roll(x, 1, axis=1)
            crossed = (x.T @ y / len(x)).astype(np.float32)
            writer.put(name, moment if full else np.diagonal(moment), crossed if cross else None)
    return path


@pytest.mark.parametrize("kind", ["diagonal", "full", "cross"])
def test_merged_is_as_over_all_tokens(tmp_path: Path, kind: str) -> None:
    parts = [data(30, 1), data(90, 2), data(7, 3)]
    options: dict[str, Any] = {"full": kind != "diagonal", "cross": kind == "cross"}
    paths = [write(tmp_path / f"{i}", {"a": x}, data_sha256=f"{i}", **options) for i, x in enumerate(parts)]
    result = merge_stats(paths, tmp_path / "out")
    whole = np.concatenate(parts)
    assert (result.entries, result.tokens) == (1, 127)
    with Stats([tmp_path / "out"]) as stats, Stats(paths) as several:
        known = stats.weights["b.weight"]
        assert (known.tokens, known.sha256, known.has_moment) == (127, "2", kind != "diagonal")
        expected = whole.T @ whole / 127
        np.testing.assert_allclose(known.diagonal(), np.diagonal(expected), rtol=1e-6)
        if kind != "diagonal":
            np.testing.assert_allclose(known.moment(), expected, rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(
                known.moment(), several.weights["b.weight"].moment(), rtol=1e-5, atol=1e-4
            )
        if kind == "cross":
            crossed = whole.T @ (whole + np.roll(whole, 1, axis=1)) / 127
            np.testing.assert_allclose(known.cross(), crossed, rtol=1e-5, atol=1e-4)


def test_other_layers_and_other_numbers_of_tokens(tmp_path: Path) -> None:
    one, other, more = data(30, 1), data(50, 2, 8), data(10, 3, 8)
    first = write(tmp_path / "1", {"a": one}, data_sha256="x", layers="0:1")
    second = write(tmp_path / "2", {"c": other}, data_sha256="x", layers="1:2")  # of the same text
    third = write(tmp_path / "3", {"c": more}, data_sha256="y", layers="1:2")
    merge_stats([first, second], tmp_path / "half")
    merge_stats([tmp_path / "half", third], tmp_path / "by halves")
    merge_stats([third, second, first], tmp_path / "at once")
    whole = np.concatenate([other, more])
    for name in ("by halves", "at once"):
        with Stats([tmp_path / name]) as stats:
            assert {key: known.tokens for key, known in stats.weights.items()} == {
                "a.weight": 30,
                "b.weight": 30,
                "c.weight": 60,
            }
            found = stats.weights["c.weight"].moment()
            np.testing.assert_allclose(found, whole.T @ whole / 60, rtol=1e-5, atol=1e-4)
            np.testing.assert_array_equal(
                stats.weights["a.weight"].moment(), (one.T @ one / 30).astype(np.float32)
            )
            sources = json.loads(stats.metadata()[0]["merged"])
            assert [source["layers"] for source in sources] == ["0:1", "1:2", "1:2"]
    assert (tmp_path / "by halves").read_bytes() == (tmp_path / "at once").read_bytes()


def test_the_order_of_the_files_does_not_show(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}", {"a": data(10 + i, i)}, data_sha256=f"{i}") for i in range(4)]
    merge_stats(paths, tmp_path / "out")
    merge_stats(paths[::-1], tmp_path / "again")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "again").read_bytes()


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    x = {"a": data(9, 1)}
    good = write(tmp_path / "good", x, data_sha256="1")
    second = write(tmp_path / "second", x, cross=True, data_sha256="1", packed_sha256="p")
    others = {
        "another kind": write(tmp_path / "diagonal", x, full=False, data_sha256="2"),
        "another kind than": write(tmp_path / "2nd", x, cross=True, data_sha256="2", packed_sha256="p"),
        "another model": write(
            tmp_path / "model", x, data_sha256="2", weights={"a": {"a.weight": "1", "b.weight": "other"}}
        ),
        "the same text as in": write(tmp_path / "twice", x, data_sha256="1"),
        "the weight is in two entries": write(
            tmp_path / "entries", {"c": data(9, 1)}, data_sha256="2", weights={"c": {"a.weight": "1"}}
        ),
    }
    for message, path in others.items():
        for pair in ((good, path), (path, good)):
            with pytest.raises(FormatError, match=message):
                merge_stats(pair, tmp_path / "out")
    beside = write(tmp_path / "beside", x, cross=True, data_sha256="2", packed_sha256="q")
    with pytest.raises(FormatError, match="beside another packed file"):
        merge_stats([second, beside], tmp_path / "out")
    merge_stats([good, write(tmp_path / "more", x, data_sha256="2")], tmp_path / "merged")
    with pytest.raises(FormatError, match=r"the same text .* the ones they were made of"):
        merge_stats([good, tmp_path / "merged"], tmp_path / "out")
    with pytest.raises(WriteError, match="exists already"):
        merge_stats([good], tmp_path / "merged")
    with pytest.raises(FormatError, match="nothing to merge"):
        merge_stats([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_is_found_before_the_output_appears(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}", {"a": data(9, i)}, data_sha256=f"{i}") for i in range(2)]
    content = bytearray(paths[1].read_bytes())
    content[-1] ^= 1
    paths[1].write_bytes(content)
    with pytest.raises(FormatError, match="damaged"):
        merge_stats(paths, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize("merged", ["[", "{}", "[1]", '[{"data_sha256":1}]'])
def test_a_damaged_list_of_sources_is_refused(tmp_path: Path, merged: str) -> None:
    path = write(tmp_path / "s", {"a": data(9, 1)}, merged=merged)
    with pytest.raises(FormatError, match=r"nf4\.stats\.merged"):
        merge_stats([path], tmp_path / "out")


def test_memory_does_not_grow_with_the_moments(tmp_path: Path) -> None:
    features = 5000  # moments of 50 MB
    values = np.arange(features, dtype=np.float32)
    entry = EntrySpec("a", features, {"a.weight": "1"})
    paths = [tmp_path / f"{i}" for i in range(3)]
    for path in paths:
        with StatsWriter(path, [entry], {"data_sha256": path.name}, tokens=5, full=True) as writer:
            writer.write("a.diagonal", [values])
            writer.write("a.moment", (values[row:] for row in range(features)))
    tracemalloc.start()
    try:
        merge_stats(paths, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6
    with Stats([tmp_path / "out"]) as stats:
        known = stats.weights["a.weight"]
        np.testing.assert_array_equal(known.diagonal(), values)
        np.testing.assert_array_equal(known.moment()[7, 7:], values[7:])
