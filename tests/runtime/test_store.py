"""Tokenized data in files: what was put in comes out; damaged, foreign or hostile files are not believed."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from nf4.data import store as store_module
from nf4.data.dataset import Example, FileReport
from nf4.data.store import StoreWriter, open_store
from nf4.errors import TrainError
from nf4format.atomic import AtomicFile
from nf4format.sums import xxh3

REPORT = FileReport("a.jsonl", 7, 5, 1, 2, 100, 50, ("a note",))


def make(path: Path, examples: list[Example], *, wide: bool = False, key: str = "key") -> None:
    with AtomicFile(path) as file:
        writer = StoreWriter(file, wide)
        for example in examples:
            writer.add(example)
        writer.finish(key, REPORT)


def random_examples(count: int, most: int, vocab: int) -> list[Example]:
    random_numbers = np.random.default_rng(0)
    examples = []
    for _ in range(count):
        length = int(random_numbers.integers(2, most))
        labelled = random_numbers.random(length) < 0.5
        labelled[0], labelled[-1] = False, True
        examples.append(Example(random_numbers.integers(0, vocab, length).astype(np.int32), labelled))
    return examples


@pytest.mark.parametrize("wide", [False, True])
def test_what_was_put_in_comes_out(wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_CHUNK", 4096)  # many, and records across their borders
    examples = random_examples(300, 100, 1 << 20 if wide else 1 << 16)
    make(tmp_path / "a", examples, wide=wide)
    found = open_store(tmp_path / "a", "key", 100)
    assert found is not None
    assert len(found) == 300
    for example, other in zip(found, examples, strict=True):
        assert example.ids.dtype == np.int32
        assert example.labelled.dtype == bool
        np.testing.assert_array_equal(example.ids, other.ids)
        np.testing.assert_array_equal(example.labelled, other.labelled)
    assert found.lengths.tolist() == [len(example.ids) for example in examples]
    assert found.label_counts.tolist() == [example.labelled.sum() for example in examples]
    assert found.max_token_id == max(example.ids.max() for example in examples)
    assert found.report.files == (REPORT,)
    assert found.lengths.dtype == found.label_counts.dtype == np.int32
    with pytest.raises(IndexError):
        found[300]


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    example = Example(np.array([1, 1 << 16], np.int32), np.array([False, True]))
    with pytest.raises(ValueError, match="id 65536 does not fit"):
        make(tmp_path / "a", [*random_examples(1, 5, 10), example])
    assert not list(tmp_path.iterdir())


def test_any_damage_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a"
    make(path, random_examples(20, 50, 1000))
    good = path.read_bytes()
    positions = random.Random(0)
    for _ in range(150):
        at, bit = positions.randrange(len(good)), 1 << positions.randrange(8)
        path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
        assert open_store(path, "key", 50) is None, at
    for size in [0, 1, 55, 56, *(positions.randrange(len(good)) for _ in range(20))]:
        path.write_bytes(good[:size])
        assert open_store(path, "key", 50) is None
        path.write_bytes(bytes(size))
        assert open_store(path, "key", 50) is None
    path.write_bytes(good)
    assert open_store(path, "key", 50) is not None
    assert open_store(path, "other", 50) is None
    assert open_store(path, "key", 20) is None  # examples longer than the run allows


def forge(path: Path, change: Callable[[dict[str, np.ndarray]], None], footer: dict[int, int]) -> None:
    """Change index arrays and fields of the footer (by position), and make the sum of both right again."""
    data = path.read_bytes()
    fields = list(store_module._FOOTER.unpack(data[-store_module._FOOTER.size :]))
    size, count = fields[2], fields[3]
    arrays = {
        "offsets": np.frombuffer(data, "<i8", count + 1, size).copy(),
        "lengths": np.frombuffer(data, "<i4", count, size + 8 * (count + 1)).copy(),
        "counts": np.frombuffer(data, "<i4", count, size + 8 * (count + 1) + 4 * count).copy(),
    }
    change(arrays)
    for position, value in footer.items():
        fields[position] = value
    index = b"".join(array.tobytes() for array in arrays.values())
    rest = data[size + 8 * (count + 1) + 8 * count : -store_module._FOOTER.size]
    tail = index + rest + store_module._FOOTER.pack(*fields)[:-8]
    path.write_bytes(data[:size] + tail + struct.pack("<Q", xxh3(tail)))


def nothing(arrays: dict[str, np.ndarray]) -> None:
    pass


HOSTILE: dict[str, tuple[Callable[[dict[str, np.ndarray]], None], dict[int, int]]] = {
    "records outside": (lambda a: a["offsets"].__setitem__(3, 1 << 40), {}),
    "records behind themselves": (lambda a: a["offsets"].__setitem__(3, -8), {}),
    "negative length": (lambda a: a["lengths"].__setitem__(0, -5), {}),
    "length of another record": (lambda a: a["lengths"].__setitem__(0, 49), {}),
    "no label": (lambda a: a["counts"].__setitem__(0, 0), {}),
    "too many labels": (lambda a: a["counts"].__setitem__(0, 1000), {}),
    "huge count": (nothing, {3: 1 << 60}),
    "no example": (nothing, {3: 0}),
    "huge data": (nothing, {2: 1 << 62}),
    "huge report": (nothing, {4: 1 << 61}),
    "three bytes an id": (nothing, {1: 3}),
    "four bytes an id": (nothing, {1: 4}),
    "ids past 31 bits": (nothing, {5: 1 << 40}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_made_to_deceive_are_refused_though_their_sums_are_right(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    make(path, random_examples(20, 50, 1000))
    forge(path, nothing, {})
    assert open_store(path, "key", 50) is not None
    forge(path, *HOSTILE[name])
    assert open_store(path, "key", 50) is None


def test_ids_above_the_stated_largest_are_not_handed_out(tmp_path: Path) -> None:
    path = tmp_path / "a"
    make(path, random_examples(20, 50, 1000))
    forge(path, nothing, {5: 3})
    store = open_store(path, "key", 50)
    assert store is not None
    with pytest.raises(TrainError, match="tokenized data changed while in use; remove it; it is made again"):
        store[0]


@pytest.mark.parametrize(
    "report",
    [
        [],
        {},
        {"key": "key"},
        {"key": "key", "report": {}},
        {"key": "key", "report": asdict(REPORT) | {"rows": "1"}},
    ],
)
def test_reports_of_another_form_are_refused(report: object, tmp_path: Path) -> None:
    path = tmp_path / "a"
    make(path, random_examples(5, 50, 1000))
    data = path.read_bytes()
    fields = list(store_module._FOOTER.unpack(data[-56:]))
    begin = fields[2] + 8 * 6 + 8 * 5
    text = json.dumps(report).encode()
    tail = data[fields[2] : begin] + text + data[begin + fields[4] : -56]
    fields[4] = len(text)
    tail += store_module._FOOTER.pack(*fields)[:-8]
    path.write_bytes(data[: fields[2]] + tail + struct.pack("<Q", xxh3(tail)))
    assert open_store(path, "key", 50) is None


def test_links_and_other_things_are_no_store(tmp_path: Path) -> None:
    make(tmp_path / "a", random_examples(5, 50, 1000))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", "absent", "."):
        assert open_store(tmp_path / name, "key", 50) is None
