"""Every kind of adapter from training to use: it learns, the seed decides it, and the commands take it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nf4
from nf4 import cli
from nf4.lora import LoraConfig
from nf4.text.tokenizer import Tokenizer
from nf4.training.options import TrainOptions
from nf4.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: dict[str, dict[str, Any]] = {
    "patterns, rslora, dropout": {
        "ranks": {"mlp.*": 2},
        "alphas": {"q_proj": 4.0},
        "rslora": True,
        "dropout": 0.1,
    },
    "dora with biases": {"dora": True, "bias": "all", "dropout": 0.1},
    "bias of B, gaussian": {"lora_bias": True, "init": "gaussian"},
    "whole modules": {"modules_to_save": ("embed_tokens", "norm", "*_layernorm")},
    "olora": {"init": "olora"},
    "pissa in bf16": {"init": "pissa_niter_4", "dtype": "bfloat16", "dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_learns_by_the_seed_and_serves_the_commands(
    kind: str,
    make_packed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tied = {"tie_word_embeddings": True}
    packed = make_packed("qwen2", hidden_size=64, intermediate_size=96, num_hidden_layers=2, **tied)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat; the dog and the frog were there too. " * 20)
    written = []
    for name in ("a", "b"):
        model = nf4.load(packed, dtype="float32")
        options = TrainOptions(
            data=(text,),
            out=tmp_path / name,
            lora=LoraConfig(rank=4, alpha=8, **KINDS[kind]),
            lr=1e-2,
            steps=10,
            warmup=1,
            batch=2,
            accumulate=1,
            seq_len=32,
            eval_fraction=0.2,
            checkpointing=name == "b",
        )
        assert model.source is not None
        losses = train(model, Tokenizer.from_file(model.source), options).evaluations
        assert losses[10] < losses[0] - 0.1
        model.source.close()
        written.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1]

    for command, *arguments in (("eval", text), ("generate", "--prompt", "the cat", "--max-new-tokens", "3")):
        words = ["nf4", command, packed, *arguments, "--adapter", tmp_path / "a", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
            raise SystemExit(0)
        assert not stop.value.code, capsys.readouterr().err
