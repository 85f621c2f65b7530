"""`nf4 export`: a directory for transformers, PEFT and bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import click

from nf4format.container import Nf4File

_EXAMPLES = """\b
Examples:
  nf4 export model.nf4 hf-model
  nf4 export model.nf4 hf-model --format bnb --force
  python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('hf-model')"
"""


@click.command(epilog=_EXAMPLES, context_settings={"show_default": True})
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(["bnb"]), default="bnb", help="bnb: bitsandbytes NF4.")
@click.option("--force", is_flag=True, help="Put the files into a directory that holds some already.")
def command(file: Path, out_dir: Path, kind: str, force: bool) -> None:
    """Write a directory that transformers, PEFT and bitsandbytes load without conversion.

    The weights are the same file, as model.safetensors: a hard link where the file system allows it, a copy
    elsewhere. config.json gains the quantization settings; tokenizer and generation files are those embedded
    in FILE. The directory appears complete or not at all.
    """
    from ..export import export_bnb

    with Nf4File.open(file) as packed_file:
        is_linked = export_bnb(packed_file, out_dir, replace=force)
    how = "hard link, no extra space" if is_linked else "copy"
    click.echo(f"{out_dir}: model.safetensors ({how}) and {len(packed_file.file_names)} more files")
