"""The steps of `feedback` on a GPU: torch multiplies and factors matrices, kernels go from column to column.

What is computed is what `feedback` computes; float32 sums in another order round differently, and a few codes
with them. Two things are done in another way:

* The factor of the inverse, U with H^-1 = UT U, is the inverse of R where H = R RT and R is upper triangular:
  one factorization less, and no inverse of H.
* In coordinate descent, the gradient is made anew for each 512 columns from what decoded weights are off by,
  not carried along from column to column: half the products.

Everything here runs on any device of torch's; kernels are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nf4format.codebook import BLOCK, NESTED_BLOCK, NESTED_MAP, NF4_LEVELS
from nf4format.levels import thresholds_of

from .feedback import DAMPING, PASSES, PAYBACK

PANEL_VALUES = 1 << 26
"""Values of a weight that are worked on at a time: each takes some 20 bytes meanwhile."""

_PANEL = 128  # columns whose errors are carried to the rest at once; the most that the kernel takes
_GROUP = 512  # columns whose gradient is made at once
_LARGEST = float(np.finfo(np.float32).max)


class Kernels:
    """The steps that go from column to column, for one table of levels.

    `native`: `nf4format._cuda_encode.Feedback`, or what has its methods. Tensors are on its device, and
    contiguous but for submatrices of `factor` and `moment`; matrices are [columns, n].
    """

    def __init__(self, native: Any, levels: np.ndarray, device: torch.device) -> None:
        self._native, self.device = native, device
        self.levels, self.thresholds = self.constant(levels), self.constant(thresholds_of(levels))
        self.nested_map = self.constant(NESTED_MAP)

    def constant(self, array: np.ndarray) -> Tensor:
        """An array on the device."""
        return torch.from_numpy(np.array(array)).to(self.device)

    def search(self, values: Tensor, n: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """As `nf4format.blocks.scale_search`, with its bits. `values`: zeros from n to a block's end."""
        absmax = values.new_empty(values.numel() // BLOCK, dtype=torch.uint8)
        nested = values.new_empty(-(-absmax.numel() // NESTED_BLOCK))
        self._native.search(
            values.data_ptr(), n, weights.data_ptr(), weights.numel(), absmax.data_ptr(), nested.data_ptr(),
            self._stream(),
        )  # fmt: skip
        return absmax, nested

    def carry(  # noqa: PLR0917
        self, weight: Tensor, rest: Tensor, factor: Tensor, order: Tensor, scales: Tensor, codes: Tensor,
        residual: Tensor, errors: Tensor,
    ) -> None:  # fmt: skip
        """Round `rest` [columns, n], carrying errors within it.

        Args:
            weight, codes, residual: [k, n]; of the last two, rows `order` [columns] are written.
            factor: [columns, columns].
            scales: [k, n], or [k / 64, n].
            errors: [columns, n], written: what is still to be carried.
        """
        self._native.carry(
            weight.data_ptr(), rest.data_ptr(), factor.data_ptr(), order.data_ptr(), scales.data_ptr(),
            codes.data_ptr(), residual.data_ptr(), errors.data_ptr(), rest.shape[1], factor.stride(0),
            rest.shape[0], 0 if len(scales) == len(weight) else int(math.log2(BLOCK)), self._stream(),
        )  # fmt: skip

    def descend(  # noqa: PLR0917
        self, weight: Tensor, slope: Tensor, moment: Tensor, scales: Tensor, codes: Tensor, residual: Tensor,
        change: Tensor, entries: Tensor | None = None, nested: Tensor | None = None,
    ) -> None:  # fmt: skip
        """One block of columns: scales, if `entries` and `nested` [n] are given, and then codes.

        Args:
            weight, slope: [columns, n]. moment: [columns, columns].
            scales: [n], or without entries [columns, n].
            codes, residual, change: [columns, n]; written are also entries and scales.
        """
        self._native.descend(
            weight.data_ptr(), slope.data_ptr(), moment.data_ptr(),
            0 if nested is None else nested.data_ptr(), 0 if entries is None else entries.data_ptr(),
            scales.data_ptr(), codes.data_ptr(), residual.data_ptr(), change.data_ptr(), slope.shape[1],
            moment.stride(0), slope.shape[0], self._stream(),
        )  # fmt: skip

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0


@dataclass(frozen=True)
class Known:
    """What is made once for a moment.

    Attributes:
        h: damped, float32 [k, k].
        diagonal: as it was before, [k].
        order: int64 [k], in which columns are rounded.
        factor: float32 [k, k]; see `inverse_factor`.
    """

    h: Tensor
    diagonal: Tensor
    order: Tensor
    factor: Tensor


@dataclass(frozen=True)
class Rounded:
    """A weight [n, k] in codes: codes uint8 [n, k]; absmax uint8 [blocks]; nested_absmax float32."""

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor


def unpacked(packed: Tensor, k: int) -> Tensor:
    """The symmetric matrix [k, k] whose upper triangle this is, row by row."""
    matrix = packed.new_empty(k, k)
    columns = torch.arange(k, device=packed.device)
    for begin in range(0, k, _GROUP):  # positions take twice the matrix
        rows = columns[begin : begin + _GROUP, None]
        low, high = torch.minimum(rows, columns), torch.maximum(rows, columns)
        matrix[begin : begin + _GROUP] = packed[low * (2 * k - low - 1) // 2 + high]
    return matrix


def known(moment: Tensor) -> Known:
    """Everything about a moment, which is damped in place.

    Raises:
        torch.linalg.LinAlgError: it is not positive definite even then.
    """
    diagonal = moment.diagonal().clone()
    added = DAMPING * float(diagonal.double().mean())
    moment.diagonal().add_(added or 1.0)
    order = torch.argsort(-moment.diagonal(), stable=True)
    return Known(moment, diagonal, order, inverse_factor(moment, order))


def inverse_factor(h: Tensor, order: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of H with its features in this order, float32 [k, k]."""
    backwards = order.flip(0)
    lower = torch.linalg.cholesky(h[backwards[:, None], backwards].double())
    identity = torch.eye(len(h), dtype=torch.float64, device=h.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).float().flip((0, 1)).contiguous()


def target_weight(weight: Tensor, moment: Known, cross: Tensor) -> Tensor:
    """As `feedback.target_weight`."""
    lower = torch.linalg.cholesky(moment.h.double())
    difference = cross.double()
    difference -= moment.h
    difference.diagonal().add_(moment.h.diagonal() - moment.diagonal)
    correction = torch.cholesky_solve(difference.T.contiguous(), lower).T.float()
    return torch.addmm(weight, weight, correction, alpha=PAYBACK)


def padded(values: Tensor, blocks_of: int = BLOCK) -> Tensor:
    """Flat, float32, with zeros up to the end of the last block; a view if there is nothing to add."""
    if values.numel() % blocks_of == 0:
        return values.reshape(-1)
    flat = torch.zeros(-(-values.numel() // blocks_of) * blocks_of, device=values.device)
    flat[: values.numel()] = values.reshape(-1)
    return flat


def round_weight(
    weight: Tensor, moment: Known, kernels: Kernels, *, panel_values: int = PANEL_VALUES
) -> Rounded:
    """As `feedback.round_weight`, for a weight float32 [n, k]."""
    n, k = weight.shape
    absmax, nested_absmax = kernels.search(padded(weight), n * k, moment.h.diagonal().contiguous())
    nested = _of_blocks(nested_absmax, absmax.numel())
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    for rows, blocks in _panels(n, k, panel_values):
        panel = _Panel(weight[rows], absmax[blocks], nested[blocks], moment, kernels)
        panel.carry_errors()
        for _ in range(PASSES):
            panel.descend()
        codes[rows], absmax[blocks] = panel.codes.t(), panel.entries
    return Rounded(codes, absmax, nested_absmax)


def nearest(weight: Tensor, diagonal: Tensor, kernels: Kernels) -> Rounded:
    """The weighted search for scales, and nearest codes: the CPU's bits."""
    n, k = weight.shape
    absmax, nested_absmax = kernels.search(padded(weight), n * k, diagonal)
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    for rows, blocks in _panels(n, k, PANEL_VALUES):
        scales = _scales(absmax, nested_absmax, blocks, (rows.stop - rows.start, k), kernels)
        scaled = torch.where(scales == 0, 0.0, weight[rows] / scales)
        codes[rows] = torch.bucketize(scaled, kernels.thresholds, out_int32=True).to(torch.uint8)
    return Rounded(codes, absmax, nested_absmax)


def output_error(
    weight: Tensor, rounded: Rounded, moment: Known, kernels: Kernels, added: Tensor | None = None
) -> float:
    """Mean squared error at the output, summed over its n values; `added` [n, k] to what is decoded."""

    def difference(rows: slice, blocks: slice) -> Tensor:
        scales = _scales(rounded.absmax, rounded.nested_absmax, blocks, weight[rows].shape, kernels)
        decoded = _looked_up(kernels.levels, rounded.codes[rows]).mul_(scales)
        if added is not None:
            decoded += added[rows]
        return decoded.sub_(weight[rows])

    return _total_error(weight, moment, difference)


def decoded_difference(weight: Tensor, rounded: Rounded, kernels: Kernels) -> Tensor:
    """The weight minus what it decodes to."""
    scales = _scales(
        rounded.absmax, rounded.nested_absmax, slice(0, rounded.absmax.numel()), weight.shape, kernels
    )
    return weight - _looked_up(kernels.levels, rounded.codes).mul_(scales)


def output_size(weight: Tensor, moment: Known) -> float:
    """Mean square of the output, summed over its n values."""
    return _total_error(weight, moment, lambda rows, blocks: weight[rows])


def plain_error(weight: Tensor, moment: Known, kernels: Kernels) -> float:
    """The error at the output of -O0, whose scales are largest magnitudes, with NF4's levels."""
    blocks = padded(weight).view(-1, BLOCK)
    levels, thresholds = kernels.constant(NF4_LEVELS), kernels.constant(thresholds_of(NF4_LEVELS))
    midpoints = kernels.constant((NESTED_MAP[:-1] + NESTED_MAP[1:]) / np.float32(2))
    absmax = blocks.abs().amax(1)
    offset = absmax.double().mean().float()
    groups = padded(absmax - offset, NESTED_BLOCK).view(-1, NESTED_BLOCK)
    nested = groups.abs().amax(1, keepdim=True)
    entries = torch.bucketize(groups * (1 / nested).clamp(max=_LARGEST), midpoints, out_int32=True)
    scales = (_looked_up(kernels.nested_map, entries) * nested).view(-1)[: absmax.numel()] + offset
    factors = (1 / absmax).clamp(max=_LARGEST)

    def difference(rows: slice, of_panel: slice) -> Tensor:
        scaled = blocks[of_panel] * factors[of_panel, None]
        codes = torch.bucketize(scaled, thresholds, out_int32=True)
        decoded = _looked_up(levels, codes).mul_(scales[of_panel, None])
        here = weight[rows]
        return decoded.view(-1)[: here.numel()].view(here.shape).sub_(here)

    return _total_error(weight, moment, difference)


def packed_codes(rounded: Rounded, kernels: Kernels) -> Tensor:
    """uint8 [ceil(n k / 2)], as the file has them."""
    codes = rounded.codes.view(-1)
    if codes.numel() % 2:
        zero = torch.bucketize(torch.zeros(1, device=codes.device), kernels.thresholds)
        codes = torch.cat([codes, zero.to(torch.uint8)])
    return (codes[0::2] << 4) | codes[1::2]


def _panels(n: int, k: int, panel_values: int) -> Iterator[tuple[slice, slice]]:
    """Rows that end with a block, and these blocks."""
    step = BLOCK // math.gcd(k, BLOCK)
    step *= max(1, panel_values // (k * step))
    for begin in range(0, n, step):
        end = min(begin + step, n)
        yield slice(begin, end), slice(begin * k // BLOCK, -(-end * k // BLOCK))


def _total_error(weight: Tensor, moment: Known, difference: Any) -> float:
    """Sum of D H DT for differences [rows, k] of rows and blocks, with H as it was before it was damped."""
    n, k = weight.shape
    added = moment.h.diagonal() - moment.diagonal
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for rows, blocks in _panels(n, k, PANEL_VALUES):
        d = difference(rows, blocks)
        product = d @ moment.h
        product.addcmul_(d, added, value=-1)
        total += product.mul_(d).sum(dtype=torch.float64)
    return float(total)


class _Panel:
    """Rows [rows, k] of a weight, from the beginning of a block, on the way to their codes.

    Attributes:
        codes: uint8 [k, rows], once errors were carried.
    """

    def __init__(
        self, weight: Tensor, entries: Tensor, nested: Tensor, moment: Known, kernels: Kernels
    ) -> None:
        """`entries`, `nested`: of each block, where its scale starts, and the nested_absmax of its group."""
        rows, k = weight.shape
        self._moment, self._kernels = moment, kernels
        self._columns = weight.t().contiguous()
        self._whole_blocks = k % BLOCK == 0
        if self._whole_blocks:  # one scale for 64 columns of a row
            entries, nested = (of.view(rows, -1).t().contiguous() for of in (entries, nested))
            self._scales = _looked_up(kernels.nested_map, entries) * nested
        else:  # blocks run across the ends of rows
            scales = _looked_up(kernels.nested_map, entries) * nested
            self._scales = scales.repeat_interleave(BLOCK)[: rows * k].view(rows, k).t().contiguous()
        self._entries, self._nested = entries, nested
        self.codes = torch.empty(k, rows, dtype=torch.uint8, device=weight.device)
        self._residual = torch.empty_like(self._columns)  # of it minus what codes decode to

    @property
    def entries(self) -> Tensor:
        """uint8 [blocks], of the map of scales."""
        return self._entries.t().reshape(-1) if self._whole_blocks else self._entries

    def carry_errors(self) -> None:
        """Step 2: every column rounded, its error carried to those behind it."""
        moment, (k, rows) = self._moment, self._columns.shape
        rest = self._columns[moment.order]
        room = rest.new_empty(_PANEL, rows)
        for begin in range(0, k, _PANEL):
            here = slice(begin, min(begin + _PANEL, k))
            errors = room[: here.stop - begin]
            self._kernels.carry(
                self._columns, rest[here], moment.factor[here, here], moment.order[here], self._scales,
                self.codes, self._residual, errors,
            )  # fmt: skip
            rest[here.stop :].addmm_(moment.factor[here, here.stop :].t(), errors, alpha=-1)

    def descend(self) -> None:
        """Step 3, one pass."""
        h, (k, rows) = self._moment.h, self._columns.shape
        room = self._columns.new_empty(BLOCK, rows)
        for begin in range(0, k, _GROUP):
            end = min(begin + _GROUP, k)
            slopes = h[begin:end] @ self._residual
            for first in range(begin, end, BLOCK):
                here = slice(first, min(first + BLOCK, end))
                change = room[: here.stop - first]
                of_block = first // BLOCK if self._whole_blocks else here
                movable = (self._entries[of_block], self._nested[of_block]) if self._whole_blocks else ()
                self._kernels.descend(
                    self._columns[here], slopes[first - begin : here.stop - begin], h[here, here],
                    self._scales[of_block], self.codes[here], self._residual[here], change, *movable,
                )  # fmt: skip
                slopes[here.stop - begin :].addmm_(h[here.stop : end, here], change, alpha=-1)


def _looked_up(table: Tensor, codes: Tensor) -> Tensor:
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def _of_blocks(nested_absmax: Tensor, num_blocks: int) -> Tensor:
    return nested_absmax.repeat_interleave(NESTED_BLOCK)[:num_blocks]


def _scales(
    absmax: Tensor, nested_absmax: Tensor, blocks: slice, shape: tuple[int, ...], kernels: Kernels
) -> Tensor:
    """Scales of all weights of rows [rows, k] that begin with a block."""
    entries = absmax[blocks]
    first = blocks.start // NESTED_BLOCK
    groups = nested_absmax[first : -(-blocks.stop // NESTED_BLOCK)]
    nested = _of_blocks(groups, groups.numel() * NESTED_BLOCK)[blocks.start - first * NESTED_BLOCK :]
    scales = _looked_up(kernels.nested_map, entries) * nested[: entries.numel()]
    size = math.prod(shape)
    return scales.repeat_interleave(BLOCK)[:size].view(shape)
