"""A run that was stopped and went on equals one never stopped, byte for byte."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import nf4
from nf4.data.encode import TextEncoder
from nf4.errors import TrainError
from nf4.lora import LoraConfig
from nf4.model.decoder import CausalLM
from nf4.training import run as run_module
from nf4.training.checkpoint import list_checkpoints
from nf4.training.options import NEWEST, TrainOptions
from nf4.training.train import train
from nf4format.errors import FormatError

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12
TEXT = "the quick brown fox jumps over the lazy dog; " * 30


class ByteTokenizer(TextEncoder):
    """One id a byte, BOS in front."""

    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [1] * special + [3 + byte for byte in text.encode()]


MakeModel = Callable[..., CausalLM]


@pytest.fixture
def options(tmp_path: Path) -> TrainOptions:
    """Everything that holds state: dropout, a schedule, paged moments, two rates, evaluations, a best one."""
    (tmp_path / "text.txt").write_text(TEXT)
    return TrainOptions(
        data=(tmp_path / "text.txt",),
        out=tmp_path / "adapter",
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


def changed(options: TrainOptions, **changes: Any) -> TrainOptions:
    return dataclasses.replace(options, **changes)


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


@pytest.fixture
def straight(make_model: MakeModel, options: TrainOptions) -> dict[str, bytes]:
    """The results of a run never stopped."""
    run = changed(options, out=options.out.with_name("straight"))
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
            summary = train(make_model(), ByteTokenizer(), changed(options, resume=NEWEST))
        except Killed:
            ways.append(f"killed in step {step}")
        else:
            if summary.stopped_by is None:
                return ways
            ways.append(f"{summary.stopped_by} in step {summary.steps}")
            done = summary.steps
        monkeypatch.undo()
        if done == STEPS or len(ways) == 3:
            train(make_model(), ByteTokenizer(), changed(options, resume=NEWEST))
            return ways


def interrupt_evaluation(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Send SIGTERM while a later batch of an evaluation is under way."""
    real, calls = run_module.evaluate, iter(range(1000))

    def evaluate(*args: Any, **kwargs: Any) -> float | None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(run_module, "evaluate", evaluate)


