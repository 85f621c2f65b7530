"""Print the closing summary of the quick start: sizes and perplexities, as the commands measured them."""

from __future__ import annotations

import json
from pathlib import Path

import click


def folder_bytes(folder: Path, pattern: str) -> int:
    """Bytes of the files in `folder` that match `pattern`."""
    return sum(path.stat().st_size for path in folder.glob(pattern))


@click.command()
@click.argument("out_dir", type=click.Path(exists=True, path_type=Path))
@click.argument("model_dir", type=click.Path(exists=True, path_type=Path))
def main(out_dir: Path, model_dir: Path) -> None:
    """Summarize the run in OUT_DIR of the checkpoint MODEL_DIR."""
    perplexity = {
        name: json.loads((out_dir / f"{name}.json").read_text())["perplexity"]
        for name in ("original", "packed", "adapted")
    }
    rows = [
        ("checkpoint", folder_bytes(model_dir, "*.safetensors"), perplexity["original"]),
        ("packed .nf4", (out_dir / "model.nf4").stat().st_size, perplexity["packed"]),
        (
            "  with the adapter",
            folder_bytes(out_dir / "adapter", "adapter_model.safetensors"),
            perplexity["adapted"],
        ),
    ]
    click.echo(f"{'':20}{'MB':>10}{'perplexity on prose':>22}")
    for name, size, value in rows:
        click.echo(f"{name:20}{size / 1e6:10.2f}{value:22.2f}")
    click.echo(f"\nThe packed file: {out_dir / 'model.nf4'}; the adapter: {out_dir / 'adapter'}")


if __name__ == "__main__":
    main()
