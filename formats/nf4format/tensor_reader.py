"""Reads one tensor of a checkpoint front to back, in chunks, and hashes it on the way."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator

import numpy as np

from .blocks import ARRAY_DTYPES, Dtype
from .checkpoint import Checkpoint
from .dtypes import DTYPE_OF_SAFETENSORS
from .encode import Room

# Bytes read, hashed and encoded at a time: few enough to stay in the processor's cache between these steps,
# enough for the interpreter's share to be small.
CHUNK_BYTES = 2 << 20


class Cancelled(Exception):
    """Another tensor failed or the user interrupted: this one need not be finished."""


class TensorReader:
    """The bytes and values of one tensor, in chunks; an `encode.TensorSource` if it is floating point.

    Not for use from several threads.

    Attributes:
        num_bytes: size of the tensor.
        num_values: number of its elements, if it is F32, BF16 or F16, else 0.
        dtype: the codec's name of its type; "float32" also where there is none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        *,
        buffer: bytearray | None = None,
        cancelled: threading.Event | None = None,
        on_read: Callable[[int], None] | None = None,
    ) -> None:
        """Args:
        buffer: room for one chunk, to be reused from tensor to tensor; CHUNK_BYTES at most by default.
        cancelled: once set, the next chunk raises Cancelled.
        on_read: is told the size of every chunk read in the first pass.
        """
        tensor = checkpoint.tensors[name]
        self.num_bytes = tensor.num_bytes
        self.dtype: Dtype = DTYPE_OF_SAFETENSORS.get(tensor.dtype, "float32")
        self._array_dtype = ARRAY_DTYPES[self.dtype]
        self.num_values = (
            self.num_bytes // self._array_dtype.itemsize if tensor.dtype in DTYPE_OF_SAFETENSORS else 0
        )
        self._checkpoint, self._name = checkpoint, name
        self._buffer = bytearray(min(CHUNK_BYTES, self.num_bytes)) if buffer is None else buffer
        self._cancelled, self._on_read = cancelled, on_read
        self._hash = hashlib.sha256()
        self._hashed_bytes = 0

    def byte_chunks(self, room: Room | None = None) -> Iterator[tuple[int, memoryview]]:
        """(offset in the tensor, bytes): as many as `room` takes, or in the buffer, overwritten by the next
        step.
        """
        offset = 0
        while offset < self.num_bytes:
            if self._cancelled is not None and self._cancelled.is_set():
                raise Cancelled
            place = room() if room else memoryview(self._buffer)
            chunk = place[: self.num_bytes - offset]
            self._checkpoint.read_into(self._name, chunk, offset)
            if offset == self._hashed_bytes:  # an encoder may read a tensor more than once
                self._hash.update(chunk)
                self._hashed_bytes += len(chunk)
                if self._on_read is not None:
                    self._on_read(len(chunk))
            yield offset, chunk
            offset += len(chunk)

    def chunks(self, room: Room | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the first value, values), as `encode.TensorSource` has it."""
        for offset, chunk in self.byte_chunks(room):
            yield offset // self._array_dtype.itemsize, np.frombuffer(chunk, self._array_dtype)

    def read_values(self, start: int, stop: int) -> np.ndarray:
        """A new array with the values [start, stop)."""
        values = np.empty(stop - start, self._array_dtype)
        self._checkpoint.read_into(self._name, values.data, start * values.itemsize)
        return values

    def sha256(self) -> str:
        """Hash of the tensor's bytes; reads it, unless all chunks were read."""
        if self._hashed_bytes != self.num_bytes:
            for _ in self.byte_chunks():
                pass
        return self._hash.hexdigest()
