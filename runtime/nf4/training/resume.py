"""Going on from a checkpoint: which one, and whether the result can be that of a run never stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from nf4format.errors import FormatError

from ..data.dataset import Dataset, Source
from ..errors import TrainError
from ..model.decoder import CausalLM
from .checkpoint import Checkpoint, RunState, list_checkpoints, read_checkpoint
from .evaluation import gives_up_at
from .options import NEWEST, TrainOptions

# Where things are and how much of them is kept: no number of the run depends on it. What the data hold is
# compared by their fingerprint.
_WITHOUT_INFLUENCE = {
    "data", "data_options.cache", "data_options.cache_bytes", "data_options.workers", "eval_data", "out",
    "log", "force", "resume", "save_every", "keep", "page_budget", "page_bytes", "page_store", "page_file",
    "plot", "tensorboard", "wandb",
}  # fmt: skip
# Early stopping may change as long as the run would have come this far.
_EARLY_STOPPING = {"patience", "min_delta"}


def find_checkpoint(options: TrainOptions, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that the options name, or None where the run begins at its first step.

    For NEWEST, and for a directory of checkpoints, that is the newest whole one; damaged ones are told and
    passed over. A run that left no checkpoint begins anew.

    Raises:
        FormatError: the checkpoint named is damaged.
        TrainError: no checkpoint is whole; nothing can be resumed, yet the output exists.
    """
    if options.resume is None:
        return None
    if options.resume != NEWEST:
        path = Path(options.resume)
        found = list_checkpoints(path) if path.is_dir() else []
        if not found:
            return read_checkpoint(path)
    else:
        path, found = options.checkpoints_path, list_checkpoints(options.checkpoints_path)
    for candidate in found:
        try:
            return read_checkpoint(candidate)
        except FormatError as error:
            say(f"passing over a checkpoint: {error}")
    if found:
        remedy = "start again with --force"
        raise TrainError(path, f"none of {len(found)} checkpoints is whole", remedy=remedy)
    if options.out.exists() and not options.force:
        remedy = "it was finished without checkpoints; choose another name or pass --force"
        raise TrainError(options.out, "exists, and there is no checkpoint to resume from", remedy=remedy)
    say(f"no checkpoint in {path}: the run begins at its first step")
    return None


def check_same_run(state: RunState, now: RunState, options: TrainOptions, file: Path) -> list[str]:
    """Refuse to go on where the result would not be that of a run never stopped.

    Args:
        state: of the checkpoint.
        now: of the run that is about to go on; only options, base, data and machine matter.

    Returns:
        What else is different and may change bits: another torch, GPU or number of threads.

    Raises:
        TrainError: another base, data, or option; the checkpoint is behind the end of the run.
    """
    if state.base != now.base:
        expected, got = (str(base)[:16] for base in (state.base, now.base))
        remedy = "resume with the packed file that the run began with"
        raise TrainError(file, "made with another base", expected=expected, got=got, remedy=remedy)
    ours, theirs = now.options, dict(state.options)
    is_constant = ours["schedule"] == theirs.get("schedule") == "constant" and ours["warmup_ratio"] is None
    if is_constant and None not in (ours["steps"], theirs.get("steps")):
        theirs["steps"] = ours["steps"]  # no step depends on how many follow
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in _EARLY_STOPPING and ours.get(name) != theirs.get(name):
            raise TrainError(
                file,
                f"made with another {name}",
                expected=json.dumps(theirs.get(name)),
                got=json.dumps(ours.get(name)),
                remedy="resume with the options of that run, or start another one",
            )
    if state.start != now.start:
        remedy = "resume on the machine that the run began on"
        raise TrainError(file, "initial values of the adapter differ", remedy=remedy)
    if state.data != now.data:
        remedy = "resume with the data that the run began with"
        raise TrainError(file, "made with other data", expected=state.data, got=now.data, remedy=remedy)
    if options.steps is not None and state.step > options.steps:
        expected = f"at most {options.steps} steps"
        raise TrainError(file, "the run is further already", expected=expected, got=state.step)
    before = {step: loss for step, loss in state.evaluations.items() if step < state.step}
    stop = gives_up_at(before, options.patience, options.min_delta)
    if stop is not None:
        problem = f"with this patience the run would have ended at step {stop}"
        raise TrainError(file, problem, remedy="raise --patience, or resume from an earlier checkpoint")
    return [
        f"{name} was {state.machine.get(name)} and is {value}: the result may differ in its last bits"
        for name, value in now.machine.items()
        if state.machine.get(name) != value
    ]


def lasting_options(options: TrainOptions, model: CausalLM) -> dict[str, Any]:
    """The options on which the result depends, nested ones by their path, and the arithmetic: JSON values."""
    given = _flat(dataclasses.asdict(options))
    given |= {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    lasting = {name: value for name, value in given.items() if name not in _WITHOUT_INFLUENCE}
    plain: dict[str, Any] = json.loads(json.dumps(lasting, default=str))
    return plain


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What besides the options decides the last bits of sums."""
    facts: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def data_fingerprint(sources: Sequence[Source], evaluation: Dataset | None) -> str:
    """Of all examples, their order and weights: XXH3-128 in hexadecimal digits."""
    parts = [f"{source.dataset.fingerprint} {source.weight!r}" for source in sources]
    parts.append("" if evaluation is None else evaluation.fingerprint)
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their path: lora.rank."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
