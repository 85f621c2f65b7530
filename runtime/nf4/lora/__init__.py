"""LoRA (arXiv 2106.09685) and its relatives: trainable thin matrices beside frozen linear layers."""

from .attach import add_lora, attach_lora, lora_layers
from .config import ALL_LINEAR, INITS, LoraConfig
from .layer import LoRALinear
from .targets import linear_names, target_names

__all__ = [
    "ALL_LINEAR",
    "INITS",
    "LoRALinear",
    "LoraConfig",
    "add_lora",
    "attach_lora",
    "linear_names",
    "lora_layers",
    "target_names",
]
