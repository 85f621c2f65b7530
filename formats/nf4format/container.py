"""The .nf4 container: opening, checking, reading, and sealing what a writer has filled."""

from __future__ import annotations

import contextlib
import hashlib
import mmap as mmap_module
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from . import _native
from .atomic import AtomicFile
from .blocks import PackedTensor, empty
from .embedded import FILE_PREFIX
from .errors import FormatError
from .files import open_regular, pread_exactly, pread_into, read_failure
from .header import MAX_HEADER_BYTES, Header, TensorEntry, read_header
from .layout import Layout
from .profile import Profile, check_metadata, check_profile
from .region import DataRegion
from .sums import (
    CHUNK_BYTES,
    REMEDY,
    SUMS_NAME,
    Damage,
    Progress,
    check_header_sum,
    check_sums,
    chunk_sums,
    compute_sums,
    damage_in,
    read_sums,
)

# Without it the kernel may refuse to map, privately and writable, a file larger than memory and swap.
_MAP_NORESERVE: Final = getattr(mmap_module, "MAP_NORESERVE", 0x4000 if os.name == "posix" else 0)


class Nf4File:
    """An open, checked .nf4 file. Use `Nf4File.open`, as a context manager or with `close`.

    Opening checks the header, the profile (SPEC.md) and every constant that a kernel would trust, except
    absmax bytes and codes, which are in range whatever they are: so time and memory do not grow with the
    weights. `verify` checks all bytes against their sums.

    Attributes:
        path: as given.
        header, metadata: as read.
        config: the embedded config.json.
        packed_names, kept_names: names in file order.
        file_names: the embedded files.
        aliases: alias -> name of the stored tensor it shares (tied weights).
        other_levels: packed weights whose codes stand for other levels than NF4's.
    """

    def __init__(self, path: Path, fd: int, *, mmap: bool, allow_maps: bool, max_header_bytes: int) -> None:
        self.path = path
        self.header: Header = read_header(fd, strict=True, name=path, max_header_bytes=max_header_bytes)
        check_metadata(self.header, path)
        self._sums = read_sums(fd, self.header, path)
        damage = check_header_sum(fd, self.header, self._sums, path)
        if damage:
            raise FormatError(path, str(damage), remedy=REMEDY)
        self._profile: Profile = check_profile(fd, self.header, path, allow_maps=allow_maps)
        self.metadata = self.header.metadata
        self.config: dict[str, Any] = self._profile.config
        self.packed_names = tuple(self._profile.packed)
        self.kept_names = self._profile.kept
        self.file_names = self._profile.files
        self.aliases = self._profile.aliases
        self.other_levels = self._profile.other_levels
        self._memory: np.ndarray | None = _map_file(fd, self.header.file_bytes, path) if mmap else None
        self._memory_begin = 0  # the byte of the file that the memory begins with
        self._fd = fd  # owned from here on

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        mmap: bool = True,
        allow_maps: bool = False,
        max_header_bytes: int = MAX_HEADER_BYTES,
    ) -> Nf4File:
        """Open and check a file.

        Args:
            mmap: map the file and give views of it; otherwise each access reads, or `read_weights` at once
                (slower, but a file that is cut short while in use is then an exception, where a mapping
                kills the process).
            allow_maps: accept any finite level tables, and others than the standard nested map.
            max_header_bytes: refuse longer headers.

        Raises:
            FormatError: anything that SPEC.md does not allow, with the tensor's name and the values.
        """
        fd = open_regular(path)
        try:
            return cls(Path(path), fd, mmap=mmap, allow_maps=allow_maps, max_header_bytes=max_header_bytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def from_descriptor(cls, fd: int, path: str | os.PathLike[str]) -> Nf4File:
        """As `open`, of a file that is open already, such as one not yet renamed; `fd` stays the caller's."""
        own = os.dup(fd)
        try:
            return cls(Path(path), own, mmap=True, allow_maps=False, max_header_bytes=MAX_HEADER_BYTES)
        except BaseException:
            os.close(own)
            raise

    def packed(self, name: str) -> PackedTensor:
        """The NF4 weight `name` (or an alias of it); arrays are views of the mapping, private and writable.

        Raises:
            KeyError: no such packed weight.
        """
        name = self.aliases.get(name, name)
        state = self._profile.packed[name]
        return PackedTensor(
            shape=state.shape,
            dtype=state.dtype,
            codes=self._bytes(self.header.entries[name]),
            absmax=self._bytes(self.header.entries[f"{name}.absmax"]),
            quant_map=self._floats(f"{name}.quant_map"),
            nested_absmax=self._floats(f"{name}.nested_absmax"),
            nested_quant_map=self._floats(f"{name}.nested_quant_map"),
            nested_offset=state.nested_offset,
        )

    def kept(self, name: str) -> tuple[np.ndarray, str, tuple[int, ...]]:
        """A tensor stored as it is (or an alias of one): flat uint8 bytes, safetensors dtype, shape.

        Raises:
            KeyError: no such kept tensor.
        """
        name = self.aliases.get(name, name)
        if name not in self._profile.kept_set:
            raise KeyError(name)
        entry = self.header.entries[name]
        return self._bytes(entry), entry.dtype, entry.shape

    def file(self, name: str) -> bytes:
        """The bytes of an embedded file, e.g. "tokenizer.json". Raises KeyError when there is none."""
        if name not in self.file_names:
            raise KeyError(name)
        entry = self.header.entries[FILE_PREFIX + name]
        return pread_exactly(self._descriptor(), entry.end - entry.begin, entry.begin, self.path)

    @property
    def weights_end(self) -> int:
        """Offset behind the last byte of any weight: where the embedded files begin, or else the sums."""
        entries = self.header.entries.values()
        return min(entry.begin for entry in entries if entry.name.startswith((FILE_PREFIX, SUMS_NAME)))

    @property
    def region(self) -> DataRegion:
        """The data region, for readers of their own, who check as they read."""
        return DataRegion(
            self.header.data_start,
            self.weights_end,
            self.header.entries[SUMS_NAME].begin,
            chunk_sums(self._sums),
        )

    def read_weights(self, *, check: bool = True, threads: int | None = None) -> None:
        """Read the data region into memory, once; from then on arrays are views of that.

        Unlike a mapping it needs the memory and the time, and then the file no more: one that is cut short
        or written to meanwhile is an error here, and cannot hurt later.

        Args:
            check: compare the bytes with their sums, as they are read.
            threads: readers; None means one per CPU, at most 8.

        Raises:
            FormatError: bytes that differ from their sum; the file has become shorter, or cannot be read; too
                little memory.
        """
        region = self.region
        try:
            memory = empty(region.end - region.begin, np.uint8)
        except MemoryError:
            needed = f"{region.end - region.begin:,} bytes"
            remedy = "open it with mmap=True, which needs none"
            raise FormatError(self.path, "too little memory", expected=needed, remedy=remedy) from None
        failure = _native.read_chunks(
            self._descriptor(),
            region.begin,
            region.end,
            CHUNK_BYTES,
            region.sums if check else b"",
            memory.ctypes.data,
            threads or min(8, os.cpu_count() or 1),
        )
        if failure is not None:
            what, index, code = failure
            span = region.chunk(max(index, 0))
            if what == "damaged":
                raise FormatError(self.path, str(damage_in(self.header, *span)), remedy=REMEDY)
            raise read_failure(self.path, what, span, code)
        self._memory, self._memory_begin = memory, region.begin

    def fileno(self) -> int:
        """The descriptor, for readers of their own; it is closed with this."""
        return self._descriptor()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the table of sums: identifies the exact content without reading it."""
        return hashlib.sha256(self._sums).hexdigest()

    @property
    def source_fingerprint(self) -> str:
        """SHA-256 (hex) of the tensors of the checkpoint it was compiled from."""
        return self.metadata["nf4.source_sha256"]

    def verify(self, *, threads: int | None = None, progress: Progress | None = None) -> list[Damage]:
        """Check every sum; an empty list means that the file is whole.

        Args:
            threads: readers; None means one per CPU, at most 8.
            progress: called now and then with the number of bytes checked since; in all
                `header.file_bytes` less the header and the table of sums.

        Raises:
            FormatError: the file cannot be read, or its header has changed since it was opened.
        """
        threads = threads or min(8, os.cpu_count() or 1)
        found = check_sums(
            self._descriptor(), self.header, self._sums, self.path, threads=threads, progress=progress
        )
        return list(found)

    def close(self) -> None:
        """Give up the descriptor and the mapping. Arrays handed out stay valid: they hold their memory."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # the descriptor is gone all the same, and nothing was written
                os.close(fd)
        self._memory = None

    def __enter__(self) -> Nf4File:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def _descriptor(self) -> int:
        if self._fd < 0:
            raise ValueError(f"{self.path} is closed")
        return self._fd

    def _bytes(self, entry: TensorEntry) -> np.ndarray:
        fd = self._descriptor()
        if self._memory is not None:
            return self._memory[entry.begin - self._memory_begin : entry.end - self._memory_begin]
        data = np.empty(entry.end - entry.begin, np.uint8)
        pread_into(fd, data.data, entry.begin, self.path)
        return data

    def _floats(self, name: str) -> np.ndarray:
        return self._bytes(self.header.entries[name]).view(np.float32)


def seal(
    file: AtomicFile,
    layout: Layout,
    metadata: Mapping[str, str] | None = None,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> None:
    """Finish a file whose data region is written: sums, then the header, then its length.

    Until the last write the first 8 bytes are zero, which every reader refuses.

    Args:
        metadata: values known only now, of the planned lengths (the source's SHA-256).
    """
    header = layout.header_bytes(metadata)
    file.pwrite(compute_sums(file.fd, layout, threads, header=header, progress=progress), layout.sums_begin)
    file.pwrite(header[8:], 8)
    file.pwrite(header[:8], 0)


def config_sha256(config: bytes) -> str:
    """The value of `nf4.config_sha256` for an embedded config.json."""
    return hashlib.sha256(config).hexdigest()


def _map_file(fd: int, size: int, path: Path) -> np.ndarray:
    """The file as a private, writable uint8 array: writes stay in this process and never reach the file."""
    try:
        mapping = mmap_module.mmap(
            fd,
            size,
            flags=mmap_module.MAP_PRIVATE | _MAP_NORESERVE,
            prot=mmap_module.PROT_READ | mmap_module.PROT_WRITE,
        )
    except (OSError, ValueError) as error:
        raise FormatError(path, f"cannot be mapped: {error}", remedy="open it with mmap=False") from error
    return np.frombuffer(mapping, np.uint8)
