"""adapter_config.json: written for a model's adapter, and read for a model that is to get one.

Only the keys in use are written: older versions of PEFT refuse those that they do not know. What changes the
arithmetic in a way that is not supported is refused, never skipped.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..errors import LoadError, TrainError
from .attach import biased_layers, lora_layers, saved_modules
from .config import BIASES, LoraConfig
from .layer import LoRALinear
from .path_regex import MOST_STATES, PathRegex
from .targets import linear_names, module_names, savable_names

MOST_NAMES = 1 << 14  # in a list or table: more than any model has modules, few enough to look up each
_LITERAL_PATTERN = re.compile(r"\^?((?:[A-Za-z0-9_]|\\?\.)+)\$?")

# Settings of PEFT's LoraConfig that change nothing about what a saved adapter computes.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_UNDERSTOOD = {
    "alpha_pattern", "bias", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save", "r",
    "rank_pattern", "use_dora", "use_rslora",
}  # fmt: skip
# Initial values drawn without touching the base; the others (pissa, olora, corda, loftq ...) change it.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


class PeftConfig(NamedTuple):
    """What a config says about one model.

    Attributes:
        lora: for `attach_lora`, with rank and alpha of every linear layer by its path.
        saved: paths of the modules that were trained in full.
        targets: paths of the layers that must have an adapter.
    """

    lora: LoraConfig
    saved: list[str]
    targets: list[str]


def rank_and_alpha(layer: LoRALinear) -> tuple[int, float]:
    """As a file has them: a fixed pair doubles the rank, and alpha keeps alpha / rank at the scaling."""
    if layer.fixed_A is None:
        return layer.rank, layer.alpha
    rank = layer.rank + len(layer.fixed_A)
    return rank, layer.scaling * rank


def write_config(model: nn.Module) -> dict[str, Any]:
    """The config of a model's adapter; at least one of its layers has LoRA."""
    layers = dict(lora_layers(model))
    ranks = {name: rank_and_alpha(layer)[0] for name, layer in layers.items()}
    alphas = {name: rank_and_alpha(layer)[1] for name, layer in layers.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    first = next(iter(layers.values()))
    saved = [name for name, _ in saved_modules(model)]
    trains_bias = any(layer.bias is not None for layer in layers.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": first.dropout,
        "target_modules": _target_modules(model, list(layers), saved),
        "bias": "all" if any(True for _ in biased_layers(model)) else "lora_only" if trains_bias else "none",
        "inference_mode": True,
    }
    switches = {
        "use_rslora": first.rslora and first.fixed_A is None,
        "use_dora": first.lora_magnitude is not None,
        "lora_bias": first.lora_bias is not None,
    }
    config |= {key: True for key, is_on in switches.items() if is_on}
    for key, values, usual in (("rank_pattern", ranks, rank), ("alpha_pattern", alphas, alpha)):
        pattern = {name: _whole(value) for name, value in values.items() if value != usual}
        if pattern:
            config[key] = pattern
    if saved:
        config["modules_to_save"] = _modules_to_save(model, saved)
    return config


def read_config(config: dict[str, Any], file: Path, model: nn.Module) -> PeftConfig:
    """What an untrusted config, of which nf4format has checked the basic fields, says about a model.

    Raises:
        LoadError: a setting that is not supported, or of the wrong kind.
    """
    _check_settings(config, file)
    linears = linear_names(model)
    ranks = dict.fromkeys(linears, config["r"]) | _read_pattern(config, "rank_pattern", file, linears)
    alphas = _read_pattern(config, "alpha_pattern", file, linears)
    alphas = dict.fromkeys(linears, config["lora_alpha"]) | alphas
    try:
        lora = LoraConfig(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=_read(config, "lora_dropout", (int, float), 0.0, file),
            rslora=_read(config, "use_rslora", bool, False, file),
            ranks=ranks,
            alphas=alphas,
            bias=_read(config, "bias", str, "none", file),
            lora_bias=_read(config, "lora_bias", bool, False, file),
            dora=_read(config, "use_dora", bool, False, file),
        )
    except TrainError as error:
        raise LoadError(file, str(error)) from None
    saved = _read_saved(config, file, model)
    return PeftConfig(lora, saved, _read_targets(config, file, linears, saved))


def _check_settings(config: dict[str, Any], file: Path) -> None:
    init = config.get("init_lora_weights", True)
    if init is not None and init not in _PLAIN_INITS:
        raise LoadError(
            file,
            "initial values that change the base are not supported",
            got=f"init_lora_weights {shown(init)}",
            remedy="convert it to a plain LoRA adapter with PEFT (path_initial_model_for_weight_conversion)",
        )
    if config.get("bias", "none") not in BIASES:
        raise LoadError(file, "bias", expected=f"one of {', '.join(BIASES)}", got=shown(config["bias"]))
    for key, value in config.items():
        if key not in _HARMLESS | _UNDERSTOOD and value:
            raise LoadError(
                file,
                f"{shown(key)} is not supported",
                got=shown(value),
                remedy="only LoRA and DoRA on linear layers, and modules_to_save, can be loaded",
            )


def _read(config: dict[str, Any], key: str, kind: type | tuple[type, ...], usual: Any, file: Path) -> Any:
    value = config.get(key)
    if value is None:
        return usual
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise LoadError(file, f"bad {key}", got=shown(value))
    return value


def _read_pattern(config: dict[str, Any], key: str, file: Path, linears: list[str]) -> dict[str, Any]:
    """PEFT's pattern -> value as path -> value. The first pattern that matches a path decides."""
    kind = int if key == "rank_pattern" else (int, float)
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise LoadError(file, key, expected="an object", got=shown(patterns))
    _check_count(key, patterns, file)
    values: dict[str, Any] = {}
    total = 0
    for pattern, value in patterns.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            raise LoadError(file, f"{key} {shown(pattern)}", expected="a number", got=shown(value))
        literal = _LITERAL_PATTERN.fullmatch(pattern)
        if literal is not None:
            name = literal[1].replace("\\", "")
            is_whole = pattern.startswith("^")
            found = [p for p in linears if p == name or (p.endswith(f".{name}") and not is_whole)]
        else:
            try:
                regex = PathRegex(pattern)
            except ValueError as error:
                raise LoadError(file, f"{key} {shown(pattern)}: {error}") from None
            total += regex.size
            if total > MOST_STATES:
                raise LoadError(file, f"{key}: too many, or too large, regular expressions")
            found = [path for path in linears if regex.matches(path)]
        for path in found:
            values.setdefault(path, value)
    return values


def _read_saved(config: dict[str, Any], file: Path, model: nn.Module) -> list[str]:
    """Paths that modules_to_save means: PEFT takes every module whose path ends so."""
    endings = config.get("modules_to_save") or []
    _check_names("modules_to_save", endings, file)
    savable = set(savable_names(model))
    saved = [name for name in module_names(model) if name.endswith(tuple(endings))]
    for name in saved:
        if name not in savable:
            raise LoadError(
                file,
                f"modules_to_save {shown(name)} is not supported",
                expected="linear layers, embeddings and norms",
            )
    for ending in endings:
        if not any(name.endswith(ending) for name in saved):
            raise LoadError(file, f"modules_to_save {shown(ending)}: the model has no such module")
    return saved


def _read_targets(config: dict[str, Any], file: Path, linears: list[str], saved: list[str]) -> list[str]:
    """Layers that the config names for LoRA, as far as it names them one by one."""
    targets = config.get("target_modules")
    narrowed = any(config.get(key) for key in ("exclude_modules", "layers_to_transform"))
    if not isinstance(targets, list) or narrowed:
        return []
    _check_names("target_modules", targets, file)
    endings = tuple(f".{target}" for target in targets)
    names = set(targets)
    return [n for n in linears if (n in names or n.endswith(endings)) and n not in set(saved)]


def _check_names(key: str, names: Any, file: Path) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise LoadError(file, key, expected="a list of names", got=shown(names))
    _check_count(key, names, file)


def _check_count(key: str, entries: Any, file: Path) -> None:
    if len(entries) > MOST_NAMES:
        raise LoadError(file, f"{key}: too many entries", expected=f"at most {MOST_NAMES}", got=len(entries))


def _target_modules(model: nn.Module, names: list[str], saved: list[str]) -> list[str]:
    """Names by which PEFT finds exactly these layers: last parts where they suffice, else whole paths."""
    leaves = {name.rpartition(".")[2] for name in names}
    left = [name for name in linear_names(model) if name not in saved]
    return sorted(leaves) if [n for n in left if n.rpartition(".")[2] in leaves] == names else names


def _modules_to_save(model: nn.Module, saved: list[str]) -> list[str]:
    """Names by which PEFT finds exactly these modules: last parts where they suffice, else whole paths."""
    leaves = sorted({name.rpartition(".")[2] for name in saved})
    reached = {name for name in module_names(model) if name.endswith(tuple(leaves))}
    return leaves if reached == set(saved) else saved


def _most_common(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def shown(value: object) -> str:
    """A value from an untrusted config for a message, cut at 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
