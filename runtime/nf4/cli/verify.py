"""`nf4 verify`: every byte of a packed file against its sums; its contents against sense or a checkpoint."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from nf4format.container import Nf4File
from nf4format.errors import printable

if TYPE_CHECKING:
    from nf4format.audit import Finding

_EXAMPLES = """\b
Examples:
  nf4 verify model.nf4
  nf4 verify model.nf4 --threads 8 && cp model.nf4 /elsewhere
  nf4 verify model.nf4 --deep                      do constants and codes make sense
  nf4 verify model.nf4 --against Llama-3.1-8B      encode the checkpoint again, and compare
"""
_FETCH = "fetch the file again or compile it again"


@click.command(epilog=_EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(1), help="Readers.  [default: one for each CPU, at most 8]")
@click.option("--deep", is_flag=True, help="Check that constants and codes can be what an encoder wrote.")
@click.option(
    "--against",
    "model_dir",
    metavar="MODEL_DIR",
    type=click.Path(path_type=Path),
    help="Encode this checkpoint again, at the level that FILE states, and compare every bit.",
)
def command(file: Path, threads: int | None, deep: bool, model_dir: Path | None) -> None:
    """Check every sum of a packed file.

    The whole file is read once. Damage is reported by tensor and byte range, one line each, with exit
    status 1; a file without damage is reported in one line. Sums find damage, not forgery: a file that
    somebody changed on purpose may have right sums. --deep finds contents that no encoder can have written,
    --against everything that is not the checkpoint's.
    """
    started = time.perf_counter()
    problems = 0
    with Nf4File.open(file, mmap=False) as packed_file:
        size = packed_file.header.file_bytes
        with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            damage = packed_file.verify(threads=threads, progress=bar.update)
        for place in damage:
            _tell(file, f"{place}; {_FETCH}")
            problems += 1
        for finding in _deeper(packed_file, threads, deep, model_dir):
            _tell(file, f"{finding}; {_FETCH}")
            problems += 1
    if problems:
        sys.exit(1)
    seconds = time.perf_counter() - started
    more = ", constants and codes make sense" if deep else ""
    more += f", all that {printable(str(model_dir))} encodes to" if model_dir else ""
    speed = f"{size:,} bytes checked in {seconds:.2f} s ({size / 1e9 / max(seconds, 1e-9):.2f} GB/s)"
    click.echo(f"{printable(str(file))}: whole{more}, {speed}")


def _deeper(
    packed_file: Nf4File, threads: int | None, deep: bool, model_dir: Path | None
) -> Iterator[Finding]:
    if deep:
        from nf4format.audit import audit

        with tqdm(
            total=packed_file.header.file_bytes,
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None,
            desc="deep",
        ) as bar:
            yield from audit(packed_file, bar.update)
    if model_dir is not None:
        from nf4format.against import compare
        from nf4format.checkpoint import Checkpoint

        threads = threads or min(8, os.cpu_count() or 1)
        with Checkpoint.open(model_dir) as checkpoint:
            total = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
            with tqdm(
                total=total, unit="B", unit_scale=True, leave=False, disable=None, desc="encode"
            ) as bar:
                yield from compare(packed_file, checkpoint, threads=threads, progress=bar.update)


def _tell(file: Path, problem: str) -> None:
    click.echo(f"nf4: {printable(str(file))}: {printable(problem)}", err=True)
