"""Deterministic training on a GPU: what the switch does, and runs that are equal bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nf4
from nf4 import CUBLAS_WORKSPACE
from nf4.lora import LoraConfig
from nf4.text.tokenizer import Tokenizer
from nf4.training.determinism import deterministic
from nf4.training.options import TrainOptions
from nf4.training.train import train


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_the_environment_is_prepared_on_import_unless_somebody_has(given: str | None) -> None:
    name, prepared = CUBLAS_WORKSPACE
    environment = {key: value for key, value in os.environ.items() if key != name}
    if given is not None:
        environment[name] = given
    command = [sys.executable, "-c", f"import nf4, os; print(os.environ[{name!r}])"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == (given or prepared)


def test_a_cpu_needs_no_switch() -> None:
    with deterministic(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.cuda
def test_the_switch_is_put_back() -> None:
    with pytest.raises(KeyError), deterministic(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_two_runs_write_the_same_adapter(
    make_packed, tmp_path: Path, dtype: str, checkpointing: bool
) -> None:
    path = make_packed("llama")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat; the dog and the frog were there too. " * 60)
    files = []
    for run in ("first", "second"):
        model = nf4.load(path, device="cuda", dtype=dtype)
        options = TrainOptions(
            data=(text,),
            out=tmp_path / run,
            lora=LoraConfig(rank=4, alpha=8, dropout=0.1),
            lr=1e-2,
            steps=6,
            warmup=1,
            batch=4,
            accumulate=2,
            seq_len=64,
            checkpointing=checkpointing,
        )
        train(model, Tokenizer.from_file(model.source), options)
        files.append((tmp_path / run / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