def test_one_run_at_a_time(
    make_model: MakeModel, options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run to the same output is refused while one is under way, and leaves its files alone."""
    refused = []

    def begin_others() -> None:
        before = {path: path.read_bytes() for path in options.out.parent.rglob("*") if path.is_file()}
        for how, problem in (
            ({}, "exists already"),
            ({"resume": NEWEST}, "another run is writing it; wait"),
            ({"force": True}, "another run is writing it; wait"),
        ):
            with pytest.raises(TrainError, match=rf"adapter.jsonl: {problem}"):
                train(make_model(), ByteTokenizer(), changed(options, **how))
            refused.append(problem)
        after = {path: path.read_bytes() for path in options.out.parent.rglob("*") if path.is_file()}
        assert after == before

    interrupt_at(monkeypatch, 7, begin_others)
    train(make_model(), ByteTokenizer(), options)
    assert len(refused) == 3


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
        run = changed(options, out=tmp_path / f"stopped{seed}")
        ways = stop_at_random(make_model, run, monkeypatch, seed)
        monkeypatch.undo()
        differing = [name for name, data in results(run).items() if data != straight[name]]
        assert not differing, (seed, ways)
        stops += ways
        seed += 1
    assert {stop.split()[0] for stop in stops} == {"SIGTERM", "SIGINT", "killed"}


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
        changed(options, **{"resume": NEWEST, **changes}),
        say=said.append,
    )
    return said


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
    options = changed(options, lora=config, page_budget=None, **changes)
    whole = changed(options, out=options.out.with_name("whole"))
    train(make_model(), ByteTokenizer(), whole)
    stopped_after(7, make_model, options, monkeypatch)
    monkeypatch.undo()
    resume(make_model, options)
    assert results(options) == results(whole)


def test_only_the_newest_checkpoints_stay(make_model: MakeModel, options: TrainOptions) -> None:
    options.checkpoints_path.mkdir()
    (options.checkpoints_path / ".step-000001.0a1b.partial").mkdir()  # of a run killed while it saved
    train(make_model(), ByteTokenizer(), changed(options, save_every=2, keep=2, force=True))
    assert sorted(path.name for path in options.checkpoints_path.iterdir()) == [
        "step-000010",
        "step-000012",
    ]
    train(make_model(), ByteTokenizer(), changed(options, save_every=4, keep=0, force=True))
    assert len(list_checkpoints(options.checkpoints_path)) == 3


def test_damaged_checkpoints_are_told_and_passed_over(
    make_model: MakeModel,
    options: TrainOptions,
    straight: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    newest = stopped_after(11, make_model, options, monkeypatch)
    tensors = newest / "training_state.safetensors"
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(FormatError, match="the sum does not match: the file is damaged; resume from another"):
        resume(make_model, options, resume=newest)
    middle = options.checkpoints_path / "step-000010"
    (middle / "state.json").unlink()
    said = resume(make_model, options)
    assert [line.split(":")[0] for line in said[:2]] == ["passing over a checkpoint"] * 2
    assert "step-000011/training_state.safetensors: the sum does not match" in said[0]
    assert "step-000010/state.json: no such file" in said[1]
    assert f"going on from {options.checkpoints_path}/step-000005, after step 5" in said
    assert results(options) == straight


def test_no_whole_checkpoint_is_an_error_and_none_at_all_a_beginning(
    make_model: MakeModel, options: TrainOptions, straight: dict[str, bytes]
) -> None:
    said = resume(make_model, options)
    assert said[0] == f"no checkpoint in {options.checkpoints_path}: the run begins at its first step"
    assert results(options) == straight
    for path in list_checkpoints(options.checkpoints_path):
        (path / "state.json").write_text("{}")
    with pytest.raises(TrainError, match="none of 3 checkpoints is whole; start again with --force"):
        resume(make_model, options)
    shutil.rmtree(options.checkpoints_path)
    with pytest.raises(TrainError, match="exists, and there is no checkpoint to resume from"):
        resume(make_model, options)
    with pytest.raises(FormatError, match=r"elsewhere/state\.json: no such file"):
        resume(make_model, options, resume=options.out.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 2e-2}, "made with another lr, expected 0.01, got 0.02; resume with the options of that run"),
        ({"steps": 20}, "made with another steps, expected 12, got 20"),
        ({"seed": 3}, "made with another seed, expected 0, got 3"),
        ({"betas": (0.9, 0.95)}, r"made with another betas, expected \[0.9, 0.999\], got \[0.9, 0.95\]"),
        ({"lora": LoraConfig(rank=8)}, "made with another lora.alpha, expected 8, got 32.0"),
        ({"eval_every": 3}, "made with another eval_every"),
    ],
)
def test_another_run_is_not_resumed(
    changes: dict[str, Any],
    message: str,
    make_model: MakeModel,
    options: TrainOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped_after(3, make_model, options, monkeypatch)
    log = options.log_path.read_bytes()
    with pytest.raises(TrainError, match=message):
        resume(make_model, options, **changes)
    assert options.log_path.read_bytes() == log


def test_other_data_or_arithmetic_is_not_resumed(
    make_model: MakeModel, options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(3, make_model, options, monkeypatch)
    with pytest.raises(TrainError, match='made with another dtype, expected "float32", got "bfloat16"'):
        resume(lambda: make_model(dtype=torch.bfloat16), options)
    other = options.out.with_name("other.txt")
    other.write_text(TEXT.replace("fox", "dog"))
    with pytest.raises(TrainError, match=r"made with other data, expected .*; resume with the data"):
        resume(make_model, options, data=(other,))
    other.write_text(TEXT)
    assert f"going on from {options.checkpoints_path}/step-000003, after step 3" in resume(
        make_model, options, data=(other,)
    )


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
    whole = changed(options, schedule="constant", eval_fraction=0.0, eval_every=0, out=tmp_path / "whole")
    train(make_model(), ByteTokenizer(), whole)
    short = changed(whole, out=tmp_path / "short", steps=7)
    train(make_model(), ByteTokenizer(), short)
    resume(make_model, short, steps=STEPS)
    for name in ("adapter_model.safetensors",):
        assert (short.out / name).read_bytes() == (whole.out / name).read_bytes()
    assert short.log_path.read_bytes() == whole.log_path.read_bytes()
    with pytest.raises(TrainError, match="the run is further already, expected at most 10 steps, got 12"):
        resume(make_model, short, steps=10)


def test_a_log_that_is_another_is_not_cut(
    make_model: MakeModel, options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(6, make_model, options, monkeypatch)
    lines = options.log_path.read_bytes()
    for content, problem in (
        (lines.replace(b"loss", b"LOSS"), "is not the one that the checkpoint belongs to"),
        (lines[:-5], "is shorter than it was when the checkpoint was made"),
        (None, "cannot be opened: No such file"),
    ):
        options.log_path.unlink()
        if content is not None:
            options.log_path.write_bytes(content)
        with pytest.raises(TrainError, match=re.escape(f"the log {problem}")):
            resume(make_model, options)
        assert not options.log_path.exists() or options.log_path.read_bytes() == content
    said = resume(make_model, options, force=True)
    assert any(line.startswith("beginning a new log: ") for line in said)
    assert json.loads(options.log_path.read_text().splitlines()[0])["step"] == 7


def test_early_stopping_is_found_again(make_model: MakeModel, options: TrainOptions, tmp_path: Path) -> None:
    patient = changed(options, eval_every=2, patience=1, min_delta=10.0)
    summary = train(make_model(), ByteTokenizer(), patient)
    assert (summary.steps, summary.gave_up, summary.stopped_by) == (2, True, None)
    before = patient.log_path.read_bytes()
    assert "stopping early after step 2: 1 evaluations without a better one" in resume(make_model, patient)
    assert patient.log_path.read_bytes() == before
    # With more patience it goes on as if it had had that from the start.
    resume(make_model, patient, patience=3)
    other = changed(patient, patience=3, out=tmp_path / "other")
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


def test_hostile_checkpoints_give_one_error(
    make_model: MakeModel, options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums do not protect from forgery: whatever the state says, it is refused in one line."""
    options = changed(options, keep=0)
    path = stopped_after(2, make_model, options, monkeypatch)
    whole = json.loads((path / "state.json").read_text())
    del whole["sum"]

    def forge(**changes: Any) -> None:
        record = {**whole, **changes}
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
        record["sum"] = xxhash.xxh3_64_hexdigest(text.encode())
        (path / "state.json").write_text(json.dumps(record))

    forge()
    resume(make_model, options, steps=STEPS)  # the forgery itself is right
    for changes in (
        {"step": -1}, {"step": "2"}, {"tokens": 1e300}, {"format": 2}, {"files": {}}, {"files": {"../x": {}}},
        {"evaluations": []}, {"evaluations": {"x": 1}}, {"log": {}}, {"log": None}, {"optimizer_steps": [1]},
        {"optimizer_steps": "all"}, {"passes": {"shapes": 1}}, {"passes": {"shapes": [{}], "is_full": 0}},
        {"options": {}}, {"options": []}, {"data": 1}, {"base": 5}, {"base": "other"}, {"loss_scale": 1},
        {"machine": None}, {"seconds": None}, {"unknown": {}, "step": None},
    ):  # fmt: skip
        forge(**changes)
        with pytest.raises((FormatError, TrainError)) as caught:
            resume(make_model, options, resume=path)
        assert "\n" not in str(caught.value)
    for junk in ("", "[]", "{" * 5000, '{"sum": 1}'):
        (path / "state.json").write_text(junk)
        with pytest.raises(FormatError):
            resume(make_model, options, resume=path)


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
    options = changed(
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

    whole = changed(options, out=tmp_path / "whole")
    run(whole)
    assert (recorded[0] > 0) == (variant == "graphs")
    for step in (2, 17, 18, 40):
        interrupt_at(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(changed(options, resume=NEWEST)).steps == step
        monkeypatch.undo()
    run(changed(options, resume=NEWEST))
    for file in (
        "{}.jsonl",
        "{}/adapter_model.safetensors",
        "{}.checkpoints/step-000060/training_state.safetensors",
    ):
        stopped, straight = ((tmp_path / file.format(name)).read_bytes() for name in ("adapter", "whole"))
        assert stopped == straight, file
