"""What a run tells besides its log: card, settings, picture, numbers; and what it refuses to hide."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import ByteTokenizer

from nf4.errors import TrainError
from nf4.lora import LoraConfig, add_lora, lora_layers
from nf4.model.decoder import CausalLM
from nf4.training import run as run_module
from nf4.training.card import code_span, fenced
from nf4.training.evaluation import best_step, gives_up_at
from nf4.training.options import TrainOptions
from nf4.training.plot import plot_run
from nf4.training.train import make_optimizer, train
from nf4.training.weight_change import WeightChange

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "the quick brown fox jumps over the lazy dog; " * 30
MakeModel = Callable[[], CausalLM]


@pytest.fixture
def options(tmp_path: Path) -> TrainOptions:
    (tmp_path / "te`xt|.txt").write_text(TEXT)
    return TrainOptions(
        data=(tmp_path / "te`xt|.txt",),
        out=tmp_path / "adapter",
        lora=LoraConfig(rank=4, alpha=8),
        lr=1e-2,
        steps=6,
        warmup=2,
        batch=2,
        accumulate=1,
        seq_len=32,
        eval_fraction=0.2,
        eval_every=2,
    )


def test_card_and_settings_stand_beside_the_adapter_and_the_best_one(
    make_model: MakeModel, options: TrainOptions
) -> None:
    summary = train(make_model(), ByteTokenizer(), options, settings="lr = 1\n```\n# not the end\n")
    for folder in (options.out, options.best_path):
        assert (folder / "training_config.toml").read_text() == "lr = 1\n```\n# not the end\n"
        card = (folder / "README.md").read_text()
        head = card.split("---\n")[1]
        assert "library_name: peft" in head
        assert 'model_name: "adapter"' in head
        assert f"* ``{options.data[0]}``: " in card
        assert "````toml\nlr = 1\n```\n# not the end\n````" in card
        assert "* steps: 6, 384 tokens" in card
        assert len(re.findall(r"evaluation after step \d: loss", card)) == 4
    assert summary.weights is not None
    assert summary.weights.of_b > 0
    assert (
        f"norm of B: {summary.weights.of_b:.4g}; change of the weights: {summary.weights.change:.4g}" in card
    )
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(head)["model_name"] == "adapter"


@pytest.mark.parametrize("text", ["a", "`", "a``b", " a", "", "a\nb# c", "\x1b[31m", "``` `x"])
def test_strings_cannot_leave_their_place_in_the_card(text: str) -> None:
    span = code_span(text)
    assert "\n" not in span
    assert "\x1b" not in span
    fence = re.match("`+", span)
    assert fence is not None
    assert span.endswith(fence[0])
    assert not re.search(f"(?<!`){fence[0]}(?!`)", span[len(fence[0]) : -len(fence[0])])
    first, *inside, last, empty = fenced(f"x\n{text}\n````", "toml")
    assert (first, empty) == (f"{last}toml", "")
    assert not any(line.strip().startswith(last) for line in inside)


@pytest.mark.parametrize("init", ["default", "olora"])
def test_norms_are_those_of_whole_products(init: str, make_model: MakeModel) -> None:
    model = make_model()
    add_lora(model, LoraConfig(rank=4, alpha=6, init=init))
    change = WeightChange(model)
    assert change.measure().change == pytest.approx(0.0, abs=1e-5)
    before = {name: layer.lora_B @ layer.lora_A for name, layer in lora_layers(model)}
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
        torch.nn.init.normal_(layer.lora_A)
    expected = sum(
        (layer.scaling * (layer.lora_B @ layer.lora_A - before[name])).square().sum().item()
        for name, layer in lora_layers(model)
    )
    of_b = sum(layer.lora_B.square().sum().item() for _, layer in lora_layers(model))
    norms = change.measure()
    assert norms.change == pytest.approx(expected**0.5, rel=1e-4)
    assert norms.of_b == pytest.approx(of_b**0.5, rel=1e-5)


def test_a_run_that_learns_nothing_is_an_error(
    make_model: MakeModel, options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        TrainError, match="nothing was learned: 6 steps have changed no parameter; raise --lr"
    ):
        # Far below what bfloat16 can add to values of B's size, were they not zero.
        train(make_model(), ByteTokenizer(), dataclasses.replace(options, lr=1e-300))
    model = make_model()
    for loss, norm, what in ((0.0, 1.0, "loss"), (1.0, 0.0, "gradient")):
        values = torch.tensor(loss, dtype=torch.float64), torch.tensor(norm)
        monkeypatch.setattr(run_module, "train_step", lambda *args, values=values, **named: values)
        run = dataclasses.replace(options, out=options.out.with_name(what))
        message = (
            rf"step 1: the {what} is exactly 0: nothing is learned, got .*example \d+; .*example \d+; look at"
        )
        with pytest.raises(TrainError, match=message):
            train(make_model(), ByteTokenizer(), run)
    add_lora(model, options.lora)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(TrainError, match="nothing to train: no parameter of the model requires a gradient"):
        make_optimizer(model, options)


def test_lora_plus_gives_b_a_rate_of_its_own(make_model: MakeModel, options: TrainOptions) -> None:
    """With AdamW's first step, which moves every element by the rate, whatever the gradient."""
    for ratio in (1.0, 16.0):
        model = make_model()
        run = dataclasses.replace(
            options, out=options.out.with_name(str(ratio)), steps=1, warmup=0, lora_plus_ratio=ratio,
            eval_every=0, eval_fraction=0.0, eps=1e-12,
        )  # fmt: skip
        train(model, ByteTokenizer(), run)
        moved = torch.cat([layer.lora_B.detach().abs().flatten() for _, layer in lora_layers(model)])
        assert moved.median().item() == pytest.approx(ratio * 1e-2, rel=1e-2)


