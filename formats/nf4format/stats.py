"""Calibration statistics: second moments of what the linear layers of a model read, in a safetensors file.

For a layer y = W x over many tokens, an encoder that knows H = mean of x xT can weigh errors by what they do
to y. Weights that read the same x (q, k and v of a layer; gate and up) share an entry:

    <entry>.diagonal   float32 [k]               mean of x_j^2
    <entry>.moment     float32 [k (k + 1) / 2]   H: its upper triangle, row by row; only in full statistics
    <entry>.cross      float32 [k, k]            mean of x yT; only after a second pass: there y is what the
                                                 packed model reads, x what the original does, and the moment
                                                 is that of y

A file says which weights it is of, by name and by the SHA-256 of their bytes in the checkpoint, so that
statistics of another model are refused weight by weight; the XXH3-64 of each tensor is in its metadata, and
compared when the tensor is read. Several files go together: other layers, or other data for the same ones,
which are averaged by their numbers of tokens. `stats_merge` makes one file of them.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import xxhash

from .atomic import AtomicFile
from .errors import FormatError
from .files import open_regular, pread_into
from .header import Header, read_header
from .strictjson import parse_object
from .tensorfile import begin_tensors, plan_tensors, write_header

FORMAT: Final = "nf4.stats"
VERSION: Final = "1"
MAX_FEATURES: Final = 1 << 20
_MOST_TOKENS: Final = 10**15
_SUM_DIGITS: Final = 16  # of each tensor's sum, hexadecimal, in the order of the tensors' offsets
_REMEDY: Final = "collect the statistics again with nf4 calibrate"


@dataclass(frozen=True)
class EntrySpec:
    """One x: its number of features, and the weights [n, features] that read it, name -> SHA-256.

    tokens: over which its means are taken; None = as the whole file.
    """

    name: str
    features: int
    weights: Mapping[str, str]
    tokens: int | None = None


class StatsWriter:
    """Writes a file entry by entry; it appears whole, at the end of the `with` block."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Sequence[EntrySpec],
        metadata: Mapping[str, str],
        *,
        tokens: int,
        full: bool,
        cross: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Args:
        entries: all there will be.
        metadata: what else is worth knowing, such as the fingerprint of the data; values are strings.
        tokens: over which means are taken, of entries that do not say.
        full: with moments.
        cross: with cross moments.
        """
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for entry in entries:
            tensors[f"{entry.name}.diagonal"] = ("F32", (entry.features,))
            if full:
                tensors[f"{entry.name}.moment"] = ("F32", (entry.features * (entry.features + 1) // 2,))
            if cross:
                tensors[f"{entry.name}.cross"] = ("F32", (entry.features, entry.features))
        described: dict[str, dict[str, Any]] = {}
        for entry in entries:
            described[entry.name] = {"features": entry.features, "weights": dict(entry.weights)}
            if entry.tokens not in (None, tokens):
                described[entry.name]["tokens"] = entry.tokens
        known = {
            FORMAT: VERSION,
            f"{FORMAT}.entries": json.dumps(described, sort_keys=True, separators=(",", ":")),
            f"{FORMAT}.tokens": str(tokens),
            f"{FORMAT}.xxh3": "0" * (_SUM_DIGITS * len(tensors)),  # until they are known
        }
        self._plan = plan_tensors(tensors, {**{f"{FORMAT}.{k}": v for k, v in metadata.items()}, **known})
        self._sums: dict[str, str] = {}
        self._file = AtomicFile(path, overwrite=overwrite)

    def __enter__(self) -> StatsWriter:
        self._file.__enter__()
        begin_tensors(self._file, self._plan)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self._write_sums()
            except BaseException as failure:
                self._file.__exit__(type(failure), failure, failure.__traceback__)
                raise
        self._file.__exit__(kind, error, trace)

    def _write_sums(self) -> None:
        missing = self._plan.entries.keys() - self._sums.keys()
        if missing:
            raise ValueError(f"never written: {min(missing)}")
        sums = "".join(self._sums[name] for name in self._plan.entries)
        metadata = {**self._plan.metadata, f"{FORMAT}.xxh3": sums}
        write_header(self._file, replace(self._plan, metadata=metadata))

    def put(self, name: str, moment: np.ndarray, cross: np.ndarray | None = None) -> None:
        """Write an entry from its moment, float32 [k, k] or only its diagonal [k], and its cross moment."""
        diagonal = moment if moment.ndim == 1 else np.diagonal(moment)
        self.write(f"{name}.diagonal", [np.ascontiguousarray(diagonal, np.float32)])
        if f"{name}.moment" in self._plan.entries:
            rows = (np.ascontiguousarray(moment[row, row:], np.float32) for row in range(len(moment)))
            self.write(f"{name}.moment", rows)
        if cross is not None:
            self.write(f"{name}.cross", [np.ascontiguousarray(cross, np.float32)])

    def write(self, tensor: str, parts: Iterable[np.ndarray]) -> None:
        """Write one tensor, float32, from consecutive parts."""
        position, hashed = self._plan.entries[tensor].begin, xxhash.xxh3_64()
        for part in parts:
            self._file.pwrite(part.data, position)
            hashed.update(part.data)
            position += part.nbytes
        self._sums[tensor] = hashed.hexdigest()


class WeightStats:
    """What is known of the x of one weight; arrays are read when asked for.

    Attributes:
        features: length of x.
        sha256: of the weight's bytes in the checkpoint.
        tokens: over which means are taken.
        has_moment, has_cross: whether these are there.
    """

    def __init__(self, parts: list[tuple[StatsFile, str]], weight: str) -> None:
        self._parts = parts
        described = [file.entries[entry] for file, entry in parts]
        self.features: int = described[0]["features"]
        self.sha256: str = described[0]["weights"][weight]
        self.tokens = sum(file.tokens_of(entry) for file, entry in parts)
        for (file, _), other in zip(parts, described, strict=True):
            if (other["features"], other["weights"][weight]) != (self.features, self.sha256):
                raise FormatError(
                    file.path,
                    f"statistics of another model than those of {parts[0][0].path}",
                    tensor=weight,
                    expected=f"SHA-256 {self.sha256}",
                    got=other["weights"][weight],
                    remedy="give files of one model",
                )
        self.has_moment = all(file.has(f"{entry}.moment") for file, entry in parts)
        self.has_cross = all(file.has(f"{entry}.cross") for file, entry in parts)

    @property
    def origin(self) -> tuple[tuple[str, str], ...]:
        """Files and entries it is read from; weights that read the same x have the same."""
        return tuple((str(file.path), entry) for file, entry in self._parts)

    def diagonal(self) -> np.ndarray:
        """Mean of x_j^2, float32 [features]."""
        return self._mean("diagonal", (self.features,))

    def moment(self) -> np.ndarray:
        """Mean of x xT (after a second pass: y yT), float32 [features, features], symmetric."""
        packed = self.packed_moment()
        matrix = np.empty((self.features, self.features), np.float32)
        position = 0
        for row in range(self.features):
            length = self.features - row
            matrix[row, row:] = matrix[row:, row] = packed[position : position + length]
            position += length
        return matrix

    def packed_moment(self) -> np.ndarray:
        """The moment's upper triangle, row by row: float32 [features (features + 1) / 2]."""
        return self._mean("moment", (self.features * (self.features + 1) // 2,))

    def cross(self) -> np.ndarray:
        """Mean of x yT, float32 [features, features]."""
        return self._mean("cross", (self.features, self.features))

    def _mean(self, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        total: np.ndarray | None = None
        for file, entry in self._parts:
            values = file.read(f"{entry}.{kind}", shape)
            if total is None and len(self._parts) == 1:
                return values
            values *= np.float32(file.tokens_of(entry) / self.tokens)
            total = values if total is None else np.add(total, values, out=total)
        assert total is not None
        return total


class Stats:
    """Statistics of a model, from one file or several; a context manager."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Open and check headers and metadata; numbers are read when they are asked for.

        Raises:
            FormatError: not a file of statistics, a damaged one, or files of different models.
        """
        self._files: list[StatsFile] = []
        self.weights: dict[str, WeightStats] = {}
        try:
            parts: dict[str, list[tuple[StatsFile, str]]] = defaultdict(list)
            for path in paths:
                file = StatsFile(Path(path))
                self._files.append(file)
                for entry, described in file.entries.items():
                    for weight in described["weights"]:
                        parts[weight].append((file, entry))
            self.weights = {weight: WeightStats(places, weight) for weight, places in parts.items()}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Stats:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def metadata(self) -> list[dict[str, str]]:
        """What each file says about itself, without the description of its entries and their sums."""
        return [file.own_metadata() for file in self._files]


class StatsFile:
    """One open file.

    Attributes:
        path, header: of the file.
        tokens: over which means are taken, of entries that do not say.
        entries: name -> {"features", "weights": name -> SHA-256, and perhaps "tokens"}.
    """

    def __init__(self, path: Path) -> None:
        """Raises FormatError: not a file of statistics, or a damaged one."""
        self.path = path
        self._fd = open_regular(path)
        try:
            self.header: Header = read_header(self._fd, strict=False, name=path)
            metadata = self.header.metadata
            if metadata.get(FORMAT) != VERSION:
                raise FormatError(
                    path,
                    "not a file of statistics",
                    expected=f"{FORMAT} {VERSION!r} in the metadata",
                    got=ascii(metadata.get(FORMAT))[:40],
                    remedy=_REMEDY,
                )
            self.tokens = self._checked_tokens(metadata)
            self.entries = self._checked_entries(metadata)
            self._sums = self._checked_sums(metadata)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def has(self, tensor: str) -> bool:
        return tensor in self.header.entries

    def tokens_of(self, entry: str) -> int:
        """Over which the means of an entry are taken."""
        return self.entries[entry].get("tokens", self.tokens)

    def own_metadata(self) -> dict[str, str]:
        """What the file says about itself, without the description of its entries and their sums."""
        known = (f"{FORMAT}.entries", f"{FORMAT}.xxh3")
        return {
            key.removeprefix(f"{FORMAT}."): value
            for key, value in self.header.metadata.items()
            if key.startswith(f"{FORMAT}.") and key not in known
        }

    def read(self, tensor: str, shape: tuple[int, ...]) -> np.ndarray:
        """float32, held to its sum and to be finite."""
        (values,) = self.pieces(tensor, math.prod(shape))
        return values.reshape(shape)

    def pieces(self, tensor: str, size: int) -> Iterator[np.ndarray]:
        """Flat float32 pieces of so many values (the last of fewer), held to be finite.

        Raises:
            FormatError: NaN or infinity; in the place of the last piece, if the sum does not agree.
        """
        entry, hashed = self.header.entries[tensor], xxhash.xxh3_64()
        for begin in range(entry.begin, entry.end, 4 * size):
            values = np.empty(min(size, (entry.end - begin) // 4), np.float32)
            pread_into(self._fd, values.data.cast("B"), begin, self.path)
            hashed.update(values.data)
            is_last = begin + values.nbytes == entry.end
            if is_last and hashed.hexdigest() != self._sums[tensor]:
                raise FormatError(
                    self.path,
                    "damaged",
                    tensor=tensor,
                    expected=f"XXH3-64 {self._sums[tensor]}",
                    got=hashed.hexdigest(),
                    remedy=_REMEDY,
                )
            if not np.isfinite(values).all():
                raise FormatError(self.path, "NaN or infinity", tensor=tensor, remedy=_REMEDY)
            yield values

    def _checked_tokens(self, metadata: Mapping[str, str]) -> int:
        text = metadata.get(f"{FORMAT}.tokens", "")
        if not (text.isascii() and text.isdecimal() and 0 < len(text) <= 15 and int(text) > 0):
            raise FormatError(
                self.path,
                f"{FORMAT}.tokens",
                expected="a number above 0",
                got=ascii(text)[:40],
                remedy=_REMEDY,
            )
        return int(text)

    def _checked_sums(self, metadata: Mapping[str, str]) -> dict[str, str]:
        text, width = metadata.get(f"{FORMAT}.xxh3", ""), _SUM_DIGITS
        if len(text) != width * len(self.header.entries):
            raise FormatError(
                self.path,
                f"{FORMAT}.xxh3",
                expected=f"{width} digits for each of {len(self.header.entries)} tensors",
                got=f"{len(text)} digits",
                remedy=_REMEDY,
            )
        return {name: text[i * width : (i + 1) * width] for i, name in enumerate(self.header.entries)}

    def _checked_entries(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        try:
            entries = parse_object(metadata.get(f"{FORMAT}.entries", "").encode())
        except ValueError as error:
            raise FormatError(self.path, f"{FORMAT}.entries: {error}", remedy=_REMEDY) from error
        for name, described in entries.items():
            if (
                not isinstance(described, dict)
                or set(described) - {"tokens"} != {"features", "weights"}
                or type(described["features"]) is not int
                or not 0 < described["features"] <= MAX_FEATURES
                or not _is_count(described.get("tokens", 1))
                or not isinstance(described["weights"], dict)
                or not all(isinstance(value, str) for value in described["weights"].values())
            ):
                raise FormatError(self.path, f"{FORMAT}.entries", tensor=name, remedy=_REMEDY)
            features = described["features"]
            shapes = {
                f"{name}.diagonal": (features,),
                f"{name}.moment": (features * (features + 1) // 2,),
                f"{name}.cross": (features, features),
            }
            for tensor, shape in shapes.items():
                found = self.header.entries.get(tensor)
                if found is None and not tensor.endswith(".diagonal"):
                    continue
                if found is None or (found.dtype, found.shape) != ("F32", shape):
                    got = f"{found.dtype} {list(found.shape)}" if found else "nothing"
                    raise FormatError(
                        self.path, tensor=tensor, expected=f"F32 {list(shape)}", got=got, remedy=_REMEDY
                    )
        return entries


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < _MOST_TOKENS
