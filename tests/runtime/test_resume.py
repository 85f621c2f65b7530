"""A run that was stopped and went on equals one never stopped, byte for byte."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import ByteTokenizer
from stopped_runs import (
    STEPS,
    TEXT,
    Killed,
    MakeModel,
    interrupt_at,
    results,
    resume,
    run_options,
    stopped_after,
    straight_results,
)

import nf4
from nf4.errors import TrainError
from nf4.lora import LoraConfig
from nf4.training import run as run_module
from nf4.training.checkpoint import list_checkpoints
from nf4.training.options import NEWEST, TrainOptions
from nf4.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def options(tmp_path: Path) -> TrainOptions:
    return run_options(tmp_path)


@pytest.fixture
def straight(make_model: MakeModel, options: TrainOptions) -> dict[str, bytes]:
    return straight_results(make_model, options)


def stop_at_random(
    make_model: MakeModel, options: TrainOptions, monkeypatch: pytest.MonkeyPatch, seed: int
) -> list[str]:
    """Stop a run at a random step, twice or so, each time in a random way; it goes on until it is through."""
    draw, ways = random.Random(seed), []
    done = 0
    while True:
        way = draw.choice(["SIGTERM", "SIGINT", "killed", "evaluation"])
        step = draw.randint(done + 1, STEPS)
        if way == "killed":
            # What a SIGKILL leaves: the last checkpoint, and logs that are further.
            def action() -> None:
                raise Killed

            interrupt_at(monkeypatch, step, action)
        elif way == "evaluation":
            interrupt_evaluation(monkeypatch, draw.randint(0, 3))
        else:
            number = signal.Signals[way]
            interrupt_at(monkeypatch, step, lambda number=number: os.kill(os.getpid(), number))
        try:
            summary = train(make_model(), ByteTokenizer(), replace(options, resume=NEWEST))
        except Killed:
            ways.append(f"killed in step {step}")
        else:
            if summary.stopped_by is None:
                return ways
            ways.append(f"{summary.stopped_by} in step {summary.steps}")
            done = summary.steps
        monkeypatch.undo()
        if done == STEPS or len(ways) == 3:
            train(make_model(), ByteTokenizer(), replace(options, resume=NEWEST))
            return ways


def interrupt_evaluation(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Send SIGTERM while a later batch of an evaluation is under way."""
    real, calls = run_module.evaluate, iter(range(1000))

    def evaluate(*args: Any, **kwargs: Any) -> float | None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(run_module, "evaluate", evaluate)


