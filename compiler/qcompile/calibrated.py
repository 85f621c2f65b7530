"""Levels 2 and 3 as encoders: one tensor at a time, with what statistics know of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from nf4format.codebook import NF4_LEVELS
from nf4format.encode import ENCODERS, Constants, Encoder, TensorSource, WriteCodes
from nf4format.stats import Stats, WeightStats

from .absorb import LowRank
from .errors import CompileError
from .options import CompileOptions
from .plan import Plan
from .policy import Decision
from .roles import Role
from .rounder import REMEDY, Rounder, Task
from .summary import OutputError

DATA_FREE = max(ENCODERS)
"""The highest level that needs the weights alone."""

LEVELS = (*ENCODERS, 2, 3)


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
                remedy=f"{REMEDY} {decision.name}",
            )
        if known.features != decision.shape[1]:
            raise CompileError(
                "--stats",
                "statistics of another model",
                tensor=decision.name,
                expected=f"{decision.shape[1]} features",
                got=known.features,
                remedy=REMEDY,
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

    def __init__(
        self, plan: Plan, options: CompileOptions, stats: Stats, data_free: Encoder, rounder: Rounder
    ) -> None:
        """Args:
        data_free: what encodes tensors for which the weights alone are needed.
        rounder: what rounds the others.

        Raises:
        CompileError: the statistics do not serve, see `check_stats`; or are missing, or of no use.
        """
        self._level, self._stats, self._rank = options.level, stats, options.adapter_rank
        self._data_free, self._rounder = data_free, rounder
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
        encoder = CalibratedEncoder(decision, known, self._level, rank, self._rounder)
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
    """Encodes one weight.

    Attributes:
        output_error: known once it has run, and only with moments; of the file and its adapter, if any.
        correction: the weight's part of the adapter.
    """

    def __init__(
        self, decision: Decision, stats: WeightStats, level: int, rank: int, rounder: Rounder
    ) -> None:
        """`rank`: of the correction; 0 = none."""
        self._decision, self._stats, self._level, self._rank = decision, stats, level, rank
        self._rounder = rounder
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
        task = Task(self._decision.name, self._decision.shape, self._stats, self._level, self._rank, levels)
        outcome = self._rounder.round(task, source, threads)
        self.output_error, self.correction = outcome.output_error, outcome.correction
        write_codes(0, outcome.codes)
        return Constants(outcome.absmax, outcome.nested_absmax, 0.0)
