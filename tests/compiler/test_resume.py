"""Interrupted compilations: what is left, how they go on, and that the bytes are those of one run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nf4format import encode
from nf4format.errors import Nf4Error, WriteError
from nf4format.resumable import ResumableFile, partial_path
from qcompile import emit, journal
from qcompile.errors import CompileError
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint
from qcompile.summary import CompileSummary

Write = Callable[..., Path]
NUM_TENSORS = 6


class Stopped(Exception):
    """What ends a run in the middle."""


@pytest.fixture
def model(write_checkpoint: Write, random_tensors: Callable[..., dict[str, torch.Tensor]]) -> Path:
    tensors = random_tensors(
        model__embed_tokens__weight=(50, 64),
        model__layers__0__self_attn__q_proj__weight=(64, 64),
        model__layers__0__self_attn__k_proj__weight=(32, 64),
        model__layers__0__mlp__up_proj__weight=(96, 65),
        model__layers__0__mlp__down_proj__weight=(64, 96),
        model__norm__weight=(64,),
    )
    return write_checkpoint(tensors, shards=2)


@pytest.fixture
def whole(model: Path, tmp_path: Path) -> tuple[bytes, CompileSummary]:
    """Bytes and summary of a run never stopped."""
    summary = compile_checkpoint(model, tmp_path / "whole.nf4")
    content = (tmp_path / "whole.nf4").read_bytes()
    (tmp_path / "whole.nf4").unlink()
    return content, summary


def stop_after(tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run stops where it would write the tensor after this many; largest tensors come first."""
    real, done = emit._Emitter.emit, []

    def emit_some(self: Any, decision: Any) -> Any:
        if len(done) >= tensors:
            raise Stopped
        done.append(decision)
        return real(self, decision)

    monkeypatch.setattr(emit._Emitter, "emit", emit_some)


