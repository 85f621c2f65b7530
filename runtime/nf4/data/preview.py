"""A look at the data before a run, as text: examples token by token, and a table of it all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nf4format.errors import printable

from .dataset import DataReport, Dataset, Example, FileReport
from .plan import Batches

_HEAD = ("data", "rows", "examples", "tokens", "median", "95%", "longest", "cut", "left out", "masked")
WIDTH = 100  # columns of shown tokens
_LOSS, _NO_LOSS = "loss", "-"
_GREEN, _DIM, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"

Pieces = Callable[[Sequence[int]], Sequence[str]]  # the text of each token, as `Tokenizer.pieces` has it


def shown_examples(batches: Batches, count: int, pieces: Pieces, *, color: bool = False) -> str:
    """The first examples that training will see, in its order.

    Args:
        color: for a terminal: tokens with loss in green, the others dim. Marks stand there in any case.
    """
    found: list[int] = []
    step = 0
    while len(found) < count and step < batches.steps:
        for batch in batches.step(step):
            found += batch.examples
        step += 1
    shown = found[:count]
    texts = []
    for number, index in enumerate(shown, 1):
        place = f"example {number} of {len(shown)}: {printable(batches.dataset.place(index))}"
        texts.append(shown_example(batches.dataset[index], pieces, title=place, color=color))
    return "\n\n".join(texts)


def shown_example(example: Example, pieces: Pieces, *, title: str, color: bool = False) -> str:
    """An example as tokens, each its text in quotes and its id; lines with `loss` in front are learned.

    Characters that a terminal would not show, or obey, are escaped as Python writes them.
    """
    labelled = example.labelled.tolist()
    lines = [f"{title}: {len(labelled):,} tokens, {sum(labelled):,} with loss"]
    ids = example.ids.tolist()
    texts = [f"{quoted(piece)}:{token}" for piece, token in zip(pieces(ids), ids, strict=True)]
    width = 0
    for i, text in enumerate(texts):
        if i == 0 or labelled[i] != labelled[i - 1] or width + 1 + len(text) > WIDTH:
            mark = _LOSS if labelled[i] else _NO_LOSS
            lines.append(f"  {mark:<5}{text}")
            width = len(lines[-1])
        else:
            lines[-1] += f" {text}"
            width += 1 + len(text)
    if color:
        paints = (_GREEN if line.startswith(f"  {_LOSS}") else _DIM for line in lines[1:])
        lines[1:] = [f"{paint}{line}{_PLAIN}" for paint, line in zip(paints, lines[1:], strict=True)]
    return "\n".join(lines)


def quoted(text: str) -> str:
    """A text in double quotes, on one line, harmless to a terminal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{printable(escaped)}"'


def run_table(
    batches: Batches, evaluation: Dataset | None = None, tokens_per_second: float | None = None
) -> str:
    """What a run will see: a line for each file, then rows, steps and tokens.

    Args:
        tokens_per_second: known or measured, tokens with loss or without, padding not counted; None leaves
            the time open.
    """
    datasets = {"training": batches.dataset} | ({} if evaluation is None else {"evaluation": evaluation})
    files = [file for dataset in datasets.values() for file in dataset.report.files]
    told = [f"{file.path}: {note}" for file in files for note in file.notes]
    notes = dict.fromkeys(map(printable, told))
    options, volume = batches.options, batches.volume()
    per_row = volume.tokens / volume.rows
    rows = f"{volume.rows:,} rows"
    if options.packing == "none":
        how = "padding"
        used = f"{volume.examples:,} examples, {_share(volume.computed - volume.tokens, volume.computed)}"
        used += " of what is computed is padding"
    else:
        how = "packing"
        used = f"{volume.examples:,} examples in {rows} of {options.seq_len:,},"
        used += f" {_share(volume.tokens, volume.rows * options.seq_len)} full"
    per_step = per_row * min(options.batch * options.accumulate, batches.rows)
    total = round(per_row * batches.rows)
    of_row = volume.labelled / volume.rows
    numbers = {
        how: used,
        "steps": f"{batches.steps:,} of {options.batch} x {options.accumulate} rows,"
        f" {batches.epochs_after(batches.steps):.4g} epochs",
        "tokens a step": f"about {round(per_step):,}, {_share(volume.labelled, volume.tokens)} with loss",
        "tokens in all": f"about {total:,}, {round(of_row * batches.rows):,} with loss",
        "expected time": expected_time(total, tokens_per_second),
    }
    table = _file_table(datasets)
    return "\n".join([*table, *notes, "", *(f"{name:<14} {text}" for name, text in numbers.items())])


def expected_time(tokens: int, tokens_per_second: float | None) -> str:
    """How long so many tokens take, as text."""
    if not tokens_per_second or not math.isfinite(tokens_per_second):
        return "known after the first steps"
    seconds = tokens / tokens_per_second
    hours, minutes = divmod(round(seconds / 60), 60)
    days, hours_of_day = divmod(hours, 24)
    if seconds < 100:
        text = f"{seconds:.0f} s"
    elif hours < 1:
        text = f"{minutes} min"
    else:
        text = f"{days} d {hours_of_day} h" if days else f"{hours} h {minutes} min"
    return f"about {text} at {tokens_per_second:,.0f} tokens/s"


def _file_table(datasets: Mapping[str, Dataset]) -> list[str]:
    table: list[tuple[str, ...]] = [_HEAD]
    for name, dataset in datasets.items():
        files = dataset.report.files
        first = 0
        for file in files:
            part = slice(first, first + file.examples)
            first = part.stop
            table.append((printable(file.path), *_counts(file, dataset, part)))
        if len(files) != 1 or len(datasets) > 1:
            table.append((name, *_counts(dataset.report, dataset, slice(0, len(dataset)))))
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEAD))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def _counts(report: FileReport | DataReport, dataset: Dataset, part: slice) -> tuple[str, ...]:
    lengths, labels = dataset.lengths[part], dataset.label_counts[part]
    tokens, labelled = int(lengths.sum(dtype=np.int64)), int(labels.sum(dtype=np.int64))
    levels = np.percentile(lengths, (50, 95, 100), method="nearest") if len(lengths) else (0, 0, 0)
    numbers = (report.rows, len(lengths), tokens, *map(int, levels), report.truncated, report.dropped)
    return (*(f"{number:,}" for number in numbers), _share(tokens - labelled, tokens))


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"
