"""Levels 2 and 3: rounding that knows what a layer reads.

With H = mean of x xT over calibration text, an error D of the weights costs D H DT at the output, row by row.
Three steps bring it down (GPTQ, arXiv 2210.17323, with scales that stay as they are):

1. scales: for each block the one with the least error weighted by the diagonal of H, on the 8-bit grid;
2. columns are rounded in order of falling diagonal, and each one's error is carried over to those not rounded
   yet, in the way that cancels most of it at the output;
3. coordinate descent: scales and codes are changed one by one wherever that lowers the cost.

Level 3 rounds towards other weights: with x the original's input, y the packed model's, H = mean of y yT and
C = mean of x yT, those that make up for what earlier layers have lost (after GPTAQ, arXiv 2504.02692).

Matrices are [k, n], features first: what is worked on together lies together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nf4format.blocks import scale_search
from nf4format.codebook import BLOCK, NESTED_BLOCK, NESTED_MAP
from nf4format.levels import thresholds_of

DAMPING = 0.1
"""Of the mean of the diagonal, added to it: what is known of H is not the whole truth."""

PASSES = 3
"""Of coordinate descent."""

PAYBACK = 0.25
"""How far level 3 goes from the original weight to the one that makes up for earlier layers. Their errors
were measured in another file than the one that is being written, whose errors are alike in part only. On
two models and text of other sources, a quarter of the way lost less than a half or three quarters."""

PANEL_VALUES = 1 << 24
"""Values of a weight that are worked on at a time: each takes some 30 bytes meanwhile."""

_PANEL = 128  # columns whose errors are carried to the rest at once
_NESTED_THRESHOLDS = (NESTED_MAP[:-1] + NESTED_MAP[1:]) / np.float32(2)


@dataclass
class Rounded:
    """A weight [n, k] in codes: codes uint8 [k, n]; absmax uint8 [blocks]; nested_absmax float32."""

    codes: np.ndarray
    absmax: np.ndarray
    nested_absmax: np.ndarray


def damped(moment: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """H plus damping times the mean of its diagonal, float32; features that are never read get weight too."""
    diagonal = np.diagonal(moment)
    added = damping * float(diagonal.mean(dtype=np.float64))
    result = moment.astype(np.float32)
    result[np.diag_indices_from(result)] += np.float32(added or 1.0)
    return result


def target_weight(weight: np.ndarray, moment: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Towards the weight whose output on y is nearest to the original's on x: W (C - H) (H + damping)^-1 is
    the way to it from W, of which PAYBACK is gone.

    Args:
        weight: [n, k]. moment: H, undamped. cross: C.
    """
    correction = np.linalg.solve(
        damped(moment).astype(np.float64), (cross.astype(np.float64) - moment).T
    ).T.astype(np.float32)
    return weight + np.float32(PAYBACK) * (weight @ correction)