def test_best_and_giving_up_follow_from_the_losses() -> None:
    losses = {0: 1.0, 10: 3.0, 20: 2.0, 30: 2.0, 40: 2.5, 50: 1.9}
    assert best_step({}) is best_step({0: 1.0}) is None
    assert best_step(losses) == 50
    assert best_step({0: 1.0, 10: 2.0, 20: 2.0}) == 10
    assert gives_up_at(losses, 0, 0.0) is None
    assert gives_up_at(losses, 5, 0.0) == 50  # none is better than the model before training
    trained = {step: loss for step, loss in losses.items() if step}
    assert gives_up_at(trained, 2, 0.0) == 40
    assert gives_up_at(trained, 3, 0.0) is None
    assert gives_up_at(trained, 3, 0.2) == 50


def test_plot_of_a_run(make_model: MakeModel, options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("matplotlib"):
        train(make_model(), ByteTokenizer(), dataclasses.replace(options, plot=True))
        assert options.plot_path.read_bytes().startswith(b"\x89PNG")
        options.log_path.write_text("")
        with pytest.raises(TrainError, match="no step to plot"):
            plot_run(options.log_path, options.timing_path, options.plot_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TrainError, match="a plot needs matplotlib; pip install matplotlib"):
        plot_run(options.log_path, options.timing_path, options.plot_path)


@pytest.mark.parametrize(
    ("changes", "package"),
    [({"tensorboard": Path("tb")}, "tensorboard"), ({"wandb": "p"}, "wandb"), ({"plot": True}, "matplotlib")],
)
def test_extras_that_are_missing_are_told_before_anything_happens(
    changes: dict[str, Any], package: str, make_model: MakeModel, options: TrainOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("nf4.training.sinks.find_spec", lambda name: None)
    with pytest.raises(TrainError, match=f"needs {package}; pip install {package}"):
        train(make_model(), ByteTokenizer(), dataclasses.replace(options, **changes))
    assert not options.log_path.exists()


def test_tensorboard_holds_the_numbers_of_the_log(make_model: MakeModel, options: TrainOptions) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = options.out.with_name("tb")
    train(make_model(), ByteTokenizer(), dataclasses.replace(options, tensorboard=folder))
    events = EventAccumulator(str(folder))
    events.Reload()
    records = [json.loads(line) for line in options.log_path.read_text().splitlines()]
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(loss)) for step, loss in losses
    ]
    assert [event.step for event in events.Scalars("eval_loss")] == [0, 2, 4, 6]
    assert len(events.Scalars("tokens_per_second")) == 6


@pytest.mark.parametrize("fails", ["", "init", "log"])
def test_weights_and_biases_gets_the_numbers_and_cannot_end_a_run(
    fails: str, make_model: MakeModel, options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the calls that are used: the real one talks to a server."""
    seen: list[tuple[int, dict[str, float]]] = []
    started: dict[str, Any] = {}

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            if fails == "log":
                raise OSError("the network\nis down")
            seen.append((step, values))

        def finish(self) -> None:
            started["finished"] = True

    def init(**settings: Any) -> Run:
        if fails == "init":
            raise RuntimeError("no")
        started.update(settings)
        return Run()

    fake = types.ModuleType("wandb")
    fake.init, fake.api = init, types.SimpleNamespace(api_key=None)  # type: ignore[attr-defined]
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said: list[str] = []
    summary = train(make_model(), ByteTokenizer(), dataclasses.replace(options, wandb="p"), say=said.append)
    assert summary.steps == 6
    warnings = [line for line in said if "no more numbers for Weights & Biases" in line]
    assert len(warnings) == bool(fails)
    if fails == "log":
        assert "the network is down" in warnings[0]
    if not fails:
        assert started["mode"] == "offline"
        assert (started["project"], started["name"], started["finished"]) == ("p", "adapter", True)
        assert started["config"]["lora.rank"] == 4
        assert [step for step, values in seen if "loss" in values] == [1, 2, 3, 4, 5, 6]
