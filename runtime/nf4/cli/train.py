"""`nf4 train`: options and closing summary; the run itself is nf4.training.train."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import click

_EXAMPLES = """\b
Examples:
  nf4 train model.nf4 --data book.txt --out my-adapter
  nf4 train model.nf4 --data rows.jsonl --out my-adapter --epochs 3 --eval-fraction 0.05 --eval-every 50
  nf4 train model.nf4 --data a.txt --data b.txt --eval-data held-out.txt --out my-adapter --steps 200 \\
      --rank 32 --target q_proj --target v_proj --lr 1e-4 --page-budget 64M
  nf4 generate model.nf4 --adapter my-adapter --prompt "Once upon a time"
"""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class ByteSize(click.ParamType):
    """A number of bytes, with K, M or G behind it for powers of 1024."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).upper().removesuffix("B").removesuffix("I")
        unit = text[-1:] if text[-1:] in _UNITS else ""
        try:
            size = float(text.removesuffix(unit)) * _UNITS[unit]
        except ValueError:
            self.fail(f"{value!r} is not a size; write for example 64M or 2G", param, ctx)
        if not 1 <= size < 1 << 63:
            self.fail(f"{value!r} is out of range", param, ctx)
        return int(size)


_PATH = click.Path(path_type=Path)
_INPUT = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command(epilog=_EXAMPLES, context_settings={"show_default": True})
@click.argument("file", type=_INPUT)
@click.option(
    "--data", type=_INPUT, multiple=True, required=True, help="Text or JSONL to train on; repeatable."
)
@click.option("--out", type=_PATH, required=True, help="Directory for the adapter.")
@click.option("--eval-data", type=_INPUT, multiple=True, help="Text or JSONL to evaluate on; repeatable.")
@click.option(
    "--eval-fraction", type=float, default=0.0, help="Share of the data to hold out for evaluation."
)
@click.option(
    "--eval-every", type=int, default=0, help="Steps between evaluations; 0: at start and end only."
)
@click.option("--steps", type=int, help="Optimizer steps; overrides --epochs.")
@click.option("--epochs", type=float, default=1.0, help="Passes over the data.")
@click.option("--batch", type=int, default=4, help="Sequences computed at once.")
@click.option("--accumulate", type=int, default=4, help="Batches added up for a step.")
@click.option("--seq-len", type=int, default=512, help="The most tokens in a sequence.")
@click.option("--rank", type=int, default=16, help="Rank of the adapter.")
@click.option("--alpha", type=float, default=32.0, help="The adapter is scaled by alpha / rank.")
@click.option("--dropout", type=float, default=0.0, help="Dropout before the adapter.")
@click.option(
    "--target",
    multiple=True,
    metavar="PATTERN",
    help="Linear layers to adapt, by (the end of) their path, such as q_proj, 'mlp.*' or 'model.layers.0.*';"
    " repeatable.  [default: all but the output head]",
)
@click.option("--lr", type=float, default=2e-4, help="Peak learning rate.")
@click.option(
    "--schedule", type=click.Choice(["cosine", "linear", "constant"]), default="cosine", help="Decay."
)
@click.option("--warmup", type=int, default=10, help="Steps until the peak rate.")
@click.option("--clip", type=float, default=1.0, help="Limit of the gradient norm; 0: none.")
@click.option("--weight-decay", type=float, default=0.0, help="AdamW's decay of the adapter.")
@click.option("--seed", type=int, default=0, help="Decides initial values, split, order and dropout.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Arithmetic and activations; 16 bits take half the memory. float16, with a scaled loss, is for GPUs"
    " that are slow in bfloat16.  [default: bfloat16 on a GPU, float32 on a CPU]",
)
@click.option("--checkpointing", is_flag=True, help="Compute layers again in backward: less memory, slower.")
@click.option(
    "--offload-checkpoints",
    is_flag=True,
    help="The same, with what waits for backward in host memory: still less memory on a GPU.",
)
@click.option(
    "--page-budget",
    type=ByteSize(),
    help="The most optimizer state kept in memory, such as 64M; the rest is paged to a file. On a GPU: kept"
    " there; the rest is paged to host memory.  [default: all]",
)
@click.option("--page-file", type=_PATH, help="Where paged state goes on a CPU.  [default: a temporary file]")
@click.option(
    "--save-every",
    type=int,
    default=0,
    help="Steps between checkpoints; 0: only when stopped.",
)
@click.option("--keep", type=int, default=3, help="How many checkpoints stay, the newest; 0: all.")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="newest",
    metavar="[PATH]",
    help="Go on from a checkpoint, or from the newest one in OUT.checkpoints; begin where there is none.",
)
@click.option("--log", type=_PATH, help="JSONL log of the run.  [default: OUT.jsonl]")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU where one can be used.")
@click.option("--threads", type=int, help="CPU threads.  [default: torch's choice]")
@click.option("--force", is_flag=True, help="Replace an adapter and a log that exist.")
def command(file: Path, **given: Any) -> None:
    """Fine-tune a LoRA adapter on a packed model.

    FILE comes from qcompile. Text files (documents separated by a line <|doc|>) are trained on as they
    stand; .jsonl files hold one object a line with the keys "prompt" and "completion", and only the
    completion is learned. The base stays as it is: what is trained and saved is a small adapter, in
    PEFT's format. Ctrl-C finishes the step, saves, and stops.
    """
    import torch
    from tqdm import tqdm

    from ..device import resolve
    from ..loading import load
    from ..lora import ALL_LINEAR, LoraConfig
    from ..text.tokenizer import Tokenizer
    from ..training.evaluation import perplexity_of
    from ..training.options import TrainOptions, check_options
    from ..training.train import train

    if given["threads"]:
        torch.set_num_threads(given["threads"])
    names = TrainOptions.__dataclass_fields__.keys() - {"lora"}
    options = TrainOptions(
        lora=LoraConfig(given["rank"], given["alpha"], given["dropout"], given["target"] or ALL_LINEAR),
        **{name: value for name, value in given.items() if name in names},
    )
    check_options(options)  # before the seconds of loading and tokenizing
    device = resolve(given["device"], file)
    dtype = given["dtype"] or ("float32" if device.type == "cpu" else "bfloat16")
    model = load(file, device=device, dtype=dtype)
    assert model.source is not None  # load maps a file
    summary = train(
        model,
        Tokenizer.from_file(model.source),
        options,
        progress=sys.stderr.isatty(),
        say=lambda text: tqdm.write(text, file=sys.stderr),
    )
    if summary.stopped_by:
        click.echo(f"stopped by {summary.stopped_by} after step {summary.steps}", err=True)
    evaluations = [perplexity_of(loss) for loss in summary.evaluations.values()]
    if len(evaluations) > 1:
        click.echo(f"evaluation perplexity  {evaluations[0]:.2f} -> {evaluations[-1]:.2f}")
    click.echo(f"steps                  {summary.steps} ({summary.tokens:,} tokens)")
    click.echo(f"speed                  {summary.tokens_per_second:,.0f} tokens/s")
    click.echo(f"log                    {summary.log}")
    click.echo(f"adapter                {summary.out}")
    if summary.stopped_by:
        sys.exit(128 + signal.Signals[summary.stopped_by].value)
