"""Fine-tuning a LoRA adapter on a packed model: the whole run, read top to bottom in `train`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

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
from .checkpoint import RunState
from .determinism import deterministic
from .loss_scale import LossScale
from .options import TrainOptions, check_options
from .progress import TrainSummary
from .resume import data_fingerprint, find_checkpoint, lasting_options, machine_facts
from .run import Run
from .runlog import RunLog
from .signals import StopRequest
from .step import RATE_FACTOR


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
        TrainError: options or data that cannot be used, an output that exists, a checkpoint of another run,
            a loss or gradient that is not finite. An adapter saved before stays as it was.
        FormatError: the checkpoint named is damaged.
        WriteError: the adapter or a checkpoint cannot be written.
    """
    check_options(options)
    checkpoint = find_checkpoint(options, say)
    sources, evaluation = load_data(tokenizer, options, progress=progress)
    plan = Batches(sources, options.batch_options, options.seed, steps=options.steps, epochs=options.epochs)
    _check_fit(model, options, plan.dataset, evaluation)
    for line in run_table(plan, evaluation).splitlines():
        say(line)

    torch.manual_seed(options.seed)  # dropout
    add_lora(model, options.lora, options.seed)
    _set_up(model, options)
    optimizer = make_optimizer(model, options)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"training {trained:,} parameters for {plan.steps} steps")
    summary = TrainSummary(options.out, options.log_path)
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
                options=lasting_options(options, model),
                base=None if model.source is None else model.source.fingerprint,
                data=data_fingerprint(sources, evaluation),
                machine=machine_facts(model.device),
            )
            run = Run(
                model, optimizer, options, plan, evaluation, state, summary, log, timing, stop, bar, say
            )
            if checkpoint is None:
                run.begin()
            else:
                run.go_on_from(checkpoint)
            run.go()
    finally:
        optimizer.close()
        _set_up(model.eval(), None)
    return summary


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
        budget_bytes=options.page_budget,
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


def _set_up(model: CausalLM, options: TrainOptions | None) -> None:
    """How layers go through training; None: as they were before it."""
    model.offload_checkpoints = options is not None and options.offload_checkpoints
    model.gradient_checkpointing = options is not None and (
        options.checkpointing or options.offload_checkpoints
    )
    model.capture_graphs = options is not None
