"""`nf4 eval`: perplexity of a packed model, with or without an adapter, on a text file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import write_json

if TYPE_CHECKING:
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
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Arithmetic and activations.  [default: the checkpoint's]",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="ORIGINAL",
    help="The checkpoint directory (or .nf4 file) FILE was made from: report KL(original || FILE) too.",
)
@click.option("--limit", type=click.IntRange(1), help="The most tokens to predict.  [default: all]")
@click.option(
    "--separator",
    help="What stands between documents; empty: the text is one.  [default: a line <|doc|>]",
)
@click.option("--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU where one can be used.")
@click.option(
    "--no-mmap",
    is_flag=True,
    help="Read FILE into memory instead of mapping it: for network file systems. Its sums are checked.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's choice]")
@click.option(
    "--json", "json_path", metavar="PATH", help="Write the result as JSON too; '-': to stdout, alone."
)
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
    separator: str | None,
    no_mmap: bool,
    threads: int | None,
    json_path: str | None,
) -> None:
    """Report token-level perplexity of the model FILE over TEXT.

    The text is split into documents, each is encoded with the tokens the tokenizer puts around it, and all
    tokens are cut into windows with BOS in front (where the model has one); every token of a window is
    predicted from those before it. The last, incomplete window is left out.
    """
    import torch
    from tqdm import tqdm

    from ..data.documents import DOCUMENT_SEPARATOR
    from ..errors import LoadError
    from ..loading import load
    from ..text.perplexity import encode_documents, perplexity
    from ..text.tokenizer import Tokenizer

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
    with tqdm(total=len(ids), unit="tok", unit_scale=True, leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = perplexity(model, ids, window, bos_id=tokenizer.bos_id, max_tokens=limit, progress=show)
    seconds = time.perf_counter() - started
    dtype_name = str(model.dtype).removeprefix("torch.")
    facts = {
        "file": str(file),
        "adapter": str(adapter) if adapter else None,
        "text": str(text),
        "window": window,
        "device": str(model.device),
        "dtype": dtype_name,
        "perplexity": result.perplexity,
        "mean_nll": result.mean_nll,
        "tokens": result.tokens,
        "seconds": seconds,
    }
    if against:
        facts |= _divergence_facts(model, against, ids, window, bos_id=tokenizer.bos_id, limit=limit)
    if json_path and write_json(json_path, facts):
        return
    click.echo(f"perplexity  {result.perplexity:.4f}")
    click.echo(
        f"tokens      {result.tokens:,} predicted, windows of {window}, {dtype_name} on {model.device}"
    )
    if against:
        click.echo(
            f"original    {facts['original_perplexity']:.4f}\n"
            f"KL          {facts['kl']:.5f} +- {facts['kl_error']:.5f} nats a token; "
            f"the same first choice at {facts['same_choice']:.1%} of them"
        )
    click.echo(f"speed       {result.tokens / seconds:,.0f} tokens/s, {seconds:.1f} s")


def _divergence_facts(
    model: CausalLM, original: Path, ids: list[int], window: int, *, bos_id: int | None, limit: int | None
) -> dict[str, float | str]:
    """What `--against` adds to the facts."""
    import math

    from ..calibration.original import OriginalFile
    from ..loading import build_original, load
    from ..text.divergence import divergence
    from ..text.perplexity import windows_of

    windows = windows_of(ids, window, bos_id)
    if limit is not None:
        windows = windows[: max(1, limit // (windows.shape[1] - 1))]
    if original.is_dir():
        other = build_original(OriginalFile(original), model.dtype).to(model.device).eval()
    else:
        other = load(original, device=model.device, dtype=model.dtype)
    found = divergence(other, model, windows)
    return {
        "against": str(original),
        "kl": found.kl,
        "kl_error": found.kl_error,
        "original_perplexity": math.exp(found.original_nll),
        "same_choice": found.same_choice,
    }
