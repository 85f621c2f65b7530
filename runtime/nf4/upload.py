"""Moving a packed file to a GPU: read, checked and copied in one pass, in little host memory.

The part of the file that holds weights becomes one slab of device memory, byte for byte, and every weight a
view of it. Readers take the chunks over which the file has sums:

    file   | 4 MiB | 4 MiB | 4 MiB | ...             pread, several threads
    ring   [ slot ][ slot ] ... pinned               sum compared here
    slab   | 4 MiB | 4 MiB | 4 MiB | ...             asynchronous copy; its event frees the slot
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor

from nf4format.container import Nf4File
from nf4format.header import TensorEntry
from nf4format.sums import CHUNK_BYTES, Chunk, xxh3

from . import ops_cuda
from .errors import LoadError

MOST_READERS = 16  # more do not read a page cache faster
SLOTS_PER_READER = 2  # one being filled, one on its way


class Slab:
    """The weights of a file in the memory of one GPU.

    Args:
        file: open; only its descriptor is used, not its mapping.
        device: a GPU.
        readers: threads; None takes one a CPU, at most MOST_READERS.

    Raises:
        LoadError: too little memory on the GPU, or bytes that differ from their sum.
        FormatError: the file cannot be read.
    """

    def __init__(self, file: Nf4File, device: torch.device, *, readers: int | None = None) -> None:
        self._begin = file.header.data_start
        self._entries = file.header.entries
        chunks = file.chunks()
        num_bytes = file.weights_end - self._begin
        self.memory = _allocate(file, num_bytes, device)
        readers = min(readers or min(MOST_READERS, os.cpu_count() or 1), max(1, len(chunks)))
        copies = torch.cuda.Stream(device)
        copies.wait_stream(torch.cuda.current_stream(device))  # the slab's memory may have been in use there
        try:
            with ThreadPoolExecutor(readers, thread_name_prefix="upload") as pool:
                ring = _Ring(min(readers * SLOTS_PER_READER, max(1, len(chunks))), device)
                tasks = [pool.submit(self._move, file, chunk, ring, copies) for chunk in chunks]
                try:
                    for task in tasks:
                        task.result()
                except BaseException:
                    for task in tasks:
                        task.cancel()
                    raise
        finally:
            copies.synchronize()  # before the ring is given back, and before any other stream reads
        ops_cuda.mark_constant(self.memory)

    def tensor(self, name: str, dtype: torch.dtype = torch.uint8) -> Tensor:
        """A stored tensor's bytes as a flat tensor of `dtype`, a view of the slab."""
        entry: TensorEntry = self._entries[name]
        return self.memory[entry.begin - self._begin : entry.end - self._begin].view(dtype)

    def _move(self, file: Nf4File, chunk: Chunk, ring: _Ring, copies: torch.cuda.Stream) -> None:
        slot = ring.take()
        try:
            size = chunk.end - chunk.begin
            data = slot.view[:size]
            file.read_into(data, chunk.begin)
            if xxh3(data) != chunk.sum:
                raise LoadError(
                    file.path,
                    f"data is damaged (bytes {chunk.begin} to {chunk.end})",
                    remedy="nf4 verify names the tensors; fetch the file again or compile it again",
                )
            at = chunk.begin - self._begin
            wanted = min(size, self.memory.numel() - at)
            if wanted > 0:
                with torch.cuda.stream(copies):
                    self.memory[at : at + wanted].copy_(slot.pinned[:wanted], non_blocking=True)
                    slot.copied.record(copies)
        finally:
            ring.give(slot)


class _Slot:
    def __init__(self) -> None:
        self.pinned = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        self.view = self.pinned.numpy().data
        self.copied = torch.cuda.Event()  # a fresh event counts as done


class _Ring:
    """Pinned buffers, handed out when the copy out of them has ended."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._free: SimpleQueue[_Slot] = SimpleQueue()
        with torch.cuda.device(device):
            for _ in range(slots):
                self._free.put(_Slot())

    def take(self) -> _Slot:
        slot = self._free.get()
        slot.copied.synchronize()
        return slot

    def give(self, slot: _Slot) -> None:
        self._free.put(slot)


def _allocate(file: Nf4File, num_bytes: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info(device)
        raise LoadError(
            file.path,
            f"too little memory on {device} for the weights",
            expected=f"{num_bytes:,} bytes",
            got=f"{free:,} free of {total:,}",
            remedy="end other programs on this GPU, or use the CPU",
        ) from None
