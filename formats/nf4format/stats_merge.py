"""Several files of calibration statistics as one: means over all of their tokens, other layers side by side.

Numbers pass in pieces, so that memory does not grow with the model; they are added in float64 and rounded
once, in an order that does not depend on that of the files. What the merged file says of its tokens, entry by
entry, lets it be merged again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import FormatError
from .stats import FORMAT, EntrySpec, StatsFile, StatsWriter
from .strictjson import parse_json

_PIECE = 1 << 20  # values of each file in memory

MERGED = "merged"
"""Key of the metadata, after FORMAT."""

PACKED_SHA256 = f"{FORMAT}.packed_sha256"


@dataclass(frozen=True)
class MergeResult:
    """entries: of the merged file; tokens: the most over which any of them is a mean."""

    entries: int
    tokens: int


def merge_stats(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Merge files of statistics; the result is that of one collection over all the texts, but for rounding.

    Args:
        progress: takes (entries done, entries in all).

    Raises:
        FormatError: a file is damaged; files of different models, of first and second passes, of second
            passes beside different packed files, with moments and without; the same text twice for one entry.
        WriteError: the output cannot be written.
    """
    with ExitStack() as stack:
        files = []
        for path in paths:
            files.append(StatsFile(Path(path)))
            stack.callback(files[-1].close)
        files.sort(key=lambda file: json.dumps(file.header.metadata, sort_keys=True))
        kinds = _kinds(files)
        parts: dict[str, list[StatsFile]] = {}
        for file in files:
            for name in file.entries:
                parts.setdefault(name, []).append(file)
        for name, found in parts.items():
            _check_entry(name, found)
        _check_weights(parts)
        tokens = {name: sum(file.tokens_of(name) for file in found) for name, found in parts.items()}
        most = max(tokens.values())
        specs = [
            EntrySpec(name, entry["features"], entry["weights"], tokens[name])
            for name, entry in ((name, found[0].entries[name]) for name, found in parts.items())
        ]
        writer = StatsWriter(
            out,
            specs,
            _metadata(files),
            tokens=most,
            full="moment" in kinds,
            cross="cross" in kinds,
            overwrite=overwrite,
        )
        with writer:
            for done, (name, found) in enumerate(parts.items(), 1):
                shares = [file.tokens_of(name) / tokens[name] for file in found]
                for kind in kinds:
                    tensor = f"{name}.{kind}"
                    writer.write(tensor, _means([file.pieces(tensor, _PIECE) for file in found], shares))
                if progress is not None:
                    progress(done, len(parts))
    return MergeResult(len(parts), most)


def _means(files: list[Iterator[np.ndarray]], shares: list[float]) -> Iterator[np.ndarray]:
    """float32 pieces of the sum of share times value."""
    for pieces in zip(*files, strict=True):
        total = np.zeros(pieces[0].shape, np.float64)
        for piece, share in zip(pieces, shares, strict=True):
            total += piece.astype(np.float64) * share
        yield total.astype(np.float32)


def _kinds(files: list[StatsFile]) -> tuple[str, ...]:
    """What each entry of all files has: "diagonal", "moment", "cross"."""
    first: tuple[str, ...] | None = None
    for file in files:
        for name in file.entries:
            kinds = tuple(kind for kind in ("diagonal", "moment", "cross") if file.has(f"{name}.{kind}"))
            first = first or kinds
            if kinds != first:
                raise FormatError(
                    file.path,
                    f"statistics of another kind than those of {files[0].path}",
                    tensor=name,
                    expected=" and ".join(first),
                    got=" and ".join(kinds),
                    remedy="merge those with --full, without it, and of second passes, apart from each other",
                )
        packed = file.header.metadata.get(PACKED_SHA256)
        if packed != files[0].header.metadata.get(PACKED_SHA256):
            raise FormatError(
                file.path,
                f"a second pass beside another packed file than that of {files[0].path}",
                expected=ascii(files[0].header.metadata.get(PACKED_SHA256)),
                got=ascii(packed),
                remedy="collect them beside the same one",
            )
    if first is None:
        raise FormatError(
            files[0].path if files else "", "nothing to merge", remedy="give files with entries"
        )
    return first


def _check_entry(name: str, files: list[StatsFile]) -> None:
    """One entry in several files: of the same weights, and of different texts."""
    seen: dict[str, StatsFile] = {}
    for file in files:
        described, expected = file.entries[name], files[0].entries[name]
        if (described["features"], described["weights"]) != (expected["features"], expected["weights"]):
            raise FormatError(
                file.path,
                f"statistics of another model than those of {files[0].path}",
                tensor=name,
                expected=json.dumps(expected["weights"], sort_keys=True),
                got=json.dumps(described["weights"], sort_keys=True),
                remedy="merge files of one model",
            )
        for text in _texts(file):
            if text in seen:
                raise FormatError(
                    file.path,
                    f"statistics of the same text as in {seen[text].path}, which would count twice",
                    tensor=name,
                    got=f"data_sha256 {text}",
                    remedy="give each file once; of files merged already, the ones they were made of",
                )
            seen[text] = file


def _check_weights(parts: Mapping[str, list[StatsFile]]) -> None:
    """A weight belongs to one entry."""
    places: dict[str, str] = {}
    for name, files in parts.items():
        for weight in files[0].entries[name]["weights"]:
            if places.setdefault(weight, name) != name:
                raise FormatError(
                    files[0].path,
                    "the weight is in two entries",
                    tensor=weight,
                    expected=places[weight],
                    got=name,
                    remedy="collect the statistics with one version of nf4 calibrate",
                )


def _sources(file: StatsFile) -> list[dict[str, str]]:
    """What each of the collections that the file was made of says about itself.

    Raises:
        FormatError: a merged file whose list of them is damaged.
    """
    metadata = file.own_metadata()
    merged = metadata.get(MERGED)
    if merged is None:
        return [metadata]
    try:
        sources = parse_json(merged.encode())
    except ValueError:
        sources = None
    if not isinstance(sources, list) or not all(
        isinstance(source, dict) and all(isinstance(value, str) for value in source.values())
        for source in sources
    ):
        raise FormatError(file.path, f"nf4.stats.{MERGED}", remedy="merge the files again")
    return sources


def _texts(file: StatsFile) -> set[str]:
    return {source["data_sha256"] for source in _sources(file) if "data_sha256" in source}


def _metadata(files: list[StatsFile]) -> dict[str, str]:
    """Of the merged file; `merged` lists what its sources said."""
    sources = [source for file in files for source in _sources(file)]
    sources.sort(key=lambda source: json.dumps(source, sort_keys=True))
    texts = sorted({text for file in files for text in _texts(file)})
    found = {
        MERGED: json.dumps(sources, sort_keys=True, separators=(",", ":")),
        "data_sha256": texts[0] if len(texts) == 1 else hashlib.sha256("\n".join(texts).encode()).hexdigest(),
    }
    packed = files[0].header.metadata.get(PACKED_SHA256)
    return found if packed is None else {**found, "packed_sha256": packed}
