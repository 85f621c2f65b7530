"""Runs that are stopped and go on: one with everything that holds state, ways to stop it, what it leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import ByteTokenizer

from nf4.lora import LoraConfig
from nf4.model.decoder import CausalLM
from nf4.training import run as run_module
from nf4.training.options import NEWEST, TrainOptions
from nf4.training.train import train

STEPS = 12
TEXT = "the quick brown fox jumps over the lazy dog; " * 30
MakeModel = Callable[..., CausalLM]


def run_options(folder: Path) -> TrainOptions:
    """Everything that holds state: dropout, a schedule, paged moments, two rates, evaluations, a best one."""
    (folder / "text.txt").write_text(TEXT)
    return TrainOptions(
        data=(folder / "text.txt",),
        out=folder / "adapter",
        lora=LoraConfig(rank=4, alpha=8, dropout=0.1),
        lr=1e-2,
        lora_plus_ratio=4.0,
        steps=STEPS,
        warmup=2,
        batch=2,
        accumulate=2,
        seq_len=32,
        eval_fraction=0.2,
        eval_every=4,
        save_every=5,
        page_budget=4000,
    )


def results(options: TrainOptions) -> dict[str, bytes]:
    """What a run leaves that must not depend on where it was stopped."""
    last = options.checkpoints_path / f"step-{STEPS:06d}"
    files = {
        "adapter": options.out / "adapter_model.safetensors",
        "adapter config": options.out / "adapter_config.json",
        "best adapter": options.best_path / "adapter_model.safetensors",
        "last checkpoint": last / "training_state.safetensors",
        "its adapter": last / "adapter" / "adapter_model.safetensors",
        "log": options.log_path,
    }
    return {name: path.read_bytes() for name, path in files.items()}


def straight_results(make_model: MakeModel, options: TrainOptions) -> dict[str, bytes]:
    """The results of a run never stopped."""
    run = replace(options, out=options.out.with_name("straight"))
    train(make_model(), ByteTokenizer(), run)
    return results(run)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Let `action` happen in the middle of a step."""
    real = run_module.train_step

    def step_with_it(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if kwargs["step"] == step:
            monkeypatch.setattr(run_module, "train_step", real)
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(run_module, "train_step", step_with_it)


class Killed(BaseException):
    """Nothing in a run may catch this: the process is as good as gone."""


def stopped_after(
    step: int, make_model: MakeModel, options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Run until a signal stops it after that step; the checkpoint."""
    interrupt_at(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    summary = train(make_model(), ByteTokenizer(), options)
    assert (summary.steps, summary.stopped_by) == (step, "SIGTERM")
    return options.checkpoints_path / f"step-{step:06d}"


def resume(make_model: MakeModel, options: TrainOptions, **changes: Any) -> list[str]:
    """Go on; what it said."""
    said: list[str] = []
    train(
        make_model(),
        ByteTokenizer(),
        replace(options, **{"resume": NEWEST, **changes}),
        say=said.append,
    )
    return said
