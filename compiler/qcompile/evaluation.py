"""`--eval-text`: KL divergence and perplexity against the checkpoint; a level that does not help is refused.

The runtime measures, in a process of its own (`nf4 eval --against`): nothing of it is imported here, and what
is to be measured is a file. The level below is measured first, so that a text or a model that cannot be
evaluated shows before the hours of encoding.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nf4format.atomic import write_error
from nf4format.container import Nf4File
from nf4format.files import open_regular
from nf4format.layout import OTHER_LEVELS

from .errors import EvaluationError
from .eval_process import COLUMNS, Watch, evaluate
from .options import CompileOptions


@dataclass(frozen=True)
class Figures:
    """How far a file's predictions are from the checkpoint's.

    Attributes:
        kl: mean KL(checkpoint || file), nats a token.
        kl_error: its standard error, windows taken as independent; None of a single window.
        perplexity: of the file.
        same_choice: share of the tokens at which both find the same next token the likeliest.
    """

    kl: float
    kl_error: float | None
    perplexity: float
    same_choice: float


@dataclass(frozen=True)
class Evaluation:
    """What the texts say of a file, and of the level below it.

    Attributes:
        texts: their paths.
        windows, tokens: how many were predicted.
        original_perplexity: the checkpoint's.
        file: figures of the file, with its adapter if it has one.
        below: those of the level below; None of the lowest.
        below_name: "-O1", or the path of a file that was given.
        difference: KL of the file less that of the level below; None of the lowest.
        difference_error: its standard error, paired by windows; None of a single window.
        forced: worse than the level below, and wanted nevertheless.
        seconds: all of this took, the level below included.
    """

    texts: tuple[str, ...]
    windows: int
    tokens: int
    original_perplexity: float
    file: Figures
    below: Figures | None = None
    below_name: str = ""
    difference: float | None = None
    difference_error: float | None = None
    forced: bool = False
    seconds: float = 0.0


class Judge:
    """Measures a file and the level below it on the same windows of text."""

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        options: CompileOptions,
        tell: Callable[[str], None],
        watch: Watch | None,
    ) -> None:
        """Raises FormatError for a text that cannot be opened."""
        self._model_dir, self._options = Path(model_dir), options
        self._tell, self._watch = tell, watch
        self._below: _Measured | None = None
        self.seconds = 0.0
        for text in options.eval_texts:
            os.close(open_regular(text))

    def measure_below(
        self, out: Path, packed_names: Sequence[str], compile_below: Callable[[Path, CompileOptions], object]
    ) -> None:
        """Measure the level below: the file that was given, or one compiled beside the output and removed.

        Args:
            packed_names: weights that the output will pack; a file that was given must pack the same.

        Raises:
            EvaluationError: the file that was given is not comparable; or it cannot be evaluated.
            FormatError: it is damaged.
        """
        started = time.perf_counter()
        given = self._options.against_file
        if given is not None:
            self._check_given(Path(given), packed_names)
            self._below = self._measure(Path(given), given)
        elif self._options.level:
            name = f"-O{_level_below(self._options.level)}"
            with _folder_beside(out) as folder:
                path = folder / "below.nf4"
                self._tell(f"compiling {name} to compare with")
                compile_below(path, _options_below(self._options))
                self._below = self._measure(path, name)
        self.seconds += time.perf_counter() - started

    def judge(self, out: Path, unpublished: Path, write_adapter: Callable[[Path], None] | None) -> Evaluation:
        """Measure the file and compare it with the level below.

        Args:
            out: its name to be.
            unpublished: where it lies meanwhile, whole.
            write_adapter: writes its adapter into a directory; None without one.

        Raises:
            EvaluationError: its KL is worse than that of the level below, and it is not forced.
        """
        started = time.perf_counter()
        if self._options.against_file is not None:
            _check_same_source(Path(self._options.against_file), unpublished)
        with ExitStack() as stack:
            adapter = None
            if write_adapter is not None:
                adapter = stack.enter_context(_folder_beside(out)) / "adapter"
                write_adapter(adapter)
            measured = self._measure(unpublished, f"-O{self._options.level}", adapter)
        self.seconds += time.perf_counter() - started
        evaluation = Evaluation(
            texts=self._options.eval_texts,
            windows=len(measured.kl),
            tokens=measured.tokens,
            original_perplexity=_exp(float(measured.original_nll.mean())),
            file=measured.figures(),
            seconds=self.seconds,
        )
        if self._below is None:
            return evaluation
        differences = measured.kl - self._below.kl
        difference = float(differences.mean())
        evaluation = replace(
            evaluation,
            below=self._below.figures(),
            below_name=self._below.name,
            difference=difference,
            difference_error=_standard_error(differences),
            forced=difference > 0 and self._options.force_level,
        )
        if difference > 0 and not self._options.force_level:
            _refuse(out, evaluation)
        return evaluation

    def _check_given(self, path: Path, packed_names: Sequence[str]) -> None:
        with Nf4File.open(path) as file:
            if set(file.packed_names) != set(packed_names):
                raise EvaluationError(
                    path,
                    "packs other weights than this compilation",
                    expected=f"{len(packed_names)} packed weights",
                    got=f"{len(file.packed_names)}, or others",
                    remedy="give a file compiled with the same --include, --exclude and --quantize options",
                )
            levels = file.metadata.get(OTHER_LEVELS, "nf4")
            if levels != self._options.levels_name:
                raise EvaluationError(
                    path,
                    "has other levels than this compilation",
                    expected=self._options.levels_name,
                    got=levels,
                    remedy="give a file compiled with the same --levels",
                )

    def _measure(self, file: Path, name: str, adapter: Path | None = None) -> _Measured:
        self._tell(f"evaluating {name} on at most {self._options.eval_windows} windows of each text")
        parts = []
        for text in self._options.eval_texts:
            facts = self._columns(file, text, adapter)
            columns = [np.array(facts[key], np.float64) for key in COLUMNS]
            parts.append((columns, facts["tokens"], facts["same_choice"]))
        kl, nll, original_nll = (np.concatenate([part[0][i] for part in parts]) for i in range(3))
        tokens = sum(part[1] for part in parts)
        same = sum(part[1] * part[2] for part in parts) / tokens
        measured = _Measured(name, kl, nll, original_nll, tokens, same)
        before = original_nll if self._below is None else self._below.original_nll
        if before.shape != original_nll.shape or not np.allclose(before, original_nll, rtol=1e-3):
            raise EvaluationError(
                file, "the checkpoint or the texts have changed meanwhile", remedy="run it again"
            )
        return measured

    def _columns(self, file: Path, text: str, adapter: Path | None) -> dict[str, Any]:
        arguments = ["--dtype", "float32", "--windows", str(self._options.eval_windows)]
        arguments += ["--device", self._options.device]
        if adapter is not None:
            arguments += ["--adapter", str(adapter)]
        if self._options.jobs:
            arguments += ["--threads", str(self._options.jobs)]
        return evaluate(file, text, self._model_dir, arguments, self._watch)


@dataclass(frozen=True)
class _Measured:
    """Values of each window, float64 [windows]."""

    name: str
    kl: np.ndarray
    nll: np.ndarray
    original_nll: np.ndarray
    tokens: int
    same_choice: float

    def figures(self) -> Figures:
        return Figures(
            float(self.kl.mean()),
            _standard_error(self.kl),
            _exp(float(self.nll.mean())),
            self.same_choice,
        )


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A directory for the time of the block, on the disk that has room for outputs."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{out.name[:40]}.", dir=out.absolute().parent)
    except OSError as error:
        raise write_error(out, error) from error
    with folder as path:
        yield Path(path)


def _check_same_source(given: Path, written: Path) -> None:
    """Only now the SHA-256 of the checkpoint's weights is known."""
    with Nf4File.open(given) as one, Nf4File.open(written) as other:
        if one.source_fingerprint != other.source_fingerprint:
            raise EvaluationError(
                given,
                "was compiled from another checkpoint",
                expected=f"SHA-256 {other.source_fingerprint}",
                got=one.source_fingerprint,
                remedy="give a file of this one",
            )


