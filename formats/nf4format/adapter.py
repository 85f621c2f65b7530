"""PEFT adapter directories: adapter_config.json and adapter_model.safetensors, as plain arrays and dicts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from .atomic import AtomicDirectory, AtomicFile
from .errors import FormatError
from .files import open_regular, pread_into, read_file
from .header import read_header
from .strictjson import MAX_CONFIG_VALUES, parse_object
from .tensorfile import begin_tensors, plan_tensors

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
PICKLED_NAME: Final = "adapter_model.bin"
MAX_CONFIG_BYTES: Final = 4 << 20
MAX_RANK: Final = 65536

# Metadata of the weights file, which PEFT ignores: which base the adapter was trained on.
BASE_FINGERPRINT: Final = "nf4.base_fingerprint"
BASE_SOURCE: Final = "nf4.base_source"

AdapterTensor = tuple[np.ndarray, str, tuple[int, ...]]
"""Flat uint8 bytes, safetensors dtype, shape."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter directory holds; `tensors` has PEFT's names, in file order."""

    config: dict[str, Any]
    tensors: dict[str, AdapterTensor]
    metadata: dict[str, str] = field(default_factory=dict)


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read a PEFT LoRA adapter. The weights' place is fixed; no name in the config is ever opened.

    Raises:
        FormatError: a file is missing, damaged or too large; the config is not that of a LoRA adapter; only
            pickled weights are there.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FormatError(folder, "no such adapter directory", remedy="check the path")
    config = _read_config(folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    if not weights.exists() and (folder / PICKLED_NAME).exists():
        remedy = "pickled weights are never loaded; save the adapter as safetensors"
        raise FormatError(folder, expected=WEIGHTS_NAME, got=PICKLED_NAME, remedy=remedy)
    fd = open_regular(weights)
    try:
        header = read_header(fd, strict=False, name=weights)
        tensors: dict[str, AdapterTensor] = {}
        for entry in header.entries.values():
            data = np.empty(entry.end - entry.begin, np.uint8)
            pread_into(fd, data.data, entry.begin, weights)
            tensors[entry.name] = (data, entry.dtype, entry.shape)
    finally:
        os.close(fd)
    if not tensors:
        raise FormatError(weights, "the adapter holds no tensors", remedy="save it again")
    return Adapter(config, tensors, header.metadata)


def write_adapter(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, AdapterTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter directory, atomically: a reader finds the old adapter or the new one, never a mixture.

    Other files of an existing directory stay. Equal input gives equal bytes.

    Args:
        tensors: PEFT name -> (bytes as any contiguous array, safetensors dtype, shape).
        metadata: strings for the weights file's header, e.g. BASE_FINGERPRINT.

    Raises:
        WriteError: the directory cannot be written.
        ValueError: a tensor's bytes do not fit its dtype and shape, or its name is not allowed.
    """
    text = json.dumps(dict(config), indent=2, sort_keys=True, allow_nan=False) + "\n"
    views = {name: np.ascontiguousarray(data).data.cast("B") for name, (data, _, _) in tensors.items()}
    plan = plan_tensors(
        {name: (dtype, tuple(shape)) for name, (_, dtype, shape) in tensors.items()}, metadata or {}
    )
    for entry in plan.entries.values():
        size = entry.end - entry.begin
        if len(views[entry.name]) != size:
            raise ValueError(
                f"{entry.name}: expected {size} bytes for {entry.dtype} {list(entry.shape)},"
                f" got {len(views[entry.name])}"
            )
    with AtomicDirectory(path, replace=True) as folder:
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
        with AtomicFile(folder / WEIGHTS_NAME) as file:
            begin_tensors(file, plan)
            for entry in plan.entries.values():
                file.pwrite(views[entry.name], entry.begin)


def _read_config(path: Path) -> dict[str, Any]:
    """The config, with the fields that every LoRA adapter has checked."""
    if not path.exists():
        raise FormatError(path, "the file is missing", remedy="give the directory of a PEFT adapter")
    data = read_file(path, MAX_CONFIG_BYTES)
    try:
        config = parse_object(data, most_values=MAX_CONFIG_VALUES)
    except ValueError as error:
        raise FormatError(path, str(error), remedy="save the adapter again") from error

    def refuse(field: str, expected: str) -> NoReturn:
        got = ascii(config.get(field))[:80]
        raise FormatError(
            path, field, expected=expected, got=got, remedy="give a LoRA adapter, saved by PEFT"
        )

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA'")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 0 < rank <= MAX_RANK:
        refuse("r", f"an integer from 1 to {MAX_RANK}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        refuse("lora_alpha", "a number")
    return config
