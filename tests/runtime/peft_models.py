"""A small transformers model, for PEFT, and the same in ours; adapters as after some training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM

IDS = torch.tensor([[1, 17, 33, 250, 4, 9, 77], [5, 6, 7, 8, 9, 10, 11]])


def transformers_model(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "dtype")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def same_in_ours(config: dict[str, Any], theirs: Any) -> CausalLM:
    model = CausalLM(ModelConfig.from_dict(config))
    model.load_state_dict(theirs.state_dict())
    return model.eval()


def moved(model: nn.Module) -> None:
    """Everything that trains, as after some training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values()), found
    return {name: gradient for name, gradient in found.items() if gradient is not None}
