"""Adapters on disk: what trains beside a model, to and from PEFT's directory layout.

`adapter_config.json` holds the settings, `adapter_model.safetensors` under `base_model.model.<path>`:

    .lora_A.weight [R, I]  .lora_B.weight [O, R]    of each layer with LoRA
    .lora_B.bias [O]                                with lora_bias
    .lora_magnitude_vector [O]                      with DoRA
    .base_layer.bias [O]                            of layers with LoRA, where biases train
    .bias [O]                                       of other layers, where all biases train
    .weight                                         of modules_to_save; and .bias where they have one

Initial values that came out of the base (PiSSA, OLoRA) are saved as an ordinary adapter of twice the rank, so
that the base stays the packed file: B A - B0 A0 = [B | -B0] [A ; A0].

The weights' metadata names the base: the fingerprint of the packed file and that of the checkpoint it was
compiled from. PEFT ignores both; adapters that PEFT wrote have none and are not asked for one. What else
changes the arithmetic (adapted embeddings, initial values that change the base ...) is refused, not skipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from .lora.attach import (
    EMBEDDINGS,
    attach_lora,
    biased_layers,
    has_adapter,
    lora_layers,
    saved_modules,
    tied_embeddings,
)
from .lora.config import LoraConfig
from .lora.peft_config import PeftConfig, read_config, write_config
from .lora.saved import weight_shape
from .lora.targets import linear_names, savable_names

_PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(.+?)"
    r"\.(lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector|base_layer\.bias|weight|bias)",
    re.DOTALL,
)
_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_DTYPE_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


class _Modules(NamedTuple):
    """Paths of the layers with LoRA, and of the modules that were trained in full; in module order."""

    lora: list[str]
    saved: list[str]


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's adapter as a PEFT directory, atomically; an adapter already there is replaced.

    Args:
        model: a model with LoRA layers; its `source`, if it has one, is the base that is named.
        path: the directory; its parent must exist.

    Raises:
        TrainError: the model has no adapter, or one that is not finite.
        WriteError: the directory cannot be written.
    """
    if not any(True for _ in lora_layers(model)):
        raise TrainError(path, "the model has no adapter to save")
    tensors: dict[str, AdapterTensor] = {}
    with torch.no_grad():
        values = dict(_parts(model))
        for name, layer in lora_layers(model):
            values[_key(name, "lora_A.weight")] = torch.cat([A for A, _ in layer.pairs()])
            values[_key(name, "lora_B.weight")] = torch.cat([B for _, B in layer.pairs()], dim=1)
        for key, value in values.items():
            if not value.isfinite().all():
                name, remedy = key.removeprefix(_PREFIX), "lower the learning rate"
                raise TrainError(path, "the adapter is not finite", tensor=name, remedy=remedy)
            data = value.detach().cpu().contiguous()
            flat = data.view(-1).view(torch.uint8).numpy()
            tensors[key] = (flat, _DTYPE_NAMES[data.dtype], tuple(data.shape))
    write_adapter(path, write_config(model), tensors, _base_of(model))


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
    if has_adapter(model):
        raise LoadError(path, "the model has an adapter already", remedy="load the model afresh")
    if not force:
        _check_base(model, adapter.metadata, weights)
    config = read_config(adapter.config, Path(path) / CONFIG_NAME, model)
    modules = _modules_of(adapter, weights, model, config)
    tensors = _read_tensors(adapter, weights, _expected_shapes(model, modules, config.lora))
    saved = {name: _kept_dtype(tensors[_key(name, "weight")]) for name in modules.saved}
    tied = _tied(model, tensors, modules.saved)
    attach_lora(model, modules.lora, config.lora, saved=saved, tied=tied)
    with torch.no_grad():
        for key, parameter in _parts(model):
            parameter.copy_(tensors[key])


def _kept_dtype(value: Tensor) -> torch.dtype:
    """Of a module that was trained in full: bf16 stays, as these are large."""
    return torch.bfloat16 if value.dtype == torch.bfloat16 else torch.float32


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


