"""Host memory for the pages of a GPU's optimizer state, pinned so that copies run beside everything else."""

from __future__ import annotations

import weakref

import torch
from torch import cuda

from ..errors import TrainError


class PinnedArena:
    """Host memory for every page, pinned, in one allocation.

    Attributes:
        pages: uint8 [num_pages, page_bytes].

    Raises:
        TrainError: there is not enough memory, or it cannot be pinned.
    """

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        wanted = num_pages * page_bytes
        remedy = "free host memory, raise its limit (ulimit -l), or raise the page budget"
        try:
            # Pinned here and not by torch, whose allocator for pinned memory rounds up to a power of two.
            self.pages = torch.empty(num_pages, page_bytes, dtype=torch.uint8)
        except RuntimeError:
            raise TrainError("", f"no host memory for {wanted} bytes of pages", remedy=remedy) from None
        runtime = cuda.cudart()
        code = runtime.cudaHostRegister(self.pages.data_ptr(), wanted, 0)
        if code != runtime.cudaError.success:
            reason = runtime.cudaGetErrorString(code)
            raise TrainError("", f"cannot pin {wanted} bytes of pages: {reason}", remedy=remedy)
        self._finalizer = weakref.finalize(self, runtime.cudaHostUnregister, self.pages.data_ptr())

    def close(self) -> None:
        """Unpin; no copy may be under way."""
        self._finalizer()
