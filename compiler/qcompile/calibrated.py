"""Levels 2 and 3 as encoders: one tensor at a time, with what statistics know of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nf4format.blocks import NonFinite, dequantize, quantize, scale_search
from nf4format.codebook import BLOCK, NESTED_BLOCK, NESTED_MAP, NF4_LEVELS
from nf4format.encode import ENCODERS, Constants, Encoder, TensorSource, WriteCodes
from nf4format.levels import thresholds_of
from nf4format.stats import Stats, WeightStats

from .absorb import ROUNDS, Corrections, LowRank
from .errors import CompileError
from .feedback import Rounded, output_error, round_weight, target_weight
from .options import CompileOptions
from .plan import Plan
from .policy import Decision
from .quality import to_float32
from .roles import Role
from .summary import OutputError

DATA_FREE = max(ENCODERS)
"""The highest level that needs the weights alone."""

LEVELS = (*ENCODERS, 2, 3)

_REMEDY = "collect them with nf4 calibrate, for all layers, or keep the tensor: --exclude"


def check_stats(stats: Stats, plan: Plan, level: int) -> None:
    """Refuse statistics that do not serve this compilation, before anything is written.

    Raises:
        CompileError: a linear weight without statistics, with those of another shape, or without what the
            level needs.
    """
    for decision in plan.decisions:
        known = stats.weights.get(decision.name)
        if not decision.quantize or (known is None and decision.role is not Role.LINEAR):
            continue
        if known is None:
            raise CompileError(
                "--stats",
                "no statistics of this weight",
                tensor=decision.name,
                remedy=f"{_REMEDY} {decision.name}",
            )
        if known.features != decision.shape[1]:
            raise CompileError(
                "--stats",
                "statistics of another model",
                tensor=decision.name,
                expected=f"{decision.shape[1]} features",
                got=known.features,
                remedy=_REMEDY,
            )
        if level >= 3 and not known.has_cross:
            raise CompileError(
                "--stats",
                "-O3 needs a second pass",
                tensor=decision.name,
                expected="cross moments",
                got="statistics of the original alone",
                remedy="compile with -O2, then nf4 calibrate MODEL_DIR --with THAT.nf4",
            )
        if level == 2 and known.has_cross:
            raise CompileError(
                "--stats",
                "-O2 rounds by the original's own statistics",
                tensor=decision.name,
                expected="those of a first pass",
                got="those of a second",
                remedy="give the first ones, or -O3",
            )


class Encoders:
    """The encoder of each tensor, at the level that was asked for.

    Attributes:
        output_errors: name -> error at the output, of tensors that are done and whose moments are known.
    """

    def __init__(self, plan: Plan, options: CompileOptions, stats: Stats, data_free: Encoder) -> None:
        """`data_free`: what encodes tensors for which the weights alone are needed.

        Raises:
        CompileError: the statistics do not serve, see `check_stats`; or are missing, or of no use.
        """
        self._level, self._stats, self._rank = options.level, stats, options.adapter_rank
        self._data_free = data_free
        if options.level <= DATA_FREE and options.stats:
            raise CompileError(
                "--stats", f"-O{options.level} uses no statistics", remedy="give -O2 or -O3 with them"
            )
        if options.level > DATA_FREE:
            if not options.stats:
                raise CompileError(
                    f"-O{options.level}",
                    "needs statistics",
                    remedy="nf4 calibrate MODEL_DIR --data TEXT --full --out stats.safetensors, then "
                    "--stats stats.safetensors",
                )
            check_stats(stats, plan, options.level)
        if options.adapter:
            self._check_adapter(plan, options.adapter, options.resume)
        self._turn = threading.Lock()
        self._made: dict[str, CalibratedEncoder] = {}

    def _check_adapter(self, plan: Plan, path: str, resume: bool) -> None:
        if resume:
            raise CompileError("--adapter", "cannot be taken up again", remedy="leave out --resume")
        if not Path(path).absolute().parent.is_dir():
            raise CompileError(path, "its directory does not exist", remedy="make it first")
        for decision in plan.decisions:
            if not decision.quantize or decision.role is not Role.LINEAR:
                continue
            known = self._stats.weights.get(decision.name)
            if known is None or not known.has_moment:
                raise CompileError(
                    "--adapter",
                    "needs -O2 and whole moments",
                    tensor=decision.name,
                    remedy="nf4 calibrate --full, then -O2 --stats",
                )
            if self._rank > min(decision.shape):
                raise CompileError(
                    "--rank",
                    "larger than a weight",
                    tensor=decision.name,
                    expected=f"at most {min(decision.shape)}",
                    got=self._rank,
                )

    def of(self, decision: Decision) -> Encoder:
        """The encoder of one tensor; without statistics of it that of the highest level that needs none."""
        known = self._stats.weights.get(decision.name)
        if self._level <= DATA_FREE or known is None:
            return self._data_free
        rank = self._rank if decision.role is Role.LINEAR else 0
        encoder = CalibratedEncoder(decision, known, self._level, rank, self._turn)
        self._made[decision.name] = encoder
        return encoder

    def output_error(self, name: str) -> OutputError | None:
        """Of one tensor, as `output_errors`."""
        made = self._made.get(name)
        return None if made is None else made.output_error

    @property
    def output_errors(self) -> dict[str, OutputError]:
        return {name: made.output_error for name, made in self._made.items() if made.output_error}

    @property
    def corrections(self) -> dict[str, LowRank]:
        """Of each weight that has one, in order of names."""
        return {name: made.correction for name, made in sorted(self._made.items()) if made.correction}


class CalibratedEncoder:
    """Encodes one weight; holds it whole, its moment and a few matrices of their sizes.

    Attributes:
        output_error: known once it has run, and only with moments; of the file and its adapter, if any.
        correction: the weight's part of the adapter.
    """

    def __init__(
        self, decision: Decision, stats: WeightStats, level: int, rank: int, turn: threading.Lock
    ) -> None:
        """Args:
        rank: of the correction; 0 = none.
        turn: one for all encoders of a compilation, so that one tensor is worked on at a time.
        """
        self._decision, self._stats, self._level, self._rank = decision, stats, level, rank
        self._turn = turn
        self.output_error: OutputError | None = None
        self.correction: LowRank | None = None

    def __call__(
        self,
        source: TensorSource,
        write_codes: WriteCodes,
        threads: Callable[[], int],
        scales: np.ndarray,
        *,
        levels: np.ndarray = NF4_LEVELS,
    ) -> Constants:
        """As `encode.Encoder`; `scales` stays unused."""
        with self._turn:
            weight = self._read(source)
            if self._stats.has_moment:
                rounded = self._feedback(weight, levels, threads())
            else:
                rounded = self._weighted(weight, levels, threads())
            codes = np.ascontiguousarray(rounded.codes.T).reshape(-1)
        if codes.size % 2:
            codes = np.append(codes, np.searchsorted(thresholds_of(levels), np.float32(0)).astype(np.uint8))
        write_codes(0, (codes[0::2] << 4) | codes[1::2])
        return Constants(rounded.absmax, rounded.nested_absmax, 0.0)

    def _read(self, source: TensorSource) -> np.ndarray:
        flat = np.empty(source.num_values, np.float32)
        for start, values in source.chunks():
            flat[start : start + values.size] = to_float32(values, source.dtype)
        if not np.isfinite(flat).all():
            raise NonFinite(int(np.flatnonzero(~np.isfinite(flat))[0]))
        found = source.sha256()  # type: ignore[attr-defined]
        if found != self._stats.sha256:
            raise CompileError(
                "--stats",
                "statistics of another model",
                tensor=self._decision.name,
                expected=f"SHA-256 {found}",
                got=self._stats.sha256,
                remedy="collect them from this checkpoint",
            )
        return flat.reshape(self._decision.shape)

    def _feedback(self, weight: np.ndarray, levels: np.ndarray, threads: int) -> Rounded:
        moment = self._stats.moment()
        wanted = weight
        if self._level >= 3:
            wanted = np.ascontiguousarray(target_weight(weight, moment, self._stats.cross()))
        rounded = round_weight(wanted, moment, levels, threads=threads)
        if self._rank:
            corrections = Corrections(moment, self._rank)
            for turn in range(ROUNDS):
                if turn:
                    rest = wanted - self.correction.product()  # type: ignore[union-attr]
                    rounded = round_weight(rest, moment, levels, threads=threads)
                self.correction = corrections.of(wanted - decoded(rounded, weight.shape, levels))
        self.output_error = self._measure(weight, rounded, levels, moment)
        return rounded

    def _measure(
        self, weight: np.ndarray, rounded: Rounded, levels: np.ndarray, moment: np.ndarray
    ) -> OutputError:
        plain = dequantize(quantize(weight, "float32")).reshape(weight.shape)
        total = output_error(weight, moment) or 1.0
        ours = decoded(rounded, weight.shape, levels)
        if self.correction:
            ours += self.correction.product()
        after = output_error(ours - weight, moment)
        return OutputError(output_error(plain - weight, moment) / total, after / total)

    def _weighted(self, weight: np.ndarray, levels: np.ndarray, threads: int) -> Rounded:
        absmax, nested = scale_search(
            weight.reshape(-1), self._stats.diagonal(), levels=levels, threads=threads
        )
        spread = _spread(absmax, nested, weight.shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.where(spread == 0, np.float32(0), weight / spread)
        codes = np.searchsorted(thresholds_of(levels), scaled).astype(np.uint8)
        return Rounded(codes.T, absmax, nested)


def decoded(rounded: Rounded, shape: tuple[int, ...], levels: np.ndarray) -> np.ndarray:
    """What a rounded weight decodes to, float32."""
    return levels[rounded.codes.T] * _spread(rounded.absmax, rounded.nested_absmax, shape)


def _spread(absmax: np.ndarray, nested_absmax: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    scales = NESTED_MAP[absmax] * np.repeat(nested_absmax, NESTED_BLOCK)[: absmax.size]
    size = int(np.prod(shape))
    return np.repeat(scales, BLOCK)[:size].reshape(shape)
