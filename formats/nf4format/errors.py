"""The one form of every message about bad input: file, tensor, expected, got, what to do."""

from __future__ import annotations

import os


class Nf4Error(ValueError):
    """A problem with something the user gave us, told in one line.

    The text reads ``<file>: tensor 'x': <problem>, expected ..., got ...; <remedy>``; parts that do
    not apply are left out. Commands turn it into one line on stderr and exit status 1; anything that
    is not an ``Nf4Error`` is a bug and keeps its traceback.

    Attributes:
        file: the path at fault, as text; "" when no file is involved.
        tensor: the tensor's name, or None.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        problem: str = "",
        *,
        tensor: str | None = None,
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        self.file = os.fspath(file)
        self.tensor = tensor
        where = [
            part for part in (self.file, f"tensor {_shown(tensor)}" if tensor is not None else "") if part
        ]
        what = [problem] if problem else []
        if expected is not None:
            what.append(f"expected {expected}")
        if got is not None:
            what.append(f"got {got}")
        text = ": ".join([*where, ", ".join(what)])
        super().__init__(f"{text}; {remedy}" if remedy else text)


class FormatError(Nf4Error):
    """A file or directory does not follow its format."""


class WriteError(Nf4Error):
    """An output cannot be written: path, permissions, space."""


def _shown(name: str) -> str:
    """A name from an untrusted file, safe to print: escaped, and cut at 120 characters."""
    text = ascii(name)
    return text if len(text) <= 120 else f"{text[:117]}...'"
