"""What a run does not go on from: damage, forgeries, other data or options, a run that is under way."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from byte_tokenizer import ByteTokenizer
from stopped_runs import (
    STEPS,
    TEXT,
    MakeModel,
    interrupt_at,
    results,
    resume,
    run_options,
    stopped_after,
    straight_results,
)

from nf4.errors import TrainError
from nf4.lora import LoraConfig
from nf4.training.checkpoint import list_checkpoints
from nf4.training.options import NEWEST, TrainOptions
from nf4.training.train import train
from nf4format.errors import FormatError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def options(tmp_path: Path) -> TrainOptions:
    return run_options(tmp_path)


@pytest.fixture
def straight(make_model: MakeModel, options: TrainOptions) -> dict[str, bytes]:
    return straight_results(make_model, options)


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
                train(make_model(), ByteTokenizer(), replace(options, **how))
            refused.append(problem)
        after = {path: path.read_bytes() for path in options.out.parent.rglob("*") if path.is_file()}
        assert after == before

    interrupt_at(monkeypatch, 7, begin_others)
    train(make_model(), ByteTokenizer(), options)
    assert len(refused) == 3


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


def test_hostile_checkpoints_give_one_error(
    make_model: MakeModel, options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums do not protect from forgery: whatever the state says, it is refused in one line."""
    options = replace(options, keep=0)
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
