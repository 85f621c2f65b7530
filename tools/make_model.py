"""Train a small Llama from scratch and save it as a Hugging Face checkpoint: something real to compile.

The model is the runtime's own decoder with ordinary linear layers, so what it saves has the names and
shapes of any Llama checkpoint. The tokenizer is a byte-level BPE trained on the same text.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from tqdm import tqdm

from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM
from nf4.ops.cpu import matmul_dtype

SEPARATOR = "\n<|doc|>\n"
VOCAB_SIZE = 2048
CONTEXT = 256
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-level BPE over `documents`; encoding puts `<s>` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def initialize(model: CausalLM) -> None:
    """Small embeddings; weights of unit gain, smaller where they add to the residual stream."""
    residual_gain = (2 * CONFIG["num_hidden_layers"]) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            gain = residual_gain if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            std = 0.02 if "embed" in name else gain * parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, std=std)


def train(model: CausalLM, tokens: torch.Tensor, steps: int, batch: int, seed: int) -> float:
    """Train every weight on random windows of `tokens`; returns the mean loss of the last tenth."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2),
    )
    has_bf16 = matmul_dtype(torch.bfloat16) == torch.bfloat16  # else autocast would slow it down
    losses: list[float] = []
    progress = tqdm(range(steps), desc="training a small Llama", unit="step", disable=None)
    for _ in progress:
        starts = torch.randint(len(tokens) - CONTEXT - 1, (batch,), generator=order)
        window = torch.stack([tokens[start : start + CONTEXT + 1] for start in starts.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bf16):
            logits = model(window[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{loss.item():.3f}")
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def save(model: CausalLM, tokenizer: Tokenizer, out_dir: Path) -> None:
    """Write config.json, model.safetensors (bf16) and the tokenizer's files."""
    out_dir.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in model.named_parameters()  # a tied head is listed once, under the embedding
    }
    save_file(weights, out_dir / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out_dir / "tokenizer.json"))
    for name, content in (
        ("config.json", CONFIG),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
        ),
    ):
        (out_dir / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@click.command()
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", default=700, show_default=True, help="Optimizer steps.")
@click.option("--batch", default=8, show_default=True, help=f"Windows of {CONTEXT} tokens a step.")
@click.option("--seed", default=0, show_default=True, help="Seed of the initial weights and of the order.")
def main(text: Path, out_dir: Path, steps: int, batch: int, seed: int) -> None:
    """Train a small Llama on TEXT and write the checkpoint to OUT_DIR."""
    documents = text.read_text(encoding="utf-8").split(SEPARATOR)
    tokenizer = train_tokenizer(documents)
    ids = [i for encoding in tokenizer.encode_batch(documents) for i in encoding.ids]
    tokens = torch.tensor(ids)
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig.from_dict(CONFIG), linear=torch.nn.Linear)
    initialize(model)
    loss = train(model, tokens, steps, batch, seed)
    save(model, tokenizer, out_dir)
    parameters = sum(p.numel() for p in model.parameters())
    click.echo(
        f"{out_dir}: {parameters / 1e6:.1f} M parameters, {len(tokens):,} training tokens, loss {loss:.3f}"
    )


if __name__ == "__main__":
    main()
