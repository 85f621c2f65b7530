"""The `nf4` command: a file per subcommand, and the one place where errors become exit statuses."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import click

from nf4format.atomic import write_bytes
from nf4format.errors import Nf4Error

# Subcommand -> its help. nf4.cli.<name> is imported only when it runs, so `nf4 --help` stays fast.
COMMANDS = {
    "inspect": "Show what a packed file holds: tensors, sizes, bits per parameter, how it was made.",
    "verify": "Check every sum of a packed file; name the tensors that are hurt.",
    "eval": "Report token-level perplexity over a text file.",
    "train": "Fine-tune a LoRA adapter on a packed file.",
    "generate": "Continue a prompt.",
    "calibrate": "Collect what qcompile -O2 and -O3 need to know of a model.",
    "export": "Write a directory that transformers, PEFT and bitsandbytes load.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"nf4.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="nf4")
def group() -> None:
    """Load, run and fine-tune models packed by qcompile."""


def write_json(path: str, facts: Mapping[str, Any]) -> bool:
    """Write `facts` to a file, whole or not at all; or, where `path` is "-", to stdout: True then.

    Raises:
        WriteError: the file cannot be written.
    """
    text = json.dumps(facts, indent=2)
    if path == "-":
        click.echo(text)
        return True
    write_bytes(path, f"{text}\n".encode("ascii"))
    return False


def main() -> None:
    """Run the command line; a problem with the user's input is one line on stderr and exit status 1."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        group(prog_name="nf4")
    except Nf4Error as error:
        click.echo(f"nf4: {error}", err=True)
        sys.exit(1)
    except MemoryError:
        click.echo("nf4: not enough memory", err=True)
        sys.exit(1)
    except OSError as error:
        reason = error.strerror or str(error)
        click.echo(f"nf4: {error.filename}: {reason}" if error.filename else f"nf4: {reason}", err=True)
        sys.exit(1)


def _stop(signum: int, frame: FrameType | None) -> None:
    """SIGTERM ends like Ctrl-C: temporary files are removed."""
    raise KeyboardInterrupt
