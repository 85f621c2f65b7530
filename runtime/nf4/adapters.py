"""Adapters on disk: LoRA layers of a model to and from PEFT's directory layout.

`adapter_config.json` holds the settings, `adapter_model.safetensors` for each wrapped layer
`base_model.model.<path>.lora_A.weight` [R, I] and `.lora_B.weight` [O, R]. The weights' metadata names
the base: the fingerprint of the packed file and that of the checkpoint it was compiled from. PEFT
ignores both; adapters that PEFT wrote have none and are not asked for one.

Supported: plain LoRA on linear layers, rsLoRA, rank_pattern and alpha_pattern of literal names.
Whatever else changes the arithmetic (DoRA, trained biases or embeddings, modules_to_save, initial
values that change the base ...) is refused, never skipped.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nf4format.adapter import (
    BASE_FINGERPRINT,
    BASE_SOURCE,
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    AdapterTensor,
    read_adapter,
    write_adapter,
)
from nf4format.container import Nf4File

from .errors import LoadError, TrainError
from .lora import LoraConfig, attach_lora, linear_names, lora_layers

_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", re.DOTALL)
_LITERAL_PATTERN = re.compile(r"\^?((?:[A-Za-z0-9_]|\\?\.)+)\$?")
_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Settings of PEFT's LoraConfig that change nothing about what a saved adapter computes.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_UNDERSTOOD = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
# Initial values drawn without touching the base; the others (pissa, olora, corda, loftq ...) change it.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's adapter as a PEFT directory, atomically; an adapter already there is replaced.

    Args:
        model: a model with LoRA layers; its `source`, if it has one, is the base that is named.
        path: the directory; its parent must exist.

    Raises:
        TrainError: the model has no adapter, or one that is not finite.
        WriteError: the directory cannot be written.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise TrainError(path, "the model has no adapter to save")
    for name, layer in layers.items():
        if not (layer.lora_A.isfinite().all() and layer.lora_B.isfinite().all()):
            raise TrainError(path, "the adapter is not finite", tensor=name, remedy="lower the learning rate")
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    first = next(iter(layers.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": first.dropout,
        "target_modules": _target_modules(model, list(layers)),
        "bias": "none",
        "inference_mode": True,
    }
    if first.rslora:
        config["use_rslora"] = True
    for key, values, usual in (("rank_pattern", ranks, rank), ("alpha_pattern", alphas, alpha)):
        pattern = {name: value for name, value in values.items() if value != usual}
        if pattern:
            config[key] = pattern
    tensors: dict[str, AdapterTensor] = {}
    for name, layer in layers.items():
        for side, value in (("A", layer.lora_A), ("B", layer.lora_B)):
            data = value.detach().cpu().contiguous()
            flat = data.numpy().reshape(-1).view(np.uint8)
            tensors[f"{_PREFIX}{name}.lora_{side}.weight"] = (flat, "F32", tuple(data.shape))
    write_adapter(path, config, tensors, _base_of(model))


def load_adapter(model: nn.Module, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Put an adapter from a PEFT directory, ours or PEFT's, on the model; the base is frozen.

    Args:
        model: a model without an adapter.
        path: the directory.
        force: accept an adapter that was trained on another base of the same shapes.

    Raises:
        FormatError: not a readable LoRA adapter.
        LoadError: another base, a setting that is not supported, or tensors that do not fit the model.
            The model is unchanged then.
    """
    adapter = read_adapter(path)
    weights = Path(path) / WEIGHTS_NAME
    if any(True for _ in lora_layers(model)):
        raise LoadError(path, "the model has an adapter already", remedy="load the model afresh")
    if not force:
        _check_base(model, adapter.metadata, weights)
    linears = linear_names(model)
    config = _read_config(adapter.config, Path(path) / CONFIG_NAME, linears)
    pairs = _pair_up(adapter, weights)
    _check_targets(adapter.config, pairs, linears, weights)
    for name, pair in pairs.items():
        rank = config.rank_of(name)
        module: Any = model.get_submodule(name)
        expected = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
        for side in "AB":
            if tuple(pair[side].shape) != expected[side]:
                raise LoadError(
                    weights,
                    "shape does not fit the model",
                    tensor=_key(name, side),
                    expected=list(expected[side]),
                    got=list(pair[side].shape),
                    remedy="use the base that the adapter was trained on",
                )
    attach_lora(model, [name for name in linears if name in pairs], config)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            layer.lora_A.copy_(pairs[name]["A"])
            layer.lora_B.copy_(pairs[name]["B"])


def _base_of(model: nn.Module) -> dict[str, str]:
    """Metadata that names the packed file behind a model; nothing for a dense model."""
    source = getattr(model, "source", None)
    if not isinstance(source, Nf4File):
        return {}
    return {BASE_FINGERPRINT: source.fingerprint, BASE_SOURCE: source.source_fingerprint}


def _check_base(model: nn.Module, metadata: dict[str, str], weights: Path) -> None:
    ours, theirs = _base_of(model), metadata.get(BASE_FINGERPRINT)
    if not ours or theirs is None or theirs == ours[BASE_FINGERPRINT]:
        return
    if metadata.get(BASE_SOURCE) == ours[BASE_SOURCE]:
        problem = "trained on the same checkpoint compiled with other options"
        remedy = "it should work nearly as well; force it, or use the file it was trained on"
    else:
        problem, remedy = "trained on another base", "use the file it was trained on, or force it"
    raise LoadError(
        weights,
        problem,
        expected=f"base {theirs[:16]}",
        got=f"{model.source.path} = {ours[BASE_FINGERPRINT][:16]}",  # type: ignore[union-attr]
        remedy=remedy,
    )


