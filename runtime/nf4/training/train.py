"""Fine-tuning a LoRA adapter on a packed model: the whole run, read top to bottom in `train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from tqdm import tqdm

from nf4format.adapter import CONFIG_NAME
from nf4format.atomic import write_bytes

from ..data.dataset import Dataset, Source
from ..data.encode import TextEncoder
from ..data.plan import Batches
from ..data.preview import run_table
from ..data.reading import load_dataset, load_sources
from ..data.split import split
from ..errors import TrainError
from ..lora import add_lora
from ..model.decoder import CausalLM
from ..paging.optim import PagedAdamW
from .card import CARD_NAME, model_card
from .checkpoint import RunState
from .determinism import deterministic
from .loss_scale import LossScale
from .options import SETTINGS_NAME, TrainOptions, check_options
from .plot import plot_run
from .progress import TrainSummary
from .resume import data_fingerprint, find_checkpoint, lasting_options, machine_facts
from .run import Run
from .runlog import RunLog
from .signals import StopRequest
from .sinks import Sinks, check_extras
from .step import RATE_FACTOR
from .weight_change import parameters_fingerprint


def train(
    model: CausalLM,
    tokenizer: TextEncoder,
    options: TrainOptions,
    *,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
    settings: str | None = None,
) -> TrainSummary:
    """Add LoRA layers to the model, train them, and save the adapter.

    Args:
        model: from `nf4.load`, without an adapter. It keeps the trained adapter.
        tokenizer: the model's.
        options: the run.
        progress: show a bar on stderr.
        say: takes lines about data, evaluations and saves.
        settings: the options as a configuration file, which goes beside the adapter and into its card.

    Raises:
        TrainError: options or data that cannot be used, an output that exists, a checkpoint of another run,
            a loss or gradient that is not finite. An adapter saved before stays as it was.
        FormatError: the checkpoint named is damaged.
        WriteError: the adapter or a checkpoint cannot be written.
    """
    check_options(options)
    check_extras(options)
    checkpoint = find_checkpoint(options, say)
    sources, evaluation = load_data(tokenizer, options, progress=progress)
    plan = plan_of(sources, options)
    _check_fit(model, options, plan.dataset, evaluation)
    for line in run_table(plan, evaluation).splitlines():
        say(line)

    torch.manual_seed(options.seed)  # dropout
    add_lora(model, options.lora, options.seed)
    _set_up(model, options)
    optimizer = make_optimizer(model, options)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"training {trained:,} parameters for {plan.steps} steps")
    summary = TrainSummary(options.out, options.log_path, options.best_path)
    lasting = lasting_options(options, model)
    sinks = Sinks(options, 0 if checkpoint is None else checkpoint.state.step + 1, lasting, say)
    try:
        with (
            deterministic(model.device),
            RunLog(options.log_path) as log,
            RunLog(options.timing_path) as timing,
            StopRequest() as stop,
            tqdm(total=plan.steps, unit="step", disable=not progress) as bar,
        ):
            state = RunState(
                step=0,
                tokens=0,
                seconds=0.0,
                evaluations={},
                log=log.position(),
                timing=timing.position(),
                options=lasting,
                base=None if model.source is None else model.source.fingerprint,
                data=data_fingerprint(sources, evaluation),
                start=parameters_fingerprint(model),
                machine=machine_facts(model.device),
            )
            run = Run(
                model=model,
                optimizer=optimizer,
                options=options,
                plan=plan,
                evaluation=evaluation,
                state=state,
                summary=summary,
                log=log,
                timing=timing,
                sinks=sinks,
                stop=stop,
                bar=bar,
                say=say,
            )
            if checkpoint is None:
                run.begin()
            else:
                run.go_on_from(checkpoint)
            run.go()
    finally:
        sinks.close()
        optimizer.close()
        _set_up(model.eval(), None)
    _leave_reports(model, options, plan, summary, settings=settings, say=say)
    return summary


def plan_of(sources: Sequence[Source], options: TrainOptions) -> Batches:
    """The micro-batches of every step of a run.

    Raises:
        TrainError: see nf4.data.plan.
    """
    return Batches(sources, options.batch_options, options.seed, steps=options.steps, epochs=options.epochs)


def make_optimizer(model: CausalLM, options: TrainOptions) -> PagedAdamW:
    """AdamW over what the model trains; every lora_B with a rate of its own where LoRA+ is asked for.

    Raises:
        TrainError: nothing trains, or settings that cannot be used.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise TrainError("", "nothing to train: no parameter of the model requires a gradient")
    groups: list[dict[str, Any]] = [{"params": [p for _, p in trained], RATE_FACTOR: 1.0}]
    if options.lora_plus_ratio != 1:
        is_fast = [name.rpartition(".")[2] == "lora_B" for name, _ in trained]
        groups = [
            {"params": [p for (_, p), fast in zip(trained, is_fast, strict=True) if fast == wanted]}
            | {RATE_FACTOR: options.lora_plus_ratio if wanted else 1.0}
            for wanted in (False, True)
        ]
    return PagedAdamW(
        groups,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        state_bits=options.state_bits,
        page_bytes=options.page_bytes,
        budget_bytes=options.page_budget,
        store=options.page_store,
        backing=options.page_file,
        loss_scale=LossScale() if model.dtype == torch.float16 else None,
    )


def load_data(
    tokenizer: TextEncoder, options: TrainOptions, *, progress: bool = False
) -> tuple[list[Source], Dataset | None]:
    """Training data, and evaluation data if the options name any.

    Raises:
        TrainError: see nf4.data.reading; both kinds of evaluation data asked for.
    """
    weights = options.weights or (1.0,) * len(options.data)
    paths = list(zip(options.data, weights, strict=True))
    sources = load_sources(paths, tokenizer, options.reading, progress=progress)
    evaluation = None
    if options.eval_data:
        evaluation = load_dataset(options.eval_data, tokenizer, options.reading, progress=progress)
    elif options.eval_fraction:
        sources, evaluation = split(sources, options.eval_fraction, options.seed)
    return sources, evaluation


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


def _leave_reports(
    model: CausalLM,
    options: TrainOptions,
    plan: Batches,
    summary: TrainSummary,
    *,
    settings: str | None,
    say: Callable[[str], None],
) -> None:
    """Card and settings beside the adapter and the best one; the picture of the logs."""
    card = model_card(model, options, plan, summary, settings)
    for folder in (options.out, options.best_path):
        if (folder / CONFIG_NAME).exists():
            write_bytes(folder / CARD_NAME, card.encode("utf-8", "backslashreplace"))
            if settings is not None:
                write_bytes(folder / SETTINGS_NAME, settings.encode("utf-8", "surrogateescape"))
    if summary.steps and (find_spec("matplotlib") if options.plot is None else options.plot):
        plot_run(options.log_path, options.timing_path, options.plot_path)
        say(f"plot {options.plot_path}")


def _set_up(model: CausalLM, options: TrainOptions | None) -> None:
    """How layers go through training; None: as they were before it."""
    passes = model.passes
    passes.offload_checkpoints = options is not None and options.offload_checkpoints
    passes.gradient_checkpointing = options is not None and (
        options.checkpointing or options.offload_checkpoints
    )
    passes.capture_graphs = options is not None