def interrupt(model: Path, out: Path, tensors: int, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(tensors, patch)
        with pytest.raises(Stopped):
            compile_checkpoint(model, out, CompileOptions(jobs=1, **{"resume": True, **options}))


def name_of(fd: int) -> str:
    return Path(f"/proc/self/fd/{fd}").readlink().name


def left(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.is_file())


PARTIAL = [".out.nf4.partial", ".out.nf4.partial.journal"]


@pytest.mark.parametrize("tensors", range(NUM_TENSORS + 1))
def test_goes_on_where_it_stopped(
    model: Path, tmp_path: Path, whole: tuple[bytes, CompileSummary], tensors: int
) -> None:
    out = tmp_path / "out.nf4"
    if tensors < NUM_TENSORS:
        interrupt(model, out, tensors)
        assert left(out) == (PARTIAL if tensors else PARTIAL[:1])
        seen: list[int] = []
        summary = compile_checkpoint(
            model, out, CompileOptions(resume=True, jobs=3), lambda step, total: seen.append(step)
        )
        assert sum(seen) == summary.source_bytes
        assert (summary.resumed_bytes > 0) == (tensors > 0)
    else:  # nothing to resume
        summary = compile_checkpoint(model, out, CompileOptions(resume=True))
        assert summary.resumed_bytes == 0
    assert out.read_bytes() == whole[0]
    assert left(out) == ["out.nf4"]
    for field in ("source_sha256", "groups", "negative_scales", "plain_ratio", "measured_parameters"):
        assert getattr(summary, field) == getattr(whole[1], field)


def test_stopped_again_and_again(
    model: Path, tmp_path: Path, whole: tuple[bytes, CompileSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SYNC_SECONDS", 0.0)  # as in long runs: lines appended all the time
    out = tmp_path / "out.nf4"
    out.write_bytes(b"old")
    for _ in range(NUM_TENSORS - 1):
        interrupt(model, out, 1, force=True)
        assert out.read_bytes() == b"old"
    summary = compile_checkpoint(model, out, CompileOptions(resume=True, force=True, verify=True))
    assert summary.source_bytes - summary.resumed_bytes == 128  # the norm
    assert "were done already" in summary.text()
    assert out.read_bytes() == whole[0]
    assert left(out) == ["out.nf4"]


def test_journal_cut_or_damaged_anywhere(
    model: Path, tmp_path: Path, whole: tuple[bytes, CompileSummary]
) -> None:
    """A torn tail, or any damage, costs work and never bytes."""
    out = tmp_path / "out.nf4"
    interrupt(model, out, NUM_TENSORS - 1)
    partial, notes = partial_path(out), partial_path(out).with_name(PARTIAL[1])
    data, lines = partial.read_bytes(), notes.read_bytes()
    resumed = set()
    for end in [*range(0, len(lines), 97), len(lines)]:
        for damaged in (lines[:end], lines[:end] + b"\0" + lines[end + 1 :], lines[:end] + b"\xff" * 50):
            partial.write_bytes(data)
            notes.write_bytes(damaged)
            resumed.add(compile_checkpoint(model, out, CompileOptions(resume=True, force=True)).resumed_bytes)
            assert out.read_bytes() == whole[0]
            assert left(out) == ["out.nf4"]
    assert len(resumed) == NUM_TENSORS  # every prefix of the tensors was believed, none too


def test_data_damaged_after_they_were_noted(
    model: Path, tmp_path: Path, whole: tuple[bytes, CompileSummary]
) -> None:
    out = tmp_path / "out.nf4"
    interrupt(model, out, NUM_TENSORS - 1)
    partial, notes = partial_path(out), partial_path(out).with_name(PARTIAL[1])
    data, lines = bytearray(partial.read_bytes()), notes.read_bytes()
    size = len(data)
    for variant in (bytes(size), data[: size // 2], data[: size // 2] + bytes(size - size // 2), b""):
        partial.write_bytes(variant)
        notes.write_bytes(lines)
        compile_checkpoint(model, out, CompileOptions(resume=True, force=True))
        assert out.read_bytes() == whole[0]


def test_lines_are_appended_only_after_the_data_are_on_the_disk(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def watched(fd: int, *arguments: Any) -> Any:
            calls.append((name, name_of(fd)))
            return real(fd, *arguments)

        monkeypatch.setattr(os, name, watched)

    for name in ("pwrite", "write", "fdatasync"):
        watch(name)
    monkeypatch.setattr(journal, "SYNC_BYTES", 0)
    interrupt(model, tmp_path / "out.nf4", 3)
    written = [index for index, call in enumerate(calls) if call == ("write", PARTIAL[1])]
    assert written
    for index in written:
        synced = [i for i, call in enumerate(calls[:index]) if call == ("fdatasync", PARTIAL[0])]
        assert synced
        assert calls[index + 1] == ("fdatasync", PARTIAL[1])
        # Between the two only what other threads wrote for tensors that are not noted yet.
        assert ("write", PARTIAL[1]) not in calls[synced[-1] : index]


@pytest.mark.parametrize("call", ["fdatasync", "write"])
def test_journal_on_a_disk_that_fails(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Lost pages end the run; a journal that cannot be written does not."""
    real, real_emit, has_failed = getattr(os, call), emit._Emitter.emit, threading.Event()

    def fail(fd: int, *arguments: Any) -> Any:
        if name_of(fd).startswith(".out"):
            has_failed.set()
            raise OSError(5, "Input/output error")
        return real(fd, *arguments)

    monkeypatch.setattr(journal, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(journal, "_PERIOD_S", 0.0)
    monkeypatch.setattr(os, call, fail)
    done: list[str] = []

    def emit_later(self: Any, decision: Any) -> Any:
        if done:
            assert has_failed.wait(20)
        done.append(decision.name)
        return real_emit(self, decision)

    monkeypatch.setattr(emit._Emitter, "emit", emit_later)
    out = tmp_path / "out.nf4"
    if call == "write":
        compile_checkpoint(model, out, CompileOptions(jobs=1))
        assert left(out) == ["out.nf4"]
    else:
        with pytest.raises(WriteError, match="input/output error"):
            compile_checkpoint(model, out, CompileOptions(jobs=1))
        assert left(out) == []


def test_what_another_plan_left_is_not_mixed_in(
    model: Path, tmp_path: Path, whole: tuple[bytes, CompileSummary]
) -> None:
    out = tmp_path / "out.nf4"
    interrupt(model, out, 3)
    before = partial_path(out).read_bytes()
    shard = model / "model-00001-of-00002.safetensors"
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    (tmp_path / "levels").write_text(" ".join(str(i / 8 - 1) for i in range(1, 17)))
    others: list[Callable[[], dict[str, Any]]] = [
        lambda: {"level": 0},
        lambda: {"exclude": ("*q_proj*",)},
        lambda: {"levels": str(tmp_path / "levels")},
        lambda: [os.utime(shard, ns=(times[0], times[1] + 1)), {}][1],  # type: ignore[list-item, return-value]
    ]
    for other in others:
        try:
            options = CompileOptions(resume=True, **other())
            with pytest.raises(Nf4Error, match=r"(made from other weights|expected .*levels)"):
                compile_checkpoint(model, out, options)
        finally:
            os.utime(shard, ns=times)
        assert partial_path(out).read_bytes() == before
    (tmp_path / "levels").unlink()
    moved = model.rename(tmp_path / "moved")  # the directory does not matter
    assert compile_checkpoint(moved, out, CompileOptions(resume=True)).resumed_bytes > 0
    assert out.read_bytes() == whole[0]


def test_without_resume_the_rest_is_removed_and_begun_anew(
    model: Path, tmp_path: Path, whole: tuple[bytes, CompileSummary]
) -> None:
    out = tmp_path / "out.nf4"
    interrupt(model, out, 3)
    interrupt(model, out, 3, resume=False)
    assert left(out) == []
    interrupt(model, out, 3)
    assert compile_checkpoint(model, out, CompileOptions(level=0)).resumed_bytes == 0
    assert left(out) == ["out.nf4"]
    (tmp_path / PARTIAL[1]).write_bytes(b"of nothing")
    assert compile_checkpoint(model, out, CompileOptions(force=True)).resumed_bytes == 0
    assert left(out) == ["out.nf4"]
    assert out.read_bytes() == whole[0]


def test_nothing_is_kept_that_could_not_go_on(
    model: Path, tmp_path: Path, write_checkpoint: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "out.nf4", CompileOptions(resume=True, jobs=1)
    tensors = {"a.weight": torch.ones(128, 64), "b.weight": torch.full((64, 64), torch.nan)}
    with pytest.raises(CompileError, match="nan"):
        compile_checkpoint(write_checkpoint(tensors, name="damaged"), out, options)
    assert left(out) == []

    def encode_and_touch(*arguments: Any, **more: Any) -> Any:
        os.utime(model / "model-00001-of-00002.safetensors", (1, 1))
        return encode.encode_search(*arguments, **more)

    monkeypatch.setitem(encode.ENCODERS, 1, encode_and_touch)
    with pytest.raises(Nf4Error, match="changed while it was read"):
        compile_checkpoint(model, out, options)
    assert left(out) == []


@pytest.mark.parametrize("resume", [False, True])
def test_one_run_at_a_time(
    model: Path, tmp_path: Path, whole: tuple[bytes, CompileSummary], resume: bool
) -> None:
    out = tmp_path / "out.nf4"
    with ResumableFile(out) as file:
        file.pwrite(b"mine", 0)
        with pytest.raises(WriteError, match="another run is writing it; wait"):
            compile_checkpoint(model, out, CompileOptions(resume=resume, force=True))
        result = subprocess.run(
            [sys.executable, "-m", "qcompile", str(model), str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 1
        assert re.fullmatch(r"qcompile: .*out.nf4: another run is writing it; .*\n", result.stderr)
        assert left(out) == [".out.nf4.partial"]
        compile_checkpoint(model, tmp_path / "other.nf4")  # another output is no matter
    assert out.read_bytes() == b"mine"
    assert left(out) == ["other.nf4", "out.nf4"]


def test_nothing_is_written_through_what_others_put_there(
    model: Path, tmp_path: Path, whole: tuple[bytes, CompileSummary]
) -> None:
    out, precious = tmp_path / "out.nf4", tmp_path / "precious"
    precious.write_bytes(b"precious")
    partial = partial_path(out)
    for resume in (False, True):
        for plant in (partial.symlink_to, partial.hardlink_to):
            plant(precious)
            partial.with_name(PARTIAL[1]).write_bytes(b"")
            try:
                compile_checkpoint(model, out, CompileOptions(resume=resume, force=True))
            except WriteError as error:
                assert "symbolic links" in str(error)
                partial.unlink()
            else:
                assert out.read_bytes() == whole[0]
            assert precious.read_bytes() == b"precious"
    os.mkfifo(partial)
    compile_checkpoint(model, out, CompileOptions(resume=True, force=True))
    assert out.read_bytes() == whole[0]


def test_names_that_are_long_and_begin_alike(tmp_path: Path) -> None:
    one, other = (partial_path(tmp_path / ("x" * 254 + end)) for end in "ab")
    assert one != other
    for path in (one, other):
        assert len(path.name + ".journal") <= 255
    with ResumableFile(tmp_path / ("x" * 255)) as file:
        file.pwrite(b"data", 0)
    assert left(tmp_path / "x") == ["x" * 255]


def test_permissions(model: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        interrupt(model, tmp_path / "out.nf4", 3)
        assert {path.stat().st_mode & 0o777 for path in tmp_path.glob(".out*")} == {0o640}
        compile_checkpoint(model, tmp_path / "out.nf4", CompileOptions(resume=True))
    finally:
        os.umask(old)
    assert (tmp_path / "out.nf4").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_command_goes_on(
    model: Path, tmp_path: Path, whole: tuple[bytes, CompileSummary], signum: int
) -> None:
    out = tmp_path / "out.nf4"
    program = """
import os, signal, sys
from qcompile import cli, emit
real, count, signum = emit._Emitter.emit, [], int(sys.argv.pop())
def emit_some(self, decision):
    count.append(decision)
    if len(count) == 4:
        os.kill(os.getpid(), signum)
        self.cancelled.wait()
    return real(self, decision)
emit._Emitter.emit = emit_some
cli.main()
"""
    command = [str(model), str(out), "--resume", "-j", "1"]
    stopped = subprocess.run(
        [sys.executable, "-c", program, *command, str(int(signum))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert stopped.returncode == 130
    assert stopped.stderr.strip() == "qcompile: interrupted; the same command goes on from here"
    assert left(out) == PARTIAL
    assert compile_checkpoint(model, out, CompileOptions(resume=True)).resumed_bytes > 0
    assert out.read_bytes() == whole[0]
