"""Plain text as documents, in bounded memory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Final, NamedTuple

from ..errors import TrainError
from .files import DataFile

DOCUMENT_SEPARATOR: Final = "\n<|doc|>\n"
# A longer document is encoded in pieces, as an encoding takes some 100 bytes a character: several at once, by
# all cores.
MAX_WHOLE: Final = 4 << 20
_PIECES: Final = 8  # in MAX_WHOLE


class Piece(NamedTuple):
    """Part of a document; `begins` is true of the first."""

    text: str
    begins: bool


def read_documents(file: DataFile, max_whole: int = MAX_WHOLE) -> Iterator[Piece]:
    """What `text.split(DOCUMENT_SEPARATOR)` gives, without documents of white space and without holding it.

    A document of more than `max_whole` characters comes in pieces of an eighth of that, cut behind a line's
    end or before a space where there is one.

    Raises:
        TrainError: not UTF-8, told as file:line.
    """
    buffer, begins = "", True
    for text in decoded(file):
        # The separator may have begun in what is here.
        searched = max(0, len(buffer) - len(DOCUMENT_SEPARATOR) + 1)
        buffer += text
        start = 0  # of what has not been given out
        while True:
            at = buffer.find(DOCUMENT_SEPARATOR, searched)
            most = max_whole if begins else max_whole // _PIECES
            if 0 <= at <= start + most:
                stop, behind = at, at + len(DOCUMENT_SEPARATOR)
            elif at >= 0 or len(buffer) - start > most + len(DOCUMENT_SEPARATOR):
                stop = behind = start + _cut(buffer[start : start + max_whole // _PIECES])
            else:
                break
            if not begins or buffer[start:stop].strip():
                yield Piece(buffer[start:stop], begins)
                begins = False
            begins = begins or behind > stop
            searched = start = behind
        buffer = buffer[start:]
    if buffer.strip() or (buffer and not begins):
        yield Piece(buffer, begins)


def pieces(text: str, max_whole: int) -> Iterator[Piece]:
    """A document in hand, in pieces as `read_documents` gives them."""
    at, most = 0, max_whole
    while len(text) - at > most:
        most = max_whole // _PIECES
        cut = at + _cut(text[at : at + most])
        yield Piece(text[at:cut], at == 0)
        at = cut
    yield Piece(text[at:], at == 0)


def decoded(file: DataFile) -> Iterator[str]:
    """The text of a UTF-8 file, a MiB at a time, without a byte order mark.

    Raises:
        TrainError: not UTF-8, told as file:line.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    while True:
        data = file.read()
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise not_utf8(file, line, error) from None
        line += text.count("\n")
        if text:
            yield text
        if not data:
            return


def not_utf8(file: DataFile, line: int, error: UnicodeDecodeError) -> TrainError:
    """The error about bytes that are not UTF-8; `line` is that of the first byte handed to the decoder."""
    line += error.object.count(b"\n", 0, error.start)
    got = f"byte 0x{error.object[error.start]:02x}"
    return TrainError(f"{file.path}:{line}", "not UTF-8", got=got, remedy="convert it to UTF-8")


def _cut(text: str) -> int:
    """Where to cut a text: behind the last line's end or before the last space of its second half."""
    half = len(text) // 2
    at = text.rfind("\n", half)
    if at >= 0:
        return at + 1
    at = text.rfind(" ", half)
    return at if at > 0 else len(text)
