"""Which files a path means, what kind each is, and opening them: regular files, summed and read once more."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

import xxhash

from nf4format.errors import FormatError
from nf4format.files import open_regular

from ..errors import TrainError

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet"]

KINDS: Final[dict[str, Kind]] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
# Training on the bytes or the markup of these as if they were prose would go unnoticed.
_REFUSED: Final[dict[str, str]] = {
    **dict.fromkeys((".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".lz4", ".7z"), "unpack it first"),
    **dict.fromkeys((".arrow", ".feather", ".ipc", ".avro", ".orc"), "convert it to parquet or JSONL"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npy", ".npz", ".bin"), "write its text as JSONL"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub"), "extract its text first"),
    **dict.fromkeys((".html", ".htm", ".xml"), "extract its text, or rename it to .txt to learn the markup"),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "save it as CSV"),
    **dict.fromkeys((".safetensors", ".nf4", ".gguf"), "it is a model, not data"),
    **dict.fromkeys((".yaml", ".yml", ".toml"), "convert it to JSONL"),
}
_MAX_FILES: Final = 100_000  # of a directory: more is a mistaken path such as /
_READ_BYTES: Final = 1 << 20


def kind_of(path: Path) -> Kind:
    """The kind of a file by its suffix; plain text where the suffix says nothing.

    Raises:
        TrainError: a kind that cannot be read, with what to do about it.
    """
    suffix = path.suffix.lower()
    if suffix in _REFUSED:
        expected = f"one of {' '.join(KINDS)}"
        raise TrainError(
            path, "unsupported kind of data", expected=expected, got=suffix, remedy=_REFUSED[suffix]
        )
    return KINDS.get(suffix, "text")


def find_files(path: Path) -> list[Path]:
    """The file itself, or of a directory every file in it and below whose suffix is in KINDS, sorted by path.

    Hidden files and directories are left out. Symbolic links are not followed: one to a place inside the
    directory would count twice what it leads to and is left out, one to a file elsewhere is refused.

    Raises:
        TrainError: a link that leads out of the directory, no file, more than 100,000 of them.
        FormatError: a directory that cannot be listed.
    """
    if not path.is_dir():
        return [path]
    root = Path(os.path.realpath(path))
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        raise FormatError(error.filename or path, f"cannot be listed: {error.strerror}") from error

    for folder, names, files in os.walk(path, onerror=refuse):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in [*names, *files]:
            file = Path(folder, name)
            if name.startswith(".") or not (file.is_symlink() or name in files):
                continue
            if name in files and file.suffix.lower() not in KINDS:
                continue
            if file.is_symlink():
                if not Path(os.path.realpath(file)).is_relative_to(root):
                    remedy = "give what it leads to as data of its own, or remove it"
                    raise TrainError(file, "a symbolic link leads out of the directory", remedy=remedy)
                continue
            found.append(file)
            if len(found) > _MAX_FILES:
                raise TrainError(path, "too many files in a directory", expected=f"at most {_MAX_FILES:,}")
    if not found:
        raise TrainError(path, "no data in the directory", expected=f"files with one of {' '.join(KINDS)}")
    return sorted(found)


class DataFile:
    """An open data file: read from front to back, counted.

    Attributes:
        path: as given. kind: how it is read. size: bytes.
    """

    def __init__(self, path: Path, advance: Callable[[int], None] = lambda count: None) -> None:
        """Open it; `advance` is told of bytes as they are read.

        Raises:
            TrainError: an unsupported kind.
            FormatError: not a regular file, or one that cannot be opened.
        """
        self.path, self.kind = path, kind_of(path)
        self._advance = advance
        self.raw = os.fdopen(open_regular(path), "rb")
        self._status = os.fstat(self.raw.fileno())
        self.size = self._status.st_size

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.raw.close()

    def content_sum(self) -> str:
        """XXH3-128 of all bytes, in hexadecimal; reading begins at the front again afterwards."""
        total = xxhash.xxh3_128()
        while data := self._told(lambda: self.raw.read(_READ_BYTES)):
            total.update(data)
        self.raw.seek(0)
        return total.hexdigest()

    def read(self) -> bytes:
        """The next bytes, up to a MiB; b"" at the end."""
        return self._counted(self._told(lambda: self.raw.read(_READ_BYTES)))

    def readline(self, limit: int) -> bytes:
        """The next line with its end, cut at `limit` bytes; b"" at the end."""
        return self._counted(self._told(lambda: self.raw.readline(limit)))

    def count(self, num_bytes: int) -> None:
        """Tell of progress that went another way than `read`."""
        self._advance(num_bytes)

    def check_unchanged(self) -> None:
        """Raises TrainError where the file was written to since it was opened."""
        now = os.fstat(self.raw.fileno())
        before = self._status
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise TrainError(self.path, "the file changed while it was read", remedy="start again")

    def _counted(self, data: bytes) -> bytes:
        self._advance(len(data))
        return data

    def _told(self, read: Callable[[], bytes]) -> bytes:
        try:
            return read()
        except OSError as error:
            raise FormatError(self.path, f"cannot be read: {error.strerror}") from error
