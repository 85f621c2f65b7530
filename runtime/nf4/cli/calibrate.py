"""`nf4 calibrate`: statistics of what a model's linear layers read, for `qcompile -O2`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from . import write_json

if TYPE_CHECKING:
    from tqdm import tqdm

_EXAMPLES = """\b
Examples:
  nf4 calibrate Llama-3.1-8B --data texts.txt --full --out stats.safetensors
  nf4 calibrate Llama-3.1-8B --data a.txt --data b.txt --full --layers 0:8 --out first.safetensors
  nf4 calibrate Llama-3.1-8B --with llama.nf4 --data texts.txt --out second.safetensors
  nf4 calibrate --merge first.safetensors rest.safetensors --out stats.safetensors
"""


class _Layers(click.ParamType[tuple[int, int | None]]):
    name = "A:B"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int | None]:
        if isinstance(value, tuple):
            return value
        first, colon, stop = str(value).partition(":")
        try:
            return int(first or 0), int(stop) if stop else None if colon else int(first) + 1
        except ValueError:
            self.fail(f"expected a range of layers such as 0:8, got {value!r}", param, ctx)


@click.command(epilog=_EXAMPLES, context_settings={"show_default": True})
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL")
@click.option("--data", multiple=True, type=click.Path(path_type=Path), help="Text; repeatable.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File of statistics to write.")
@click.option(
    "--full",
    is_flag=True,
    help="Whole second moments: k^2 / 2 numbers for a layer that reads k. Without it only their diagonals.",
)
@click.option(
    "--with",
    "packed",
    type=click.Path(path_type=Path),
    metavar="PACKED.nf4",
    help="Second pass: run this packed file of the same model beside the original; implies --full.",
)
@click.option(
    "--merge",
    is_flag=True,
    help="Merge files of statistics, given in the place of MODEL: other texts, other layers, or both.",
)
@click.option("--layers", type=_Layers(), help="Measure a range of layers, such as 0:8.  [default: all]")
@click.option("--tokens", type=click.IntRange(1), default=262_144, help="The most tokens to run.")
@click.option(
    "--seq-len", type=click.IntRange(2), help="Tokens of a window.  [default: 2048, or the model's context]"
)
@click.option(
    "--separator",
    help="What stands between documents; empty: each text is one.  [default: a line <|doc|>]",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="Arithmetic.")
@click.option("--device", default="cpu", help="cpu, cuda, cuda:1; auto: a GPU where one can be used.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's choice]")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option(
    "--json", "json_path", metavar="PATH", help="Write the result as JSON too; '-': to stdout, alone."
)
def command(
    *,
    sources: tuple[Path, ...],
    data: tuple[Path, ...],
    out: Path,
    full: bool,
    packed: Path | None,
    merge: bool,
    layers: tuple[int, int | None] | None,
    tokens: int,
    seq_len: int | None,
    separator: str | None,
    dtype: str,
    device: str,
    threads: int | None,
    force: bool,
    json_path: str | None,
) -> None:
    """Collect what `qcompile -O2` and `-O3` need to know of MODEL.

    MODEL is a checkpoint directory of a supported family, or a .nf4 file that keeps its weights. The texts
    run through it layer by layer; for each linear layer the second moments of what it reads are written.
    Take text like that which the model will see, and measure the result on other text.
    """
    if merge:
        if data or full or packed or layers:
            raise click.UsageError("--merge takes files of statistics and --out alone")
        _merge(sources, out, force=force, json_path=json_path)
        return
    if len(sources) != 1:
        raise click.UsageError("give one MODEL; several files of statistics go with --merge")
    if not data:
        raise click.UsageError("Missing option '--data'.")
    model = sources[0]
    import torch
    from tqdm import tqdm

    from ..calibration.run import CalibrateOptions, calibrate
    from ..data.documents import DOCUMENT_SEPARATOR

    if threads:
        torch.set_num_threads(threads)
    options = CalibrateOptions(
        data=data,
        full=full,
        packed=packed,
        layers=layers,
        tokens=tokens,
        seq_len=seq_len,
        separator=DOCUMENT_SEPARATOR if separator is None else separator,
        dtype=dtype,
        device=device,
        force=force,
    )
    started = time.perf_counter()
    with tqdm(unit="window", desc="calibrate", leave=False, disable=None) as bar:
        result = calibrate(model, out, options, _follow(bar))
    facts = {
        "out": str(out),
        "tokens": result.tokens,
        "windows": result.windows,
        "seq_len": result.seq_len,
        "layers": [result.layers.start, result.layers.stop],
        "entries": result.entries,
        "data_sha256": result.data_sha256,
        "bytes": out.stat().st_size,
        "seconds": time.perf_counter() - started,
    }
    if json_path and write_json(json_path, facts):
        return
    click.echo(f"{out}: {facts['bytes']:,} bytes, {result.entries} entries")
    click.echo(f"  layers  {result.layers.start} to {result.layers.stop - 1}")
    click.echo(f"  tokens  {result.tokens:,} in {result.windows} windows of {result.seq_len}")
    click.echo(f"  time    {facts['seconds']:.1f} s")


def _merge(sources: tuple[Path, ...], out: Path, *, force: bool, json_path: str | None) -> None:
    from tqdm import tqdm

    from nf4format.stats_merge import merge_stats

    started = time.perf_counter()
    with tqdm(unit="entry", desc="merge", leave=False, disable=None) as bar:
        result = merge_stats(sources, out, overwrite=force, progress=_follow(bar))
    facts = {
        "out": str(out),
        "merged": [str(source) for source in sources],
        "entries": result.entries,
        "tokens": result.tokens,
        "bytes": out.stat().st_size,
        "seconds": time.perf_counter() - started,
    }
    if json_path and write_json(json_path, facts):
        return
    click.echo(f"{out}: {facts['bytes']:,} bytes, {result.entries} entries of {len(sources)} files")
    click.echo(f"  tokens  {result.tokens:,} at most")
    click.echo(f"  time    {facts['seconds']:.1f} s")


def _follow(bar: tqdm[NoReturn]) -> Callable[[int, int], None]:
    """Takes what is done, and what there is in all."""

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show
