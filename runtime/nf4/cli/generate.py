"""`nf4 generate`: continue a prompt, streaming."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .parameters import runs_model

_EXAMPLES = """\b
Examples:
  nf4 generate model.nf4 -p "Once upon a time"
  nf4 generate model.nf4 -p "The capital of France" --temperature 0.8 --top-p 0.95 --seed 7
  nf4 generate model.nf4 --adapter my-adapter -p "ROMEO:" --max-new-tokens 200
"""


@click.command(epilog=_EXAMPLES, context_settings={"show_default": True})
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--prompt", "-p", required=True, help="Text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, help="The most tokens to add.")
@click.option("--temperature", type=float, default=0.0, help="Of the random choice; 0: the likeliest token.")
@click.option("--top-k", type=int, default=0, help="Choose among the k likeliest tokens; 0: all.")
@click.option("--top-p", type=float, default=1.0, help="Choose among the likeliest that reach p; 1: all.")
@click.option("--seed", type=int, default=0, help="Of the random choice; the same seed, the same text.")
@click.option(
    "--adapter", type=click.Path(path_type=Path), help="PEFT adapter directory to put on the model."
)
@runs_model
def command(
    *,
    file: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    adapter: Path | None,
    dtype: str | None,
    device: str,
    no_mmap: bool,
    threads: int | None,
) -> None:
    """Continue a prompt with the model FILE; the new text goes to standard output as it is made.

    It ends at the model's end token or after --max-new-tokens. Without --temperature the likeliest token is
    taken each time.
    """
    import torch

    from ..loading import load
    from ..text.generate import stream_text
    from ..text.sampling import Sampling
    from ..text.tokenizer import Tokenizer

    if threads:
        torch.set_num_threads(threads)
    sampling = Sampling(temperature, top_k, top_p, seed)
    model = load(file, device=device, dtype=dtype, adapter=adapter, mmap=not no_mmap)
    assert model.source is not None
    tokenizer = Tokenizer.from_file(model.source)
    pieces = stream_text(model, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling)
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
