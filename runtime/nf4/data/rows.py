"""Rows of JSONL, JSON, CSV, TSV and parquet files as objects, one at a time, in bounded memory."""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Collection, Iterator
from typing import Any, Final, NamedTuple

from nf4format.strictjson import MAX_NESTING, parse_json

from ..errors import TrainError
from .documents import decoded, not_utf8
from .files import DataFile

MAX_ROW_BYTES: Final = 64 << 20
_BOM: Final = b"\xef\xbb\xbf"
_BLANK: Final = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD: Final = 12  # of JSON outside strings (-Infinity, an escape): what an end of the buffer may cut
_PARQUET_BATCH: Final = 256  # rows decoded at once


class Row(NamedTuple):
    """An object and its place, as messages tell it: file:line, or file: row n."""

    place: str
    value: dict[str, Any]


def read_rows(file: DataFile, wanted: Collection[str]) -> Iterator[Row]:
    """The rows of a file of any kind but text.

    Args:
        wanted: names of columns that matter. Parquet leaves others on disk, unless there is none of these.

    Raises:
        TrainError: malformed, too large, not UTF-8, nested too deeply; parquet without pyarrow.
    """
    if file.kind == "jsonl":
        return _json_lines(file)
    if file.kind == "json":
        return _JsonStream(file).rows()
    if file.kind == "parquet":
        return _parquet(file, wanted)
    return _table(file, "\t" if file.kind == "tsv" else ",")


def _json_lines(file: DataFile) -> Iterator[Row]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        if len(line) > MAX_ROW_BYTES:
            raise _too_large(file, number)
        if line.strip():
            yield _object(line, f"{file.path}:{number}", "write one JSON object a line")


class _JsonStream:
    """A JSON file that is an array of objects, or objects one after another, read an object at a time."""

    def __init__(self, file: DataFile) -> None:
        self._file, self._texts = file, decoded(file)
        self._buffer, self._at, self._line = "", 0, 1
        self._ended = False
        self._decoder = json.JSONDecoder()

    def rows(self) -> Iterator[Row]:
        in_array = self._next() == "["
        if in_array:
            self._at += 1
        first = True
        while (character := self._next()) != "":
            if in_array and character == "]":
                self._at += 1
                if self._next() != "":
                    raise self._malformed("more text behind the array")
                return
            if in_array and not first:
                if character != ",":
                    raise self._malformed("a comma is missing between two objects")
                self._at += 1
                self._next()
            yield self._row()
            first = False
        if in_array:
            raise self._malformed("the array is not closed")

    def _next(self) -> str:
        """Skip white space; the next character, or "" at the end."""
        while True:
            end = _BLANK.match(self._buffer, self._at).end()  # type: ignore[union-attr]  # it matches ""
            self._line += self._buffer.count("\n", self._at, end)
            self._at = end
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def _more(self, least: int = 1) -> bool:
        """Read at least so many characters more, dropping what is done with; whether there were any."""
        parts = [self._buffer[self._at :]]
        self._at, got = 0, 0
        while got < least and not self._ended:
            text = next(self._texts, "")
            self._ended = not text
            parts.append(text)
            got += len(text)
        self._buffer = "".join(parts)
        return got > 0

    def _row(self) -> Row:
        """The object at the current place: decoded with more and more text until it is whole."""
        while True:
            try:
                if self._buffer[self._at : self._at + 1] != "{":
                    raise self._malformed("expected an object")
                _, end = self._decoder.raw_decode(self._buffer, self._at)
                break
            except json.JSONDecodeError as error:
                line = self._line + self._buffer.count("\n", self._at, error.pos)
                held = len(self._buffer) - self._at
                is_cut = (
                    error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - _LONGEST_WORD
                )
                if is_cut and held > MAX_ROW_BYTES:
                    raise _too_large(self._file, self._line) from None
                # Twice as much each time, so that a large object is not scanned over and over.
                if not is_cut or not self._more(held):
                    raise self._malformed(error.msg.lower(), line) from None
            except RecursionError:
                raise self._malformed(f"nested deeper than {MAX_NESTING} levels") from None
        text = self._buffer[self._at : end]
        row = _object(text.encode(), self._place(self._line), "check the object that begins in this line")
        self._line += text.count("\n")
        self._at = end
        return row

    def _place(self, line: int) -> str:
        return f"{self._file.path}:{line}"

    def _malformed(self, problem: str, line: int | None = None) -> TrainError:
        remedy = "write an array of objects, or one object a line"
        return TrainError(self._place(line or self._line), f"not JSON: {problem}", remedy=remedy)


def _object(data: bytes, place: str, remedy: str) -> Row:
    try:
        value = parse_json(data)
    except ValueError as error:
        raise TrainError(place, str(error), remedy=remedy) from None
    if not isinstance(value, dict):
        raise TrainError(place, "bad row", expected="a JSON object", got=type(value).__name__, remedy=remedy)
    return Row(place, value)


class _TableLines:
    """Lines of a table as text, for the csv module; refuses a row that goes on and on."""

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self.row_bytes = self._number = 0

    def __iter__(self) -> _TableLines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self._number += 1
        self.row_bytes += len(line)
        if self.row_bytes > MAX_ROW_BYTES:
            raise _too_large(self._file, self._number)
        try:
            return line.decode("utf-8-sig" if self._number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(self._file, self._number, error) from None


def _table(file: DataFile, delimiter: str) -> Iterator[Row]:
    lines = _TableLines(file)
    before = csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            place = f"{file.path}:{line}"
            line, lines.row_bytes = reader.line_num + 1, 0
            if not cells:
                continue
            if names is None:
                names = cells
                if len(set(names)) != len(names):
                    twice = next(name for name in names if names.count(name) > 1)
                    raise TrainError(place, f"two columns are named {ascii(twice)[:120]}")
                continue
            if len(cells) != len(names):
                raise TrainError(
                    place,
                    "bad row",
                    expected=f"{len(names)} cells, as in the first line",
                    got=len(cells),
                    remedy="quote cells that hold the separator or a line break",
                )
            yield Row(place, dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        remedy = "quote cells that hold the separator, a quote (doubled) or a line break"
        raise TrainError(f"{file.path}:{line}", f"malformed table: {error}", remedy=remedy) from None
    finally:
        csv.field_size_limit(before)


def _parquet(file: DataFile, wanted: Collection[str]) -> Iterator[Row]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        remedy = "install nf4[parquet], or convert the file to JSONL"
        raise TrainError(file.path, "reading parquet needs pyarrow", remedy=remedy) from None
    try:
        # Buffered streams instead of whole column chunks: a file may be one row group.
        table = parquet.ParquetFile(file.raw, pre_buffer=False, buffer_size=1 << 20)
        names = [name for name in table.schema_arrow.names if name in wanted] or None
        total, number = max(table.metadata.num_rows, 1), 0
        for batch in table.iter_batches(batch_size=_PARQUET_BATCH, columns=names, use_threads=False):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{file.path}: row {number}", value)
            file.count(file.size * number // total - file.size * (number - batch.num_rows) // total)
    except TrainError:
        raise
    except MemoryError:
        raise TrainError(file.path, "a row group does not fit into memory") from None
    except Exception as error:  # pyarrow raises many kinds on damaged files
        problem = " ".join(str(error).split())[:200]
        raise TrainError(file.path, f"not readable as parquet: {problem}", remedy="write it again") from None


def _too_large(file: DataFile, line: int) -> TrainError:
    return TrainError(
        f"{file.path}:{line}",
        "a row is too large",
        expected=f"at most {MAX_ROW_BYTES >> 20} MiB",
        remedy="split it into several rows",
    )
