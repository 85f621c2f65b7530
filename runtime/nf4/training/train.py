"""Fine-tuning a LoRA adapter on a packed model: the whole run, read top to bottom in `train`."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..adapters import save_adapter
from ..data.batches import Batch, example_order, make_batch
from ..data.dataset import Dataset, Source
from ..data.options import DataOptions
from ..data.reading import TextEncoder, load_dataset
from ..data.split import split
from ..errors import TrainError
from ..lora import LoraConfig, add_lora
from ..model.decoder import CausalLM
from ..paging.optim import PagedAdamW
from .determinism import deterministic
from .loss import labelled_positions, loss_sum
from .loss_scale import LossScale
from .progress import StepNumbers, StepReports, TrainSummary
from .runlog import RunLog, StopRequest
from .schedule import SCHEDULES, rate_factor
from .step import not_finite, relieved, train_step


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides a run. The same options, data and base give the same adapter, bit for bit,
    on the same machine with the same number of threads (on a GPU: see `nf4.training.determinism`).

    Attributes:
        data: text or JSONL files (see nf4.data.reading).
        out: directory of the adapter; written at the end, and every `save_every` steps.
        steps, epochs: length of the run; `steps` counts optimizer steps and wins where both are given.
        batch, accumulate: sequences of a micro-batch, and micro-batches of a step.
        seq_len: the most tokens in a sequence.
        lr, schedule, warmup: peak rate, what follows, steps until it is reached.
        clip: the most the gradient's norm may be; 0 leaves it alone.
        eval_data, eval_fraction: text or JSONL to evaluate on, or a share of `data` kept apart for it.
        eval_every: steps between evaluations; 0 evaluates at the start and the end only.
        checkpointing: keep each layer's input only and compute the rest again. offload_checkpoints: the same,
            with the inputs in pinned host memory where training is on a GPU.
        page_budget: bytes of optimizer state kept in memory, or on the GPU; None keeps all. page_file:
            where the rest goes on a CPU; None takes a temporary file. On a GPU it goes to host memory.
        log: JSONL file; None takes `out` with .jsonl behind its name.
        force: replace an adapter and a log that are there already.
    """

    data: tuple[Path, ...]
    out: Path
    lora: LoraConfig = field(default_factory=LoraConfig)
    lr: float = 2e-4
    schedule: str = "cosine"
    warmup: int = 10
    steps: int | None = None
    epochs: float = 1.0
    batch: int = 4
    accumulate: int = 4
    seq_len: int = 512
    clip: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0
    checkpointing: bool = False
    offload_checkpoints: bool = False
    eval_data: tuple[Path, ...] = ()
    eval_fraction: float = 0.0
    eval_every: int = 0
    save_every: int = 0
    page_budget: int | None = None
    page_file: Path | None = None
    log: Path | None = None
    force: bool = False

    @property
    def log_path(self) -> Path:
        return self.log or self.out.with_name(f"{self.out.name}.jsonl")


