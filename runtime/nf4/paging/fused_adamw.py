"""AdamW over pages on a GPU in few launches: the tables that the kernels of csrc/cuda/adamw.cu and
adamw_8bit.cu read.

A table of chunks on the device says for each block of threads which elements of which parameter it updates,
where their gradient is, and in which page their moments begin. It is built again only when a parameter or a
gradient has moved: gradients that are zeroed in place, not dropped, keep their address. Where the pages lie
goes with the launch, because that changes. The norm has a table of its own, which pages do not cut, so that
its rounding, and with it the clipping factor, is the same for every page size and budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import TrainError
from ..ops.cuda import kernels
from ..ops.operands import DTYPE_CODES
from .blockwise import signed_map, unsigned_map
from .layout import Piece, StateLayout, page_elements

CHUNK_ELEMENTS = 4096  # of a block of 256 threads; whole blocks of 8-bit states

# struct Nf4AdamwChunk of csrc/cuda/launchers.h; Nf4GradientChunk is its gradient, count and dtype
_CHUNK = np.dtype(
    [
        ("parameter", "<u8"),
        ("gradient", "<u8"),
        ("page", "<i4"),
        ("at", "<i4"),
        ("count", "<i4"),
        ("setting", "<u2"),
        ("parameter_dtype", "u1"),
        ("gradient_dtype", "u1"),
    ]
)
_DTYPES = (torch.float32, torch.bfloat16)
_GRADIENT_CHUNK = np.dtype([("gradient", "<u8"), ("count", "<i4"), ("dtype", "<i4")])


class Setting(NamedTuple):
    """The numbers of AdamW that hold for some of the parameters at one step; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


class _Places(NamedTuple):
    """Where tensors lie and of what they are; of one that is not there, address 0."""

    addresses: np.ndarray
    dtype_codes: np.ndarray
    item_bytes: np.ndarray

    @staticmethod
    def of(tensors: Sequence[Tensor | None]) -> _Places:
        return _Places(
            np.array([0 if t is None else t.data_ptr() for t in tensors], dtype=np.uint64),
            np.array([0 if t is None else DTYPE_CODES[t.dtype] for t in tensors]),
            np.array([0 if t is None else t.element_size() for t in tensors], dtype=np.uint64),
        )


