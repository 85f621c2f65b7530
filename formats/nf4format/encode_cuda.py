"""Levels 0 and 1 on an NVIDIA GPU: the bytes of the CPU's encoders, sooner.

Chunks go through a few slots of pinned memory. While the GPU works on one, its thread reads the next, and
other threads theirs: right into pinned memory, if the source can. What is in memory does not grow with
tensors.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING

import numpy as np

from .blocks import Dtype, NonFinite, quantize_absmax
from .codebook import BLOCK, NESTED_BLOCK, NF4_LEVELS
from .encode import Constants, TensorSource, WriteCodes
from .errors import Nf4Error
from .levels import check_levels, thresholds_of

if TYPE_CHECKING:
    from ._cuda_encode import ChunkEncoder

LEVELS = (0, 1)
"""Optimisation levels that run here."""

_LEAST_CAPABILITY = 80
_SLOTS = 3  # of each tensor at work: being filled, on the GPU, being written
_MOST_TENSORS = 24  # at work at once; fewer fill the link
_DTYPE_CODES: dict[Dtype, int] = {"float32": 0, "bfloat16": 1, "float16": 2}  # of _cuda_encode


class DeviceError(Nf4Error):
    """No GPU can be used, or one failed."""


class CudaEncoder:
    """An `encode.Encoder` for any number of tensors at once; a context manager.

    Raises:
        DeviceError: there is no module, no driver or no GPU that serves; or it has no memory left.
        ValueError: levels do not serve.
    """

    def __init__(
        self, level: int, levels: np.ndarray, *, chunk_bytes: int, tensors: int, device: int = 0
    ) -> None:
        """Args:
        level: one of LEVELS.
        levels: what codes stand for, float32 [16].
        chunk_bytes: the largest chunk of a source, a multiple of 65536.
        tensors: how many to work at at once; more of them wait.
        device: index of the GPU.
        """
        check_levels(levels)
        self._module = _load(device)
        self._searched = level == 1
        self._levels, thresholds = levels.copy(), thresholds_of(levels)
        lanes = min(tensors, _MOST_TENSORS)
        try:
            self._chunks = self._module.ChunkEncoder(
                device, self._levels.ctypes.data, thresholds.ctypes.data, self._searched,
                chunk_bytes, lanes * _SLOTS,
            )  # fmt: skip
        except (self._module.CudaError, MemoryError) as error:
            raise _failed(error) from error
        self._lanes: queue.SimpleQueue[range] = queue.SimpleQueue()
        for lane in range(lanes):
            self._lanes.put(range(lane * _SLOTS, (lane + 1) * _SLOTS))

    def close(self) -> None:
        """Free the memory, on the GPU and pinned. No tensor may be at work."""
        del self._chunks

    def __enter__(self) -> CudaEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(
        self,
        source: TensorSource,
        write_codes: WriteCodes,
        threads: Callable[[], int],
        scales: np.ndarray,
        *,
        levels: np.ndarray = NF4_LEVELS,
    ) -> Constants:
        """As `encode.Encoder`; `threads` stays unused.

        Raises:
            NonFinite: with the flat index of the first NaN or infinity.
            DeviceError: the GPU failed.
            ValueError: other levels than it was made for.
        """
        if not np.array_equal(levels, self._levels):
            raise ValueError("levels: expected those that this encoder was made for")
        lane = self._lanes.get()
        tensor = _Tensor(
            self._chunks, lane, write_codes, source.num_values, scales if not self._searched else None
        )
        try:
            for start, values in source.chunks(tensor.room):
                tensor.add(start, values, source.dtype)
            return tensor.finish()
        except self._module.CudaError as error:
            raise _failed(error) from error
        finally:
            tensor.abandon()
            self._lanes.put(lane)


class _Tensor:
    """One tensor on its way, in the slots of a lane."""

    def __init__(
        self,
        chunks: ChunkEncoder,
        lane: range,
        write_codes: WriteCodes,
        num_values: int,
        scales: np.ndarray | None,
    ) -> None:
        """`scales`: where float32 scales go; None if they are searched for."""
        self._chunks, self._write_codes, self._scales = chunks, write_codes, scales
        self._free = deque(lane)
        self._started: deque[tuple[int, int]] = deque()  # slot, index of the first value
        num_blocks = -(-num_values // BLOCK)
        self._absmax = np.empty(num_blocks if scales is None else 0, np.uint8)
        self._nested = np.empty(-(-self._absmax.size // NESTED_BLOCK), np.float32)

    def room(self) -> memoryview:
        """Pinned memory of the slot that the next chunk goes into."""
        if not self._free:
            self._take()
        return self._chunks.memory(self._free[0])

    def add(self, start: int, values: np.ndarray, dtype: Dtype) -> None:
        """Send a chunk on its way; if there is no slot for it, take the oldest one's results first."""
        if not self._free:
            self._take()
        slot = self._free.popleft()  # the one whose memory `room` gave
        self._chunks.start(slot, values.ctypes.data, _DTYPE_CODES[dtype], values.size)
        self._started.append((slot, start))

    def finish(self) -> Constants:
        """Take what is still on its way."""
        while self._started:
            self._take()
        if self._scales is not None:
            return Constants(*quantize_absmax(self._scales))
        return Constants(self._absmax, self._nested, 0.0)

    def abandon(self) -> None:
        """Wait for what is on its way, so that another tensor may have the slots."""
        for slot, _ in self._started:
            self._chunks.finish(slot)

    def _take(self) -> None:
        slot, start = self._started.popleft()
        nonfinite, codes, scales, nested = self._chunks.finish(slot)
        if nonfinite >= 0:
            raise NonFinite(start + nonfinite)
        first = start // BLOCK
        if self._scales is not None:
            chunk_scales = np.frombuffer(scales, np.float32)
            self._scales[first : first + chunk_scales.size] = chunk_scales
        else:
            self._absmax[first : first + len(scales)] = np.frombuffer(scales, np.uint8)
            chunk_nested = np.frombuffer(nested, np.float32)
            self._nested[first // NESTED_BLOCK :][: chunk_nested.size] = chunk_nested
        self._write_codes(start, np.frombuffer(codes, np.uint8))
        self._free.append(slot)


def _load(device: int) -> ModuleType:
    """The native module, if it and the GPU can be used."""
    try:
        from . import _cuda_encode
    except ImportError as error:
        raise DeviceError(
            "",
            "this installation has no CUDA encoder",
            remedy="install the CUDA toolkit (nvcc) and then nf4 from source, or encode on the CPU",
        ) from error
    try:
        capabilities = _cuda_encode.devices()
    except _cuda_encode.CudaError as error:
        raise DeviceError(
            "",
            f"no NVIDIA GPU can be used ({error})",
            remedy="install or update its driver, or encode on the CPU",
        ) from error
    if device >= len(capabilities) or capabilities[device] < _LEAST_CAPABILITY:
        found = ", ".join(f"{capability // 10}.{capability % 10}" for capability in capabilities)
        raise DeviceError(
            "",
            f"GPU {device} cannot be used",
            expected="compute capability 8.0 or higher",
            got=found or "no GPU",
            remedy="encode on the CPU",
        )
    return _cuda_encode


def _failed(error: Exception) -> DeviceError:
    reason = str(error) or "no host memory for the chunks under way"
    return DeviceError("", f"the GPU failed ({reason})", remedy="give fewer --jobs, or encode on the CPU")
