"""`nf4 inspect`: what a packed file holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from nf4format.container import Nf4File
from nf4format.embedded import FILE_PREFIX
from nf4format.errors import printable
from nf4format.layout import COMPANIONS
from nf4format.levels import levels_name

from . import write_json

_EXAMPLES = """\b
Examples:
  nf4 inspect model.nf4
  nf4 inspect model.nf4 --tensors
  nf4 inspect model.nf4 --json - | jq .bits_per_parameter
"""


@click.command(epilog=_EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor with its type, shape and bytes.")
@click.option(
    "--json", "json_path", metavar="PATH", help="Write everything as JSON too; '-': to stdout, alone."
)
def command(file: Path, tensors: bool, json_path: str | None) -> None:
    """Show what a packed model file holds and how it was made.

    Opening the file checks its header, its layout and the constants of every packed tensor; the weights
    themselves are not read. `nf4 verify` reads them all.
    """
    with Nf4File.open(file) as packed_file:
        facts = describe(packed_file)
    if json_path and write_json(json_path, facts):
        return
    click.echo(_text(facts))
    if tensors:
        click.echo()
        click.echo(_table(facts["tensors"]))


def describe(file: Nf4File) -> dict[str, Any]:
    """Everything that `--json` prints; bytes of a packed tensor count its scales and state too."""
    entries = file.header.entries
    tensors = []
    levels: dict[str, int] = {}
    for name in file.packed_names:
        parts = (name, *(name + suffix for suffix in COMPANIONS))
        size = sum(_stored_bytes(file, part) for part in parts)
        packed = file.packed(name)
        table = levels_name(packed.quant_map) if name in file.other_levels else "nf4"
        levels[table] = levels.get(table, 0) + 1
        tensors.append(_tensor(name, table.upper(), packed.shape, size))
    for name in file.kept_names:
        entry = entries[name]
        tensors.append(_tensor(name, entry.dtype, entry.shape, entry.end - entry.begin))
    groups = {}
    for kind, names in (("packed", file.packed_names), ("kept", file.kept_names)):
        wanted = set(names)
        chosen = [tensor for tensor in tensors if tensor["name"] in wanted]
        groups[kind] = {
            "tensors": len(chosen),
            "parameters": sum(tensor["parameters"] for tensor in chosen),
            "bytes": sum(tensor["bytes"] for tensor in chosen),
        }
    parameters = groups["packed"]["parameters"] + groups["kept"]["parameters"]
    size = groups["packed"]["bytes"] + groups["kept"]["bytes"]
    shown = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size", "tie_word_embeddings")
    return {
        "file": str(file.path),
        "file_bytes": file.header.file_bytes,
        "model": {key: file.config[key] for key in shown if key in file.config},
        "parameters": parameters,
        "bits_per_parameter": 8 * size / parameters if parameters else None,
        **groups,
        "levels": levels,
        "embedded_files": {name: _stored_bytes(file, FILE_PREFIX + name) for name in file.file_names},
        "aliases": dict(file.aliases),
        "metadata": dict(file.metadata),
        "fingerprint": file.fingerprint,
        "tensors": tensors,
    }


def _stored_bytes(file: Nf4File, tensor: str) -> int:
    entry = file.header.entries[tensor]
    return entry.end - entry.begin


def _tensor(name: str, dtype: str, shape: tuple[int, ...], num_bytes: int) -> dict[str, Any]:
    shown = {"name": name, "dtype": dtype, "shape": list(shape)}
    return {**shown, "parameters": math.prod(shape), "bytes": num_bytes}


def _text(facts: dict[str, Any]) -> str:
    model, metadata = facts["model"], facts["metadata"]
    tied = "tied" if model.get("tie_word_embeddings") else "untied"
    embedded = ", ".join(f"{name} ({_size(size)})" for name, size in facts["embedded_files"].items())
    sizes = " ".join(f"{model[k]} {label}" for k, label in _MODEL_FIELDS if k in model)
    levels = ", ".join(f"{table} ({count} tensors)" for table, count in facts["levels"].items())
    rows = {
        "file": f"{facts['file']}, {_size(facts['file_bytes'])}",
        "model": f"{model.get('model_type', 'unknown family')}: {sizes}, {tied} embeddings",
        "parameters": f"{facts['parameters']:,}, {facts['bits_per_parameter'] or 0:.3f} bits each",
        "packed": _group(facts["packed"]),
        "kept": _group(facts["kept"]),
        "levels": levels or "none",
        "aliases": ", ".join(f"{alias} = {name}" for alias, name in facts["aliases"].items()) or "none",
        "embedded": embedded,
        "made by": f"{metadata.get('nf4.producer')} with {metadata.get('nf4.options')}",
        "source": metadata["nf4.source_sha256"],
        "fingerprint": facts["fingerprint"],
    }
    return "\n".join(f"{key:<12} {printable(value[:_MOST_SHOWN])}" for key, value in rows.items())


_MOST_SHOWN = 2000  # characters of a row, which may come from a stranger
_MODEL_FIELDS = (
    ("num_hidden_layers", "layers,"),
    ("hidden_size", "hidden,"),
    ("vocab_size", "tokens"),
)


def _group(group: dict[str, Any]) -> str:
    counted = f"{group['tensors']} tensors, {group['parameters']:,} parameters, {_size(group['bytes'])}"
    bits = 8 * group["bytes"] / group["parameters"] if group["parameters"] else 0.0
    return f"{counted}, {bits:.3f} bits each"


def _table(tensors: list[dict[str, Any]]) -> str:
    width, kinds = (max((len(tensor[key]) for tensor in tensors), default=0) for key in ("name", "dtype"))
    lines = []
    for tensor in tensors:
        shape = "x".join(str(size) for size in tensor["shape"])
        name = ascii(tensor["name"])[1:-1]
        lines.append(f"{name:<{width}}  {tensor['dtype']:<{kinds}} {shape:>16} {tensor['bytes']:>14,}")
    return "\n".join(lines)


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"
