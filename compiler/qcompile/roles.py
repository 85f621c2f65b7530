"""What a tensor is for, judged from its name and shape: linear weight, embedding, head, router, norm ...

There is no table of architectures. Module names are shared by hundreds of them, and whatever is not
recognised as something to keep, is two-dimensional and is called a weight, is a linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Role(Enum):
    """The use of a tensor in its model."""

    LINEAR = "linear weight"
    EXPERTS = "fused experts"
    EMBEDDING = "embedding"
    HEAD = "output head"
    ROUTER = "router"
    NORM = "norm"
    BIAS = "bias"
    OTHER = "other"


# Every pattern is searched in the module path: the name in lower case without its last part ("weight").
# `(^|\.)x$` is the module that owns the weight, `(^|\.)x(\.|$)` any module on the way to it.
_ROUTER = re.compile(
    r"(^|\.)(router|gating|switch)(\.|$)"
    r"|(^|\.)(shared_expert_gate|shared_experts_gate|gate\.wg|router_proj|gate_network)$"
)
_GATE = re.compile(r"(^|\.)gate$")  # a router, unless it expands its input: see role_of
_NORM = re.compile(r"norm(\d+|s\.\d+)?(\.|$)|(^|\.)(ln|norm)_|(^|\.)ln\d*$|_ln$|layernorm|groupnorm")
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|score|classifier|qa_outputs|output_layer|predictions\.decoder)(\.|$)"
    r"|(^|\.)([a-z]+_)*head$"
    r"|^(model\.)?output$"
)
_EMBEDDING = re.compile(
    r"(^|\.)(wte|wpe|emb|embed|shared|relative_attention_bias|relative_position_bias_table|codebook)$"
    r"|(^|\.)[a-z_]*embed(ding)?s?(_[a-z]+)*$"
    r"|(^|\.)(patch_embed|patch_embedding|embeddings)(\.|$)"
)
_EXPERTS = re.compile(r"(^|\.)(local_|routed_|moe_|shared_)?experts?(\.|$)")
# How configurations spell the number of experts; multimodal ones nest it one level deeper.
_EXPERT_COUNTS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_moe_experts",
)
# A tensor with an axis this short is a convolution's kernel or a table of per-expert scales, not a matrix.
_SHORT_AXIS = 16


@dataclass(frozen=True)
class TensorPath:
    """A tensor's name, taken apart.

    Attributes:
        module: the path of the module that owns it, lower case: "model.layers.0.self_attn.q_proj".
        attribute: its last part, lower case: "weight", "bias", "a_log", or a fused expert's projection.
        layer: index of the layer, or None outside the layers.
        expert: index of the expert, or None.
        stack: what stands before the layer's index: "model.layers", "encoder.block"; "" outside the layers.
    """

    module: str
    attribute: str
    layer: int | None
    expert: int | None
    stack: str


def parse_name(name: str) -> TensorPath:
    """Take a tensor's name apart."""
    parts = name.lower().split(".")
    module, attribute = ".".join(parts[:-1]), parts[-1]
    layer = expert = None
    stack = ""
    for position, part in enumerate(parts[:-1]):
        if not part.isascii() or not part.isdigit():
            continue
        if position and _EXPERTS.search(parts[position - 1]):
            expert = int(part)
        elif layer is None:
            layer, stack = int(part), ".".join(parts[:position])
    return TensorPath(module, attribute, layer, expert, stack)


def role_of(name: str, shape: Sequence[int], num_experts: int | None = None) -> Role:
    """Judge what a tensor is for.

    Args:
        name: its full name, as in the checkpoint.
        shape: its shape.
        num_experts: the model's number of experts, if its configuration tells.

    Returns:
        The role. For `LINEAR` the shape has two axes, for `EXPERTS` three.
    """
    path = parse_name(name)
    if path.attribute.endswith("bias"):
        # Relative attention "biases" are tables, called `relative_attention_bias.weight`: not meant here.
        return Role.BIAS
    role = _role_of_module(path.module, shape)
    if role is not None:
        return role
    in_experts = _EXPERTS.search(path.module) is not None
    if len(shape) == 3 and min(shape[1:]) > _SHORT_AXIS and (in_experts or shape[0] == num_experts):
        return Role.EXPERTS
    if len(shape) == 2 and (path.attribute == "weight" or path.attribute.endswith("_weight")):
        return Role.LINEAR
    if len(shape) == 2 and in_experts and min(shape) > _SHORT_AXIS:
        return Role.LINEAR  # DBRX stacks the experts of a layer along the rows of one matrix
    return Role.OTHER


def _role_of_module(module: str, shape: Sequence[int]) -> Role | None:
    if _ROUTER.search(module):
        return Role.ROUTER
    # Mixtral, Qwen and DeepSeek call the router `gate`; others call a gated layer's expanding half so.
    if _GATE.search(module) and (len(shape) != 2 or shape[0] <= shape[1]):
        return Role.ROUTER
    if _NORM.search(module):
        return Role.NORM
    if _HEAD.search(module):
        return Role.HEAD
    if _EMBEDDING.search(module):
        return Role.EMBEDDING
    return None


def count_experts(config: Mapping[str, Any]) -> int | None:
    """The number of experts a configuration declares, at its top or in a nested part of it; None without."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in _EXPERT_COUNTS:
            value = part.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def group_of(name: str) -> str:
    """The layer group a tensor is counted in: q_proj, down_proj, experts.gate_up_proj ..."""
    path = parse_name(name)
    parts = [part for part in path.module.split(".") if part and not part.isdigit()]
    if path.attribute != "weight":
        parts.append(path.attribute)
    if not parts:
        return path.attribute
    inside_experts = any(_EXPERTS.search(part) for part in parts[:-1])
    return f"experts.{parts[-1]}" if inside_experts else parts[-1]
