"""Adapters onto a model: layers wrapped in place, everything else frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import nn

from ..errors import TrainError
from .config import LoraConfig
from .initial import check_rank
from .layer import BiasedLinear, LoRALinear
from .names import matches
from .saved import SavedModule, saved_copy
from .targets import OUTPUT_HEAD, linear_names, matching, savable_names, target_names

EMBEDDINGS: Final = ("embed_tokens", OUTPUT_HEAD)


def add_lora(model: nn.Module, config: LoraConfig, seed: int = 0) -> list[str]:
    """Wrap the target layers in place, freeze everything else, and return the wrapped paths in order.

    The model computes what it did before, until trained; where this raises it is unchanged. Of input and
    output embeddings that are tied, modules_to_save naming either trains the one matrix that they share.

    Raises:
        TrainError: the model has adapters already; a pattern matches nothing; a rank that initial values
            from a weight cannot have.
    """
    saved = matching(savable_names(model), config.modules_to_save, "module that can train in full")
    tied = tied_embeddings(model)
    if any(name in tied for name in saved):
        saved += [name for name in tied if name not in saved]
    names = [name for name in target_names(model, config.targets) if name not in saved]
    for what, values in (("rank", config.ranks), ("alpha", config.alphas)):
        _check_patterns(what, values or {}, names)
    if not names:
        raise TrainError("", "no layer is left for LoRA beside modules_to_save")
    for name in names:
        check_rank(config.init, name, model.get_submodule(name), config.rank_of(name))
    generator = torch.Generator().manual_seed(seed)
    dtypes = dict.fromkeys(saved, config.torch_dtype)
    attach_lora(model, names, config, generator, saved=dtypes, tied=tied)
    return names


def attach_lora(
    model: nn.Module,
    names: list[str],
    config: LoraConfig,
    generator: torch.Generator | None = None,
    *,
    saved: Mapping[str, torch.dtype] | None = None,
    tied: Sequence[str] = (),
) -> None:
    """Wrap the linear layers at these paths and freeze everything else.

    The config's targets and modules_to_save are not looked at.

    Args:
        names: of linear layers for LoRA.
        generator: draws initial values; None leaves them unset.
        saved: paths of modules that train in full, and the dtype of each. tied: those of them that share one
            weight.

    Raises:
        TrainError: the model has adapters already.
    """
    if has_adapter(model):
        raise TrainError("", "the model has an adapter already", remedy="load the model afresh")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    dtype, saved = config.torch_dtype, saved or {}
    for name in names:
        base = model.get_submodule(name)
        layer = LoRALinear(
            base,
            rank=config.rank_of(name),
            alpha=config.alpha_of(name),
            dropout=config.dropout,
            rslora=config.rslora,
            init=config.init if generator is not None else None,
            trains_bias=config.bias != "none",
            lora_bias=config.lora_bias,
            dora=config.dora,
            dtype=dtype,
            generator=generator,
        )
        _replace(model, name, layer)
    if config.bias == "all":
        for name in linear_names(model):
            module = model.get_submodule(name)
            if name not in names and name not in saved and module.bias is not None:
                _replace(model, name, BiasedLinear(module, dtype))
    shared: nn.Parameter | None = None
    for name, saved_dtype in saved.items():
        copy = saved_copy(model.get_submodule(name), saved_dtype, shared if name in tied else None)
        if name in tied:
            shared = copy.weight
        _replace(model, name, copy)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Paths and adapters of a model, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def biased_layers(model: nn.Module) -> Iterator[tuple[str, BiasedLinear]]:
    """Paths of the layers that train their bias only, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, BiasedLinear):
            yield name, module


def saved_modules(model: nn.Module) -> Iterator[tuple[str, SavedModule]]:
    """Paths of the modules that train in full, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, SavedModule):
            yield name, module


def has_adapter(model: nn.Module) -> bool:
    """Whether anything stands around, or in place of, layers of the model."""
    return any(isinstance(module, (LoRALinear, BiasedLinear, SavedModule)) for module in model.modules())


def tied_embeddings(model: nn.Module) -> list[str]:
    """Paths of input and output embeddings that share one matrix; empty where they do not."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return []
    return [name for name in savable_names(model) if name.rpartition(".")[2] in EMBEDDINGS]


def _check_patterns(what: str, values: Mapping[str, float], names: list[str]) -> None:
    for pattern in values:
        if not any(matches(name, pattern) for name in names):
            shown = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
            raise TrainError(
                "", f"{what} pattern {pattern!r} matches no adapted layer", expected=f"one of {shown}"
            )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, leaf, module.train(getattr(parent, leaf).training))
