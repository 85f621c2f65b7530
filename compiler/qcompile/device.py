"""Where data-free levels are encoded: on the CPU, or on an NVIDIA GPU with the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nf4format.encode import ENCODERS, Encoder
from nf4format.encode_cuda import CudaEncoder, DeviceError

from .calibrated import DATA_FREE
from .errors import CompileError
from .options import CompileOptions

DEVICES = ("cpu", "cuda", "auto")
CHUNK_BYTES = 8 << 20  # that go to a GPU at once; with 2 MiB starting the work takes most of the time


@contextmanager
def open_encoder(options: CompileOptions, jobs: int, tell: Callable[[str], None]) -> Iterator[Encoder]:
    """The encoder of tensors for which the weights alone are needed.

    Args:
        jobs: how many tensors are encoded at once.
        tell: takes a line for the user, if "auto" has to go on without a GPU.

    Raises:
        CompileError: "cuda", and there is no GPU that serves; or it failed meanwhile.
    """
    level = min(options.level, DATA_FREE)
    if options.device == "cpu":
        yield ENCODERS[level]
        return
    try:
        encoder = CudaEncoder(level, options.level_table(), chunk_bytes=CHUNK_BYTES, tensors=jobs)
    except DeviceError as error:
        if options.device == "cuda":
            raise CompileError("--device cuda", str(error)) from error
        tell(f"encoding on the CPU: {error}")
        yield ENCODERS[level]
        return
    with encoder:
        try:
            yield encoder
        except DeviceError as error:
            raise CompileError(f"--device {options.device}", str(error)) from error