def test_twenty_random_stops_change_no_byte(
    make_model: MakeModel,
    options: TrainOptions,
    straight: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    stops: list[str] = []
    seed = 0
    while len(stops) < 20:
        run = replace(options, out=tmp_path / f"stopped{seed}")
        ways = stop_at_random(make_model, run, monkeypatch, seed)
        monkeypatch.undo()
        differing = [name for name, data in results(run).items() if data != straight[name]]
        assert not differing, (seed, ways)
        stops += ways
        seed += 1
    assert {stop.split()[0] for stop in stops} == {"SIGTERM", "SIGINT", "killed"}


def test_a_finished_run_resumed_stays_as_it_is(make_model: MakeModel, options: TrainOptions) -> None:
    train(make_model(), ByteTokenizer(), options)
    before = results(options)
    said = resume(make_model, options)
    assert f"going on from {options.checkpoints_path}/step-000012, after step 12" in said
    assert results(options) == before
    for path in (options.out, options.log_path, options.timing_path, options.best_path):
        message = re.escape(f"{path}: exists already; choose another name or pass --force")
        with pytest.raises(TrainError, match=message):
            train(make_model(), ByteTokenizer(), options)
        path.rename(path.with_name(f"{path.name} before"))
    with pytest.raises(TrainError, match="checkpoints: exists already; go on with --resume, choose another"):
        train(make_model(), ByteTokenizer(), options)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LoraConfig(rank=4, alpha=8, dora=True, modules_to_save=("lm_head", "norm")), {}),
        (LoraConfig(rank=4, alpha=8, init="pissa", dtype="bfloat16"), {}),
        (
            LoraConfig(rank=4, alpha=8, init="olora", bias="all", lora_bias=True, dropout=0.2),
            {"packing": "best-fit"},
        ),
        (LoraConfig(rank=128, alpha=8), {"state_bits": 8, "weight_decay": 0.1, "group_by_length": True}),
    ],
)
def test_every_kind_of_adapter_and_state_goes_on(
    config: LoraConfig, changes: dict[str, Any], make_model: MakeModel, options: TrainOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = replace(options, lora=config, page_budget=None, **changes)
    whole = replace(options, out=options.out.with_name("whole"))
    train(make_model(), ByteTokenizer(), whole)
    stopped_after(7, make_model, options, monkeypatch)
    monkeypatch.undo()
    resume(make_model, options)
    assert results(options) == results(whole)


def test_only_the_newest_checkpoints_stay(make_model: MakeModel, options: TrainOptions) -> None:
    options.checkpoints_path.mkdir()
    (options.checkpoints_path / ".step-000001.0a1b.partial").mkdir()  # of a run killed while it saved
    train(make_model(), ByteTokenizer(), replace(options, save_every=2, keep=2, force=True))
    assert sorted(path.name for path in options.checkpoints_path.iterdir()) == [
        "step-000010",
        "step-000012",
    ]
    train(make_model(), ByteTokenizer(), replace(options, save_every=4, keep=0, force=True))
    assert len(list_checkpoints(options.checkpoints_path)) == 3


def test_paging_may_change_and_another_machine_is_told(
    make_model: MakeModel,
    options: TrainOptions,
    straight: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped_after(7, make_model, options, monkeypatch)
    monkeypatch.setattr(torch, "__version__", "99.0")
    said = resume(make_model, options, page_budget=None)
    assert any("warning: torch was" in line and "and is 99.0" in line for line in said)
    assert results(options) == straight


def test_a_constant_rate_lets_a_run_be_prolonged(
    make_model: MakeModel, options: TrainOptions, tmp_path: Path
) -> None:
    whole = replace(options, schedule="constant", eval_fraction=0.0, eval_every=0, out=tmp_path / "whole")
    train(make_model(), ByteTokenizer(), whole)
    short = replace(whole, out=tmp_path / "short", steps=7)
    train(make_model(), ByteTokenizer(), short)
    resume(make_model, short, steps=STEPS)
    for name in ("adapter_model.safetensors",):
        assert (short.out / name).read_bytes() == (whole.out / name).read_bytes()
    assert short.log_path.read_bytes() == whole.log_path.read_bytes()
    with pytest.raises(TrainError, match="the run is further already, expected at most 10 steps, got 12"):
        resume(make_model, short, steps=10)


def test_early_stopping_is_found_again(make_model: MakeModel, options: TrainOptions, tmp_path: Path) -> None:
    patient = replace(options, eval_every=2, patience=1, min_delta=10.0)
    summary = train(make_model(), ByteTokenizer(), patient)
    assert (summary.steps, summary.gave_up, summary.stopped_by) == (2, True, None)
    before = patient.log_path.read_bytes()
    assert "stopping early after step 2: 1 evaluations without a better one" in resume(make_model, patient)
    assert patient.log_path.read_bytes() == before
    # With more patience it goes on as if it had had that from the start.
    resume(make_model, patient, patience=3)
    other = replace(patient, patience=3, out=tmp_path / "other")
    train(make_model(), ByteTokenizer(), other)
    assert patient.log_path.read_bytes() == other.log_path.read_bytes()
    with pytest.raises(TrainError, match="with this patience the run would have ended at step 2; raise"):
        resume(make_model, patient, patience=1)


def test_a_kill_while_saving_leaves_the_checkpoint_before(
    make_model: MakeModel,
    options: TrainOptions,
    straight: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = os.fsync
    calls = iter(range(10_000))

    def fsync(fd: int) -> None:
        real(fd)
        # Some file of the second checkpoint; what a kill leaves is what an exception finds.
        if len(list_checkpoints(options.checkpoints_path)) == 1 and next(calls) == 2:
            raise Killed

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Killed):
        train(make_model(), ByteTokenizer(), options)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(options.checkpoints_path)] == ["step-000005"]
    resume(make_model, options)
    assert results(options) == straight


@pytest.mark.cuda
@pytest.mark.parametrize("variant", ["graphs", "layer by layer", "dropout"])
def test_stops_on_a_gpu_change_no_byte(
    variant: str,
    make_packed: Callable[..., Path],
    options: TrainOptions,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Recorded passes round otherwise than those layer by layer: each must go the way that it went before."""
    packed = make_packed("llama")
    rows = tmp_path / "rows.jsonl"
    # Shapes that come once, and more that come often than there are places for recorded ones.
    lengths = [3 + 2 * (i % 10) for i in range(60)] + [40, 50, 60]
    rows.write_text(
        "".join(
            json.dumps({"prompt": "q", "completion": TEXT[i : i + n]}) + "\n" for i, n in enumerate(lengths)
        )
    )
    options = replace(
        options,
        data=(rows,),
        batch=1,
        accumulate=4,
        steps=60,
        eval_every=20,
        save_every=11,
        page_budget=None,
        lora=LoraConfig(rank=4, alpha=8, dropout=0.1 if variant == "dropout" else 0.0),
        checkpointing=variant == "layer by layer",
        offload_checkpoints=variant == "layer by layer",
        seq_len=64,
    )
    recorded: list[int] = []

    def run(which: TrainOptions) -> Any:
        model = nf4.load(packed, device="cuda", dtype="bfloat16")
        graphs = model.passes.graphs
        summary = train(model, ByteTokenizer(), which)
        recorded.append(len(graphs._recorded))
        return summary

    whole = replace(options, out=tmp_path / "whole")
    run(whole)
    assert (recorded[0] > 0) == (variant == "graphs")
    for step in (2, 17, 18, 40):
        interrupt_at(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(replace(options, resume=NEWEST)).steps == step
        monkeypatch.undo()
    run(replace(options, resume=NEWEST))
    for file in (
        "{}.jsonl",
        "{}/adapter_model.safetensors",
        "{}.checkpoints/step-000060/training_state.safetensors",
    ):
        stopped, straight = ((tmp_path / file.format(name)).read_bytes() for name in ("adapter", "whole"))
        assert stopped == straight, file
