"""The one form of every message about bad input: file, tensor, expected, got, what to do."""

from __future__ import annotations

import os
from typing import Final

_MAX_NAME: Final = 120  # characters of a tensor's name
_MAX_VALUE: Final = 400
_MAX_TEXT: Final = 1200


class Nf4Error(ValueError):
    """A problem with something the user gave us, told in one line.

    The text reads ``<file>: tensor 'x': <problem>, expected ..., got ...; <remedy>``; parts that do
    not apply are left out. It is printable whatever is in the file: control characters are escaped, long
    values cut. Commands turn it into one line on stderr and exit status 1; anything that is not an
    ``Nf4Error`` is a bug and keeps its traceback.

    Attributes:
        file: the path at fault, as text; "" when no file is involved.
        tensor: the tensor's name, or None.
        remedy: what to do about it, or None.
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
        self.remedy = remedy
        where = [printable(self.file)] if self.file else []
        if tensor is not None:
            where.append(f"tensor {_cut(ascii(tensor), _MAX_NAME)}")
        what = [problem] if problem else []
        if expected is not None:
            what.append(f"expected {_cut(str(expected), _MAX_VALUE)}")
        if got is not None:
            what.append(f"got {_cut(str(got), _MAX_VALUE)}")
        text = ": ".join([*where, _cut(printable(", ".join(what)), _MAX_TEXT)])
        super().__init__(f"{text}; {remedy}" if remedy else text)


class FormatError(Nf4Error):
    """A file or directory does not follow its format."""


class WriteError(Nf4Error):
    """An output cannot be written: path, permissions, space."""


class TakenError(WriteError):
    """Another process is writing the same output."""


def printable(text: str) -> str:
    """A text from a stranger, safe for a terminal: what is not printable is escaped, as in literals."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
