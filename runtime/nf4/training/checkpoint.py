"""Checkpoints of a run: directories from which it goes on as if it had never stopped.

    step-000120/
      state.json                    counters, evaluations, options, what data and base were, sums of the files
      training_state.safetensors    trained parameters, moments of AdamW, states of the random generators
      adapter/                      the adapter as `save_adapter` writes it, for use with anything else

A checkpoint appears whole or not at all (`nf4format.atomic`), and every byte of it has a sum, XXH3-64, which
finds damage. Moments are written and read a page at a time. Nothing in it is pickled.

The data need no place of their own: which examples a step takes follows from its number.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import xxhash
from torch import Tensor, nn

from nf4format.atomic import AtomicDirectory, AtomicFile, write_error
from nf4format.errors import FormatError
from nf4format.files import open_regular, pread_into, read_file
from nf4format.header import Header, TensorEntry, read_header
from nf4format.strictjson import parse_object
from nf4format.tensorfile import begin_tensors, plan_tensors

from ..adapters import save_adapter
from ..errors import TrainError
from ..paging.optim import PagedAdamW
from .runlog import LogPosition

STATE_NAME: Final = "state.json"
TENSORS_NAME: Final = "training_state.safetensors"
ADAPTER_NAME: Final = "adapter"
FORMAT: Final = 1
MAX_STATE_BYTES: Final = 64 << 20
_STEP: Final = re.compile(r"step-(\d{6,12})")
_CHUNK_BYTES: Final = 4 << 20
_REMEDY: Final = "resume from another checkpoint"
_DTYPES: Final = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


@dataclass
class RunState:
    """What of a run is neither a tensor nor follows from its options.

    Attributes:
        step, tokens, seconds: optimizer steps done, tokens that went through the model for them, and how long
            they took.
        evaluations: step -> mean negative log-likelihood.
        log, timing: how far the two logs had come.
        options: those that the result depends on (see nf4.training.resume).
        base, data: fingerprints of the packed file, None for a dense model, and of the examples.
        start: fingerprint of what trains, before the first step.
        machine: versions and devices, on which bits may depend too.
        passes: what `LayerGraphs.history` gave.
        optimizer_steps: updates that each parameter has had. loss_scale: state of the `LossScale`, or None.
    """

    step: int
    tokens: int
    seconds: float
    evaluations: dict[int, float]
    log: LogPosition
    timing: LogPosition
    options: dict[str, Any]
    base: str | None
    data: str
    start: str
    machine: dict[str, Any]
    passes: dict[str, Any] = field(default_factory=dict)
    optimizer_steps: list[int] = field(default_factory=list)
    loss_scale: dict[str, Any] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint: its directory, and its state."""

    path: Path
    state: RunState


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in the directory of a run's checkpoints."""
    return folder / f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Directories of checkpoints, whole or not, the newest first."""
    try:
        found = [(match, path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    except FileNotFoundError:
        return []
    return [path for _, path in sorted(found, key=lambda item: int(item[0][1]), reverse=True)]


def write_checkpoint(folder: Path, model: nn.Module, optimizer: PagedAdamW, state: RunState) -> Path:
    """Write the checkpoint of `state.step`, its optimizer's part filled in here.

    Args:
        folder: the directory of the run's checkpoints, made if it is not there.

    Raises:
        TrainError: the adapter is not finite, the page file failed.
        WriteError: the checkpoint cannot be written; nothing of it is there then.
    """
    state.optimizer_steps = list(optimizer.steps)
    state.loss_scale = None if optimizer.loss_scale is None else optimizer.loss_scale.state_dict()
    path = checkpoint_path(folder, state.step)
    with _made(folder), AtomicDirectory(path, replace=True) as temporary:
        save_adapter(model, temporary / ADAPTER_NAME)
        _write_tensors(temporary / TENSORS_NAME, model, optimizer)
        record = {"format": FORMAT} | asdict(state)
        record["log"], record["timing"] = state.log._asdict(), state.timing._asdict()
        record["files"] = {name: _facts_of(temporary / name) for name in _file_names(temporary)}
        record = json.loads(json.dumps(record, allow_nan=False))  # keys as they will be read
        text = json.dumps(record | {"sum": _sum_of(record)}, indent=2)
        (temporary / STATE_NAME).write_text(text + "\n", encoding="ascii")
    return path


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a directory if it is not there; and remove it again if it is empty after a failure."""
    is_new = False
    try:
        folder.mkdir()
        is_new = True
    except (FileExistsError, FileNotFoundError):
        pass  # AtomicDirectory tells what is wrong
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's state, and check every byte of its files against their sums.

    Raises:
        FormatError: a file is missing, cut short or damaged, or the state is not that of a checkpoint.
    """
    file = path / STATE_NAME
    data = read_file(file, MAX_STATE_BYTES)
    try:
        record = parse_object(data)
    except ValueError as error:
        raise FormatError(file, str(error), remedy=_REMEDY) from error
    if record.pop("sum", None) != _sum_of(record):
        raise FormatError(file, "the sum does not match: it was damaged or edited", remedy=_REMEDY)
    if record.get("format") != FORMAT:
        remedy = "resume with the version of nf4 that made it"
        raise FormatError(
            file,
            "the checkpoint's format",
            expected=FORMAT,
            got=ascii(record.get("format"))[:40],
            remedy=remedy,
        )
    try:
        files, state = _parse_state(record)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            file, f"not the state of a run: {ascii(str(error))[:120]}", remedy=_REMEDY
        ) from error
    for name, facts in files.items():
        if _facts_of(path / name) != facts:
            raise FormatError(path / name, "the sum does not match: the file is damaged", remedy=_REMEDY)
    return Checkpoint(path, state)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: PagedAdamW) -> None:
    """Put parameters, moments and random generators to where they were.

    Args:
        model: with adapters as they were when the run began, trained parameters those that require gradients.
        optimizer: over these.

    Raises:
        TrainError: the tensors are not those of this model and optimizer.
        FormatError: the file cannot be read.
    """
    file, state = checkpoint.path / TENSORS_NAME, checkpoint.state
    fd = open_regular(file)
    try:
        header = read_header(fd, strict=False, name=file)
        trained = dict(_trained(model))
        if len(state.optimizer_steps) != len(trained):
            got = f"{len(state.optimizer_steps)} of them"
            raise TrainError(file, "trained parameters", expected=len(trained), got=got, remedy=_REMEDY)
        for name, parameter in trained.items():
            value = _read_tensor(fd, header, file, f"parameter.{name}", parameter.dtype, parameter.shape)
            with torch.no_grad():
                parameter.copy_(value)

        def get(name: str, offset: int, into: memoryview) -> None:
            entry = _entry(header, f"optimizer.{name}", file)
            if offset + len(into) > entry.end - entry.begin:
                raise TrainError(file, "shape does not fit the model", tensor=entry.name, remedy=_REMEDY)
            pread_into(fd, into, entry.begin + offset, file)

        optimizer.read_state(state.optimizer_steps, get)
        if optimizer.loss_scale is not None and state.loss_scale is not None:
            optimizer.loss_scale.load_state_dict(state.loss_scale)
        _restore_generators(fd, header, optimizer.device, file)
    finally:
        os.close(fd)
    # A run never stopped has them from its first step on: sums that begin at zero, not at nothing.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, updates in zip(parameters, state.optimizer_steps, strict=True):
        if updates:
            parameter.grad = torch.zeros_like(parameter)


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what a kill left half-written."""
    paths = list_checkpoints(folder)
    for path in paths[keep:] if keep else []:
        aside = path.with_name(f".{path.name}.removed.partial")  # never a half-removed one by its real name
        with contextlib.suppress(OSError):
            path.rename(aside)
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What trains, by name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _write_tensors(path: Path, model: nn.Module, optimizer: PagedAdamW) -> None:
    tensors: dict[str, Tensor] = {f"parameter.{name}": p.detach() for name, p in _trained(model)}
    tensors["generator.cpu"] = torch.get_rng_state()
    if optimizer.device.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(optimizer.device)
    specs = {name: (_DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    specs |= {f"optimizer.{name}": spec for name, spec in optimizer.state_layout().items()}
    plan = plan_tensors(specs, {})
    with AtomicFile(path) as file:
        begin_tensors(file, plan)
        for name, tensor in tensors.items():
            data = tensor.cpu().contiguous().view(-1).view(torch.uint8)
            file.pwrite(data.numpy().data, plan.entries[name].begin)
        optimizer.write_state(
            lambda name, offset, data: file.pwrite(data, plan.entries[f"optimizer.{name}"].begin + offset)
        )


def _read_tensor(  # noqa: PLR0917
    fd: int, header: Header, file: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None
) -> Tensor:
    """A tensor that must have this dtype and, unless it is None, this shape."""
    entry = _entry(header, name, file)
    expected = (_DTYPES[dtype], entry.shape if shape is None else tuple(shape))
    if (entry.dtype, entry.shape) != expected:
        raise TrainError(
            file, "does not fit the model", tensor=name, expected=expected, got=(entry.dtype, entry.shape)
        )
    data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    pread_into(fd, data.numpy().data, entry.begin, file)
    return data.view(dtype).view(entry.shape)


def _entry(header: Header, name: str, file: Path) -> TensorEntry:
    entry = header.entries.get(name)
    if entry is None:
        raise TrainError(file, "missing", tensor=name, remedy=_REMEDY)
    return entry


def _restore_generators(fd: int, header: Header, device: torch.device, file: Path) -> None:
    try:
        torch.set_rng_state(_read_tensor(fd, header, file, "generator.cpu", torch.uint8))
        if device.type == "cuda":
            state = _read_tensor(fd, header, file, "generator.cuda", torch.uint8)
            torch.cuda.set_rng_state(state, device)
    except (RuntimeError, TypeError) as error:
        raise TrainError(file, f"not the state of a random generator: {error}", remedy=_REMEDY) from None


def _file_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _facts_of(path: Path) -> dict[str, Any]:
    """Size and XXH3-64 of a file."""
    fd = open_regular(path, follow=False)
    try:
        size, total, at = os.fstat(fd).st_size, xxhash.xxh3_64(), 0
        buffer = bytearray(min(_CHUNK_BYTES, size))
        while at < size:
            view = memoryview(buffer)[: min(_CHUNK_BYTES, size - at)]
            pread_into(fd, view, at, path)
            total.update(view)
            at += len(view)
    finally:
        os.close(fd)
    return {"bytes": size, "sum": total.hexdigest()}


def _sum_of(record: Mapping[str, Any]) -> str:
    """Of the state's values, however the text is laid out."""
    return xxhash.xxh3_64_hexdigest(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())


def _parse_state(record: dict[str, Any]) -> tuple[dict[str, Any], RunState]:
    """Files and state of a checkpoint; KeyError, TypeError or ValueError where it is not one."""
    files = _typed(record, "files", dict)
    for name in files:
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise ValueError(f"file name {name}")
    if TENSORS_NAME not in files:
        raise ValueError(f"no {TENSORS_NAME}")
    evaluations = {int(step): _number(loss) for step, loss in _typed(record, "evaluations", dict).items()}
    scale, base = record["loss_scale"], record["base"]
    if scale is not None:
        scale = {"value": _number(scale["value"]), "good_steps": _count(scale["good_steps"])}
    if base is not None and not isinstance(base, str):
        raise TypeError("base")
    state = RunState(
        step=_count(record["step"]),
        tokens=_count(record["tokens"]),
        seconds=_number(record["seconds"]),
        evaluations=dict(sorted(evaluations.items())),
        log=_position(record["log"]),
        timing=_position(record["timing"]),
        options=_typed(record, "options", dict),
        base=base,
        data=_typed(record, "data", str),
        start=_typed(record, "start", str),
        machine=_typed(record, "machine", dict),
        passes=_typed(record, "passes", dict),
        optimizer_steps=[_count(value) for value in _typed(record, "optimizer_steps", list)],
        loss_scale=scale,
    )
    return files, state


def _typed(record: dict[str, Any], key: str, kind: type) -> Any:
    if not isinstance(record[key], kind):
        raise TypeError(f"{key} is a {type(record[key]).__name__}")
    return record[key]


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"expected a count, got {value}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"expected a number, got {value}")
    return float(value)


def _position(value: Any) -> LogPosition:
    if not isinstance(value, dict) or not isinstance(value["sum"], str):
        raise TypeError("expected the position of a log")
    return LogPosition(_count(value["num_bytes"]), value["sum"])
