"""The `qcompile` command, and the one place where errors become exit statuses."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType

import click
from tqdm import tqdm

from nf4format.atomic import write_bytes
from nf4format.errors import Nf4Error
from nf4format.levels import LEVELS
from nf4format.resumable import partial_path

from .calibrated import LEVELS as OPTIMISATION_LEVELS
from .device import DEVICES
from .options import CompileOptions
from .pipeline import compile_checkpoint, plan_checkpoint
from .report import check_report_path, write_report
from .summary import CompileSummary, plan_json, plan_text

_EXAMPLES = """\b
Examples:
  qcompile Llama-3.1-8B llama.nf4 --dry-run        show the plan, write nothing
  qcompile Llama-3.1-8B llama.nf4                  compile
  qcompile Llama-3.1-8B llama.nf4 --verify         and compare the result with the checkpoint
  qcompile Llama-3.1-8B llama.nf4 --resume         may be stopped and repeated: goes on where it was
  qcompile Llama-3.1-8B llama.nf4 --device cuda    the same bytes, encoded by a GPU
  qcompile Llama-3.1-8B same.nf4 -O0               the bits that bitsandbytes would make
  qcompile Llama-3.1-8B llama.nf4 --report llama.html         what became of each tensor
  nf4 calibrate Llama-3.1-8B --data texts.txt --full --out stats.safetensors
  qcompile Llama-3.1-8B best.nf4 -O2 --stats stats.safetensors
  qcompile Llama-3.1-8B best.nf4 -O2 --stats stats.safetensors --eval-text other.txt  if it does better
  qcompile Qwen3-30B-A3B moe.nf4 --exclude '*.self_attn.*'    keep attention in 16 bit
  qcompile Llama-3.1-8B part.nf4 --include '*.mlp.*'          pack the feed-forward layers only
  qcompile Llama-3.1-8B whole.nf4 --exclude '*'               the same container, nothing packed
