"""Kinds of values that options of the command line take, and options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class ByteSize(click.ParamType):
    """A number of bytes, with K, M or G behind it for powers of 1024."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).upper().removesuffix("B").removesuffix("I")
        unit = text[-1:] if text[-1:] in _UNITS else ""
        try:
            size = float(text.removesuffix(unit)) * _UNITS[unit]
        except ValueError:
            self.fail(f"{value!r} is not a size; write for example 64M or 2G", param, ctx)
        if not 1 <= size < 1 << 63:
            self.fail(f"{value!r} is out of range", param, ctx)
        return int(size)


class WeightedPath(click.ParamType):
    """PATH, or PATH=WEIGHT: a pair of both. What exists under the whole name is a path."""

    name = "path[=weight]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, float]:
        if isinstance(value, tuple):
            return value
        path, sign, weight = str(value).rpartition("=")
        if sign and path and not Path(str(value)).exists():
            try:
                return Path(path), float(weight)
            except ValueError:
                self.fail(
                    f"{weight!r} behind {path!r} is not a weight; write for example {path}=0.5", param, ctx
                )
        return Path(str(value)), 1.0


class Assignment(click.ParamType):
    """KEY=VALUE: a pair of key and value, the latter of a kind of its own."""

    def __init__(self, key: str, value: click.ParamType) -> None:
        self.name = f"{key}={value.name}"
        self._value = value

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        key, sign, given = str(value).rpartition("=")
        if not (sign and key and given):
            self.fail(f"{value!r} is not of the form {self.name.upper()}", param, ctx)
        return key, self._value.convert(given, param, ctx)


def runs_model(command: _Command) -> _Command:
    """The options of a command that loads FILE and runs it: dtype, device, no_mmap, threads."""
    for option in reversed(_RUN_OPTIONS):  # as decorators below each other
        command = option(command)
    return command


_RUN_OPTIONS = (
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Arithmetic and activations.  [default: the checkpoint's]",
    ),
    click.option("--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU where one can be used."),
    click.option(
        "--no-mmap",
        is_flag=True,
        help="Read FILE into memory instead of mapping it: for network file systems. Its sums are checked.",
    ),
    click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's choice]"),
)
