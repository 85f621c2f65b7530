"""Where tensors are encoded: on the CPU or on an NVIDIA GPU, data-free levels with the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from nf4format.encode import ENCODERS, Encoder
from nf4format.encode_cuda import CudaEncoder, DeviceError

from .calibrated import DATA_FREE
from .errors import CompileError
from .options import CompileOptions
from .rounder import CpuRounder, Rounder

DEVICES = ("cpu", "cuda", "auto")
CHUNK_BYTES = 8 << 20  # that go to a GPU at once; with 2 MiB starting the work takes most of the time
FEW_TENSORS = 2  # that the data-free encoder works on at once where statistics are of almost all


@dataclass(frozen=True)
class Encoding:
    """What encodes tensors for which the weights alone are needed, and what rounds the others."""

    data_free: Encoder
    rounder: Rounder


@contextmanager
def open_device(options: CompileOptions, jobs: int, tell: Callable[[str], None]) -> Iterator[Encoding]:
    """What encodes on the device that was asked for.

    Args:
        jobs: how many tensors are encoded at once.
        tell: takes a line for the user, if "auto" has to go on without a GPU.

    Raises:
        CompileError: "cuda", and there is no GPU that serves; or it failed meanwhile.
    """
    with ExitStack() as stack:
        encoding = Encoding(ENCODERS[min(options.level, DATA_FREE)], CpuRounder())
        if options.device != "cpu":
            try:
                encoding = _on_gpu(options, jobs, stack)
            except DeviceError as error:
                stack.close()
                if options.device == "cuda":
                    raise CompileError("--device cuda", str(error)) from error
                tell(f"encoding on the CPU: {error}")
        try:
            yield encoding
        except DeviceError as error:
            raise CompileError(f"--device {options.device}", str(error)) from error


def _on_gpu(options: CompileOptions, jobs: int, stack: ExitStack) -> Encoding:
    levels = options.level_table()
    if options.level <= DATA_FREE:
        encoder = CudaEncoder(options.level, levels, chunk_bytes=CHUNK_BYTES, tensors=jobs)
        return Encoding(stack.enter_context(encoder), CpuRounder())
    encoder = CudaEncoder(DATA_FREE, levels, chunk_bytes=CHUNK_BYTES, tensors=min(jobs, FEW_TENSORS))
    stack.enter_context(encoder)
    from .rounder_cuda import CudaRounder  # torch takes seconds to load

    return Encoding(encoder, stack.enter_context(CudaRounder(levels, tensors=jobs)))
