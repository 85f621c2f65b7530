"""A checkpoint that changes while it is compiled: one typed line, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nf4format import encode
from nf4format.atomic import AtomicFile
from nf4format.errors import FormatError, WriteError
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def model(
    write_checkpoint: Callable[..., Path], random_tensors: Callable[..., dict[str, torch.Tensor]]
) -> Path:
    shapes = {f"layers__{index}__up_proj__weight": (128, 256) for index in range(6)}
    return write_checkpoint(random_tensors(**shapes), shards=2)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_by_a_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def extended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"other")


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


def removed(path: Path) -> None:
    path.unlink()


def touched(path: Path) -> None:
    os.utime(path, (1, 1))


CHANGES = [truncated, cut_by_a_byte, emptied, extended, overwritten, replaced, removed, touched]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_is_written(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    resume: bool,
) -> None:
    """Before each tensor in turn: the first, one in the middle, the last."""
    out, original = tmp_path / "out.nf4", (model / SHARD).read_bytes()
    out.write_bytes(b"old")
    for position in (0, 3, 5):
        (model / SHARD).write_bytes(original)
        count = iter(range(100))

        def encode_after(*arguments: Any, count: Any = count, at: int = position, **options: Any) -> Any:
            if next(count) == at:
                change(model / SHARD)
            return encode.encode_search(*arguments, **options)

        monkeypatch.setitem(encode.ENCODERS, 1, encode_after)
        with pytest.raises(FormatError, match=rf"{SHARD}.*changed while it was read") as caught:
            compile_checkpoint(model, out, CompileOptions(jobs=1, force=True, resume=resume))
        assert "\n" not in str(caught.value)
        assert out.read_bytes() == b"old"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.nf4"]


@pytest.mark.parametrize("resume", [False, True])
def test_the_directory_is_synced_after_the_rename(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(fd: int) -> None:
        calls.append(f"fsync {Path(f'/proc/self/fd/{fd}').readlink().name}")
        real_fsync(fd)

    def replace(path: Path, target: Path) -> Path:
        calls.append(f"rename {path.name}")
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    compile_checkpoint(model, tmp_path / "out.nf4", CompileOptions(force=True, resume=resume))
    assert calls == ["fsync .out.nf4.partial", "rename .out.nf4.partial", f"fsync {tmp_path.name}"]


def test_a_full_disk_shows_before_anything_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        f_bavail, f_frsize = 3, 4096

    monkeypatch.setattr(os, "fstatvfs", lambda fd: Full)
    monkeypatch.setitem(encode.ENCODERS, 1, pytest.fail)
    with pytest.raises(WriteError, match=r"not enough space on the disk, expected \d+ bytes free, got 12288"):
        compile_checkpoint(model, tmp_path / "out.nf4", CompileOptions(resume=True))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".nf4"] == []


def test_space_that_an_interrupted_run_holds_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        f_bavail, f_frsize = 0, 4096

    with AtomicFile(tmp_path / "x") as file:
        file.preallocate(1 << 20)
        monkeypatch.setattr(os, "fstatvfs", lambda fd: Full)
        file.preallocate(1 << 20)
        with pytest.raises(WriteError, match="not enough space"):
            file.preallocate(2 << 20)


def test_outputs_that_are_links(model: Path, tmp_path: Path) -> None:
    """A link is replaced, never followed; another name of an input is refused."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"precious")
    (tmp_path / "link.nf4").symlink_to(elsewhere)
    compile_checkpoint(model, tmp_path / "link.nf4", CompileOptions(force=True))
    assert elsewhere.read_bytes() == b"precious"
    assert not (tmp_path / "link.nf4").is_symlink()
    (tmp_path / "dangling.nf4").symlink_to(tmp_path / "nothing")
    with pytest.raises(WriteError, match="exists already"):
        compile_checkpoint(model, tmp_path / "dangling.nf4")
    (tmp_path / "hard.nf4").hardlink_to(model / SHARD)
    with pytest.raises(ValueError, match="a file of the checkpoint itself"):
        compile_checkpoint(model, tmp_path / "hard.nf4", CompileOptions(force=True))
