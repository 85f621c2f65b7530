"""`nf4 verify`: every byte of a packed file against its sums."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
from tqdm import tqdm

from nf4format.container import Nf4File

_EXAMPLES = """\b
Examples:
  nf4 verify model.nf4
  nf4 verify model.nf4 --threads 8 && cp model.nf4 /elsewhere
"""


@click.command(epilog=_EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(1), help="Readers.  [default: one for each CPU, at most 8]")
def command(file: Path, threads: int | None) -> None:
    """Check every sum of a packed file.

    The whole file is read once. Damage is reported by tensor and byte range, one line each, with exit
    status 1; a file without damage is reported in one line.
    """
    started = time.perf_counter()
    with Nf4File.open(file, mmap=False) as packed_file:
        size = packed_file.header.file_bytes
        with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            damage = packed_file.verify(threads=threads, progress=bar.update)
    for place in damage:
        click.echo(f"nf4: {file}: {place}; fetch the file again or compile it again", err=True)
    if damage:
        sys.exit(1)
    seconds = time.perf_counter() - started
    speed = size / 1e9 / max(seconds, 1e-9)
    click.echo(f"{file}: whole, {size:,} bytes checked in {seconds:.2f} s ({speed:.2f} GB/s)")
