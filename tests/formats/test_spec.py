"""SPEC.md says what the code says: its tables are compared with the constants."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nf4format
from nf4format import header, layout, sums
from nf4format.embedded import FILE_LIMITS

SPEC = (Path(nf4format.__file__).parent / "SPEC.md").read_text(encoding="utf-8")


def rows(section: str) -> list[list[str]]:
    """Cells of the table rows of a section."""
    text = SPEC[SPEC.index(section) :].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_embedded_files() -> None:
    listed = {row[0].split()[0]: int(row[1].removesuffix(" MiB")) << 20 for row in rows("## 6.")}
    assert listed == FILE_LIMITS
    assert list(listed) == list(FILE_LIMITS)


def test_metadata() -> None:
    table = {row[0].strip("`"): row[1] for row in rows("## 3.")}
    assert list(table)[:2] == list(layout.FIXED_METADATA)[:2]
    assert list(table)[2:] == sorted(list(table)[2:])
    for key, value in layout.FIXED_METADATA.items():
        assert table[key].startswith(f"`{value}`")


def test_packed_tensors() -> None:
    names = {row[0].strip("`") for row in rows("## 4.")}
    assert names == {"X", *("X" + suffix for suffix in layout.COMPANIONS)}


@pytest.mark.parametrize(
    ("what", "shown"),
    [
        ("header", f"{header.MAX_HEADER_BYTES >> 20} MiB"),
        ("tensors", f"{header.MAX_TENSORS:,}"),
        ("rank", str(header.MAX_RANK)),
        ("dimension", f"2^{header.MAX_DIM.bit_length() - 1}"),
        ("elements", f"2^{header.MAX_ELEMENTS.bit_length() - 1}"),
        ("tensor name", f"1 to {header.MAX_NAME_BYTES} of"),
        (
            "metadata",
            f"{header.MAX_METADATA_ENTRIES} keys",
        ),
    ],
)
def test_limits(what: str, shown: str) -> None:
    limits = {row[0]: row[1] for row in rows("### Limits")}
    assert limits[what].startswith(shown)


def test_name_characters() -> None:
    characters = re.search(r"A-Z a-z 0-9 ([^`]*)`", SPEC)
    assert characters is not None
    for code in range(128):
        character = chr(code)
        listed = character.isalnum() or character in characters[1].split()
        assert header.valid_name(f"x{character}x") == listed, character


def test_sums() -> None:
    assert f"`{sums.MAGIC.decode()}`" in SPEC
    assert f"chunk_bytes = {sums.CHUNK_BYTES:,}" in SPEC
    assert sums.SUMS_NAME in SPEC
