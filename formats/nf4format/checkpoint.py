"""Hugging Face checkpoint directories: safetensors shards, index, config and tokenizer files, opened lazily.

Names found inside files are never followed out of the directory; nothing is unpickled or executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn

from .embedded import CONFIG_FILE, EMBEDDED_FILES, FILE_LIMITS
from .errors import FormatError
from .files import open_regular, os_error, read_capped
from .header import MAX_NAME_BYTES, MAX_TENSORS, read_header, valid_name
from .strictjson import MAX_CONFIG_VALUES, parse_object

__all__ = ["EMBEDDED_FILES", "Checkpoint", "SourceTensor"]

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
MAX_INDEX_BYTES: Final = 32 << 20  # 200,000 tensors with long names
MAX_SHARDS: Final = 1000

_REDOWNLOAD: Final = "download it again"
_UNSAFE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_SHARD_NAME: Final = re.compile(r"[^/\\\x00-\x1f\x7f]{1,243}\.safetensors")
_NUMBERED: Final = re.compile(r"(.*)-\d{5}-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of a checkpoint: safetensors dtype, shape, where its bytes are (absolute, in the shard)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


class Checkpoint:
    """An open checkpoint directory; a context manager. Safe to read from several threads.

    Attributes:
        path: the directory.
        config: config.json, parsed.
        tensors: name -> SourceTensor, in the order of the shards' names and of their data.
        files: name -> bytes of those EMBEDDED_FILES that exist.
        shards: the names of the tensor files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, SourceTensor] = {}
        self.files: dict[str, bytes] = {}
        self._fds: dict[str, int] = {}
        self._stamps: dict[str, tuple[int, int, int, int]] = {}
        self._root = _directory(path)
        self._blobs = _blobs_folder(self._root)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a directory: read and check every header, the index, config.json and the tokenizer files.

        Raises:
            FormatError: a file is missing, damaged, too large, not a regular file or outside the directory;
                the index and the shards disagree; only pickled weights are there.
        """
        return cls(Path(path))

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(self._fds)

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """What config.json says about an earlier quantization; None if the weights are plain."""
        value = self.config.get("quantization_config", self.config.get("compression_config"))
        return value if isinstance(value, dict) or value is None else {"quantization_config": value}

    def read_into(self, name: str, buffer: Any, offset: int = 0) -> int:
        """Fill a writable contiguous buffer with the tensor's bytes from `offset`.

        Returns:
            The number of bytes read: less than the buffer holds only where the tensor ends.

        Raises:
            KeyError: no such tensor.
            FormatError: the file ends before the tensor does, or cannot be read.
        """
        tensor = self.tensors[name]
        view = memoryview(buffer).cast("B")
        size = max(0, min(len(view), tensor.num_bytes - offset))
        begin, done = tensor.begin + offset, 0
        while done < size:
            try:
                count = os.preadv(self._fds[tensor.file], [view[done:size]], begin + done)
            except OSError as error:
                raise os_error(self.path / tensor.file, error) from error
            if count == 0:
                self._changed(tensor.file, "it ends before the tensor does", tensor=name)
            done += count
        return done

    def check_unchanged(self) -> None:
        """Raise FormatError if a file was written to, replaced or removed since it was opened.

        Call it after the last read: sizes, times and inodes then tell whether all bytes were of one version.
        """
        for file, fd in self._fds.items():
            try:
                path_stamp = _stamp(os.stat(self.path / file))  # noqa: PTH116 - beside fstat
            except OSError:
                self._changed(file, "it is gone")
            if _stamp(os.fstat(fd)) != self._stamps[file] or path_stamp != self._stamps[file]:
                self._changed(file, "its size, time or inode is not what it was")

    def sizes_and_times(self) -> dict[str, tuple[int, int]]:
        """Shard -> its size and time of change (ns) when it was opened: enough to notice another version."""
        return {file: (size, time_ns) for file, (_, _, size, time_ns) in self._stamps.items()}

    def close(self) -> None:
        for fd in self._fds.values():
            with suppress(OSError):
                os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> None:
        listing = _listing(self.path)
        weight_map = self._weight_map(listing)
        self._read_files(listing)
        shards = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
        if len(shards) > MAX_SHARDS:
            problem = "too many shards"
            raise FormatError(
                self.path / INDEX_FILE,
                problem,
                expected=f"at most {MAX_SHARDS}",
                got=len(shards),
                remedy=_REDOWNLOAD,
            )
        for shard in shards:
            self._open_shard(shard, weight_map)
        if weight_map is not None:
            self._check_complete(weight_map, listing)

    def _weight_map(self, listing: list[str]) -> dict[str, str] | None:
        """The index's tensor -> shard map; None for a single file."""
        if INDEX_FILE in listing and SINGLE_FILE in listing:
            raise FormatError(
                self.path,
                f"{SINGLE_FILE} and {INDEX_FILE} are both there",
                remedy="remove the one that is not the model",
            )
        if SINGLE_FILE in listing:
            return None
        if INDEX_FILE not in listing:
            _no_weights(self.path, listing)
        path = self.path / INDEX_FILE
        index = self._json(INDEX_FILE, MAX_INDEX_BYTES, most_keys=MAX_TENSORS + 1000)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            got = type(weight_map).__name__
            raise FormatError(path, "weight_map", expected="a non-empty object", got=got, remedy=_REDOWNLOAD)
        if len(weight_map) > MAX_TENSORS:
            expected, remedy = f"at most {MAX_TENSORS} tensors", "fuse the experts of a layer into one tensor"
            raise FormatError(path, "weight_map", expected=expected, got=len(weight_map), remedy=remedy)
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
                raise FormatError(
                    path,
                    "not the name of a shard",
                    tensor=tensor,
                    expected="a plain file name ending in .safetensors",
                    got=ascii(shard)[:120],
                    remedy="do not use this checkpoint: names may not lead out of its directory",
                )
            if not valid_name(tensor):
                problem = f"not a tensor name, expected 1 to {MAX_NAME_BYTES} plain ASCII characters"
                raise FormatError(path, problem, tensor=tensor, remedy="rename it in the checkpoint")
        return weight_map

    def _read_files(self, listing: list[str]) -> None:
        if CONFIG_FILE not in listing:
            remedy = "give the directory of a Hugging Face checkpoint"
            raise FormatError(self.path, f"there is no {CONFIG_FILE}", remedy=remedy)
        for name in EMBEDDED_FILES:
            if name in listing:
                with self._opened(name) as fd:
                    self.files[name] = read_capped(fd, FILE_LIMITS[name], self.path / name)
        try:
            self.config = parse_object(
                self.files[CONFIG_FILE], allow_infinity=True, most_values=MAX_CONFIG_VALUES
            )
        except ValueError as error:
            raise FormatError(self.path / CONFIG_FILE, str(error), remedy=_REDOWNLOAD) from error

    def _open_shard(self, shard: str, weight_map: dict[str, str] | None) -> None:
        path = self.path / shard
        self._fds[shard] = fd = self._resolve(shard)
        self._stamps[shard] = _stamp(os.fstat(fd))
        header = read_header(fd, strict=False, name=path)
        for entry in header.entries.values():
            if entry.name in self.tensors:
                problem = f"it is also in {self.tensors[entry.name].file}"
                raise FormatError(path, problem, tensor=entry.name, remedy="remove one of the two")
            if weight_map is not None and weight_map.get(entry.name) != shard:
                listed = weight_map.get(entry.name)
                what = f"lists it in {listed}" if listed else "does not list it"
                remedy = "the index and the shards are of different versions; download both again"
                raise FormatError(path, f"{INDEX_FILE} {what}", tensor=entry.name, remedy=remedy)
            self.tensors[entry.name] = SourceTensor(
                entry.name, entry.dtype, entry.shape, shard, entry.begin, entry.end
            )
        if len(self.tensors) > MAX_TENSORS:
            remedy = "fuse the experts of a layer into one tensor"
            raise FormatError(self.path, "too many tensors", expected=f"at most {MAX_TENSORS}", remedy=remedy)

    def _check_complete(self, weight_map: dict[str, str], listing: list[str]) -> None:
        for tensor, shard in weight_map.items():
            if tensor not in self.tensors:
                remedy = "the shard is of another version or incomplete; download it again"
                raise FormatError(self.path / shard, "not in the shard", tensor=tensor, remedy=remedy)
        for name in set(listing) - self._fds.keys():
            match = _NUMBERED.fullmatch(name)
            siblings = (_NUMBERED.fullmatch(shard) for shard in self._fds)
            if match and any(sibling and sibling.groups() == match.groups() for sibling in siblings):
                remedy = f"remove it or fetch the {INDEX_FILE} that belongs to it"
                raise FormatError(self.path / name, f"a shard that {INDEX_FILE} does not list", remedy=remedy)

    def _json(self, name: str, max_bytes: int, *, most_keys: int) -> dict[str, Any]:
        with self._opened(name) as fd:
            data = read_capped(fd, max_bytes, self.path / name)
        count = data.count(b'":')  # before it becomes objects, which take several times the memory
        if count > most_keys:
            remedy = "fuse the experts of a layer into one tensor"
            expected = f"at most {MAX_TENSORS} tensors"
            raise FormatError(self.path / name, "too many keys", expected=expected, got=count, remedy=remedy)
        try:
            return parse_object(data)
        except ValueError as error:
            raise FormatError(self.path / name, str(error), remedy=_REDOWNLOAD) from error

    def _opened(self, name: str) -> _Closing:
        return _Closing(self._resolve(name))

    def _resolve(self, name: str) -> int:
        """Open a file of the directory. A symbolic link may lead only to the directory itself or, in the
        layout of the Hugging Face cache (snapshots/<revision>/), to that repository's own blobs."""
        path = self.path / name
        try:
            real = Path(os.path.realpath(path, strict=True))
        except OSError as error:
            if not path.is_symlink() and not path.exists():
                raise FormatError(
                    path, "the file is missing", remedy="download the checkpoint again"
                ) from error
            raise os_error(path, error) from error
        if real.parent not in (self._root, self._blobs):
            raise FormatError(
                path,
                "a symbolic link that leads out of the directory",
                got=str(real),
                remedy="copy the file into the directory",
            )
        return open_regular(real, follow=False)

    def _changed(self, file: str, what: str, tensor: str | None = None) -> NoReturn:
        raise FormatError(
            self.path / file,
            f"the file changed while it was read: {what}",
            tensor=tensor,
            remedy="run again when nothing writes to the directory",
        )


