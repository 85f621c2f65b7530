"""Where the numbers of a run go besides its own logs: TensorBoard, Weights & Biases. Both are extras."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..errors import TrainError
from .options import TrainOptions


class Sink(Protocol):
    """Takes numbers by name."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars in a directory of event files; those of steps that a resumed run repeats are purged."""

    def __init__(self, folder: Path, first_step: int) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(folder), purge_step=first_step or None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of a project; kept on this machine where nobody is logged in."""

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        # Without a key it would ask for one, and wait.
        is_known = bool(os.environ.get("WANDB_API_KEY") or getattr(wandb.api, "api_key", None))
        mode = os.environ.get("WANDB_MODE") or ("online" if is_known else "offline")
        self._run = wandb.init(project=project, name=name, dir=str(folder), config=dict(config), mode=mode)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Sinks:
    """Those that the options name. One that fails is told and left out: a run of days does not end for it.

    Args:
        first_step: the first that is written.
        config: options to show.
    """

    def __init__(
        self, options: TrainOptions, first_step: int, config: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self._say = say
        self._sinks: dict[str, Sink] = {}
        makers: dict[str, Callable[[], Sink]] = {}
        folder, project = options.tensorboard, options.wandb
        if folder is not None:
            makers["TensorBoard"] = lambda: TensorBoard(folder, first_step)
        if project is not None:
            beside = options.out.absolute().parent
            makers["Weights & Biases"] = lambda: WeightsAndBiases(project, options.out.name, beside, config)
        for name, make in makers.items():
            try:
                self._sinks[name] = make()
            except Exception as error:  # whatever libraries of others raise
                self._give_up(name, error)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Give the numbers of a record to all."""
        values = {
            name: float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, (int, float))
        }
        for name, sink in list(self._sinks.items()):
            try:
                sink.write(step, values)
            except Exception as error:
                self._give_up(name, error)

    def close(self) -> None:
        """No more numbers come."""
        for name, sink in list(self._sinks.items()):
            try:
                sink.close()
            except Exception as error:
                self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._sinks.pop(name, None)
        self._say(f"warning: no more numbers for {name}: {' '.join(str(error).split())[:200]}")


def check_extras(options: TrainOptions) -> None:
    """Refuse what needs a package that is not there.

    Raises:
        TrainError: with what to install.
    """
    wanted = {
        "tensorboard": (options.tensorboard is not None, "TensorBoard"),
        "wandb": (options.wandb is not None, "Weights & Biases"),
        "matplotlib": (options.plot is True, "a plot"),
    }
    for package, (is_wanted, what) in wanted.items():
        if is_wanted and find_spec(package) is None:
            raise TrainError("", f"{what} needs {package}", remedy=f"pip install {package}")