def round_weight(
    weight: np.ndarray,
    moment: np.ndarray,
    levels: np.ndarray,
    *,
    threads: int,
    panel_values: int = PANEL_VALUES,
) -> Rounded:
    """All three steps for a weight float32 [n, k] and its undamped H float32 [k, k].

    Args:
        threads: for the search; matrix products take those of numpy.
        panel_values: about how many values are worked on at a time, rows being independent; the result does
            not depend on it but for roundings of matrix products.
    """
    n, k = weight.shape
    h = damped(moment)
    absmax, nested_absmax = scale_search(
        weight.reshape(-1), np.ascontiguousarray(np.diagonal(h)), levels=levels, threads=threads
    )
    nested = np.repeat(nested_absmax, NESTED_BLOCK)[: absmax.size]
    order = np.argsort(-np.diagonal(h), kind="stable")
    factor = inverse_factor(h, order)
    codes = np.empty((k, n), np.uint8)
    step = BLOCK // math.gcd(k, BLOCK)  # rows that end with a block
    step *= max(1, panel_values // (k * step))
    for begin in range(0, n, step):
        rows = slice(begin, min(begin + step, n))
        blocks = slice(begin * k // BLOCK, -(-rows.stop * k // BLOCK))
        rounding = Rounding(weight[rows], absmax[blocks], nested[blocks], levels)
        rounding.carry_errors(order, factor)
        for _ in range(PASSES):
            rounding.descend(h)
        codes[:, rows] = rounding.codes
        absmax[blocks] = rounding.entries
    return Rounded(codes, absmax, nested_absmax)


def inverse_factor(h: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the inverse of H with its features in this order, float32 [k, k]."""
    inverse = np.linalg.inv(h[np.ix_(order, order)].astype(np.float64))
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)


def output_error(difference: np.ndarray, moment: np.ndarray) -> float:
    """Mean squared error at the output, summed over its n values, for weights [n, k] off by `difference`."""
    return float(np.einsum("nk,nk->", difference @ moment, difference, dtype=np.float64))


class Rounding:
    """Rows of a weight on the way to their codes.

    Attributes:
        codes: uint8 [k, n], once errors were carried.
        entries: uint8 [blocks], of the map of scales.
    """

    def __init__(
        self, weight: np.ndarray, entries: np.ndarray, nested: np.ndarray, levels: np.ndarray
    ) -> None:
        """Args:
        weight: float32 [n, k], from the beginning of a block.
        entries, nested: of each block: where its scale starts from, and the nested_absmax of its group.
        """
        self._n, self._k = weight.shape
        self._weight = np.ascontiguousarray(weight.T)  # [k, n]
        self._nested = nested
        self._levels, self._thresholds = levels, thresholds_of(levels)
        self.entries = entries.copy()
        self.codes = np.empty((self._k, self._n), np.uint8)
        self._spread_scales()

    def _spread_scales(self) -> None:
        """Scales of all weights, [k, n]: blocks run along rows of [n, k], and across their ends."""
        scales = NESTED_MAP[self.entries] * self._nested
        flat = np.repeat(scales, BLOCK)[: self._n * self._k]
        self._scales = np.ascontiguousarray(flat.reshape(self._n, self._k).T)

    def _nearest(self, values: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes of values [n], and what they decode to."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scaled = np.where(scales == 0, np.float32(0), values / scales)
        codes = np.searchsorted(self._thresholds, scaled).astype(np.uint8)
        return codes, self._levels[codes] * scales

    def carry_errors(self, order: np.ndarray, upper: np.ndarray) -> None:
        """Step 2, with the columns in this order and the factor that goes with it."""
        rest = self._weight[order]
        scales = self._scales[order]
        for begin in range(0, self._k, _PANEL):
            end = min(begin + _PANEL, self._k)
            errors = np.empty((end - begin, self._n), np.float32)
            for i in range(begin, end):
                codes, decoded = self._nearest(rest[i], scales[i])
                self.codes[order[i]] = codes
                error = (rest[i] - decoded) / upper[i, i]
                errors[i - begin] = error
                rest[i + 1 : end] -= upper[i, i + 1 : end, None] * error
            rest[end:] -= upper[begin:end, end:].T @ errors

    def descend(self, h: np.ndarray) -> None:
        """Step 3, one pass over all columns in their own order."""
        decoded = self._levels[self.codes] * self._scales
        gradient = h @ (self._weight - decoded)  # of the cost, by minus a half
        whole_blocks = self._k % BLOCK == 0
        for begin in range(0, self._k, BLOCK):
            columns = slice(begin, min(begin + BLOCK, self._k))
            local, before = h[columns, columns], decoded[columns].copy()
            slope = gradient[columns]
            if whole_blocks:
                self._refit_scales(begin // BLOCK, local, slope, decoded[columns])
            for i in range(columns.stop - begin):
                column = begin + i
                wanted = decoded[column] + slope[i] / local[i, i]
                self.codes[column], new = self._nearest(wanted, self._scales[column])
                slope -= local[:, i, None] * (new - decoded[column])
                decoded[column] = new
            change = decoded[columns] - before
            outside = np.ones(self._k, bool)
            outside[columns] = False
            gradient[outside] -= h[outside, columns] @ change

    def _refit_scales(self, block: int, local: np.ndarray, slope: np.ndarray, decoded: np.ndarray) -> None:
        """Move the scale of one block of each row along the grid where that lowers the cost."""
        unit = self._levels[self.codes[block * BLOCK : (block + 1) * BLOCK]]  # [64, n]
        curvature = np.einsum("in,in->n", unit, local @ unit)
        pull = np.einsum("in,in->n", unit, slope)
        index = np.arange(self._n) * (self._k // BLOCK) + block
        nested = self._nested[index]
        scale = NESTED_MAP[self.entries[index]] * nested
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.where(curvature > 0, scale + pull / curvature, scale)
            relative = np.where(nested > 0, wanted / nested, np.float32(0))
        entries = np.searchsorted(_NESTED_THRESHOLDS, relative).astype(np.uint8)
        step = NESTED_MAP[entries] * nested - scale
        # A scale of zero would pin its block there.
        better = (step * (step * curvature - 2 * pull) < 0) & (entries != 127)
        self.entries[index] = np.where(better, entries, self.entries[index])
        scale = NESTED_MAP[self.entries[index]] * nested
        self._scales[block * BLOCK : (block + 1) * BLOCK] = scale
        new = unit * scale
        slope -= local @ (new - decoded)
        decoded[:] = new
