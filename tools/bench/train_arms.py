"""One QLoRA training step on a GPU, by ours, by PEFT and by PEFT with Liger's kernels, for the benchmarks.

Every arm trains the same adapter (a directory in PEFT's layout) on the same checkpoint: bitsandbytes
quantizes it to the very codes that the packed file holds. Same work everywhere: NF4 with double-quantized
constants, embeddings and head in bfloat16, fp32 adapters, bfloat16 arithmetic (autocast for PEFT, as
Trainer(bf16=True) does), scaled-dot-product attention, every token labelled, gradients clipped to norm 1,
AdamW, layer checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RATE = 1e-4
RANK = 16
CLIP = 1.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Step = Callable[[Tensor], tuple[float, float]]  # ids [B, T] -> (mean loss, gradient norm before clipping)


def make_adapter(packed: Path, out: Path) -> None:
    """An untrained adapter, A drawn from seed 0 and B zero, from which every arm starts."""
    import nf4
    from nf4.adapters import save_adapter
    from nf4.lora import LoraConfig, add_lora

    model = nf4.load(packed, device="cpu", dtype="bfloat16")
    add_lora(model, LoraConfig(rank=RANK, alpha=RANK), seed=0)
    save_adapter(model, out)


def ours(packed: Path, adapter: Path, rate: float = RATE, **switches: Any) -> Step:
    """`nf4.training.step.train_step` on the packed file; `switches` are those of its `LayerPasses`."""
    import nf4
    from nf4.data.batches import IGNORED, Batch
    from nf4.paging.optim import PagedAdamW
    from nf4.training.determinism import deterministic
    from nf4.training.step import train_step

    model = nf4.load(packed, device="cuda", dtype="bfloat16", adapter=adapter)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = []
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameters.append(parameter.requires_grad_(True))
    for name, value in ({"gradient_checkpointing": True, "capture_graphs": True} | switches).items():
        setattr(model.passes, name, value)
    model.train()
    optimizer = PagedAdamW(parameters, lr=rate, weight_decay=0.0)
    taken = 0

    def step(ids: Tensor) -> tuple[float, float]:
        nonlocal taken
        taken += 1
        labels = ids.clone()
        labels[:, 0] = IGNORED  # nothing predicts the first token
        batch = Batch(ids, labels, None)
        with deterministic(model.device):  # as nf4 train
            loss, norm = train_step(model, optimizer, [batch], rate=rate, clip=CLIP, step=taken)
        return float(loss), float(norm)

    return step


def peft(
    model_dir: Path,
    adapter: Path,
    rate: float = RATE,
    *,
    liger: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Step:
    """transformers + PEFT + bitsandbytes, with torch's fused AdamW; `liger` patches in Liger's kernels.

    With float32 instead of bfloat16 everything is computed in it: the curve that the others approximate.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        model_dir,
        quantization_config=quantization,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": 0},
    )
    base.config.use_cache = False
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)

    def step(ids: Tensor) -> tuple[float, float]:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), float(norm)

    return step
