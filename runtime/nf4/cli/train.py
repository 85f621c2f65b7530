"""`nf4 train`: what was asked for, and the closing summary; the run itself is nf4.training.train."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .train_options import SECTIONS, given_options, parameters, train_options

if TYPE_CHECKING:
    from ..training.options import TrainOptions
    from ..training.progress import TrainSummary

_HELP = """Fine-tune a LoRA adapter on a packed model.

FILE comes from qcompile. The data are files or directories of text, or of rows: prompts and completions,
instructions, questions, or conversations, of which only completions and the assistant's turns are learned.
The base stays as it is: what is trained and saved is a small adapter, in PEFT's format. Ctrl-C or SIGTERM
finishes the step, saves a checkpoint, and stops; --resume goes on from it, and ends with the same bytes as a
run that was never stopped.
"""

_EXAMPLES = """\b
Examples:
  nf4 train model.nf4 --data book.txt --out my-adapter
  nf4 train model.nf4 --data chats.jsonl --show-example 2 --out my-adapter
  nf4 train model.nf4 --data rows.jsonl --out my-adapter --epochs 3 --packing best-fit \\
      --eval-fraction 0.05 --eval-every 50 --patience 3 --save-every 100
  nf4 train model.nf4 --data rows.jsonl --out my-adapter --save-every 100 --resume
  nf4 train model.nf4 --data a.jsonl --data b.jsonl=0.5 --out my-adapter --steps 200 \\
      --rank 32 --target q_proj --target v_proj --lr 1e-4 --page-budget 64M
  nf4 train --config my-adapter/training_config.toml --lr 1e-4 --out another
  nf4 generate model.nf4 --adapter my-adapter --prompt "Once upon a time"
"""


class _TrainCommand(click.Command):
    """The options in the sections of their table."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        defaults = _defaults()
        records = {param.name: param.get_help_record(ctx) for param in self.get_params(ctx)}
        for section, options in SECTIONS.items():
            rows = []
            for option in options:
                record = records[option.key]
                assert record is not None
                default = defaults.get(option.key)
                told = (
                    "[default: " in option.help or default is None or default is False or default in ((), [])
                )
                text = record[1] if told else f"{record[1]}  [default: {_shown(default)}]"
                rows.append((record[0], text + (" Repeatable." if option.repeats else "")))
            with formatter.section(section):
                formatter.write_dl(rows)
        with formatter.section("Help"):
            formatter.write_dl([("-h, --help", "Show this message and exit.")])


def _defaults() -> dict[str, Any]:
    """Of every option, by key."""
    defaults = given_options(train_options({"data": (), "out": Path()}))
    return {key: value for key, value in defaults.items() if key != "out"}  # which has none


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _command(**given: Any) -> None:
    import torch
    from tqdm import tqdm

    from ..device import resolve
    from ..loading import load
    from ..text.tokenizer import Tokenizer
    from ..training.options import check_options
    from ..training.train import train
    from .train_config import MODEL_KEY, read_config, write_config

    values = read_config(given["config"]) if given["config"] else {}
    values |= {key: value for key, value in given.items() if value is not None and value != ()}
    file: Path | None = values.get("file") or values.get(MODEL_KEY)
    for name, value in (("FILE", file), ("--data", values.get("data")), ("--out", values.get("out"))):
        if not value:
            raise click.UsageError(f"Missing {name}: give it here or in a --config file.")
    assert file is not None
    options = train_options({key: value for key, value in values.items() if key not in ("file", MODEL_KEY)})
    if values.get("threads"):
        torch.set_num_threads(values["threads"])

    def say(text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    is_mapped = values.get("mmap") is not False
    if values.get("show_example"):
        _show_examples(file, options, values["show_example"], mmap=is_mapped)
        return
    check_options(options)  # before the seconds of loading and tokenizing
    device = resolve(values.get("device") or "auto", file)
    dtype = values.get("dtype") or ("float32" if device.type == "cpu" else "bfloat16")
    model = load(file, device=device, dtype=dtype, mmap=is_mapped)
    assert model.source is not None  # load maps a file
    machine = {"device": str(device), "dtype": dtype}
    machine |= {key: values.get(key) for key in ("mmap", "threads")}
    written = write_config(given_options(options) | machine, file)
    summary = train(
        model,
        Tokenizer.from_file(model.source),
        options,
        progress=sys.stderr.isatty(),
        say=say,
        settings=written,
    )
    _close(summary)


command = _TrainCommand(
    "train",
    callback=_command,
    params=parameters(),
    help=_HELP,
    epilog=_EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_examples(file: Path, options: TrainOptions, count: int, *, mmap: bool = True) -> None:
    """Print the first examples that training would see, and the table of the run."""
    from nf4format.container import Nf4File

    from ..data.preview import run_table, shown_examples
    from ..text.tokenizer import Tokenizer
    from ..training.train import load_data, plan_of

    with Nf4File.open(file, mmap=mmap) as packed_file:
        tokenizer = Tokenizer.from_file(packed_file)
    sources, evaluation = load_data(tokenizer, options, progress=sys.stderr.isatty())
    batches = plan_of(sources, options)
    click.echo(shown_examples(batches, count, tokenizer.pieces, color=sys.stdout.isatty()))
    click.echo()
    click.echo(run_table(batches, evaluation))


def _close(summary: TrainSummary) -> None:
    from ..training.evaluation import best_step, perplexity_of

    if summary.stopped_by:
        click.echo(f"stopped by {summary.stopped_by} after step {summary.steps}", err=True)
    evaluations = summary.evaluations
    if len(evaluations) > 1:
        first, last = (
            perplexity_of(loss) for loss in (next(iter(evaluations.values())), [*evaluations.values()][-1])
        )
        click.echo(f"evaluation perplexity  {first:.2f} -> {last:.2f}")
    best = best_step(evaluations)
    if best is not None and summary.best.exists():
        click.echo(
            f"best                   {perplexity_of(evaluations[best]):.2f} after step {best}: {summary.best}"
        )
    click.echo(f"steps                  {summary.steps} ({summary.tokens:,} tokens)")
    click.echo(f"speed                  {summary.tokens_per_second:,.0f} tokens/s")
    if summary.weights is not None:
        click.echo(f"norm of B              {summary.weights.of_b:.4g}")
        click.echo(f"change of the weights  {summary.weights.change:.4g}")
    click.echo(f"log                    {summary.log}")
    click.echo(f"adapter                {summary.out}")
    if summary.stopped_by:
        sys.exit(128 + signal.Signals[summary.stopped_by].value)
