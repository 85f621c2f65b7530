"""Which modules of a model an adapter is for, from the patterns that users write."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import TrainError
from .base import is_linear
from .config import ALL_LINEAR
from .layer import BiasedLinear, LoRALinear
from .names import matches
from .saved import SavedModule, can_save

OUTPUT_HEAD = "lm_head"


def linear_names(model: nn.Module) -> list[str]:
    """Paths of the linear layers, in module order; those under an adapter count by the adapter's path."""
    return [name for name, module in _outer_modules(model) if is_linear(module)]


def module_names(model: nn.Module) -> list[str]:
    """Paths of all modules but the model itself and those under an adapter, in module order."""
    return [name for name, _ in _outer_modules(model) if name]


def savable_names(model: nn.Module) -> list[str]:
    """Paths of the modules that can train in full: linear layers, embeddings, norms; in module order."""
    return [name for name, module in _outer_modules(model) if can_save(module)]


def target_names(model: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """Paths of the linear layers that the targets mean (see `LoraConfig`), in module order.

    Raises:
        TrainError: a pattern matches none of them.
    """
    linears = linear_names(model)
    if targets == ALL_LINEAR:
        chosen = [name for name in linears if name.rpartition(".")[2] != OUTPUT_HEAD]
    else:
        chosen = matching(linears, (targets,) if isinstance(targets, str) else targets, "linear layer")
    if not chosen:
        raise TrainError("", "the model has no linear layer to train")
    return chosen


def matching(names: list[str], patterns: Iterable[str], what: str) -> list[str]:
    """The names that any of the patterns matches, in their order.

    Raises:
        TrainError: a pattern matches none.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if matches(name, pattern)}
        if not matched:
            shown = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
            raise TrainError("", f"target {pattern!r} matches no {what}", expected=f"one of {shown}")
        chosen |= matched
    return [name for name in names if name in chosen]


def _outer_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules but those that an adapter stands around."""
    wrapped = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, (LoRALinear, BiasedLinear, SavedModule))
    )
    return [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if not (wrapped and name.startswith(wrapped))
    ]
