"""What is kept between runs: found again, made anew when anything else, removed when it is too much."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from nf4.cli.parameters import ByteSize
from nf4.cli.train_options import OPTIONS
from nf4.data import store as store_module
from nf4.data.dataset import Dataset
from nf4.data.options import DataOptions
from nf4.data.reading import load_dataset, load_sources
from nf4.data.store import StoreWriter, TokenStore, open_store
from nf4.data.token_cache import find_cache
from nf4.errors import TrainError
from nf4.text.tokenizer import Tokenizer
from nf4format.errors import WriteError


@pytest.fixture
def tokenizer(tokenizer_json: bytes) -> Tokenizer:
    return Tokenizer(tokenizer_json, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": "the cat " * (i % 5), "completion": f" sat {i}"}) for i in range(50)]
    path.write_text("\n".join(lines))
    return path


def same(one: object, other: object) -> bool:
    pairs = list(zip(one, other, strict=True))  # type: ignore[call-overload]
    return all((a.ids == b.ids).all() and (a.labelled == b.labelled).all() for a, b in pairs)


def test_the_second_run_finds_what_the_first_made(
    rows: Path, tokenizer: Tokenizer, tokenizer_json: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    options = DataOptions(seq_len=64, cache=cache)
    first = load_dataset([rows], tokenizer, options)
    (kept,) = cache.iterdir()
    assert kept.stat().st_mode & 0o777 & ~0o644 == 0
    assert cache.stat().st_mode & 0o077 == 0
    stamp = kept.stat().st_mtime_ns
    made: list[Path] = []
    making = store_module.StoreWriter.finish
    monkeypatch.setattr(StoreWriter, "finish", lambda self, *a: (made.append(rows), making(self, *a)))

    copy = rows.with_name("copy.jsonl")
    copy.write_bytes(rows.read_bytes())
    again = load_dataset([copy], tokenizer, options)
    assert same(first, again)
    assert again.report.files[0].path == str(copy)
    assert not made
    assert kept.stat().st_mtime_ns == stamp

    for changed in (
        DataOptions(seq_len=32, cache=cache),
        DataOptions(seq_len=64, cache=cache, loss="all"),
        DataOptions(seq_len=64, cache=cache, columns={"text": "completion"}),
        DataOptions(seq_len=64, cache=cache, template="plain"),
    ):
        load_dataset([rows], tokenizer, changed)
    assert len(made) == 4
    other = Tokenizer(tokenizer_json, tokenizer_config={"bos_token": None, "eos_token": "</s>"})
    load_dataset([rows], other, options)
    copy.write_text(copy.read_text() + "\n")
    load_dataset([copy], tokenizer, options)
    assert len(made) == 6

    kept.write_bytes(kept.read_bytes()[:-1])
    assert same(load_dataset([rows], tokenizer, options), first)
    assert len(made) == 7
    assert open_store(kept, kept.stem, 64) is not None


def test_without_a_cache_nothing_is_left(
    rows: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    dataset = load_dataset([rows], tokenizer, DataOptions(seq_len=64, cache="none"))
    assert not list(temporary.iterdir())
    assert not (tmp_path / "home").exists()
    assert same(dataset, load_dataset([rows], tokenizer, DataOptions(seq_len=64)))
    assert len(list((tmp_path / "home" / "nf4").iterdir())) == 1
    assert find_cache(DataOptions(cache="none")) is None


def test_a_failed_run_leaves_no_store(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"text": "the cat sat"}) + "\n"
    path.write_text(good * 9000 + "oops")
    with pytest.raises(TrainError, match=r"rows.jsonl:9001: not JSON"):
        load_dataset([path], tokenizer, DataOptions(seq_len=64, cache=tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_told(rows: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TrainError, match=r"the cache cannot be made: .*; name another directory with --cache, or"
    ):
        load_dataset([rows], tokenizer, DataOptions(seq_len=64, cache=tmp_path / "file" / "cache"))
    cache = tmp_path / "cache"
    dataset = load_dataset([rows], tokenizer, DataOptions(seq_len=64, cache=cache))
    (kept,) = cache.iterdir()
    kept.unlink()
    kept.mkdir()
    with pytest.raises(WriteError, match="is a directory"):
        load_dataset([rows], tokenizer, DataOptions(seq_len=64, cache=cache))
    assert len(dataset[49].ids) > 2  # mapped: it outlives its name


def test_two_processes_at_once(rows: Path, tokenizer_json: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json)
    code = """