def _modules_of(adapter: Adapter, weights: Path, model: nn.Module, config: PeftConfig) -> _Modules:
    """Which modules the tensors are for; every tensor's name is one that the config has a use for."""
    linears, savable = set(linear_names(model)), set(savable_names(model))
    bias = config.lora.bias
    pairs: dict[str, None] = {}
    saved: dict[str, None] = dict.fromkeys(config.saved)
    for key in adapter.tensors:
        found = _KEY.fullmatch(key)
        name, part = (found[1], found[2]) if found else ("", "")
        is_expected = {
            "lora_A.weight": True,
            "lora_B.weight": True,
            "lora_B.bias": config.lora.lora_bias,
            "lora_magnitude_vector": config.lora.dora,
            "base_layer.bias": bias != "none",
            "bias": bias == "all" or name in saved,
            "weight": name in saved or name.rpartition(".")[2] in EMBEDDINGS,
        }.get(part, False)
        if not is_expected:
            raise LoadError(
                weights,
                "unknown tensor",
                tensor=key,
                expected=f"names like {_key('<layer>', 'lora_A.weight')}",
                remedy="only LoRA and DoRA on linear layers, and modules_to_save, can be loaded",
            )
        known, kind = (savable, "module") if part in ("weight", "bias") else (linears, "linear layer")
        if name not in known:
            remedy = "use the base that the adapter was trained on"
            raise LoadError(weights, f"the model has no such {kind}", tensor=key, remedy=remedy)
        if part == "weight":
            saved.setdefault(name)
        elif part != "bias":
            pairs.setdefault(name)
    for name in config.targets:
        if name not in pairs and name not in saved:
            raise _missing(weights, _key(name, "lora_A.weight"))
    both = next((name for name in pairs if name in saved), None)
    if both is not None:
        raise LoadError(weights, "a module with LoRA that is also trained in full", tensor=both)
    return _Modules(
        [n for n in linear_names(model) if n in pairs], [n for n in savable_names(model) if n in saved]
    )


def _expected_shapes(model: nn.Module, modules: _Modules, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the adapter has to hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in modules.lora:
        base: Any = model.get_submodule(name)
        rank = config.rank_of(name)
        shapes[_key(name, "lora_A.weight")] = (rank, base.in_features)
        shapes[_key(name, "lora_B.weight")] = (base.out_features, rank)
        rows = {
            "lora_B.bias": config.lora_bias,
            "lora_magnitude_vector": config.dora,
            "base_layer.bias": config.bias != "none" and base.bias is not None,
        }
        shapes |= {_key(name, part): (base.out_features,) for part, is_there in rows.items() if is_there}
    for name in modules.saved:
        base = model.get_submodule(name)
        shapes[_key(name, "weight")] = weight_shape(base)
        if getattr(base, "bias", None) is not None:
            shapes[_key(name, "bias")] = tuple(base.bias.shape)
    for name in linear_names(model) if config.bias == "all" else ():
        base = model.get_submodule(name)
        if name not in modules.lora and name not in modules.saved and base.bias is not None:
            shapes[_key(name, "bias")] = (base.out_features,)
    return shapes


def _read_tensors(adapter: Adapter, weights: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors, in their dtype, each of the shape that is expected, all finite."""
    missing = next((key for key in shapes if key not in adapter.tensors), None)
    if missing is not None:
        raise _missing(weights, missing)
    tensors: dict[str, Tensor] = {}
    for key, (data, dtype, shape) in adapter.tensors.items():
        if key not in shapes:
            raise LoadError(weights, "the model's layer has no such part", tensor=key)
        if dtype not in _TORCH_DTYPES:
            expected, remedy = " or ".join(_TORCH_DTYPES), "save the adapter in one of these"
            raise LoadError(weights, "dtype", tensor=key, expected=expected, got=dtype, remedy=remedy)
        if tuple(shape) != shapes[key]:
            raise LoadError(
                weights,
                "shape does not fit the model",
                tensor=key,
                expected=list(shapes[key]),
                got=list(shape),
                remedy="use the base that the adapter was trained on",
            )
        value = torch.from_numpy(data).view(_TORCH_DTYPES[dtype]).reshape(shape)
        if not value.isfinite().all():
            raise LoadError(weights, "not finite", tensor=key, remedy="the training of this adapter failed")
        tensors[key] = value
    return tensors


def _tied(model: nn.Module, tensors: dict[str, Tensor], saved: list[str]) -> list[str]:
    """Embeddings that the model ties, where the adapter holds the same weight for both."""
    names = tied_embeddings(model)
    if len(names) != 2 or not set(names) <= set(saved):
        return []
    first, second = (tensors[_key(name, "weight")] for name in names)
    return names if first.dtype == second.dtype and torch.equal(first, second) else []


def _parts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What trains, under PEFT's names; a pair as it is, without the fixed one."""
    for name, layer in lora_layers(model):
        yield _key(name, "lora_A.weight"), layer.lora_A
        yield _key(name, "lora_B.weight"), layer.lora_B
        optional = {
            "lora_B.bias": layer.lora_bias,
            "lora_magnitude_vector": layer.lora_magnitude,
            "base_layer.bias": layer.bias,
        }
        yield from ((_key(name, part), value) for part, value in optional.items() if value is not None)
    for name, biased in biased_layers(model):
        yield _key(name, "bias"), biased.bias
    for name, module in saved_modules(model):
        yield _key(name, "weight"), module.weight
        if module.bias is not None:
            yield _key(name, "bias"), module.bias


def _missing(weights: Path, key: str) -> LoadError:
    return LoadError(weights, "missing", tensor=key, remedy="save the adapter again")


def _key(name: str, part: str) -> str:
    return f"{_PREFIX}{name}.{part}"
