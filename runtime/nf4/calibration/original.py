"""A checkpoint directory as the runtime's own model, its weights mapped where they lie, none converted."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from nf4format.blocks import PackedTensor
from nf4format.checkpoint import Checkpoint
from nf4format.errors import FormatError
from nf4format.files import open_regular

from ..errors import LoadError


class OriginalFile:
    """An open checkpoint with the face of an `Nf4File` that keeps every tensor; a context manager.

    Attributes: as those of `Nf4File`.
    """

    packed_names: tuple[str, ...] = ()

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises:
        FormatError: not a checkpoint directory, or a damaged one.
        LoadError: it is quantized already.
        """
        self.path = Path(path)
        self.aliases: dict[str, str] = {}
        self.other_levels: frozenset[str] = frozenset()
        self._checkpoint = Checkpoint.open(path)
        self._maps: dict[str, np.ndarray] = {}
        try:
            if self._checkpoint.quantization_config:
                remedy = "give the original checkpoint it was made from"
                raise LoadError(path, "the checkpoint is already quantized", remedy=remedy)
            for shard in self._checkpoint.shards:
                self._maps[shard] = _mapped(self.path / shard)
        except BaseException:
            self.close()
            raise
        self.config: dict[str, Any] = self._checkpoint.config
        self.kept_names = tuple(self._checkpoint.tensors)
        self.file_names = tuple(self._checkpoint.files)

    def kept(self, name: str) -> tuple[np.ndarray, str, tuple[int, ...]]:
        """Flat uint8 bytes over the mapping, safetensors dtype, shape."""
        tensor = self._checkpoint.tensors[name]
        return self._maps[tensor.file][tensor.begin : tensor.end], tensor.dtype, tensor.shape

    def packed(self, name: str) -> PackedTensor:
        """There are none."""
        raise KeyError(name)

    def file(self, name: str) -> bytes:
        """The bytes of config.json, of a tokenizer's file ..."""
        return self._checkpoint.files[name]

    def close(self) -> None:
        """Close the files; mappings live as long as arrays over them."""
        self._maps.clear()
        self._checkpoint.close()

    def __enter__(self) -> OriginalFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mapped(path: Path) -> np.ndarray:
    """A shard's bytes; the mapping is private, as torch has no read-only tensors."""
    fd = open_regular(path)
    try:
        return np.frombuffer(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY), np.uint8)
    except (OSError, ValueError) as error:
        _cannot_map(path, error)
    finally:
        os.close(fd)


def _cannot_map(path: Path, error: Exception) -> NoReturn:
    raise FormatError(path, f"cannot be mapped: {error}", remedy="put it on a local disk") from error