def _level_below(level: int) -> int:
    """-O2 cannot use the statistics of a second pass: below -O3 is then -O1, unless a file is given."""
    return min(level - 1, 1)


def _options_below(options: CompileOptions) -> CompileOptions:
    return replace(
        options,
        level=_level_below(options.level),
        stats=(),
        adapter=None,
        held_out=(),
        eval_texts=(),
        against_file=None,
        force=False,
        verify=False,
        resume=False,
    )


def _refuse(out: Path, evaluation: Evaluation) -> None:
    found, below = evaluation.file, evaluation.below
    assert below is not None
    assert evaluation.difference is not None
    noise = evaluation.difference_error
    is_noise = noise is None or evaluation.difference < 2 * noise
    raise EvaluationError(
        out,
        f"its KL is worse than that of {evaluation.below_name}; nothing was written",
        expected=f"at most {below.kl:.5f} nats a token (perplexity {below.perplexity:.4f})",
        got=f"{found.kl:.5f} (perplexity {found.perplexity:.4f}), worse by {evaluation.difference:.5f}"
        + ("" if noise is None else f" +- {noise:.5f}"),
        remedy=("it may be noise: give more --eval-windows; or " if is_noise else "")
        + f"take {evaluation.below_name}, collect statistics of more text or of text more like this, or give "
        "--force-level",
    )


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else None


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