def source_hash(tensors: Iterable[SourceTensor], sha256_of: dict[str, str]) -> str:
    """SHA-256 over one line a tensor: JSON of name, dtype, shape, SHA-256 of its bytes; sorted by name.

    It depends on the weights alone, not on how many files they are spread over.
    """
    manifest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        line = json.dumps([tensor.name, tensor.dtype, list(tensor.shape), sha256_of[tensor.name]])
        manifest.update(line.encode("ascii") + b"\n")
    return manifest.hexdigest()


class _Closing:
    """A descriptor that is closed at the end of a `with` block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _directory(path: Path) -> Path:
    try:
        if path.is_dir():
            return Path(os.path.realpath(path, strict=True))
        is_file = path.is_file()
    except (OSError, ValueError) as error:
        raise FormatError(path, f"cannot be opened: {error}", remedy="check the path") from error
    if is_file:
        raise FormatError(path, expected="a checkpoint directory", got="a file", remedy="give its directory")
    raise FormatError(path, "no such directory", remedy="check the path; models are not downloaded")


def _blobs_folder(root: Path) -> Path | None:
    """The blobs folder of a Hugging Face cache entry <repo>/snapshots/<revision>[/...]; None elsewhere."""
    for parent in root.parents:
        if parent.name == "snapshots":
            return parent.parent / "blobs"
    return None


def _listing(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in _bounded(entries, path)]
    except OSError as error:
        raise os_error(path, error) from error


def _bounded(entries: Iterator[os.DirEntry[str]], path: Path) -> Iterator[os.DirEntry[str]]:
    for count, entry in enumerate(entries):
        if count >= MAX_TENSORS:
            problem, remedy = "the directory has too many entries", "give the directory of one checkpoint"
            raise FormatError(path, problem, expected=f"at most {MAX_TENSORS}", remedy=remedy)
        yield entry


def _no_weights(path: Path, listing: list[str]) -> NoReturn:
    unsafe = sorted(name for name in listing if name.endswith(_UNSAFE_SUFFIXES))
    safe = sorted(name for name in listing if name.endswith(".safetensors"))
    expected = f"{SINGLE_FILE} or {INDEX_FILE}"
    if "adapter_config.json" in listing:
        raise FormatError(
            path, expected=expected, got="a LoRA adapter", remedy="give the base model's directory"
        )
    if safe:
        remedy = f"shards need their {INDEX_FILE}; a single file is called {SINGLE_FILE}"
        raise FormatError(path, expected=expected, got=safe[0], remedy=remedy)
    if unsafe:
        remedy = "pickled weights are never loaded; convert them to safetensors first"
        raise FormatError(path, expected=expected, got=unsafe[0], remedy=remedy)
    raise FormatError(path, "there are no weights", expected=expected, remedy="check the path")


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
