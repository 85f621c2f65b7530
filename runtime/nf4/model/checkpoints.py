"""Where the inputs of layers wait for the backward pass: on the GPU, or in pinned host memory.

In host memory they cost the GPU two buffers instead of one a layer. Copies run in a stream of their own: out
while the layer computes, back while the layer behind it goes backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OFFLOAD_BYTES = 2 << 20  # smaller inputs stay on the GPU: a copy would not be worth its start


class Checkpoints:
    """Keeps inputs where they are."""

    def begin(self) -> None:
        """A pass forward begins; what an abandoned one left is forgotten."""

    def keep(self, x: Tensor) -> Kept:
        """Remembers x, to be taken once. Inputs are taken in the opposite order."""
        return Kept(x)


@dataclass(eq=False)  # two are the same by identity: comparing tensors would wait for the GPU
class Kept:
    """An input that waits."""

    tensor: Tensor | None

    def take(self) -> Tensor:
        """The input. RuntimeError the second time, as autograd has it."""
        if self.tensor is None:
            raise RuntimeError("backward went through this layer before: its input is gone")
        tensor, self.tensor = self.tensor, None
        return tensor


class HostCheckpoints(Checkpoints):
    """Keeps inputs of at least OFFLOAD_BYTES in pinned host memory, which stays for the next pass.

    One pass forward and its pass backward use it at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._free: list[Tensor] = []  # pinned memory
        self._waiting: list[_OnHost] = []  # in the order kept
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None

    def begin(self) -> None:
        self._free += [kept.host for kept in self._waiting]
        self._waiting.clear()

    def keep(self, x: Tensor) -> Kept:
        if x.nbytes < OFFLOAD_BYTES:
            return Kept(x)
        current = torch.cuda.current_stream(self._device)
        self._finish_leaving(current)
        host = self._pinned(x)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)
        self._leaving = (x, self._stream.record_event())
        kept = _OnHost(self, host)
        self._waiting.append(kept)
        return kept

    def _finish_leaving(self, current: torch.cuda.Stream) -> None:
        """The memory of the input that left last may be used again once it has left."""
        if self._leaving is not None:
            current.wait_event(self._leaving[1])
            self._leaving = None

    def _pinned(self, like: Tensor) -> Tensor:
        for i, memory in enumerate(self._free):
            if memory.shape == like.shape and memory.dtype == like.dtype:
                return self._free.pop(i)
        self._free.clear()  # of another shape
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def _load(self, kept: _OnHost) -> None:
        current = torch.cuda.current_stream(self._device)
        kept.tensor = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=self._device)
        self._stream.wait_stream(current)  # the memory may be in use by what was started before
        with torch.cuda.stream(self._stream):
            kept.tensor.copy_(kept.host, non_blocking=True)
        kept.arrived = self._stream.record_event()

    def _take(self, kept: _OnHost) -> None:
        current = torch.cuda.current_stream(self._device)
        self._finish_leaving(current)
        if kept.arrived is None:
            self._load(kept)
        assert kept.arrived is not None
        current.wait_event(kept.arrived)
        self._waiting.remove(kept)
        self._free.append(kept.host)
        if self._waiting:
            self._load(self._waiting[-1])


class _OnHost(Kept):
    def __init__(self, owner: HostCheckpoints, host: Tensor) -> None:
        super().__init__(None)
        self._owner = owner
        self.host = host
        self.arrived: torch.cuda.Event | None = None
        self._is_taken = False

    def take(self) -> Tensor:
        if not self._is_taken:
            self._is_taken = True
            self._owner._take(self)
        return super().take()
