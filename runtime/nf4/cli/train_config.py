"""Configuration files of `nf4 train`: TOML or YAML; keys are the names of options, with `_` or `-`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click

from nf4format.files import read_file

from ..errors import TrainError
from .parameters import Assignment, WeightedPath
from .train_options import OPTIONS, SECTIONS, Option

MODEL_KEY: Final = "model"
_MAX_BYTES: Final = 1 << 20
# What a file may not decide about itself, or about what is there already.
_COMMAND_LINE_ONLY: Final = {"config", "show_example"}
_WRITTEN_NEVER: Final = {"config", "show_example", "force", "resume"}


def read_config(path: Path) -> dict[str, Any]:
    """The options that a file sets, by key, converted as on the command line; and `model`.

    Raises:
        FormatError: the file cannot be read.
        TrainError: not TOML or YAML, an unknown key, or a value that the option does not take.
    """
    values: dict[str, Any] = {}
    for name, raw in _parse(path).items():
        key = str(name).replace("-", "_")
        if key == MODEL_KEY:
            if not isinstance(raw, str):
                raise TrainError(path, "model", expected="a path", got=ascii(raw)[:80])
            values[key] = Path(raw)
        elif key not in OPTIONS or key in _COMMAND_LINE_ONLY:
            known = [*OPTIONS.keys() - _COMMAND_LINE_ONLY, MODEL_KEY]
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
            remedy = f"did you mean {' or '.join(near)}?" if near else "see nf4 train --help"
            raise TrainError(path, f"unknown key {ascii(str(name))[:80]}", remedy=remedy)
        elif key in values:
            raise TrainError(path, f"{key} is set twice")
        else:
            try:
                values[key] = _convert(OPTIONS[key], raw)
            except (ValueError, click.BadParameter) as error:
                reason = error.message if isinstance(error, click.BadParameter) else str(error)
                raise TrainError(path, f"{key}: {reason.rstrip('.')}") from None
    return values


def write_config(values: Mapping[str, Any], model: Path) -> str:
    """TOML with every option of a run, from which `nf4 train --config` repeats it.

    Args:
        values: by key; None where an option is not set.
    """
    lines = [
        "# Every option of this run. Repeat it with: nf4 train --config training_config.toml",
        "# Relative paths count from the directory in which the command is called.",
        "",
        f"{MODEL_KEY} = {_toml(str(model))}",
    ]
    for section, options in SECTIONS.items():
        lines += ["", f"# {section}"]
        for option in options:
            if option.key in _WRITTEN_NEVER:
                continue
            value = _plain(option, values.get(option.key))
            lines.append(f"# {option.key}: not set" if value is None else f"{option.key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _parse(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".yaml", ".yml"):
        raise TrainError(path, "kind of configuration file", expected=".toml, .yaml or .yml", got=suffix)
    data = read_file(path, _MAX_BYTES)
    try:
        text = data.decode("utf-8-sig")
        values = _toml_module(path).loads(text) if suffix == ".toml" else _yaml_module(path).safe_load(text)
    except UnicodeDecodeError as error:
        raise TrainError(path, f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise TrainError(path, "nested too deeply", expected="keys and values") from None
    except TrainError:
        raise
    except Exception as error:  # the parsers have no error class in common
        raise TrainError(path, f"not {suffix[1:].upper()}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict):
        raise TrainError(path, expected="keys and values", got=type(values).__name__)
    return values


def _toml_module(path: Path) -> Any:
    for name in ("tomllib", "tomli"):
        if find_spec(name):
            return import_module(name)
    raise TrainError(path, "TOML needs Python 3.11 or tomli", remedy="pip install tomli")


def _yaml_module(path: Path) -> Any:
    if not find_spec("yaml"):
        raise TrainError(path, "YAML needs PyYAML", remedy="pip install 'nf4[yaml]', or write TOML")
    return import_module("yaml")


def _convert(option: Option, raw: Any) -> Any:
    """A value of a file as the command line would have it; ValueError or BadParameter where it is not one."""
    if option.kind is None:
        if not isinstance(raw, bool):
            raise ValueError(f"expected true or false, got {ascii(raw)[:80]}")
        return raw
    if option.repeats or option.places > 1:
        if isinstance(option.kind, Assignment) and isinstance(raw, dict):
            raw = [f"{key}={value}" for key, value in raw.items() if _is_plain(value)]
        items = raw if isinstance(raw, list) else [raw]
        if option.places > 1 and len(items) != option.places:
            raise ValueError(f"expected {option.places} values, got {len(items)}")
        return tuple(_convert_one(option, item) for item in items)
    return _convert_one(option, raw)


def _convert_one(option: Option, raw: Any) -> Any:
    assert option.kind is not None
    if not _is_plain(raw):
        raise ValueError(f"expected {option.kind.name}, got {ascii(raw)[:80]}")
    # As text: what the command line takes, no more: 1.5 is no number of steps.
    return option.kind.convert(str(raw), None, None)


def _is_plain(value: Any) -> bool:
    return value is not None and not isinstance(value, (bool, list, dict, set, bytes))


def _plain(option: Option, value: Any) -> Any:
    """A value as strings, numbers, and lists of them, from which `_convert` gives it back; None: not set."""
    if value is None or (option.repeats and not value):
        return None
    if isinstance(option.kind, Assignment):
        return [f"{key}={item}" for key, item in value]
    if isinstance(option.kind, WeightedPath):
        # With its weight in any case: the name may hold a sign of equality.
        return [f"{path}={weight!r}" for path, weight in value]
    if option.repeats or option.places > 1:
        return [str(item) if isinstance(item, Path) else item for item in value]
    return str(value) if isinstance(value, Path) else value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
