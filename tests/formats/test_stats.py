"""Files of calibration statistics: what is written is read, several files are one, junk is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nf4format.errors import FormatError
from nf4format.stats import EntrySpec, Stats, StatsWriter

A, B = "a.weight", "b.weight"


def write(
    path: Path, x: np.ndarray, *, full: bool = True, cross: np.ndarray | None = None, sha: str = "s"
) -> Path:
    entry = EntrySpec("a", x.shape[1], {A: sha, B: "t"})
    moment = (x.T @ x / len(x)).astype(np.float32)
    with StatsWriter(
        path, [entry], {"origin": "test"}, tokens=len(x), full=full, cross=cross is not None
    ) as writer:
        writer.put("a", moment if full else np.diagonal(moment), cross)
    return path


def data(tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, 20)) * np.arange(1, 21)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    x = data(50, 0)
    cross = np.arange(400, dtype=np.float32).reshape(20, 20)
    moment = (x.T @ x / 50).astype(np.float32)
    with Stats([write(tmp_path / "s.safetensors", x, cross=cross)]) as stats:
        assert set(stats.weights) == {A, B}
        known = stats.weights[A]
        assert (known.features, known.tokens, known.sha256) == (20, 50, "s")
        assert known.has_moment
        assert known.has_cross
        np.testing.assert_array_equal(known.moment(), moment)
        np.testing.assert_array_equal(known.diagonal(), np.diagonal(moment))
        np.testing.assert_array_equal(known.cross(), cross)
        assert stats.metadata() == [{"origin": "test", "tokens": "50"}]


def test_the_triangle_takes_half_the_room(tmp_path: Path) -> None:
    path = write(tmp_path / "s.safetensors", data(50, 0))
    assert load_file(path)["a.moment"].shape == (210,)
    with Stats([write(tmp_path / "d.safetensors", data(50, 0), full=False)]) as stats:
        assert not stats.weights[A].has_moment


def test_several_files_are_as_one_over_all_tokens(tmp_path: Path) -> None:
    one, other = data(30, 1), data(90, 2)
    paths = [write(tmp_path / "1.safetensors", one), write(tmp_path / "2.safetensors", other)]
    whole = np.concatenate([one, other])
    with Stats(paths) as stats:
        assert stats.weights[A].tokens == 120
        np.testing.assert_allclose(stats.weights[A].moment(), whole.T @ whole / 120, rtol=1e-5, atol=1e-5)


def test_nothing_is_left_of_a_writer_that_fails(tmp_path: Path) -> None:
    entry = EntrySpec("a", 4, {A: "s"})
    with pytest.raises(KeyError), StatsWriter(tmp_path / "s", [entry], {}, tokens=1, full=False):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_was_not_given_all(tmp_path: Path) -> None:
    entries = [EntrySpec("a", 4, {A: "s"}), EntrySpec("b", 4, {B: "t"})]
    with (
        pytest.raises(ValueError, match=r"never written: b\.diagonal"),
        StatsWriter(tmp_path / "s", entries, {}, tokens=1, full=False) as writer,
    ):
        writer.put("a", np.ones(4, np.float32))
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "s.safetensors", data(50, 0))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with Stats([path]) as stats, pytest.raises(FormatError, match="damaged, expected XXH3-64"):
        stats.weights[A].moment()
    with Stats([path]) as stats:
        stats.weights[A].diagonal()


def test_files_of_different_models_are_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path / "1", data(5, 1)), write(tmp_path / "2", data(5, 1), sha="other")]
    with pytest.raises(FormatError, match=r"another model than those of .*expected SHA-256 s, got other"):
        Stats(paths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nf4.stats": "2"}, "not a file of statistics, expected nf4.stats '1'"),
        ({"nf4.stats.tokens": "0"}, "a number above 0"),
        ({"nf4.stats.tokens": "-5"}, "a number above 0"),
        ({"nf4.stats.tokens": "9" * 30}, "a number above 0"),
        ({"nf4.stats.xxh3": "0" * 16}, "16 digits for each of 2 tensors, got 16 digits"),
        ({"nf4.stats.entries": "[]"}, "entries"),
        ({"nf4.stats.entries": '{"a":{"features":20}}'}, "entries"),
        ({"nf4.stats.entries": '{"a":{"features":true,"weights":{}}}'}, "entries"),
        ({"nf4.stats.entries": '{"a":{"features":20,"tokens":0,"weights":{}}}'}, "entries"),
        ({"nf4.stats.entries": '{"a":{"features":20,"tokens":1e9,"weights":{}}}'}, "entries"),
        ({"nf4.stats.entries": '{"a":{"features":20,"tokens":1,"more":1,"weights":{}}}'}, "entries"),
        ({"nf4.stats.entries": '{"a":{"features":21,"weights":{}}}'}, r"expected F32 \[21\], got F32 \[20\]"),
        ({"nf4.stats.entries": '{"c":{"features":20,"weights":{}}}'}, r"expected F32 \[20\], got nothing"),
    ],
)
def test_junk_is_refused(tmp_path: Path, change: dict[str, str], message: str) -> None:
    path = write(tmp_path / "s.safetensors", data(5, 1))
    with Stats([path]) as stats:
        metadata = dict(stats._files[0].header.metadata)
    save_file(load_file(path), tmp_path / "junk.safetensors", metadata | change)
    with pytest.raises(FormatError, match=message):
        Stats([tmp_path / "junk.safetensors"])


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    x = data(5, 1)
    x[0, 3] = np.nan
    with (
        Stats([write(tmp_path / "s.safetensors", x)]) as stats,
        pytest.raises(FormatError, match="NaN or infinity"),
    ):
        stats.weights[A].moment()
