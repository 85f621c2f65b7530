"""What decides a fine-tuning run, and the checks that can be made before a model is loaded."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from ..data.options import DataOptions
from ..data.plan import BatchOptions
from ..errors import TrainError
from ..lora import LoraConfig
from .schedule import SCHEDULES

SETTINGS_NAME: Final = "training_config.toml"  # the options of a run, beside its adapter
NEWEST: Final = "newest"  # of --resume: the newest checkpoint of this run


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides a run. The same options, data and base give the same adapter, bit for bit,
    on the same machine with the same number of threads (on a GPU: see `nf4.training.determinism`).

    Attributes:
        data, weights: files and directories (see nf4.data.files), and how often an epoch shows each one's
            examples; no weights: once.
        data_options: how they become examples; its seq_len is that of the run.
        out: directory of the adapter, written at the end, and when a signal stops the run.
        steps, epochs: length of the run; `steps` counts optimizer steps and wins where both are given.
        batch, accumulate: sequences of a micro-batch, and micro-batches of a step.
        seq_len, packing, group_by_length: as `nf4.data.plan.BatchOptions` has them.
        lr, schedule: peak rate, and what follows it. min_lr_ratio: the share of the peak rate at which linear
            and cosine end.
        warmup, warmup_ratio: steps until the peak rate, or their share of all steps.
        lora_plus_ratio: the rate of every lora_B is that of lora_A times this (LoRA+, arXiv 2402.12354).
        clip: the most the gradient's norm may be; 0 leaves it alone.
        betas, eps, weight_decay: of AdamW.
        eval_data, eval_fraction: files to evaluate on, or a share of `data` kept apart for it.
        eval_every: steps between evaluations; 0 evaluates at the start and the end only. The adapter with the
            lowest loss is kept as `out` with .best behind its name.
        patience, min_delta: stop after so many evaluations that are not better than the best before them by
            more than min_delta; 0 never stops.
        checkpointing: keep each layer's input only and compute the rest again. offload_checkpoints: the same,
            with the inputs in pinned host memory where training is on a GPU.
        state_bits, page_budget, page_bytes, page_store, page_file: state_bits, budget_bytes, page_bytes,
            store and backing of `nf4.paging.optim.PagedAdamW`.
        save_every: steps between checkpoints, from which a run can go on (see nf4.training.checkpoint); 0
            makes one only when a signal stops the run. keep: how many stay, the newest; 0 keeps all.
        resume: a checkpoint to go on from, or NEWEST; None begins at step 1.
        log: JSONL file; None takes `out` with .jsonl behind its name.
        plot: draw the logs as `out` with .png behind its name; None does where matplotlib is installed.
        tensorboard, wandb: directory of TensorBoard, project of Weights & Biases, for the numbers of the log.
        force: replace what an earlier run left.
    """

    data: tuple[Path, ...]
    out: Path
    weights: tuple[float, ...] = ()
    data_options: DataOptions = field(default_factory=DataOptions)
    lora: LoraConfig = field(default_factory=LoraConfig)
    lr: float = 2e-4
    schedule: str = "cosine"
    min_lr_ratio: float = 0.0
    warmup: int = 10
    warmup_ratio: float | None = None
    lora_plus_ratio: float = 1.0
    steps: int | None = None
    epochs: float = 1.0
    batch: int = 4
    accumulate: int = 4
    seq_len: int = 512
    packing: str = "none"
    group_by_length: bool = False
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    seed: int = 0
    checkpointing: bool = False
    offload_checkpoints: bool = False
    eval_data: tuple[Path, ...] = ()
    eval_fraction: float = 0.0
    eval_every: int = 0
    patience: int = 0
    min_delta: float = 0.0
    save_every: int = 0
    keep: int = 3
    resume: str | Path | None = None
    state_bits: int = 32
    page_budget: int | None = None
    page_bytes: int | None = None
    page_store: Literal["file", "memory"] | None = None
    page_file: Path | None = None
    log: Path | None = None
    plot: bool | None = False
    tensorboard: Path | None = None
    wandb: str | None = None
    force: bool = False

    @property
    def log_path(self) -> Path:
        """What the run computes: the same bytes for the same run."""
        return self.log or self._beside("jsonl")

    @property
    def timing_path(self) -> Path:
        """How long it took, and in how much memory."""
        return self.log_path.with_name(f"{self.log_path.name.removesuffix('.jsonl')}.timing.jsonl")

    @property
    def checkpoints_path(self) -> Path:
        """The directory of the checkpoints."""
        return self._beside("checkpoints")

    @property
    def best_path(self) -> Path:
        """The adapter of the best evaluation."""
        return self._beside("best")

    @property
    def reading(self) -> DataOptions:
        """How files become examples."""
        return replace(self.data_options, seq_len=self.seq_len)

    @property
    def batch_options(self) -> BatchOptions:
        """How examples come together."""
        return BatchOptions(self.batch, self.accumulate, self.seq_len, self.packing, self.group_by_length)

    @property
    def plot_path(self) -> Path:
        """The picture of the logs."""
        return self._beside("png")

    def warmup_steps(self, steps: int) -> int:
        """Steps until the peak rate in a run of so many."""
        return self.warmup if self.warmup_ratio is None else math.ceil(self.warmup_ratio * steps)

    def _beside(self, suffix: str) -> Path:
        return self.out.with_name(f"{self.out.name}.{suffix}")


