"""Write four texts from what every Python installation has: source code and prose, each split in two.

`code_train.txt` and `code_valid.txt` come from the standard library's sources, `prose_train.txt` and
`prose_valid.txt` from the language reference behind `help()`. Documents are separated by a line
`<|doc|>`; every tenth document of a kind goes to validation.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import click

SEPARATOR = "\n<|doc|>\n"
# Folders that are absent on some systems or hold odd text (tests of encodings, for example).
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
}
VALIDATION_EVERY = 10


def code_documents() -> Iterator[str]:
    """Every readable module of the standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def prose_documents() -> Iterator[str]:
    """The topics of the language reference, in a fixed order."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


@click.command()
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
def main(out_dir: Path) -> None:
    """Write the four texts into OUT_DIR."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for kind, documents in (("code", list(code_documents())), ("prose", list(prose_documents()))):
        train = [text for i, text in enumerate(documents) if i % VALIDATION_EVERY]
        valid = documents[::VALIDATION_EVERY]
        for split, texts in (("train", train), ("valid", valid)):
            path = out_dir / f"{kind}_{split}.txt"
            path.write_text(SEPARATOR.join(texts), encoding="utf-8")
            click.echo(f"{path}: {len(texts)} documents, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
