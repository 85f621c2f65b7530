"""The training loop: what it computes, writes, refuses, and how it ends."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from byte_tokenizer import ByteTokenizer

from nf4.adapters import load_adapter
from nf4.data.batches import make_batch
from nf4.data.options import DataOptions
from nf4.data.reading import load_dataset
from nf4.errors import TrainError
from nf4.lora import LoraConfig, add_lora, lora_layers
from nf4.model.decoder import CausalLM
from nf4.paging.optim import PagedAdamW
from nf4.text.perplexity import encode_documents, perplexity
from nf4.text.tokenizer import Tokenizer
from nf4.training import run as run_module
from nf4.training.evaluation import evaluate
from nf4.training.options import TrainOptions
from nf4.training.runlog import RunLog
from nf4.training.signals import StopRequest
from nf4.training.step import train_step
from nf4.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


TOKENIZER = ByteTokenizer()
TEXT = "the quick brown fox jumps over the lazy dog; " * 40


@pytest.fixture
def options(tmp_path: Path) -> TrainOptions:
    (tmp_path / "text.txt").write_text(TEXT)
    return TrainOptions(
        data=(tmp_path / "text.txt",),
        out=tmp_path / "adapter",
        lora=LoraConfig(rank=4, alpha=8),
        lr=1e-2,
        steps=6,
        warmup=2,
        batch=2,
        accumulate=2,
        seq_len=32,
    )


def read_log(options: TrainOptions) -> list[dict[str, Any]]:
    return [json.loads(line) for line in options.log_path.read_text().splitlines()]


def read_timing(options: TrainOptions) -> list[dict[str, Any]]:
    return [json.loads(line) for line in options.timing_path.read_text().splitlines()]


def weights(options: TrainOptions) -> bytes:
    return (options.out / "adapter_model.safetensors").read_bytes()


def test_learns_logs_and_saves_what_it_learned(
    make_model: Callable[[], CausalLM], options: TrainOptions
) -> None:
    options = replace(options, steps=30, eval_fraction=0.2, eval_every=10)
    model, said = make_model(), []
    summary = train(model, TOKENIZER, options, say=said.append)
    assert list(summary.evaluations) == [0, 10, 20, 30]
    assert summary.evaluations[30] < summary.evaluations[0] - 1
    assert summary.steps == 30
    assert summary.stopped_by is None

    records = read_log(options)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert steps[0]["lr"] == options.lr / 2
    assert steps[1]["lr"] == options.lr
    assert steps[-1]["tokens"] == summary.tokens == 30 * 4 * 32
    assert all(record.keys() == {"step", "loss", "lr", "grad_norm", "tokens"} for record in steps)
    assert all(record["grad_norm"] > 0 for record in steps)
    timing = read_timing(options)
    assert [record["step"] for record in timing] == [record["step"] for record in records]
    assert all(record["tokens_per_second"] > 0 for record in timing if "seconds" in record)
    assert all(record["memory_bytes"] > 1 << 20 for record in timing if "seconds" in record)
    evaluations = {record["step"]: record for record in records if "eval_loss" in record}
    assert {step: record["eval_loss"] for step, record in evaluations.items()} == summary.evaluations
    assert evaluations[30]["eval_perplexity"] == pytest.approx(math.exp(summary.evaluations[30]))
    assert len([line for line in said if line.startswith("expected time  about")]) == 1
    assert any(line.startswith("tokens in all  about 3,840") for line in said)

    ids = torch.tensor([TOKENIZER.encode("the quick")])
    again = make_model().eval()
    load_adapter(again, options.out)
    assert not model.training
    assert torch.equal(again(ids), model(ids))


def test_same_seed_same_run_bit_for_bit_whatever_the_paging(
    make_model: Callable[[], CausalLM], options: TrainOptions, tmp_path: Path
) -> None:
    options = replace(options, lora=LoraConfig(rank=4, alpha=8, dropout=0.2))
    results = []
    for number, changes in enumerate(
        ({}, {}, {"page_budget": 4000, "page_file": tmp_path / "pages"}, {"seed": 1})
    ):
        run = replace(options, out=tmp_path / f"run{number}", **changes)
        torch.manual_seed(number)  # nothing may depend on the state outside
        said: list[str] = []
        train(make_model(), TOKENIZER, run, say=said.append)
        records = read_log(run)
        assert all(("pages" in record) == ("page_budget" in changes) for record in read_timing(run))
        paged = "optimizer state: 30,000 bytes, at most 4,000 of them in memory, the rest paged"
        assert (paged in said) == ("page_budget" in changes)
        results.append((weights(run), [record["loss"] for record in records]))
    assert results[0] == results[1] == results[2]
    assert results[3] != results[0]
    assert not (tmp_path / "pages").exists()


def test_one_step_is_plain_accumulated_training(
    make_model: Callable[[], CausalLM], options: TrainOptions
) -> None:
    """Against autograd on the mean loss over all labelled tokens of the step, and torch.optim.AdamW."""
    rows = options.out.with_name("rows.jsonl")
    rows.write_text(
        "".join(json.dumps({"prompt": "a" * n, "completion": "bc" * n}) + "\n" for n in (1, 3, 9, 5))
    )
    examples = list(load_dataset([rows], TOKENIZER, DataOptions(seq_len=64)))
    ours, theirs = make_model(), make_model()
    for model in (ours, theirs):
        add_lora(model, options.lora, seed=3)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    batch = make_batch(examples)
    logits = theirs(batch.input_ids, batch.attention_mask)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0).step()

    optimizer = PagedAdamW([p for p in ours.parameters() if p.requires_grad], weight_decay=0.0)
    micro_batches = [make_batch(examples[:1]), make_batch(examples[1:])]
    values = train_step(ours, optimizer, micro_batches, rate=0.1, clip=0.5, step=1)
    assert [value.item() for value in values] == pytest.approx((loss.item(), norm.item()), rel=1e-5)
    for (_, a), (_, b) in zip(lora_layers(ours), lora_layers(theirs), strict=True):
        torch.testing.assert_close(a.lora_B, b.lora_B, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rows", [False, True])
def test_eight_batches_of_one_equal_one_batch_of_eight(
    rows: bool, make_model: Callable[[], CausalLM], options: TrainOptions, tmp_path: Path
) -> None:
    data = options.data
    if rows:
        data = (tmp_path / "rows.jsonl",)
        lines = [json.dumps({"prompt": "q" * (i % 5), "completion": TEXT[i : 2 * i + 3]}) for i in range(16)]
        data[0].write_text("\n".join(lines))
    losses = []
    for batch, accumulate in ((8, 1), (1, 8), (3, 3)):
        run = replace(
            options, data=data, batch=batch, accumulate=accumulate, out=tmp_path / f"run{batch}", steps=4
        )
        train(make_model(), TOKENIZER, run)
        losses.append([record["loss"] for record in read_log(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(losses[2], rel=1e-4)


def test_checkpointing_changes_nothing(
    make_model: Callable[[], CausalLM], options: TrainOptions, tmp_path: Path
) -> None:
    options = replace(options, lora=LoraConfig(rank=4, alpha=8, dropout=0.3))
    adapters = set()
    for name in ("plain", "checkpointing", "offload_checkpoints"):
        run = replace(options, out=tmp_path / name, **({} if name == "plain" else {name: True}))
        model = make_model()
        train(model, TOKENIZER, run)
        assert not (model.passes.gradient_checkpointing or model.passes.offload_checkpoints)
        adapters.add((run.out / "adapter_model.safetensors").read_bytes())
    assert len(adapters) == 1


def test_evaluation_is_the_mean_over_tokens_without_dropout(
    make_model: Callable[[], CausalLM], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a", "completion": "bc" * n}) + "\n" for n in (9, 1, 4)))
    dataset = load_dataset([rows], TOKENIZER, DataOptions(seq_len=64))
    model = make_model()
    add_lora(model, LoraConfig(dropout=0.9))
    model.train()
    total = 0.0
    plain = make_model()
    for ids, labelled in dataset:
        logits = plain(torch.tensor(ids[None], dtype=torch.int64))[0].log_softmax(-1)
        total -= sum(logits[at - 1, ids[at]].item() for at in labelled.nonzero()[0])
    assert evaluate(model, dataset, 2) == pytest.approx(total / dataset.num_labels, rel=1e-5)
    assert model.training


def test_evaluation_agrees_with_the_perplexity_of_a_text(
    make_model: Callable[[], CausalLM], options: TrainOptions
) -> None:
    model = make_model()
    ids = encode_documents(cast(Tokenizer, TOKENIZER), TEXT)
    expected = perplexity(model, ids, 32, bos_id=1)
    dataset = load_dataset(options.data, TOKENIZER, DataOptions(seq_len=32))
    assert dataset.num_labels == expected.tokens
    assert evaluate(model, dataset, 4) == pytest.approx(expected.mean_nll, rel=1e-6)


def test_token_outside_the_vocabulary_is_told(
    make_model: Callable[[], CausalLM], options: TrainOptions
) -> None:
    class Foreign(ByteTokenizer):
        def encode(self, text: str, special: bool = True) -> list[int]:
            return [token + 200 for token in super().encode(text, special)]

    options.data[0].write_text("\u00ff" * 40)
    with pytest.raises(
        TrainError, match="token id, expected below the model's 320, got 398; the tokenizer is not"
    ):
        train(make_model(), Foreign(), options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_stops(
    number: signal.Signals,
    make_model: Callable[[], CausalLM],
    options: TrainOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(number)
    real = run_module.train_step

    def interrupted(*args: Any, step: int, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 2:
            os.kill(os.getpid(), number)
        return real(*args, step=step, **kwargs)

    monkeypatch.setattr(run_module, "train_step", interrupted)
    summary = train(make_model(), TOKENIZER, replace(options, eval_fraction=0.2))
    assert (summary.steps, summary.stopped_by) == (2, number.name)
    assert [record["step"] for record in read_log(options)] == [0, 1, 2]
    load_adapter(make_model(), options.out)
    assert signal.getsignal(number) is before


def test_second_interrupt_is_not_held_back() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal is signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_full_disk_leaves_whole_lines_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLog(tmp_path / "log") as log:
        log.write(step=1, loss=math.nan)
        real = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:4]))
        with pytest.raises(TrainError, match="log: cannot write the log: No space left on device"):
            log.write(step=2)
    assert (tmp_path / "log").read_text() == '{"step": 1, "loss": null}\n'
    with pytest.raises(TrainError, match="cannot write the log: Is a directory"), RunLog(tmp_path) as log:
        log.write(step=1)


def test_loss_that_is_not_finite_stops_and_keeps_the_last_save(
    make_model: Callable[[], CausalLM], options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    real = run_module.train_step

    def poisoned(*args: Any, step: int, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 4:
            next(lora_layers(model))[1].lora_B.data.fill_(math.inf)
        return real(*args, step=step, **kwargs)

    monkeypatch.setattr(run_module, "train_step", poisoned)
    options = replace(options, save_every=3, page_budget=4000, page_file=options.out.with_name("pages"))
    problem = r"step 4: the loss, micro-batch 1 of 2, is not finite, got nan from .*text.txt, example \d+; "
    with pytest.raises(TrainError, match=problem):
        train(model, TOKENIZER, options)
    assert [record["step"] for record in read_log(options)] == [1, 2, 3]
    again = make_model()
    load_adapter(again, options.checkpoints_path / "step-000003" / "adapter")
    assert sorted(path.name for path in options.out.parent.iterdir()) == [
        "adapter.checkpoints",
        "adapter.jsonl",
        "adapter.timing.jsonl",
        "text.txt",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "bad steps, expected at least 1, got 0"),
        ({"lr": 0.0}, "bad lr, expected above 0, got 0.0"),
        ({"lr": math.nan}, "bad lr, expected above 0, got nan"),
        ({"clip": -1.0}, "bad clip, expected at least 0, got -1.0"),
        ({"schedule": "step"}, "unknown schedule, expected cosine or linear or constant, got step"),
        ({"seq_len": 1000}, "sequence length, expected at most the model's 512 positions, got 1000"),
        ({"eval_every": 5}, "evaluation asked for without data; give --eval-data"),
        ({"eval_fraction": 1.0}, "cannot hold out a fraction of 1.0"),
        ({"out": Path("/nonexistent/adapter")}, "there is no directory /nonexistent; create it first"),
        ({"lora": LoraConfig(targets=("nothing",))}, "target 'nothing' matches no linear layer"),
        ({"page_budget": 7}, "page budget is smaller than one page, expected at least 8 bytes, got 7"),
    ],
)
def test_bad_options_are_told_and_leave_nothing(
    changes: dict[str, Any], message: str, make_model: Callable[[], CausalLM], options: TrainOptions
) -> None:
    with pytest.raises(TrainError, match=message):
        train(make_model(), TOKENIZER, replace(options, **changes))
    assert [path.name for path in options.out.parent.iterdir()] == ["text.txt"]


def test_existing_output_is_refused_unless_forced(
    make_model: Callable[[], CausalLM], options: TrainOptions
) -> None:
    train(make_model(), TOKENIZER, options)
    first, log = weights(options), options.log_path.read_bytes()
    with pytest.raises(TrainError, match=r"adapter: exists already; choose another name or pass --force"):
        train(make_model(), TOKENIZER, options)
    assert (weights(options), options.log_path.read_bytes()) == (first, log)
    train(make_model(), TOKENIZER, replace(options, force=True, seed=5))
    assert weights(options) != first
    assert len(read_log(options)) == options.steps
