"""Training on a GPU under a memory limit below what the run takes.

    python tools/bench/gpu_memory_limit.py --json tools/bench/results/gpu_memory_limit.json

A small dense model is trained without a limit, then under one below what it needed. Where optimizer pages
must not leave the GPU the run fails; where they may leave it ends with the same adapter, compared by SHA-256
of its files.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import tempfile
from pathlib import Path
from unittest import mock

import torch
from report import Report, machine

from nf4.data.encode import TextEncoder
from nf4.errors import TrainError
from nf4.lora import LoraConfig
from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM
from nf4.paging.optim import PagedAdamW
from nf4.training.options import TrainOptions
from nf4.training.train import train

MIB = 1 << 20

Row = list[str | float | int | None]


class _Bytes(TextEncoder):
    """A tokenizer: one id a byte."""

    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [1] * special + [3 + byte for byte in text.encode()]


def run_training(folder: Path, name: str, budget: int | None = None) -> tuple[str, float]:
    """SHA-256 of the adapter's files, or the error; the most memory allocated, bytes."""
    config = ModelConfig.from_dict(
        {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024,
            "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 8, "vocab_size": 320, "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
            "dtype": "bfloat16",
        }
    )  # fmt: skip
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    model = CausalLM(config).to("cuda", torch.bfloat16)
    text = folder / "text.txt"
    text.write_text("".join(f"{n} squared is {n * n}. " for n in range(6000)))
    options = TrainOptions(
        data=(text,), out=folder / name, lora=LoraConfig(rank=512, alpha=512, dropout=0.05), steps=8,
        warmup=2, batch=4, accumulate=2, seq_len=256, page_budget=budget,
    )  # fmt: skip
    failure = ""
    try:
        train(model, _Bytes(), options)
    except TrainError as error:
        failure = f"fails: {error}"
    del model  # after the handler: its traceback holds the model, too
    gc.collect()
    torch.cuda.empty_cache()
    most = torch.cuda.max_memory_allocated()
    if failure:
        return failure, most
    digest = hashlib.sha256()
    for path in sorted(options.out.glob("adapter_*")):  # what else is there tells its own name
        digest.update(path.read_bytes())
    return digest.hexdigest(), most


def _compared(result: str, expected: str) -> str:
    return f"{'the same adapter' if result == expected else 'another result'}: {result[:60]}"


def measure() -> list[Row]:
    rows: list[Row] = []
    total = torch.cuda.mem_get_info()[1]
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            free, most = run_training(folder, "free")
            rows.append(["no limit, all resident", most / MIB, None, free[:16]])
            again, _ = run_training(folder, "again")
            rows.append(["the same again", None, None, _compared(again, free)])
            limit = most - 100 * MIB  # a third of the optimizer state
            torch.cuda.set_per_process_memory_fraction(limit / total)
            with mock.patch.object(PagedAdamW, "release_memory", lambda optimizer: 0):
                result, most = run_training(folder, "unpaged")
                rows.append(["limit, nothing may leave", most / MIB, limit / MIB, result.partition(",")[0]])
            for title, budget in (("limit, pages leave under pressure", None), ("limit, 64 MiB", 64 * MIB)):
                result, most = run_training(folder, f"paged{budget}", budget)
                rows.append([title, most / MIB, limit / MIB, _compared(result, free)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()
    Report(
        "Training under a memory limit",
        ["run", "most allocated MiB", "limit MiB", "result"],
        measure(),
        machine("torch", gpu=True),
        ["Results: SHA-256 over the adapter's files. nf4 train asks torch for deterministic algorithms."],
    ).finish(arguments.json)


if __name__ == "__main__":
    main()