class ChunkTables:
    """The tables of some parameters on one GPU, and the launches over them.

    Args:
        params: float32 or bfloat16, contiguous.
        layout: where their moments lie.
    """

    def __init__(self, params: Sequence[Tensor], layout: StateLayout) -> None:
        self._params = list(params)
        self._device = params[0].device
        self._layout = layout
        self._num_pages = len(layout.pages)
        self._cut = _cut(layout.pages)
        if layout.num_quantized:
            maps = (signed_map(), unsigned_map())
            self._maps = torch.stack([m.levels for m in maps] + [m.tree() for m in maps]).to(self._device)
        self._norm_cut = _cut([[Piece(index, 0, p.numel(), 0) for index, p in enumerate(params)]])
        self._built_from: list[int] = []

    def follow(self, grads: Sequence[Tensor | None]) -> bool:
        """Make the table of the norm fit these gradients; True where something has moved since the last call.

        Then `assign` must be called before the next `update`.

        Raises:
            TrainError: a gradient that cannot be used.
        """
        addresses = [p.data_ptr() for p in self._params]
        addresses += [0 if grad is None else grad.data_ptr() for grad in grads]
        if addresses == self._built_from:
            return False
        for index, (p, grad) in enumerate(zip(self._params, grads, strict=True)):
            if grad is not None and (grad.dtype not in _DTYPES or grad.device != p.device):
                expected = f"float32 or bfloat16 on {p.device}"
                got = f"{grad.dtype} on {grad.device}"
                raise TrainError("", f"gradient of parameter {index}", expected=expected, got=got)
        self._parameters, self._gradients = _Places.of(self._params), _Places.of(grads)
        rows = self._rows(self._norm_cut)
        norm = np.zeros(len(rows["count"]), dtype=_GRADIENT_CHUNK)
        norm["gradient"], norm["count"] = rows["gradient"], rows["count"]
        norm["dtype"] = rows["gradient_dtype"]
        self._norm_table = self._upload(norm)
        self._sums = torch.empty(len(norm), device=self._device)
        self._built_from = addresses
        return True

    def assign(self, settings: Sequence[int]) -> None:
        """Build the table of chunks; `settings` holds for each parameter the number of its setting."""
        rows = self._rows(self._cut)
        table = np.zeros(len(rows["count"]), dtype=_CHUNK)
        for name, values in rows.items():
            if name != "param":
                table[name] = values
        table["setting"] = np.asarray(settings)[rows["param"]]
        self._table = self._upload(table)
        self._first_chunk = np.searchsorted(table["page"], np.arange(self._num_pages + 1)).tolist()

    def forget(self) -> None:
        """Build both tables anew at the next call of `follow`."""
        self._built_from = []

    def pages(self) -> list[int]:
        """Numbers of the pages that the table has chunks for, ascending."""
        return [k for k in range(self._num_pages) if self._first_chunk[k] < self._first_chunk[k + 1]]

    def update(
        self, pages: Sequence[tuple[int, Tensor]], settings: Sequence[Setting], factor: Tensor | None
    ) -> None:
        """One AdamW step for what lies in these pages, in the current stream.

        Args:
            pages: number and memory, uint8 [page bytes], of each.
            settings: by the numbers given to `assign`.
            factor: float32 scalar on the device, multiplies gradients; where not finite, nothing changes.
        """
        address = 0 if factor is None else factor.data_ptr()
        with _current_stream(self._device) as stream:
            for bits, of_these in ((8, True), (32, False)):
                chosen = [page for page in pages if (page[0] < self._layout.num_quantized) is of_these]
                elements = page_elements(bits, self._layout.page_bytes)
                for first, addresses in _runs(chosen, kernels().ADAMW_PAGES):
                    begin, end = (self._first_chunk[k] for k in (first, first + len(addresses)))
                    table = self._table.data_ptr() + begin * _CHUNK.itemsize
                    sweep = (table, end - begin, first, addresses, elements, settings, address)
                    if bits == 8:
                        kernels().adamw_8bit(*sweep, self._maps.data_ptr(), stream)
                    else:
                        kernels().adamw(*sweep, stream)

    def gradient_norm(self) -> Tensor:
        """The Euclidean norm of the gradients last followed, float32 without shape; nothing waits for it."""
        norm = torch.empty((), device=self._device)
        with _current_stream(self._device) as stream:
            sums = self._sums
            kernels().gradient_norm(
                self._norm_table.data_ptr(), len(sums), sums.data_ptr(), norm.data_ptr(), stream
            )
        return norm

    def _rows(self, cut: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The chunks whose parameter has a gradient, with addresses."""
        has_gradient = self._gradients.addresses[cut["param"]] != 0
        cut = {name: values[has_gradient] for name, values in cut.items()}
        param, start = cut["param"], cut.pop("start").astype(np.uint64)
        for name, places in (("parameter", self._parameters), ("gradient", self._gradients)):
            cut[name] = places.addresses[param] + start * places.item_bytes[param]
            cut[f"{name}_dtype"] = places.dtype_codes[param]
        return cut

    def _upload(self, table: np.ndarray) -> Tensor:
        return torch.from_numpy(table.view(np.uint8)).to(self._device)


@contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _cut(pages: Sequence[Sequence[Piece]]) -> dict[str, np.ndarray]:
    """Pieces cut into chunks, in the order of pages: int64 arrays page, param, start, at and count."""
    rows = np.array(
        [(k, *piece) for k, pieces in enumerate(pages) for piece in pieces], dtype=np.int64
    ).reshape(-1, 5)
    page, param, start, stop, at = rows.T
    chunks = -(-(stop - start) // CHUNK_ELEMENTS)
    piece = np.repeat(np.arange(len(rows)), chunks)
    number = np.arange(len(piece)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    offset = number * CHUNK_ELEMENTS
    return {
        "page": page[piece],
        "param": param[piece],
        "start": start[piece] + offset,
        "at": at[piece] + offset,
        "count": np.minimum(CHUNK_ELEMENTS, (stop - start)[piece] - offset),
    }


def _runs(pages: Sequence[tuple[int, Tensor]], most: int) -> Iterator[tuple[int, list[int]]]:
    """Runs of consecutive page numbers, at most `most` long: the first number, and the addresses."""
    ordered = sorted((number, page.data_ptr()) for number, page in pages)
    begin = 0
    for end in range(1, len(ordered) + 1):
        last = end == len(ordered) or ordered[end][0] != ordered[end - 1][0] + 1
        if last or end - begin == most:
            yield ordered[begin][0], [address for _, address in ordered[begin:end]]
            begin = end