def _read_config(config: dict[str, Any], file: Path, linears: list[str]) -> LoraConfig:
    bias = config.get("bias", "none")
    if bias != "none":
        raise LoadError(file, "trained biases are not supported", expected="bias 'none'", got=_shown(bias))
    init = config.get("init_lora_weights", True)
    if init is not None and init not in _PLAIN_INITS:
        raise LoadError(
            file,
            "initial values that change the base are not supported",
            got=f"init_lora_weights {_shown(init)}",
            remedy="convert it to a plain LoRA adapter with PEFT (path_initial_model_for_weight_conversion)",
        )
    for key, value in config.items():
        if key not in _HARMLESS | _UNDERSTOOD | {"bias"} and value:
            raise LoadError(
                file,
                f"{_shown(key)} is not supported",
                got=_shown(value),
                remedy="only plain LoRA on linear layers can be loaded",
            )
    dropout = config.get("lora_dropout") or 0.0
    rslora = config.get("use_rslora") or False
    if not isinstance(dropout, (int, float)) or not isinstance(rslora, bool):
        raise LoadError(
            file, "bad settings", got=f"lora_dropout {_shown(dropout)}, use_rslora {_shown(rslora)}"
        )
    try:
        return LoraConfig(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=dropout,
            rslora=rslora,
            ranks=_read_pattern(config, "rank_pattern", int, file, linears),
            alphas=_read_pattern(config, "alpha_pattern", (int, float), file, linears),
        )
    except TrainError as error:
        raise LoadError(file, str(error)) from None


def _read_pattern(
    config: dict[str, Any], key: str, kind: type | tuple[type, ...], file: Path, linears: list[str]
) -> dict[str, Any]:
    """PEFT's pattern -> value as path -> value. The first pattern that is a path's last parts decides.

    PEFT's patterns are regular expressions; only literal names are taken, with or without `^`.
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise LoadError(file, key, expected="an object", got=_shown(patterns))
    values: dict[str, Any] = {}
    for pattern, value in patterns.items():
        literal = _LITERAL_PATTERN.fullmatch(pattern)
        if literal is None:
            raise LoadError(
                file, f"{key} {_shown(pattern)} is not supported", remedy="only literal module names are"
            )
        if not isinstance(value, kind) or isinstance(value, bool):
            raise LoadError(file, f"{key} {_shown(pattern)}", expected="a number", got=_shown(value))
        name = literal[1].replace("\\", "")
        for path in linears:
            if path == name or (path.endswith(f".{name}") and not pattern.startswith("^")):
                values.setdefault(path, value)
    return values


def _pair_up(adapter: Adapter, weights: Path) -> dict[str, dict[str, Tensor]]:
    """Module path -> {"A": [R, I], "B": [O, R]}, fp32."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, (data, dtype, shape) in adapter.tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise LoadError(
                weights,
                "unknown tensor",
                tensor=key,
                expected=f"names like {_key('<layer>', 'A')}",
                remedy="only plain LoRA on linear layers can be loaded",
            )
        if dtype not in _TORCH_DTYPES:
            raise LoadError(weights, "dtype", tensor=key, expected=" or ".join(_TORCH_DTYPES), got=dtype)
        value = torch.from_numpy(data).view(_TORCH_DTYPES[dtype]).float().reshape(shape)
        if not value.isfinite().all():
            raise LoadError(weights, "not finite", tensor=key, remedy="the training of this adapter failed")
        pairs.setdefault(found[1], {})[found[2]] = value
    return pairs


def _check_targets(
    config: dict[str, Any], pairs: dict[str, dict[str, Tensor]], linears: list[str], weights: Path
) -> None:
    """Every tensor has a layer and its other half, and every layer the config names has tensors."""
    for name, pair in pairs.items():
        if name not in linears:
            raise LoadError(
                weights,
                "the model has no such linear layer",
                tensor=_key(name, next(iter(pair))),
                remedy="use the base that the adapter was trained on",
            )
        for side in "AB":
            if side not in pair:
                raise LoadError(weights, "missing", tensor=_key(name, side), remedy="save the adapter again")
    targets = config.get("target_modules")
    narrowed = any(config.get(key) for key in ("exclude_modules", "layers_to_transform"))
    if isinstance(targets, list) and not narrowed:
        for name in linears:
            wanted = any(isinstance(t, str) and (name == t or name.endswith(f".{t}")) for t in targets)
            if wanted and name not in pairs:
                raise LoadError(weights, "missing", tensor=_key(name, "A"), remedy="save the adapter again")


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """Names by which PEFT finds exactly these layers: last parts where they suffice, else whole paths."""
    leaves = {name.rpartition(".")[2] for name in names}
    reached = [name for name in linear_names(model) if name.rpartition(".")[2] in leaves]
    return sorted(leaves) if reached == names else names


def _most_common(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _key(name: str, side: str) -> str:
    return f"{_PREFIX}{name}.lora_{side}.weight"


def _shown(value: object) -> str:
    """A value from an untrusted config for a message, cut at 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
