"""A picture of a run from its logs: loss, learning rate and throughput. matplotlib is an extra."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nf4format.atomic import write_bytes

from ..errors import TrainError

_SMOOTH = 0.9  # of the moving average of the loss


def plot_run(log: Path, timing: Path, png: Path) -> None:
    """Draw the logs of a run.

    Raises:
        TrainError: matplotlib is missing, or the log holds no step.
        WriteError: the picture cannot be written.
    """
    try:
        figures, canvases = (
            importlib.import_module(name) for name in ("matplotlib.figure", "matplotlib.backends.backend_agg")
        )
    except ImportError:
        raise TrainError(png, "a plot needs matplotlib", remedy="pip install matplotlib") from None
    steps = [record for record in _records(log) if record.get("loss") is not None]
    evaluations = [record for record in _records(log) if record.get("eval_loss") is not None]
    times = [record for record in _records(timing) if record.get("tokens_per_second") is not None]
    if not steps:
        raise TrainError(log, "no step to plot")
    figure = figures.Figure(figsize=(8, 8), layout="constrained")
    canvas = canvases.FigureCanvasAgg(figure)
    loss, rate, speed = figure.subplots(3, 1, sharex=True)
    x = [record["step"] for record in steps]
    values = [record["loss"] for record in steps]
    loss.plot(x, values, color="tab:blue", alpha=0.3, linewidth=0.8)
    loss.plot(x, _smoothed(values), color="tab:blue", label="training")
    if evaluations:
        losses = [record["eval_loss"] for record in evaluations]
        loss.plot(
            [record["step"] for record in evaluations], losses, "o-", color="tab:orange", label="evaluation"
        )
    loss.set_ylabel("loss, nats a token")
    loss.legend()
    rate.plot(x, [record["lr"] for record in steps], color="tab:green")
    rate.set_ylabel("learning rate")
    speeds = [record["tokens_per_second"] for record in times]
    speed.plot([record["step"] for record in times], speeds, color="tab:red")
    speed.set_ylabel("tokens a second")
    speed.set_ylim(bottom=0)
    speed.set_xlabel("step")
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_bytes(png, picture.getvalue())


def _records(path: Path) -> Iterable[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average without the bias of its beginning."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = _SMOOTH * total + (1 - _SMOOTH) * value, _SMOOTH * weight + 1 - _SMOOTH
        smoothed.append(total / weight)
    return smoothed
