"""Rounding one weight by what its layer reads: what goes in and comes out, and how it is done on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nf4format.blocks import NonFinite, dequantize, quantize, scale_search
from nf4format.codebook import BLOCK, NESTED_BLOCK, NESTED_MAP
from nf4format.encode import TensorSource
from nf4format.levels import thresholds_of
from nf4format.stats import WeightStats

from .absorb import ROUNDS, Corrections, LowRank
from .errors import CompileError
from .feedback import Rounded, output_error, round_weight, target_weight
from .quality import to_float32
from .summary import OutputError

REMEDY = "collect them with nf4 calibrate, for all layers, or keep the tensor: --exclude"


@dataclass(frozen=True)
class Task:
    """One weight to round.

    Attributes:
        name, shape: of the weight, [n, k].
        stats: what is known of its k inputs.
        level: 2 or 3.
        rank: of the correction that takes up what is left over; 0 = none.
        levels: what codes stand for, float32 [16].
    """

    name: str
    shape: tuple[int, ...]
    stats: WeightStats
    level: int
    rank: int
    levels: np.ndarray

    def check(self, source: TensorSource) -> None:
        """Refuse statistics of other weights than those just read.

        Raises:
            CompileError: the weight is another one.
        """
        found = source.sha256()  # type: ignore[attr-defined]
        if found != self.stats.sha256:
            raise CompileError(
                "--stats",
                "statistics of another model",
                tensor=self.name,
                expected=f"SHA-256 {found}",
                got=self.stats.sha256,
                remedy="collect them from this checkpoint",
            )

    def not_definite(self) -> CompileError:
        """What to raise where factors of the moment do not exist."""
        return CompileError(
            "--stats",
            "no second moments of anything",
            tensor=self.name,
            expected="a matrix that is positive definite once it is damped",
            remedy=f"{REMEDY} {self.name}",
        )


@dataclass(frozen=True)
class Outcome:
    """A rounded weight.

    Attributes:
        codes: uint8 [ceil(n k / 2)], as the file has them.
        absmax: uint8 [blocks].
        nested_absmax: float32 [ceil(blocks / 256)]; the offset is 0.
        output_error: at the layer's output, of the file and the correction, by the encoder's own moments, if
            there are any.
        correction: B A, to be added to the weight.
    """

    codes: np.ndarray
    absmax: np.ndarray
    nested_absmax: np.ndarray
    output_error: OutputError | None = None
    correction: LowRank | None = None


class Rounder(Protocol):
    """Rounds weights, for any number of threads.

    Attributes:
        device: on which; files of one device kind are alike to the byte.
    """

    device: str

    def round(self, task: Task, source: TensorSource, threads: Callable[[], int]) -> Outcome:
        """Read a weight and round it.

        Raises:
            NonFinite: with the flat index of the first NaN or infinity.
            CompileError: the statistics do not serve.
            FormatError: they cannot be read.
            DeviceError: the GPU failed.
        """
        ...


class CpuRounder:
    """A `Rounder` in numpy: one weight at a time, held whole, with its moment and a few of their size."""

    device = "cpu"

    def __init__(self) -> None:
        self._turn = threading.Lock()

    def round(self, task: Task, source: TensorSource, threads: Callable[[], int]) -> Outcome:
        """As `Rounder`."""
        with self._turn:
            weight = self._read(task, source)
            work = _Work(task, weight, threads())
            rounded = work.feedback() if task.stats.has_moment else work.weighted()
            codes = np.ascontiguousarray(rounded.codes.T).reshape(-1)
        if codes.size % 2:
            codes = np.append(
                codes, np.searchsorted(thresholds_of(task.levels), np.float32(0)).astype(np.uint8)
            )
        return Outcome(
            (codes[0::2] << 4) | codes[1::2],
            rounded.absmax,
            rounded.nested_absmax,
            work.output_error,
            work.correction,
        )

    def _read(self, task: Task, source: TensorSource) -> np.ndarray:
        flat = np.empty(source.num_values, np.float32)
        for start, values in source.chunks():
            flat[start : start + values.size] = to_float32(values, source.dtype)
        if not np.isfinite(flat).all():
            raise NonFinite(int(np.flatnonzero(~np.isfinite(flat))[0]))
        task.check(source)
        return flat.reshape(task.shape)


class _Work:
    """One weight being rounded."""

    def __init__(self, task: Task, weight: np.ndarray, threads: int) -> None:
        self._task, self._weight, self._threads = task, weight, threads
        self.output_error: OutputError | None = None
        self.correction: LowRank | None = None

    def feedback(self) -> Rounded:
        """By whole moments."""
        task, weight = self._task, self._weight
        moment = task.stats.moment()
        try:
            wanted = weight
            if task.level >= 3:
                wanted = np.ascontiguousarray(target_weight(weight, moment, task.stats.cross()))
            rounded = round_weight(wanted, moment, task.levels, threads=self._threads)
            if task.rank:
                corrections = Corrections(moment, task.rank)
                for turn in range(ROUNDS):
                    if turn:
                        rest = wanted - self.correction.product()  # type: ignore[union-attr]
                        rounded = round_weight(rest, moment, task.levels, threads=self._threads)
                    self.correction = corrections.of(wanted - decoded(rounded, weight.shape, task.levels))
        except np.linalg.LinAlgError as error:
            raise task.not_definite() from error
        self.output_error = self._measure(rounded, moment)
        return rounded

    def weighted(self) -> Rounded:
        """By diagonals alone: the weighted search for scales, and nearest codes."""
        weight, levels = self._weight, self._task.levels
        absmax, nested = scale_search(
            weight.reshape(-1), self._task.stats.diagonal(), levels=levels, threads=self._threads
        )
        spread = _spread(absmax, nested, weight.shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.where(spread == 0, np.float32(0), weight / spread)
        codes = np.searchsorted(thresholds_of(levels), scaled).astype(np.uint8)
        return Rounded(codes.T, absmax, nested)

    def _measure(self, rounded: Rounded, moment: np.ndarray) -> OutputError:
        weight = self._weight
        plain = dequantize(quantize(weight, "float32")).reshape(weight.shape)
        total = output_error(weight, moment) or 1.0
        ours = decoded(rounded, weight.shape, self._task.levels)
        if self.correction:
            ours += self.correction.product()
        after = output_error(ours - weight, moment)
        return OutputError(output_error(plain - weight, moment) / total, after / total)


def decoded(rounded: Rounded, shape: tuple[int, ...], levels: np.ndarray) -> np.ndarray:
    """What a rounded weight decodes to, float32."""
    return levels[rounded.codes.T] * _spread(rounded.absmax, rounded.nested_absmax, shape)


def _spread(absmax: np.ndarray, nested_absmax: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    scales = NESTED_MAP[absmax] * np.repeat(nested_absmax, NESTED_BLOCK)[: absmax.size]
    size = int(np.prod(shape))
    return np.repeat(scales, BLOCK)[:size].reshape(shape)
