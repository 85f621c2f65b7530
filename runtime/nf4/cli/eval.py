"""`nf4 eval`: perplexity of a packed model, with or without an adapter, on a text file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import write_json
from .parameters import runs_model

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.decoder import CausalLM

_EXAMPLES = """\b
Examples:
  nf4 eval model.nf4 held-out.txt --window 512
  nf4 eval model.nf4 held-out.txt --window 512 --adapter my-adapter
  nf4 eval model.nf4 held-out.txt --limit 20000 --json result.json
  nf4 eval model.nf4 held-out.txt --against MODEL_DIR          how far from the original, token by token
"""


@click.command(epilog=_EXAMPLES, context_settings={"show_default": True})
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("text", type=click.Path(path_type=Path))
@click.option(
    "--window",
    type=int,
    help="Tokens the model sees at once, BOS included.  [default: 512, or the model's context if shorter]",
)
@click.option(
    "--adapter", type=click.Path(path_type=Path), help="PEFT adapter directory to put on the model."
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="ORIGINAL",
    help="The checkpoint directory (or .nf4 file) FILE was made from: report KL(original || FILE) too.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="The most tokens to predict, the first.  [default: all]"
)
@click.option(
    "--windows", type=click.IntRange(1), metavar="N", help="At most N windows, taken evenly over TEXT."
)
@click.option(
    "--separator",
    help="What stands between documents; empty: the text is one.  [default: a line <|doc|>]",
)
@runs_model
@click.option(
    "--json", "json_path", metavar="PATH", help="Write the result as JSON too; '-': to stdout, alone."
)
@click.option(
    "--per-window", is_flag=True, help="With --against: the JSON holds the values of each window too."
)
@click.option("--progress-lines", is_flag=True, help="Tell progress as lines DONE/TOTAL on stderr.")
def command(
    *,
    file: Path,
    text: Path,
    window: int | None,
    adapter: Path | None,
    dtype: str | None,
    against: Path | None,
    device: str,
    limit: int | None,
    windows: int | None,
    separator: str | None,
    no_mmap: bool,
    threads: int | None,
    json_path: str | None,
    per_window: bool,
    progress_lines: bool,
) -> None:
    """Report token-level perplexity of the model FILE over TEXT.

    The text is split into documents, each is encoded with the tokens the tokenizer puts around it, and all
    tokens are cut into windows with BOS in front (where the model has one); every token of a window is
    predicted from those before it. The last, incomplete window is left out.
    """
    import torch

    from ..data.documents import DOCUMENT_SEPARATOR
    from ..errors import LoadError
    from ..loading import load
    from ..text.perplexity import encode_documents, evenly, perplexity_of, windows_of
    from ..text.tokenizer import Tokenizer

    if limit and windows:
        raise click.UsageError("give --limit or --windows, not both")
    if per_window and not against:
        raise click.UsageError("--per-window goes with --against")
    if threads:
        torch.set_num_threads(threads)
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise LoadError(text, "not a text", expected="UTF-8", got=got) from error
    started = time.perf_counter()
    model = load(file, device=device, dtype=dtype, adapter=adapter, mmap=not no_mmap)
    assert model.source is not None
    context = model.config.max_position_embeddings
    window = min(512, context) if window is None else window
    if window > context:
        raise LoadError(file, "window", expected=f"at most the model's {context} positions", got=window)
    tokenizer = Tokenizer.from_file(model.source)
    ids = encode_documents(tokenizer, content, DOCUMENT_SEPARATOR if separator is None else separator)
    chosen = windows_of(ids, window, tokenizer.bos_id)
    predicted = chosen.shape[1] - 1
    if limit:
        chosen = chosen[: max(1, limit // predicted)]
    if windows:
        chosen = evenly(chosen, windows)
    facts: dict[str, Any] = {
        "file": str(file),
        "adapter": str(adapter) if adapter else None,
        "text": str(text),
        "window": window,
        "windows": len(chosen),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    with _progress(len(chosen) * predicted, lines=progress_lines) as show:
        if against:
            facts |= _divergence_facts(model, against, chosen, show, per_window=per_window)
        else:
            found = perplexity_of(model, chosen, show)
            facts |= {"perplexity": found.perplexity, "mean_nll": found.mean_nll, "tokens": found.tokens}
    facts["seconds"] = time.perf_counter() - started
    if json_path and write_json(json_path, facts):
        return
    click.echo(f"perplexity  {facts['perplexity']:.4f}")
    click.echo(
        f"tokens      {facts['tokens']:,} predicted, windows of {window}, {facts['dtype']} on {model.device}"
    )
    if against:
        click.echo(
            f"original    {facts['original_perplexity']:.4f}\n"
            f"KL          {facts['kl']:.5f} +- {facts['kl_error']:.5f} nats a token; "
            f"the same first choice at {facts['same_choice']:.1%} of them"
        )
    click.echo(f"speed       {facts['tokens'] / facts['seconds']:,.0f} tokens/s, {facts['seconds']:.1f} s")


@contextmanager
def _progress(total: int, *, lines: bool) -> Iterator[Callable[[int, int], None]]:
    """What takes (done, in all): a bar of so many tokens where there is a terminal, or lines."""
    from tqdm import tqdm

    if lines:
        yield lambda done, all_: click.echo(f"{done}/{all_}", err=True)
        return
    with tqdm(total=total, unit="tok", unit_scale=True, leave=False, disable=None) as bar:

        def show(done: int, all_: int) -> None:
            bar.update(done * total // all_ - bar.n)

        yield show


def _divergence_facts(
    model: CausalLM,
    original: Path,
    windows: Tensor,
    progress: Callable[[int, int], None],
    *,
    per_window: bool,
) -> dict[str, Any]:
    """What there is to say with `--against`."""
    from ..calibration.original import OriginalFile
    from ..loading import build_original, load
    from ..text.divergence import divergence

    if original.is_dir():
        other = build_original(OriginalFile(original), model.dtype).to(model.device).eval()
    else:
        other = load(original, device=model.device, dtype=model.dtype)
    found = divergence(other, model, windows, progress)
    facts: dict[str, Any] = {
        "perplexity": found.perplexity,
        "mean_nll": found.nll,
        "tokens": found.tokens,
        "against": str(original),
        "kl": found.kl,
        "kl_error": found.kl_error,
        "original_perplexity": found.original_perplexity,
        "original_mean_nll": found.original_nll,
        "same_choice": found.same_choice,
    }
    if per_window:
        facts["window_kl"], facts["window_nll"] = found.window_kl, found.window_nll
        facts["window_original_nll"] = found.window_original_nll
    return facts