"""


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    epilog=_EXAMPLES,
)
@click.argument("model_dir", type=click.Path(path_type=str))
@click.argument("out", type=click.Path(path_type=str), metavar="OUT.nf4")
@click.option(
    "-O",
    "level",
    type=click.Choice([str(level) for level in OPTIMISATION_LEVELS]),
    default=str(CompileOptions.level),
    help="Optimisation level; the file is decoded the same way at each. -O0: scales are block maxima, "
    "bit-identical to bitsandbytes. -O1: scales that lose least are searched for. -O2: rounding that knows "
    "what each layer reads (--stats). -O3: and what earlier layers have lost (--stats of a second pass).",
)
@click.option(
    "--stats",
    multiple=True,
    type=click.Path(path_type=str),
    metavar="FILE",
    help="Statistics of this model by nf4 calibrate; repeatable: other layers, or more data.",
)
@click.option(
    "--held-out",
    multiple=True,
    type=click.Path(path_type=str),
    metavar="FILE",
    help="Statistics of other text: report errors at the layers' outputs by them. Of use at every level.",
)
@click.option(
    "--eval-text",
    "eval_texts",
    multiple=True,
    type=click.Path(path_type=str),
    metavar="FILE",
    help="Text that no statistics were made of: report KL and perplexity against MODEL_DIR, and refuse a "
    "level whose KL is worse than that of the level below. Needs a family that nf4 runs. Repeatable.",
)
@click.option(
    "--eval-windows",
    type=click.IntRange(1),
    default=CompileOptions.eval_windows,
    help="Windows of each text, of 512 tokens or the model's context, taken evenly.",
)
@click.option(
    "--against-file",
    type=click.Path(path_type=str),
    metavar="FILE.nf4",
    help="With --eval-text: this file stands for the level below (such as the first pass of -O3).  "
    "[default: the level below is compiled and removed; -O1 for -O3]",
)
@click.option(
    "--force-level", is_flag=True, help="Write OUT.nf4 even if its KL is worse than the level below's."
)
@click.option(
    "--adapter",
    metavar="DIR",
    help="At -O2: write a PEFT adapter, of OUT.nf4 alone, that takes up most of what rounding leaves over.",
)
@click.option("--rank", type=click.IntRange(1), default=16, help="Rank of that adapter.")
@click.option(
    "--levels",
    default="nf4",
    metavar="|".join([*LEVELS, "FILE"]),
    help="What codes stand for. FILE: 16 numbers. Anything but nf4 is for this package's runtime on a CPU: "
    "GPU kernels and bitsandbytes know NF4's levels alone.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Pack only tensors whose name matches (shell pattern, whole name; repeatable). It narrows the "
    "default choice and does not widen it.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Keep tensors whose name matches in their dtype (repeatable). Wins over every other option.",
)
@click.option("--quantize-head", is_flag=True, help="Pack the output head too.")
@click.option(
    "--quantize-embeddings", is_flag=True, help="Pack embeddings too; with tied weights, also the head."
)
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default=CompileOptions.device,
    help="Where to encode. -O0 and -O1: the bytes are the same; -O2 and -O3: the quality. auto: on an NVIDIA "
    "GPU if there is one that serves.",
)
@click.option("-j", "--jobs", type=click.IntRange(min=1), show_default="all cores", help="Threads to use.")
@click.option(
    "--dry-run", is_flag=True, help="Print what would become of each tensor, and why; write nothing."
)
@click.option("--force", is_flag=True, help="Replace OUT.nf4 if it exists.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on where an interrupted or killed run to the same OUT.nf4 stopped, if there was one; and when "
    "interrupted, leave what is done. The bytes are those of a run never stopped.",
)
@click.option(
    "--verify", is_flag=True, help="Read the file back from the disk and compare it with the checkpoint."
)
@click.option(
    "--json", "json_path", metavar="PATH", help="Write the summary (or the plan) as JSON; '-' for stdout."
)
@click.option(
    "--report",
    metavar="PATH",
    help="Write what became of each tensor: errors before and after, negative scales, time; .json or .html.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.version_option(package_name="nf4")
def command(  # noqa: PLR0917 - one parameter for each option; click passes them by name
    model_dir: str,
    out: str,
    level: str,
    stats: tuple[str, ...],
    held_out: tuple[str, ...],
    eval_texts: tuple[str, ...],
    eval_windows: int,
    against_file: str | None,
    force_level: bool,
    adapter: str | None,
    rank: int,
    levels: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    quantize_head: bool,
    quantize_embeddings: bool,
    device: str,
    jobs: int | None,
    dry_run: bool,
    force: bool,
    resume: bool,
    verify: bool,
    json_path: str | None,
    report: str | None,
    quiet: bool,
) -> None:
    """Compile a Hugging Face checkpoint into one 4-bit file.

    MODEL_DIR holds config.json, *.safetensors (one file, or shards with an index) and the tokenizer's files.
    Weights of linear layers and fused experts become NF4 with double-quantized scales, 4.127 bits a
    parameter; embeddings, output head, norms, biases, routers and convolutions keep their dtype. Any
    architecture compiles.

    OUT.nf4 appears complete, at the end, or not at all. The same input and options give the same bytes.
    """
    options = CompileOptions(
        level=int(level),
        stats=stats,
        held_out=held_out,
        eval_texts=eval_texts,
        eval_windows=eval_windows,
        against_file=against_file,
        force_level=force_level,
        adapter=adapter,
        rank=rank,
        levels=levels,
        include=include,
        exclude=exclude,
        quantize_head=quantize_head,
        quantize_embeddings=quantize_embeddings,
        device=device,
        jobs=jobs or 0,
        force=force,
        verify=verify,
        resume=resume,
    )
    if (against_file or force_level) and not eval_texts:
        raise click.UsageError("--against-file and --force-level go with --eval-text")
    if report:
        check_report_path(report)
    if dry_run:
        plan = plan_checkpoint(model_dir, options)
        text, data = plan_text(plan), plan_json(plan)
    else:
        before = _inode(out)
        try:
            summary = _compile(model_dir, out, options, quiet=quiet)
        except KeyboardInterrupt:
            if _inode(out) != before:
                raise _Interrupted(f"interrupted; {out} was written") from None
            if partial_path(Path(out)).exists():
                raise _Interrupted("interrupted; the same command goes on from here") from None
            raise
        if report:
            write_report(report, summary)
        text, data = summary.text(), summary.as_json()
    as_json = json.dumps(data, indent=1) + "\n"
    if json_path == "-":
        click.echo(as_json, nl=False)
        return
    if json_path:
        write_bytes(json_path, as_json.encode("ascii"))
    if not quiet:
        click.echo(text)


class _Interrupted(Exception):
    """Ctrl-C or SIGTERM, and what is there now."""


def _compile(model_dir: str, out: str, options: CompileOptions, *, quiet: bool) -> CompileSummary:
    """Compile under a progress bar, evaluate under others."""
    hidden = quiet or not sys.stderr.isatty()
    with (
        tqdm(disable=hidden, unit="B", unit_scale=True, desc="compile", leave=False, file=sys.stderr) as bar,
        tqdm(
            disable=hidden, unit="window", desc="evaluate", leave=False, file=sys.stderr, delay=0.1
        ) as windows,
    ):

        def show(num_bytes: int, total_bytes: int) -> None:
            if bar.total is not None and bar.n >= bar.total:  # the level below is done
                bar.reset()
            bar.total = total_bytes
            bar.update(num_bytes)

        def watch(done: int, total: int) -> None:
            if done <= windows.n:  # another file or text
                windows.reset()
            windows.total = total
            windows.update(done - windows.n)

        def tell(line: str) -> None:
            if not quiet:
                tqdm.write(f"qcompile: {line}", file=sys.stderr)

        return compile_checkpoint(model_dir, out, options, None if hidden else show, tell, watch=watch)


def _inode(path: str) -> int | None:
    try:
        return Path(path).stat().st_ino
    except (OSError, ValueError):
        return None


def main() -> None:
    """Run the command line; a problem with the user's input is one line on stderr and exit status 1."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        command(prog_name="qcompile", standalone_mode=False)
    except Nf4Error as error:
        _fail(str(error), 1)
    except _Interrupted as interrupted:
        _fail(str(interrupted), 130)
    except MemoryError:
        _fail("not enough memory; a smaller --jobs needs less", 1)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; nothing was written", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        reason = error.strerror or str(error)
        _fail(f"{error.filename}: {reason}" if error.filename else reason, 1)


def _fail(message: str, status: int) -> None:
    click.echo(f"qcompile: {message}", err=True)
    sys.exit(status)


def _stop(signum: int, frame: FrameType | None) -> None:
    """SIGTERM ends like Ctrl-C: the temporary file is removed."""
    raise KeyboardInterrupt
