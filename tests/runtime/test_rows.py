"""Files of every kind as rows and documents: what is in them, and every message about what should not be."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nf4.data import documents, rows
from nf4.data.documents import DOCUMENT_SEPARATOR, Piece, pieces, read_documents
from nf4.data.files import KINDS, DataFile, find_files, kind_of
from nf4.data.rows import read_rows
from nf4.errors import TrainError
from nf4format.errors import FormatError

Write = Callable[[str, str | bytes], Path]
ROWS = [{"text": 'a, "b"\nc', "n": "1"}, {"text": "ä🐸 {[", "n": ""}, {"text": "", "n": "x"}]


def values(path: Path, wanted: Any = ()) -> list[Any]:
    with DataFile(path) as file:
        return [value for _, value in read_rows(file, wanted)]


def table(delimiter: str, **options: Any) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["text", "n"], delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, ROWS))),
        (
            "a.ndjson",
            "\ufeff\n" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n",
        ),
        ("a.json", json.dumps(ROWS)),
        ("b.json", "\ufeff " + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n"),
        ("c.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.csv", table(",")),
        ("b.CSV", "\ufeff" + table(",", quoting=csv.QUOTE_ALL, lineterminator="\n") + "\n\n"),
        ("a.tsv", table("\t")),
    ],
)
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_every_kind_gives_the_same_rows(
    name: str, content: str, step: int, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nf4.data.files._READ_BYTES", step)
    assert values(write(name, content)) == ROWS


def test_parquet_gives_the_same_rows_and_only_columns_that_matter(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    chats = [[{"role": "user", "content": "a"}], [], [{"role": "assistant", "content": "b"}]]
    columns = {"text": [row["text"] for row in ROWS], "messages": chats, "n": [1, None, 3]}
    parquet.write_table(arrow.table(columns), path, row_group_size=2)
    assert values(path, {"text", "messages"}) == [
        {"text": row["text"], "messages": chat} for row, chat in zip(ROWS, chats, strict=True)
    ]
    assert list(values(path, {"other"})[0]) == ["text", "messages", "n"]
    for cut in (b"", b"PAR1", path.read_bytes()[:-20], os.urandom(200)):
        path.write_bytes(cut)
        with pytest.raises(TrainError, match=r"a.parquet: not readable as parquet: .*; write it again"):
            values(path)


def test_parquet_without_pyarrow_is_told(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        TrainError, match=r"reading parquet needs pyarrow; install nf4\[parquet\], or convert"
    ):
        values(write("a.parquet", ""))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            '{"a": "b"}\n{"a"',
            r"x.jsonl:2: not JSON at character 4: .*; write one JSON object a line",
        ),
        ("x.jsonl", b'{"a": "b"}\n\n{"a": "\xff"}', "x.jsonl:3: not UTF-8 at byte 7"),
        ("x.jsonl", '{"a": 1, "a": 2}', "x.jsonl:1: key 'a' appears twice in one object"),
        ("x.jsonl", '{"a": NaN}', "x.jsonl:1: NaN is not JSON"),
        ("x.jsonl", '{"a": 1e999}', "x.jsonl:1: number 1e999 is out of range"),
        ("x.jsonl", '{"a": ' + "9" * 5000 + "}", "x.jsonl:1: a number of 1000 digits or more"),
        ("x.jsonl", '{"a": "\\ud83d"}', "x.jsonl:1: not JSON: half a surrogate pair"),
        ("x.jsonl", '{"a": ' + "[" * 100 + "]" * 100 + "}", "x.jsonl:1: nested deeper than 64 levels"),
        ("x.jsonl", '{"a":' * 100_000, "x.jsonl:1: nested deeper than 64 levels"),
        ("x.jsonl", "[1]", "x.jsonl:1: bad row, expected a JSON object, got list"),
        ("x.jsonl", "\n12", "x.jsonl:2: bad row, expected a JSON object, got int"),
        (
            "x.json",
            '[{"a": 1}\n{"a": 2}]',
            "x.json:2: not JSON: a comma is missing between two objects; write an",
        ),
        ("x.json", '[\n{"a": 1},\n{"a" 2}]', "x.json:3: not JSON: expecting ':' delimiter"),
        ("x.json", '[{"a": 1}', "x.json:1: not JSON: the array is not closed"),
        ("x.json", '[{"a": 1},', "x.json:1: not JSON: expected an object"),
        ("x.json", '[{"a": 1}] 3', "x.json:1: not JSON: more text behind the array"),
        ("x.json", '[{"a": "b\n', r"x.json:1: not JSON: (unterminated string|invalid control)"),
        ("x.json", '[1, {"a": 1}]', "x.json:1: not JSON: expected an object"),
        ("x.json", '"text"', "x.json:1: not JSON: expected an object"),
        ("x.json", "[" * 100_000, "x.json:1: not JSON: expected an object"),
        ("x.json", '[{"a":' + "[" * 100_000, "x.json:1: not JSON: nested deeper than 64 levels"),
        ("x.json", '[{"a": 1},\n{"b": 1, "b": 2}]', "x.json:2: key 'b' appears twice"),
        ("x.json", b'[{"a": 1},\n\n{"a": "\xe9"}]', "x.json:3: not UTF-8, got byte 0xe9"),
        ("x.csv", "a,b\n1,2\n3\n", "x.csv:3: bad row, expected 2 cells, as in the first line, got 1; quote"),
        ("x.csv", 'a,b\n"1\n1",2\n3,4,5\n', "x.csv:4: bad row, expected 2 cells, .* got 3"),
        ("x.csv", 'a,b\n1,"2\n3,4\n', "x.csv:2: malformed table: unexpected end of data"),
        ("x.csv", 'a,b\n1,"2"3\n', "x.csv:2: malformed table: ',' expected after '\"'; quote cells"),
        ("x.csv", "a,b,a\n1,2,3\n", "x.csv:1: two columns are named 'a'"),
        ("x.csv", b"a,b\n1,2\n\n3,\xff\n", "x.csv:4: not UTF-8, got byte 0xff; convert it to UTF-8"),
        ("x.tsv", "a\tb\n1,2\n", "x.tsv:2: bad row, expected 2 cells"),
    ],
)
def test_malformed_files_are_told_with_their_line(
    name: str, content: str | bytes, message: str, write: Write
) -> None:
    with pytest.raises(TrainError, match=message):
        values(write(name, content))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "y.csv"])
def test_rows_without_end_are_refused_in_bounded_memory(
    name: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1 << 20)
    content = {"x.jsonl": '{"a": "', "x.json": '[{"a": "', "x.csv": 'a\n"', "y.csv": 'a\n"'}[name]
    filling = ("x" * 99 + "\n" if name == "y.csv" else "x" * 100) * 80_000
    read = 0

    def count(num_bytes: int) -> None:
        nonlocal read
        read += num_bytes

    with (
        DataFile(write(name, content + filling), count) as file,
        pytest.raises(TrainError, match=f"{name}:.*: a row is too large, expected at most 1 MiB; split it"),
    ):
        list(read_rows(file, ()))
    assert read < 5 << 20


def test_a_large_object_in_an_array_is_read_in_time_that_grows_with_it(write: Write) -> None:
    large = {"a": ["x" * 50] * 200_000}
    assert values(write("x.json", json.dumps([large, {"a": 1}, large]))) == [large, {"a": 1}, large]


def test_a_mistake_early_in_a_large_file_is_told_at_once(write: Write) -> None:
    path = write("x.json", '[{"a": 1},\n{"a": 1, b}' + ', {"a": "' + "x" * 60 + '"}' * 200_000)
    with pytest.raises(TrainError, match=r"x.json:2: not JSON: expecting property name"):
        values(path)


TEXTS = [
    "",
    "one",
    DOCUMENT_SEPARATOR.join(["a b", " \n", "", "ä🐸", "c"]),
    DOCUMENT_SEPARATOR * 3 + "x" + DOCUMENT_SEPARATOR,
    "\n<|doc|>\n<|doc|>\n<|doc|>\n",
    "a\n<|doc|>b\n<|doc|>\r\n",
    DOCUMENT_SEPARATOR.join("word " * (i % 50) for i in range(300)),
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_documents_are_those_of_splitting_the_whole(
    text: str, step: int, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nf4.data.files._READ_BYTES", step)
    with DataFile(write("a.txt", "\ufeff" + text)) as file:
        found = list(read_documents(file))
    assert found == [Piece(one, True) for one in text.split(DOCUMENT_SEPARATOR) if one.strip()]


def test_many_small_documents_take_time_that_grows_with_them(write: Write) -> None:
    path = write("a.txt", DOCUMENT_SEPARATOR.join(["a"] * 100_000))
    with DataFile(path) as file:
        assert sum(1 for _ in read_documents(file)) == 100_000


def test_long_documents_come_in_pieces_that_make_them_whole(write: Write) -> None:
    long = "".join(f"line {i} of the text\n" for i in range(500))
    text = DOCUMENT_SEPARATOR.join(["short", long, "x" * 1000, "end"])
    with DataFile(write("a.txt", text)) as file:
        found = list(read_documents(file, max_whole=800))
    assert max(len(piece.text) for piece in found) <= 100
    assert [piece.text for piece in found if piece.begins][-1] == "end"
    whole: list[str] = []
    for piece in found:
        whole += [piece.text] if piece.begins else [whole.pop() + piece.text]
    assert whole == ["short", long.removesuffix("\n") + "\n", "x" * 1000, "end"]
    assert sum(piece.begins for piece in found) == 4
    assert all(piece.text.endswith("\n") for piece in found if "line" in piece.text)
    assert "".join(piece.text for piece in pieces(long, 800)) == long
    assert [piece.begins for piece in pieces(long, 800)][:3] == [True, False, False]
    assert list(pieces("ab", 800)) == [Piece("ab", True)]


@pytest.mark.parametrize(
    ("content", "place"), [(b"a\n\nb \xff c", "3: not UTF-8, got byte 0xff"), (b"a\n\xe2\x82", "2: .* 0xe2")]
)
def test_documents_that_are_not_text_are_told_with_their_line(
    content: bytes, place: str, write: Write
) -> None:
    with (
        DataFile(write("a.txt", content)) as file,
        pytest.raises(TrainError, match=f"a.txt:{place}; convert it to UTF-8"),
    ):
        list(read_documents(file))


@pytest.mark.parametrize(
    ("suffix", "remedy"),
    [
        (".gz", "unpack it first"),
        (".ZIP", "unpack it first"),
        (".arrow", "convert it to parquet"),
        (".pkl", "as JSONL"),
        (".pdf", "extract its text"),
        (".xlsx", "save it as CSV"),
        (".safetensors", "it is a model"),
    ],
)
def test_other_kinds_are_refused_with_what_to_do(suffix: str, remedy: str) -> None:
    with pytest.raises(TrainError, match=f"unsupported kind of data, expected one of .txt .*; .*{remedy}"):
        kind_of(Path(f"x{suffix}"))
    assert kind_of(Path("README")) == kind_of(Path("x.log")) == "text"


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    for path, message in ((tmp_path / "fifo.jsonl", "a FIFO"), (tmp_path / "none", "no such file")):
        with pytest.raises(FormatError, match=message):
            DataFile(path)


def test_a_directory_is_all_its_data_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl", "a/b/c.csv", "c.py", ".hidden.txt", ".git/x.txt", "d.gz"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    folder = tmp_path / "data"
    (folder / "a" / "inside").symlink_to(folder / "a" / "b")
    (folder / "inside.txt").symlink_to(folder / "b.txt")
    names = [str(path.relative_to(folder)) for path in find_files(folder)]
    assert names == ["a/b/c.csv", "a/z.jsonl", "b.txt"]
    assert find_files(folder / "b.txt") == [folder / "b.txt"]
    outside = tmp_path / "outside"
    outside.mkdir()
    for target in (outside, Path("/etc/passwd")):
        link = folder / "link.txt"
        link.symlink_to(target)
        with pytest.raises(
            TrainError, match=r"link.txt: a symbolic link leads out of the directory; give what"
        ):
            find_files(folder)
        link.unlink()
    (folder / "a" / "loop").symlink_to(folder)
    assert len(find_files(folder)) == 3
    with pytest.raises(TrainError, match=r"no data in the directory, expected files with one of .txt"):
        find_files(outside)
    assert set(KINDS.values()) == {"text", "jsonl", "json", "csv", "tsv", "parquet"}


def test_a_file_that_changes_while_it_is_read_is_told(write: Write) -> None:
    path = write("a.txt", "one two")
    with DataFile(path) as file:
        first = file.content_sum()
        assert file.read() == b"one two"
        file.check_unchanged()
        path.write_text("one two three")
        with pytest.raises(TrainError, match="the file changed while it was read; start again"):
            file.check_unchanged()
    with DataFile(path) as file:
        assert file.content_sum() != first


def test_limits_are_what_the_messages_say() -> None:
    assert rows.MAX_ROW_BYTES == 64 << 20
    assert documents.MAX_WHOLE == 4 << 20
