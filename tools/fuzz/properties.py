"""What must hold for any bytes whatever: checked for each fuzzed input, here and nowhere else.

    Container   a .nf4 file: opened, verified, decoded
    Source      a safetensors file as part of a checkpoint
    Directory   the index and the config of a checkpoint: opened, planned, its model's shape read

An input is refused with a `Nf4Error` of one printable line that says what to do, or it is accepted, and then
safetensors' own reader accepts it too, with the same names, types, shapes and bytes. Anything else (another
exception, a difference, a file opened outside the directory, more than a second) is a `Violation`.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from nf4.errors import LoadError
from nf4.model.config import ModelConfig
from nf4format.blocks import dequantize
from nf4format.checkpoint import Checkpoint
from nf4format.container import Nf4File
from nf4format.errors import FormatError, Nf4Error, printable
from nf4format.header import Header, read_header
from qcompile.errors import CompileError
from qcompile.options import CompileOptions
from qcompile.plan import make_plan

LIMIT_S = 1.0
LIMIT_MESSAGE = 2000


class Violation(AssertionError):
    """An input for which something does not hold that must."""


class Tally:
    """What came of the inputs: how many were accepted, and why the others were refused."""

    def __init__(self) -> None:
        self.accepted = 0
        self.refused: Counter[str] = Counter()
        self.slowest_s = 0.0

    def facts(self) -> dict[str, Any]:
        return {
            "inputs": self.accepted + sum(self.refused.values()),
            "accepted": self.accepted,
            "refused": sum(self.refused.values()),
            "kinds_of_refusal": len(self.refused),
            "slowest_ms": round(1000 * self.slowest_s, 1),
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        }


class _Property:
    """An input's check, and the tally of all."""

    def __init__(self) -> None:
        self.tally = Tally()

    def __call__(self, data: bytes) -> bool:
        """Whether the input is accepted. Raises Violation."""
        started = time.process_time()  # of this process: others may use the machine
        try:
            self.check(data)
        except Nf4Error as error:
            self._hold_message(error)
            accepted = False
        except Violation:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise Violation(f"{type(error).__name__}: {error}") from error
        else:
            accepted = True
            self.tally.accepted += 1
        seconds = time.process_time() - started
        self.tally.slowest_s = max(self.tally.slowest_s, seconds)
        if seconds > LIMIT_S:
            raise Violation(f"took {seconds:.1f} s")
        return accepted

    def check(self, data: bytes) -> None:
        """Raises Nf4Error where the input is refused."""
        raise NotImplementedError

    def _hold_message(self, error: Nf4Error) -> None:
        text = str(error)
        if not isinstance(error, FormatError | LoadError | CompileError):
            raise Violation(f"a {type(error).__name__} for an input: {text}") from error
        if not text.isprintable() or len(text) > LIMIT_MESSAGE:
            raise Violation(f"not one printable line of at most {LIMIT_MESSAGE}: {text!a}") from error
        if not error.remedy:
            raise Violation(f"nothing to do about it: {text}") from error
        problem = text.split(": ", 1)[-1].split(" ")
        self.tally.refused[" ".join(word for word in problem if word.isalpha())[:60]] += 1


class Container(_Property):
    """A .nf4 file, in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._fd = os.memfd_create("container")

    def check(self, data: bytes) -> None:
        _fill(self._fd, data)
        with Nf4File.from_descriptor(self._fd, "x.nf4") as file:
            _compare(data, file.header)
            for name in file.packed_names:
                packed = file.packed(name)
                if not np.isfinite(dequantize(packed, "float32")).all():
                    raise Violation(f"{name} decodes to numbers that are not finite")
            for name in file.kept_names:
                file.kept(name)
            for name in file.file_names:
                file.file(name)
            file.verify(threads=1)


class Source(_Property):
    """A safetensors file, in memory."""

    def __init__(self, *, strict: bool = False) -> None:
        super().__init__()
        self._fd = os.memfd_create("source")
        self._strict = strict

    def check(self, data: bytes) -> None:
        _fill(self._fd, data)
        _compare(data, read_header(self._fd, strict=self._strict, name="x.safetensors"))


class Directory(_Property):
    """A checkpoint whose index or config.json is the input; `folder` holds a good one."""

    def __init__(self, folder: Path, file: str) -> None:
        super().__init__()
        self._folder, self._file = folder, file
        self._root = os.path.realpath(folder)
        self._opened: list[str] = []
        self._watching = False
        printable("\0")  # imports its codec: a file opened outside
        sys.addaudithook(self._watch)

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self._opened.append(os.path.realpath(os.fsdecode(arguments[0])))

    def check(self, data: bytes) -> None:
        (self._folder / self._file).write_bytes(data)
        self._opened.clear()
        self._watching = True
        try:
            with Checkpoint.open(self._folder) as checkpoint:
                ModelConfig.from_dict(checkpoint.config)
                make_plan(checkpoint, CompileOptions())
        finally:
            self._watching = False
            outside = [path for path in self._opened if os.path.dirname(path) != self._root]  # noqa: PTH120
            if outside:
                raise Violation(f"opened outside the directory: {outside[0]!a}")


def _fill(fd: int, data: bytes) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)


def _compare(data: bytes, header: Header) -> None:
    """Hold what was accepted to safetensors' reader."""
    try:
        theirs = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise Violation(f"accepted, and safetensors refuses it: {error}") from error
    if theirs.keys() != header.entries.keys():
        raise Violation(f"other names than safetensors': {sorted(theirs.keys() ^ header.entries.keys())!a}")
    for name, entry in header.entries.items():
        tensor = theirs[name]
        ours = (entry.dtype, list(entry.shape), data[entry.begin : entry.end])
        if ours != (tensor["dtype"], tensor["shape"], bytes(tensor["data"])):
            raise Violation(f"tensor {name!a} is another than safetensors'")
