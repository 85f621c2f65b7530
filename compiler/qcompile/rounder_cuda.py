"""Rounding by what layers read on an NVIDIA GPU.

Threads read weights and statistics, and copy them to the GPU, while one thread has the GPU work on the weight
before: the calls' order, and with it every byte, is that of one weight after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType, TracebackType

import numpy as np
import torch
from torch import Tensor

from nf4format.blocks import ARRAY_DTYPES, NonFinite, empty
from nf4format.encode import TensorSource
from nf4format.encode_cuda import DeviceError
from nf4format.levels import thresholds_of

from . import absorb, absorb_cuda, feedback_cuda
from .absorb import ROUNDS
from .feedback_cuda import Kernels, Known, Rounded
from .rounder import Outcome, Task
from .summary import OutputError

READ_AHEAD = 2
"""Weights that are read, with their statistics, while one is worked on."""

_ROOM_BYTES = 8 << 20  # read and hashed at a time
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class _Loaded:
    """A weight and what is known of its inputs, on the device.

    Attributes:
        weight: [n, k], as in the checkpoint.
        statistics: the moment's upper triangle, or the diagonal [k] if that is all there is.
        cross: [k, k], for level 3.
    """

    weight: Tensor
    statistics: Tensor
    cross: Tensor | None


class TorchRounder:
    """A `Rounder` with torch; a context manager."""

    def __init__(self, kernels: Kernels, *, tensors: int) -> None:
        """Args:
        kernels: for the levels of all tasks, on the device that is used.
        tensors: how many weights are given at once.
        """
        self.device = f"torch, {kernels.device}"
        self._kernels = kernels
        self._ahead = threading.BoundedSemaphore(min(tensors, READ_AHEAD + 1))
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="round")
        self._known: tuple[Hashable, Known] | None = None
        self._precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def close(self) -> None:
        """Free what the device holds."""
        self._worker.shutdown()
        self._known = None
        torch.set_float32_matmul_precision(self._precision)

    def __enter__(self) -> TorchRounder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def round(self, task: Task, source: TensorSource, threads: Callable[[], int]) -> Outcome:
        """As `Rounder`; `threads` stays unused."""
        with self._ahead:
            try:
                loaded = self._load(task, source)
                return self._worker.submit(self._work, task, loaded).result()
            except torch.linalg.LinAlgError as error:
                raise task.not_definite() from error

    def _copied(self, array: np.ndarray) -> Tensor:
        """On the device, beside what it is doing."""
        return torch.from_numpy(array).to(self._kernels.device)

    def _load(self, task: Task, source: TensorSource) -> _Loaded:
        item = ARRAY_DTYPES[source.dtype].itemsize
        host = empty(source.num_values * item, np.uint8)
        begin = 0

        def room() -> memoryview:
            return host[begin : begin + _ROOM_BYTES].data

        for start, values in source.chunks(room):
            begin = (start + values.size) * item
            place = host[start * item : begin]
            if values.ctypes.data != place.ctypes.data:
                place[:] = values.view(np.uint8)
        task.check(source)
        weight = self._copied(host).view(_DTYPES[source.dtype]).view(task.shape)
        stats = task.stats
        statistics = stats.packed_moment() if stats.has_moment else stats.diagonal()
        cross = self._copied(stats.cross()) if task.level >= 3 and stats.has_moment else None
        return _Loaded(weight, self._copied(statistics), cross)

    @torch.inference_mode()
    def _work(self, task: Task, loaded: _Loaded) -> Outcome:
        kernels = self._kernels
        finite = torch.isfinite(loaded.weight)
        if not finite.all():
            raise NonFinite(int((~finite).view(-1).nonzero()[0]))
        weight = loaded.weight.float()
        if not task.stats.has_moment:
            return self._outcome(feedback_cuda.nearest(weight, loaded.statistics, kernels))
        moment = self._known_of(task, loaded.statistics)
        wanted = weight
        if loaded.cross is not None:
            wanted = feedback_cuda.target_weight(weight, moment, loaded.cross)
        rounded = feedback_cuda.round_weight(wanted, moment, kernels)
        added, correction = None, None
        if task.rank:
            corrections = absorb_cuda.Corrections(moment, task.rank)
            for _ in range(ROUNDS):
                if added is not None:
                    rounded = feedback_cuda.round_weight(wanted - added, moment, kernels)
                found = corrections.of(feedback_cuda.decoded_difference(wanted, rounded, kernels))
                added = found.product()
            correction = absorb.LowRank(found.a.cpu().numpy(), found.b.cpu().numpy())
        total = feedback_cuda.output_size(weight, moment) or 1.0
        error = OutputError(
            feedback_cuda.plain_error(weight, moment, kernels) / total,
            feedback_cuda.output_error(weight, rounded, moment, kernels, added) / total,
        )
        return self._outcome(rounded, error, correction)

    def _known_of(self, task: Task, statistics: Tensor) -> Known:
        """Weights that read the same follow each other often."""
        key = task.stats.origin
        if self._known is None or self._known[0] != key:
            self._known = None  # before room is taken for another
            moment = feedback_cuda.unpacked(statistics, task.stats.features)
            self._known = key, feedback_cuda.known(moment)
        return self._known[1]

    def _outcome(
        self, rounded: Rounded, error: OutputError | None = None, correction: absorb.LowRank | None = None
    ) -> Outcome:
        return Outcome(
            feedback_cuda.packed_codes(rounded, self._kernels).cpu().numpy(),
            rounded.absmax.cpu().numpy(),
            rounded.nested_absmax.cpu().numpy(),
            error,
            correction,
        )


class CudaRounder(TorchRounder):
    """A `Rounder` on a GPU; a context manager.

    Raises:
        DeviceError: torch, the native module or the GPU does not serve.
    """

    def __init__(self, levels: np.ndarray, *, tensors: int, device: int = 0) -> None:
        """Args:
        levels: what codes stand for, float32 [16].
        tensors: how many weights are given at once.
        device: index of the GPU.
        """
        native, place = _native(), torch.device("cuda", device)
        self._errors = (RuntimeError, native.CudaError)
        try:
            feedback = native.Feedback(device, levels.ctypes.data, thresholds_of(levels).ctypes.data)
            super().__init__(Kernels(feedback, levels, place), tensors=tensors)
            self.device = torch.cuda.get_device_name(place)
            self._copies = torch.cuda.Stream(place)
        except self._errors as error:
            raise _failed(error) from error

    def close(self) -> None:
        """Free what the GPU holds."""
        super().close()
        torch.cuda.empty_cache()

    def round(self, task: Task, source: TensorSource, threads: Callable[[], int]) -> Outcome:
        """As `Rounder`; `threads` stays unused."""
        try:
            return super().round(task, source, threads)
        except self._errors as error:
            raise _failed(error) from error

    def _copied(self, array: np.ndarray) -> Tensor:
        with torch.cuda.stream(self._copies):
            copy = super()._copied(array)
            self._copies.synchronize()
        return copy


def _native() -> ModuleType:
    """The native module, if torch can use the GPU too."""
    remedy = "encode on the CPU"
    try:
        from nf4format import _cuda_encode
    except ImportError as error:
        raise DeviceError("", "this installation has no CUDA encoder", remedy=remedy) from error
    if not torch.cuda.is_available():
        raise DeviceError(
            "",
            f"torch {torch.__version__} cannot use a GPU",
            remedy=f"install a torch built for CUDA and this machine's driver, or {remedy}",
        )
    return _cuda_encode


def _failed(error: Exception) -> DeviceError:
    lines = str(error).splitlines() or [type(error).__name__]
    return DeviceError("", f"the GPU failed ({lines[0]})", remedy="encode on the CPU: --device cpu")