def train(
    model: CausalLM,
    tokenizer: TextEncoder,
    options: TrainOptions,
    *,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> TrainSummary:
    """Add LoRA layers to the model, train them, and save the adapter.

    Args:
        model: from `nf4.load`, without an adapter. It keeps the trained adapter.
        tokenizer: the model's.
        options: the run.
        progress: show a bar on stderr.
        say: takes lines about data, evaluations and saves.

    Raises:
        TrainError: options or data that cannot be used, an output that exists, a loss or gradient that
            is not finite. An adapter saved before stays as it was.
        WriteError: the adapter cannot be written.
    """
    check_options(options)
    training, evaluation = load_data(tokenizer, options, say)
    _check_fit(model, options, training, evaluation)
    plan = StepPlan(training, options)

    torch.manual_seed(options.seed)  # dropout
    add_lora(model, options.lora, options.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    _set_up(model, options)
    optimizer = PagedAdamW(
        parameters,
        lr=options.lr,
        betas=options.betas,
        weight_decay=options.weight_decay,
        budget_bytes=options.page_budget,
        backing=options.page_file,
        loss_scale=LossScale() if model.dtype == torch.float16 else None,
    )
    say(f"training {sum(p.numel() for p in parameters):,} parameters for {plan.steps} steps")
    summary = TrainSummary(options.out, options.log_path)

    def evaluate_now(step: int) -> None:
        if evaluation is not None and step not in summary.evaluations:
            loss = relieved(optimizer, partial(evaluate, model, evaluation, options.batch), "evaluation")
            if not math.isfinite(loss):
                raise not_finite("evaluation loss", step, loss)
            summary.evaluations[step] = loss
            log.write(step=step, eval_loss=loss, eval_perplexity=perplexity_of(loss))
            say(f"step {step}: evaluation loss {loss:.4f}, perplexity {perplexity_of(loss):.2f}")

    try:
        with (
            deterministic(model.device),
            RunLog(summary.log) as log,
            StopRequest() as stop,
            tqdm(total=plan.steps, unit="step", disable=not progress) as bar,
        ):
            evaluate_now(0)
            model.train()
            reports = StepReports(summary, log, bar, optimizer, say)
            for step, micro_batches in enumerate(plan, 1):
                rate = options.lr * rate_factor(
                    step - 1, steps=plan.steps, warmup=options.warmup, schedule=options.schedule
                )
                tokens = sum(batch.num_tokens for batch in micro_batches)
                numbers = StepNumbers(step, tokens, rate, optimizer)
                loss, norm = train_step(
                    model,
                    optimizer,
                    micro_batches,
                    rate=rate,
                    clip=options.clip,
                    step=step,
                    before_update=reports.catch_up,
                )
                numbers.send(loss, norm)
                reports.add(numbers)
                is_evaluated = options.eval_every and step % options.eval_every == 0
                is_saved = options.save_every and step % options.save_every == 0
                # A GPU's numbers are read when the next step is under way, unless something hangs on them.
                if model.device.type == "cpu" or stop.signal is not None or is_evaluated or is_saved:
                    reports.catch_up()
                if stop.signal is not None:
                    summary.stopped_by = stop.signal.name
                    break
                if is_evaluated:
                    evaluate_now(step)
                if is_saved:
                    save_adapter(model, options.out)
            reports.catch_up()
            save_adapter(model, options.out)
            if summary.stopped_by is None:
                evaluate_now(summary.steps)
    finally:
        optimizer.close()
        _set_up(model.eval(), None)
    return summary


def evaluate(model: CausalLM, dataset: Dataset, batch_size: int) -> float:
    """Mean negative log-likelihood, in nats, of the labelled tokens; dropout off, the model's mode kept."""
    was_training = model.training
    model.eval()
    total = 0.0
    order = dataset.lengths.argsort(kind="stable").tolist()  # little padding
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = make_batch([dataset[i] for i in order[start : start + batch_size]]).to(model.device)
            hidden = model.hidden_states(batch.input_ids, batch.attention_mask)
            total += loss_sum(model.head, *labelled_positions(hidden, batch.labels), model.config.vocab_size)
    model.train(was_training)
    return total / dataset.num_labels


def perplexity_of(loss: float) -> float:
    """exp of a mean negative log-likelihood; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


class StepPlan:
    """The micro-batches of each optimizer step, in the order that the seed gives."""

    def __init__(self, dataset: Dataset, options: TrainOptions) -> None:
        self._dataset, self._options = dataset, options
        per_step = options.batch * options.accumulate
        count = len(dataset)
        # An epoch ends with a smaller step; a number of steps is all full ones.
        self._sequences = (
            options.steps * per_step if options.steps is not None else max(1, round(options.epochs * count))
        )
        self.steps = math.ceil(self._sequences / per_step)

    def __iter__(self) -> Iterator[list[Batch]]:
        options, dataset = self._options, self._dataset
        order = itertools.islice(example_order(len(dataset), options.seed), self._sequences)
        while chosen := [dataset[i] for i in itertools.islice(order, options.batch * options.accumulate)]:
            yield [make_batch(chosen[at : at + options.batch]) for at in range(0, len(chosen), options.batch)]


def load_data(
    tokenizer: TextEncoder, options: TrainOptions, say: Callable[[str], None]
) -> tuple[Dataset, Dataset | None]:
    """Training data, and evaluation data if the options name any; says what was cut.

    Raises:
        TrainError: see nf4.data.reading; both kinds of evaluation data asked for.
    """
    training = load_dataset(options.data, tokenizer, DataOptions(seq_len=options.seq_len))
    evaluation = None
    if options.eval_data:
        evaluation = load_dataset(options.eval_data, tokenizer, DataOptions(seq_len=options.seq_len))
    elif options.eval_fraction:
        (kept,), evaluation = split([Source(training, 1.0)], options.eval_fraction, options.seed)
        training = kept.dataset
    for name, dataset in (("training", training), ("evaluation", evaluation)):
        if dataset is not None:
            say(f"{name} data: {len(dataset):,} sequences, {dataset.num_labels:,} tokens with loss")
            if (report := dataset.report).truncated:
                say(
                    f"{name} data: {report.truncated:,} rows cut at {options.seq_len} tokens,"
                    f" {report.dropped:,} of them left out because nothing of their completion remained"
                )
    return training, evaluation


def check_options(options: TrainOptions) -> None:
    """Refuse what would fail, or be lost, after hours: numbers out of range, outputs that exist.

    Raises:
        TrainError: with the option's name and value.
    """
    at_least: dict[str, tuple[Any, float]] = {
        "steps": (options.steps if options.steps is not None else 1, 1),
        "batch": (options.batch, 1),
        "accumulate": (options.accumulate, 1),
        "warmup": (options.warmup, 0),
        "clip": (options.clip, 0),
        "eval_every": (options.eval_every, 0),
        "save_every": (options.save_every, 0),
        "seed": (options.seed, 0),
    }
    for name, (value, least) in at_least.items():
        if not value >= least:
            raise TrainError("", f"bad {name}", expected=f"at least {least}", got=value)
    for name, positive in (("epochs", options.epochs), ("lr", options.lr)):
        if not 0 < positive < math.inf:
            raise TrainError("", f"bad {name}", expected="above 0", got=positive)
    if options.schedule not in SCHEDULES:
        raise TrainError("", "unknown schedule", expected=" or ".join(SCHEDULES), got=options.schedule)
    if options.eval_data and options.eval_fraction:
        raise TrainError("", "give evaluation data or a fraction for it, not both")
    if options.eval_every and not (options.eval_data or options.eval_fraction):
        raise TrainError(
            "", "evaluation asked for without data", remedy="give --eval-data or --eval-fraction"
        )
    for path in (options.out, options.log_path):
        parent = path.absolute().parent
        if not parent.is_dir():
            raise TrainError(path, f"there is no directory {parent}", remedy="create it first")
        if not os.access(parent, os.W_OK):
            raise TrainError(path, f"{parent} is not writable", remedy="choose another place")
        if os.path.lexists(path) and not options.force:
            raise TrainError(path, "exists already", remedy="choose another name or pass --force")


def _check_fit(model: CausalLM, options: TrainOptions, *datasets: Dataset | None) -> None:
    positions, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    if options.seq_len > positions:
        expected = f"at most the model's {positions} positions"
        raise TrainError("", "sequence length", expected=expected, got=options.seq_len)
    for dataset in datasets:
        largest = dataset.max_token_id if dataset else 0
        if largest >= vocab_size:
            expected = f"below the model's {vocab_size}"
            remedy = "the tokenizer is not the model's"
            raise TrainError("", "token id", expected=expected, got=largest, remedy=remedy)


def _set_up(model: CausalLM, options: TrainOptions | None) -> None:
    """How layers go through training; None: as they were before it."""
    model.offload_checkpoints = options is not None and options.offload_checkpoints
    model.gradient_checkpointing = options is not None and (
        options.checkpointing or options.offload_checkpoints
    )
    model.capture_graphs = options is not None
