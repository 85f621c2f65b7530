"""Crash-safe output: after any failure the destination is as it was, and no temporary is left."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nf4format import atomic
from nf4format.atomic import AtomicDirectory, AtomicFile, write_bytes
from nf4format.errors import WriteError


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def failing(number: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def names(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_is_written_with_the_mode_of_any_new_file(tmp_path: Path, mask: int, mode: int) -> None:
    path = tmp_path / "out.nf4"
    with umask(mask), AtomicFile(path) as file:
        file.preallocate(10)
        file.pwrite(b"world", 5)
        file.pwrite(memoryview(b"hello"), 0)
        assert not path.exists()
    assert path.read_bytes() == b"helloworld"
    assert path.stat().st_mode & 0o777 == mode
    assert names(tmp_path) == ["out.nf4"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out.nf4"
    path.write_bytes(b"old")
    with pytest.raises(error), AtomicFile(path) as file:
        file.pwrite(b"new", 0)
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["out.nf4"]


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "posix_fallocate", "ftruncate", "close"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_every_failing_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """The k-th use of a call fails, for every k until none does: old or new, whole, and nothing else."""
    path = tmp_path / "out.nf4"
    real = getattr(os, call)
    failures = 0
    for k in range(1, 20):
        path.write_bytes(b"old")
        count = 0

        def counted(*args: Any, k: int = k) -> Any:
            nonlocal count
            count += 1
            if count == k:
                if call == "close":
                    real(*args)
                raise OSError(number, os.strerror(number))
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, counted)
            try:
                with AtomicFile(path) as file:
                    file.preallocate(6)
                    file.pwrite(b"new", 0)
                    file.pwrite(b"er!", 3)
                ended = True
            except WriteError as error:
                ended = False
                assert str(error).startswith(f"{path}: cannot be written: ")
        assert names(tmp_path) == ["out.nf4"]
        if ended:
            assert count < k
            break
        failures += 1
        assert path.read_bytes() in (b"old", b"newer!")
    assert path.read_bytes() == b"newer!"
    assert failures >= 1


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
    write_bytes(tmp_path / "x", bytes(range(100)))
    assert (tmp_path / "x").read_bytes() == bytes(range(100))


def test_full_disk_is_told_before_writing(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    needed = status.f_bavail * status.f_frsize + (1 << 40)
    with (
        pytest.raises(
            WriteError, match=rf"not enough space on the disk, expected {needed} bytes free, got \d+; free"
        ),
        AtomicFile(tmp_path / "x") as file,
    ):
        file.preallocate(needed)
    assert names(tmp_path) == []


def test_size_limit(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with (
            pytest.raises(WriteError, match=r"file too large; .*ulimit -f"),
            AtomicFile(tmp_path / "x") as file,
        ):
            file.preallocate(2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    with AtomicFile(tmp_path / "x") as file:
        file.preallocate(1000)
    assert (tmp_path / "x").read_bytes() == bytes(1000)


def test_bad_destinations(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, message in {
        tmp_path / "missing" / "x": f"there is no directory {tmp_path}/missing; create it first",
        tmp_path / "file" / "x": "not a directory",
        tmp_path: "is a directory; give the name of a file",
        tmp_path / ("x" * 256): "longer than 255 bytes",
        tmp_path / "..": "is not the name of an output",
        tmp_path / "a\0b": "is not the name of an output",
        Path(): "is not the name of an output",
    }.items():
        with pytest.raises(WriteError, match=message), AtomicFile(path):
            pass
        with pytest.raises(WriteError), AtomicDirectory(path) as _:
            raise AssertionError if path != tmp_path else WriteError(path)
    assert names(tmp_path) == ["file"]


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(WriteError, match="is a device, pipe or socket"):
            write_bytes(path, b"data")
    assert not Path("/dev/null").is_file()
    assert names(tmp_path) == ["pipe"]


def test_longest_name(tmp_path: Path) -> None:
    write_bytes(tmp_path / ("x" * 255), b"data")
    assert names(tmp_path) == ["x" * 255]


def test_unwritable_directory() -> None:
    with pytest.raises(WriteError, match="/proc/x: cannot be written: "):
        write_bytes("/proc/x", b"")


def test_destination_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "out").symlink_to("target")
    write_bytes(tmp_path / "out", b"new")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert not (tmp_path / "out").is_symlink()


def test_planted_temporary_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: "00")
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / ".out.00.partial").symlink_to("target")
    with pytest.raises(WriteError, match="file exists"):
        write_bytes(tmp_path / "out", b"new")
    assert (tmp_path / "target").read_bytes() == b"precious"


@pytest.mark.parametrize("kernel", [True, False])
def test_no_overwriting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool) -> None:
    if not kernel:
        monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)
    path = tmp_path / "out"
    write_bytes(path, b"first", overwrite=False)
    with pytest.raises(WriteError, match="exists already"):
        write_bytes(path, b"second", overwrite=False)
    with (
        pytest.raises(WriteError, match="exists already"),
        AtomicFile(tmp_path / "late", overwrite=False) as file,
    ):
        file.pwrite(b"mine", 0)
        (tmp_path / "late").write_bytes(b"theirs")  # appears while we work
    assert (path.read_bytes(), (tmp_path / "late").read_bytes()) == (b"first", b"theirs")
    assert names(tmp_path) == ["late", "out"]


def test_killed(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    script = (
        "import sys, time\nfrom nf4format.atomic import AtomicFile\n"
        "with AtomicFile(sys.argv[1]) as file:\n"
        "    file.pwrite(b'new', 0); print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGKILL)
    assert path.read_bytes() == b"old"
    left = [name for name in names(tmp_path) if name != "out"]
    assert len(left) == 1
    assert left[0].startswith(".out.")
    assert left[0].endswith(".partial")


def fill(folder: Path, text: str) -> None:
    (folder / "config").write_text(text)
    (folder / "sub").mkdir()
    (folder / "sub" / "deep").write_text(text)


def test_directory_is_created(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with umask(0o027), AtomicDirectory(path) as folder:
        fill(folder, "new")
        assert not path.exists()
    assert (path / "sub" / "deep").read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o750
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("links", [True, False])
def test_directory_is_replaced_and_the_rest_carried_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool, links: bool
) -> None:
    if not kernel:
        monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)
    if not links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    path = tmp_path / "out"
    path.mkdir()
    (path / "config").write_text("old")
    (path / "log").write_text("mine")
    (path / "link").symlink_to("log")
    (path / "runs").mkdir()
    (path / "runs" / "1").write_text("mine too")
    with AtomicDirectory(path, replace=True) as folder:
        fill(folder, "new")
    assert names(path) == ["config", "link", "log", "runs", "sub"]
    assert (path / "config").read_text() == "new"
    assert (path / "log").read_text() == (path / "link").read_text() == "mine"
    assert (path / "runs" / "1").read_text() == "mine too"
    assert names(tmp_path) == ["out"]


def test_directory_with_content_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    with AtomicDirectory(path) as folder:  # empty: fine
        fill(folder, "first")
    with pytest.raises(WriteError, match="exists and is not empty"), AtomicDirectory(path):
        pass
    for bad in (path / "config", tmp_path / "link"):
        if not bad.exists():
            bad.symlink_to(path)
        with pytest.raises(WriteError, match="not a directory"), AtomicDirectory(bad, replace=True):
            pass


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), FULL])
def test_directory_after_an_exception(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "config").write_text("old")
    expected = WriteError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), AtomicDirectory(path, replace=True) as folder:
        fill(folder, "new")
        raise error
    assert names(path) == ["config"]
    assert (path / "config").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("call", ["fsync", "open", "link", "rename"])
def test_every_failing_call_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)  # the longer path: three renames
    real = getattr(os, call)
    path = tmp_path / "out"
    failures = 0
    for k in range(1, 30):
        for leftover in tmp_path.iterdir():
            shutil.rmtree(leftover)
        (path / "runs").mkdir(parents=True)
        (path / "log").write_text("mine")
        count = 0

        def counted(*args: Any, k: int = k, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == k:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, counted)
            try:
                with AtomicDirectory(path, replace=True) as folder:
                    (folder / "config").write_bytes(b"new")
                    (folder / "weights").write_bytes(b"new")
            except WriteError:
                failures += 1
            if count < k:
                break
        assert list(tmp_path.rglob("log"))
        assert list(tmp_path.rglob("runs"))  # perhaps still under the temporary name, never gone
        assert len({name in names(path) for name in ("config", "weights")}) == 1
    assert {"config", "weights", "log", "runs"} <= set(names(path))
    assert failures >= 1 or call == "link"
