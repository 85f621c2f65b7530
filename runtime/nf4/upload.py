"""Moving a packed file to a GPU: read, checked and copied in one pass, in little host memory.

The part of the file that holds weights becomes one slab of device memory, byte for byte, and every weight a
view of it. Threads of `nf4._cuda` (csrc/cuda/upload.cpp) do the work, without the interpreter: each takes the
next of the chunks over which the file has sums, and moves it in pieces through a small ring of pinned memory.
"""

from __future__ import annotations

import os
from types import TracebackType

import torch
from torch import Tensor

from nf4format.errors import Nf4Error
from nf4format.files import open_regular, read_failure
from nf4format.header import TensorEntry
from nf4format.region import DataRegion, glance
from nf4format.sums import CHUNK_BYTES

from .errors import LoadError
from .ops import cuda as ops_cuda
from .weights import TORCH_DTYPES

# Measured on an H200 with 16 cores: enough to keep the link busy, and some cores left for the rest.
MOST_READERS = 12
PIECE_BYTES = 2 << 20  # large enough for the link, small enough to be hashed in a core's cache
SLOTS = 3  # pieces of one reader: one being read, the others on their way


class Slab:
    """The weights of a file in the memory of one GPU.

    Reading starts at once and goes on by itself; `tensor` can be called before `wait`, but what it gives has
    its values only then. Leaving it as a context manager is `cancel`.

    Args:
        path: for messages.
        fd: of the file; it may be closed once this returns.
        region: where its weights lie, and the sums of its chunks.
        device: a GPU.
        readers: threads; None takes one a CPU, at most MOST_READERS.
        check: compare with the sums.

    Attributes:
        region: as given.
        memory: the slab, uint8.

    Raises:
        LoadError: too little memory on the GPU.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fd: int,
        region: DataRegion,
        device: torch.device,
        *,
        readers: int | None = None,
        check: bool = True,
    ) -> None:
        self.region = region
        self._path = path
        self._device = device
        self.memory = _allocate(path, region.weights_end - region.begin, device)
        with torch.cuda.device(device):
            self._upload = ops_cuda.kernels().Upload(
                fd,
                begin=region.begin,
                end=region.end,
                chunk_bytes=CHUNK_BYTES,
                sums=region.sums if check else b"",
                memory=self.memory.data_ptr(),
                bytes=self.memory.numel(),
                device=self.memory.device.index,
                after=torch.cuda.current_stream(device).cuda_stream,
                readers=readers or min(MOST_READERS, len(os.sched_getaffinity(0))),
                piece_bytes=PIECE_BYTES,
                slots=SLOTS,
            )

    @classmethod
    def at_a_glance(
        cls, path: str | os.PathLike[str], device: torch.device, *, check: bool = True
    ) -> Slab | None:
        """A slab that reads before the file's header is parsed; None where a glance does not suffice.

        It may be used only if the open file's region is the same.

        Raises:
            LoadError: too little memory on the GPU.
            FormatError: the file cannot be opened or read.
        """
        fd = open_regular(path)
        try:
            region = glance(fd)
            return None if region is None else cls(path, fd, region, device, check=check)
        finally:
            os.close(fd)

    def tensor(self, entry: TensorEntry) -> Tensor:
        """A stored tensor as a flat tensor of its dtype in the file, a view of the slab."""
        data = self.memory[entry.begin - self.region.begin : entry.end - self.region.begin]
        return data if entry.dtype == "U8" else data.view(TORCH_DTYPES[entry.dtype])

    def wait(self) -> None:
        """Until all of it is there, checked.

        Raises:
            LoadError: bytes that differ from their sum; a copy that failed.
            FormatError: the file cannot be read, or has become shorter.
        """
        failure = self._upload.wait()
        if failure is not None:
            raise self._error(*failure)
        ops_cuda.mark_constant(self.memory)

    def cancel(self) -> None:
        """Stop; when this returns, nothing uses the file or the slab any more."""
        self._upload.cancel()

    def __enter__(self) -> Slab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def _error(self, what: str, index: int, code: int) -> Nf4Error:
        begin, end = self.region.chunk(index)
        if what == "damaged":
            return LoadError(
                self._path,
                f"data is damaged (bytes {begin} to {end})",
                remedy="nf4 verify names the tensors; fetch the file again or compile it again",
            )
        if what == "destination":
            text = ops_cuda.kernels().error_text(code)
            remedy = "end other programs on this GPU and try again, or use the CPU"
            return LoadError(self._path, f"copying to {self._device} failed: {text}", remedy=remedy)
        return read_failure(self._path, what, (begin, end), code)


def _allocate(path: str | os.PathLike[str], num_bytes: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info(device)
        raise LoadError(
            path,
            f"too little memory on {device} for the weights",
            expected=f"{num_bytes:,} bytes",
            got=f"{free:,} free of {total:,}",
            remedy="end other programs on this GPU, or use the CPU",
        ) from None
