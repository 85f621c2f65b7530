"""Plain text as documents, in bounded memory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Final, NamedTuple

from ..errors import TrainError
from .files import DataFile

DOCUMENT_SEPARATOR: Final = "\n<|doc|>\n"
# A longer document is encoded in pieces of so many characters: an encoding takes some 100 bytes a character.
MAX_PIECE: Final = 4 << 20


class Piece(NamedTuple):
    """Part of a document; `begins` is true of the first."""

    text: str
    begins: bool


def read_documents(file: DataFile, max_piece: int = MAX_PIECE) -> Iterator[Piece]:
    """What `text.split(DOCUMENT_SEPARATOR)` gives, without documents of white space and without holding it.

    A document of more than `max_piece` characters comes in several pieces, cut behind a line's end or before
    a space where there is one.

    Raises:
        TrainError: not UTF-8, told as file:line.
    """
    buffer, begins, searched = "", True, 0
    for text in decoded(file):
        buffer += text
        while True:
            at = buffer.find(DOCUMENT_SEPARATOR, searched)
            if 0 <= at <= max_piece:
                if not begins or buffer[:at].strip():
                    yield Piece(buffer[:at], begins)
                buffer, begins, searched = buffer[at + len(DOCUMENT_SEPARATOR) :], True, 0
            elif len(buffer) > max_piece + len(DOCUMENT_SEPARATOR):
                cut = _cut(buffer, max_piece)
                if not begins or buffer[:cut].strip():
                    yield Piece(buffer[:cut], begins)
                    begins = False
                buffer, searched = buffer[cut:], 0
            else:
                # The separator may have begun in what is here.
                searched = max(0, len(buffer) - len(DOCUMENT_SEPARATOR) + 1)
                break
    if buffer.strip() or (buffer and not begins):
        yield Piece(buffer, begins)


def pieces(text: str, max_piece: int = MAX_PIECE) -> Iterator[Piece]:
    """A document in hand in pieces of at most `max_piece` characters, cut as `read_documents` does."""
    at = 0
    while len(text) - at > max_piece:
        cut = at + _cut(text[at : at + max_piece], max_piece)
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


def _cut(text: str, most: int) -> int:
    """Where to cut a text so that the first part has at most `most` characters and at least half of that."""
    at = text.rfind("\n", most // 2, most)
    if at >= 0:
        return at + 1
    at = text.rfind(" ", most // 2, most)
    return at if at > 0 else most