import sys
from pathlib import Path
from nf4.data.options import DataOptions
from nf4.data.reading import load_dataset
from nf4.text.tokenizer import Tokenizer
folder = Path(sys.argv[1])
config = {"bos_token": "<s>", "eos_token": "</s>"}
tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes(), tokenizer_config=config)
dataset = load_dataset([folder / "rows.jsonl"], tokenizer, DataOptions(seq_len=64, cache=folder / "cache"))
print(sum(int(example.ids.sum()) for example in dataset))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    sums = {process.communicate()[0] for process in running}
    assert len(sums) == 1
    assert all(process.returncode == 0 for process in running)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_parts_have_weights_and_directories_are_one_part(rows: Path, tokenizer: Tokenizer) -> None:
    folder = rows.parent / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("the dog and the frog " * 30)
    (folder / "sub" / "a.jsonl").write_text('{"text": "the cat"}\n')
    (folder / "empty.txt").write_text("")
    options = DataOptions(seq_len=16)
    first, second = load_sources([(rows, 2.0), (folder, 0.5)], tokenizer, options)
    assert (first.weight, second.weight) == (2.0, 0.5)
    assert isinstance(first.dataset, TokenStore)
    names = [Path(file.path).name for file in second.dataset.report.files]
    assert names == ["b.txt", "a.jsonl"]
    assert second.dataset.place(len(second.dataset) - 1).endswith("a.jsonl, example 1")
    parts = [load_dataset([folder / name], tokenizer, options) for name in ("b.txt", "sub/a.jsonl")]
    assert same(second.dataset, [example for part in parts for example in part])
    assert second.dataset.max_token_id == max(part.max_token_id for part in parts)
    for name in ("b.txt", "sub/a.jsonl"):
        (folder / name).write_text("")
    with pytest.raises(TrainError, match="every file in the directory is empty"):
        load_dataset([folder], tokenizer, options)


def make_file(folder: Path, number: int) -> Path:
    path = folder / f"{number}.jsonl"
    path.write_text("".join(f'{{"text": "the cat sat {number} {i}"}}\n' for i in range(40)))
    return path


def used_hours_ago(kept: Path, hours: float) -> None:
    used = time.time_ns() - int(hours * 3.6e12)
    os.utime(kept, ns=(used, kept.stat().st_mtime_ns))


def test_what_was_used_longest_ago_goes_and_what_is_in_use_stays(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    held: dict[int, Dataset] = {}
    kept: dict[int, Path] = {}

    def load(number: int, cache_bytes: int = 1 << 30) -> Dataset:
        before = set(cache.iterdir()) if cache.exists() else set()
        options = DataOptions(seq_len=64, cache=cache, cache_bytes=cache_bytes)
        dataset = load_dataset([make_file(tmp_path, number)], tokenizer, options)
        for path in set(cache.iterdir()) - before:
            kept[number] = path
        return dataset

    for number in range(5):
        held[number] = load(number)
    (size,) = {path.stat().st_size for path in kept.values()}
    for name in ("notes.txt", "x.tokens", ".model.nf4.partial", f".{'a' * 40}.tokens.partial.txt"):
        (cache / name).write_bytes(bytes(5 * size))
    foreign = set(cache.iterdir()) - set(kept.values())
    for number in range(5):
        used_hours_ago(kept[number], 10 - number)
    examples = list(held[1])
    del held[2], held[3], held[4]
    load(3)  # opened again, and so used last
    load(5, 4 * size)  # two have to go: the oldest are in use
    assert set(cache.iterdir()) - foreign == {kept[number] for number in (0, 1, 3, 5)}
    assert same(held[1], examples)
    held.clear()
    load(6, 1)
    # 3, 5 and 6 were used less than a minute ago: another process might be about to open them.
    assert set(cache.iterdir()) - foreign == {kept[number] for number in (3, 5, 6)}
    assert same(load(1), examples)
    assert (cache / "notes.txt").stat().st_size == 5 * size


def test_the_limit_is_at_least_a_byte_and_its_default_is_the_one_told() -> None:
    with pytest.raises(TrainError, match="size of the cache, expected at least 1 byte, got 0"):
        DataOptions(cache_bytes=0).check()
    told = OPTIONS["cache_size"].help.rpartition("[default: ")[2].rstrip("]")
    context = click.Context(click.Command("train"))
    assert ByteSize().convert(told, None, context) == DataOptions().cache_bytes


READS_FOREVER = """
import sys
from pathlib import Path
from nf4.data import documents, reading
from nf4.data.options import DataOptions
from nf4.text.tokenizer import Tokenizer
folder = Path(sys.argv[1])
real = reading.read_rows

def read_rows(*arguments):
    for row in real(*arguments):
        print("reading", flush=True)
        sys.stdin.read()  # until it is told to go on, or killed
        yield row

reading.read_rows = read_rows
config = {"bos_token": "<s>", "eos_token": "</s>"}
tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes(), tokenizer_config=config)
reading.load_dataset([folder / "rows.jsonl"], tokenizer, DataOptions(seq_len=64, cache=folder / "cache"))
"""


def test_what_a_kill_leaves_goes_and_what_is_being_made_stays(
    rows: Path, tokenizer: Tokenizer, tokenizer_json: bytes, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json)
    cache = tmp_path / "cache"
    options = DataOptions(seq_len=64, cache=cache)
    command = [sys.executable, "-c", READS_FOREVER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"reading\n"
        (partial,) = cache.iterdir()
        assert partial.name.endswith(".tokens.partial")
        # The same file: not waited for, and not kept. Another: kept.
        dataset = load_dataset([rows], tokenizer, options)
        assert set(cache.iterdir()) == {partial}
        load_dataset([make_file(tmp_path, 1)], tokenizer, options)
        assert partial in set(cache.iterdir())
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert partial.exists()
    load_dataset([make_file(tmp_path, 1)], tokenizer, options)
    assert not partial.exists()
    assert same(load_dataset([rows], tokenizer, options), dataset)
    assert len(list(cache.iterdir())) == 2