def check_options(options: TrainOptions) -> None:
    """Refuse what would fail, or be lost, after hours: numbers out of range, outputs that exist.

    Raises:
        TrainError: with the option's name and value.
    """
    _check_numbers(options)
    options.data_options.check()
    if len(options.weights) not in (0, len(options.data)):
        expected = f"one for each of {len(options.data)} parts of the data"
        raise TrainError("", "weights", expected=expected, got=len(options.weights))
    if options.schedule not in SCHEDULES:
        raise TrainError("", "unknown schedule", expected=" or ".join(SCHEDULES), got=options.schedule)
    if options.eval_data and options.eval_fraction:
        raise TrainError("", "give evaluation data or a fraction for it, not both")
    remedy = "give --eval-data or --eval-fraction"
    if options.eval_every and not (options.eval_data or options.eval_fraction):
        raise TrainError("", "evaluation asked for without data", remedy=remedy)
    if options.patience and not options.eval_every:
        raise TrainError("", "early stopping needs evaluations", remedy="give --eval-every")
    for path in (*options.data, *options.eval_data):
        if not path.exists():
            raise TrainError(path, "no such file or directory", remedy="check the path")
    _check_outputs(options)


def _check_outputs(options: TrainOptions) -> None:
    for path in (options.out, options.log_path):
        parent = path.absolute().parent
        if not parent.is_dir():
            raise TrainError(path, f"there is no directory {parent}", remedy="create it first")
        if not os.access(parent, os.W_OK):
            raise TrainError(path, f"{parent} is not writable", remedy="choose another place")
    if options.resume is None and not options.force:
        outputs = (options.out, options.log_path, options.timing_path, options.best_path)
        for path in (*outputs, options.checkpoints_path):
            if os.path.lexists(path):
                remedy = "choose another name or pass --force"
                if path == options.checkpoints_path:
                    remedy = f"go on with --resume, {remedy}"
                raise TrainError(path, "exists already", remedy=remedy)


def _check_numbers(options: TrainOptions) -> None:
    at_least: dict[str, tuple[Any, float]] = {
        "steps": (options.steps if options.steps is not None else 1, 1),
        "batch": (options.batch, 1),
        "accumulate": (options.accumulate, 1),
        "warmup": (options.warmup, 0),
        "clip": (options.clip, 0),
        "eps": (options.eps, 0),
        "weight_decay": (options.weight_decay, 0),
        "eval_every": (options.eval_every, 0),
        "patience": (options.patience, 0),
        "min_delta": (options.min_delta, 0),
        "save_every": (options.save_every, 0),
        "keep": (options.keep, 0),
        "seed": (options.seed, 0),
    }
    for name, (value, least) in at_least.items():
        if not least <= value < math.inf:
            raise TrainError("", f"bad {name}", expected=f"at least {least}", got=value)
    above = {"epochs": options.epochs, "lr": options.lr, "lora_plus_ratio": options.lora_plus_ratio}
    for name, positive in above.items():
        if not 0 < positive < math.inf:
            raise TrainError("", f"bad {name}", expected="above 0", got=positive)
    for name, share in (("min_lr_ratio", options.min_lr_ratio), ("warmup_ratio", options.warmup_ratio or 0)):
        if not 0 <= share <= 1:
            raise TrainError("", f"bad {name}", expected="from 0 to 1", got=share)
    if not all(0 <= beta < 1 for beta in options.betas):
        raise TrainError("", "bad betas", expected="two numbers in [0, 1)", got=options.betas)
