"""One step of training: clipping, memory pressure, loss scaling, numbers that are not finite."""

from __future__ import annotations

import copy
import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_tokenizer import ByteTokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel

from nf4.data.batches import Batch, make_batch
from nf4.data.dataset import Example
from nf4.errors import TrainError
from nf4.lora import LoraConfig, add_lora, lora_layers
from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM
from nf4.paging.cuda_pager import SLAB_PAGES
from nf4.paging.optim import PagedAdamW
from nf4.training.loss_scale import GOOD_STEPS, LossScale
from nf4.training.options import TrainOptions
from nf4.training.step import train_step
from nf4.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make_model(family_config: Callable[..., dict[str, Any]]) -> Callable[..., CausalLM]:
    """The same small dense model with adapters of rank 4 at each call."""

    def build(
        dtype: torch.dtype = torch.float32, device: str = "cpu", dropout: float = 0.0, **changes: Any
    ) -> CausalLM:
        torch.manual_seed(0)
        fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **changes}
        model = CausalLM(ModelConfig.from_dict(family_config("llama", **fields))).to(device, dtype)
        add_lora(model, LoraConfig(rank=4, alpha=8, dropout=dropout))
        for _, layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora_B.data, std=0.02)
        return model.train()

    return build


def example(ids: np.ndarray) -> Example:
    return Example(ids, np.arange(len(ids)) > 0)


def make_batches(count: int = 3, rows: int = 2, length: int = 24) -> list[Batch]:
    rng = np.random.default_rng(0)
    return [
        make_batch([example(rng.integers(3, 320, length - 2 * k)) for k in range(rows)]) for _ in range(count)
    ]


def trained(model: CausalLM) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def values_of(model: CausalLM) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trained(model)]


def fail_once(model: CausalLM, at_call: int, times: int = 1) -> list[int]:
    """Let the model's forward run out of memory at a call, halfway through; returns the calls, growing."""
    real, calls = model.model.layers[1].forward, [0]

    def forward(*arguments: Any) -> Any:
        calls[0] += 1
        if at_call <= calls[0] < at_call + times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More words")
        return real(*arguments)

    model.model.layers[1].forward = forward  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("fails_at", [1, 3, 5])
def test_a_step_that_ran_out_of_memory_is_repeated_exactly(
    fails_at: int, make_model: Callable[..., CausalLM]
) -> None:
    results = []
    for fails in (False, True):
        model = make_model(dropout=0.3)
        optimizer = PagedAdamW(trained(model), weight_decay=0.1)
        calls = fail_once(model, fails_at if fails else 100)
        torch.manual_seed(5)
        numbers = [
            train_step(model, optimizer, make_batches(2), rate=0.01, clip=0.5, step=step)
            for step in range(1, 4)
        ]
        assert calls[0] == 6 + (1 + (fails_at - 1) % 2) * fails
        results.append((values_of(model), [(loss.item(), norm.item()) for loss, norm in numbers]))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


def test_evaluation_that_ran_out_of_memory_is_repeated(
    make_model: Callable[..., CausalLM], options: Callable[..., TrainOptions]
) -> None:
    evaluations = []
    for name, fails_at in (("plain", 1000), ("pressed", 2)):
        model = bare(make_model())
        calls = fail_once(model, fails_at)
        summary = train(model, ByteTokenizer(), options(name, steps=1, eval_fraction=0.3))
        evaluations.append(summary.evaluations)
    assert evaluations[0] == evaluations[1]
    assert calls[0] > 4


def test_running_out_of_memory_twice_is_told(make_model: Callable[..., CausalLM]) -> None:
    model = make_model()
    before = values_of(model)
    fail_once(model, 2, times=9)
    with pytest.raises(
        TrainError,
        match=r"step 7: not enough GPU memory, with optimizer state on the host, got CUDA out of memory\. "
        r"Tried to allocate 2.00 GiB; use --checkpointing",
    ):
        train_step(model, PagedAdamW(trained(model)), make_batches(), rate=0.1, clip=1.0, step=7)
    assert all(torch.equal(a, b) for a, b in zip(before, values_of(model), strict=True))


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_clipping_equals_torch(clip: float, make_model: Callable[..., CausalLM]) -> None:
    ours, theirs = make_model(), make_model()
    batches = make_batches(1)
    theirs_optimizer = torch.optim.AdamW(trained(theirs), lr=0.01, weight_decay=0.0)
    optimizer = PagedAdamW(trained(ours), weight_decay=0.0)
    for step in range(1, 6):
        train_step(ours, optimizer, batches, rate=0.01, clip=clip, step=step)
        logits = theirs(batches[0].input_ids, batches[0].attention_mask)[:, :-1].float()
        labels = batches[0].labels[:, 1:]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(trained(theirs), clip or math.inf)
        theirs_optimizer.step()
        theirs_optimizer.zero_grad()
    for p, q in zip(trained(ours), trained(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_before_update_comes_between_gradients_and_update(make_model: Callable[..., CausalLM]) -> None:
    model = make_model()
    before = values_of(model)
    seen = []

    def look() -> None:
        seen.append(all(torch.equal(a, b) for a, b in zip(before, values_of(model), strict=True)))
        assert all(p.grad is not None and p.grad.any() for p in trained(model))

    optimizer = PagedAdamW(trained(model))
    train_step(model, optimizer, make_batches(), rate=0.1, clip=1.0, step=1, before_update=look)
    assert seen == [True]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_half_precision_overflow_lowers_the_scale_and_changes_nothing(
    device: str, make_model: Callable[..., CausalLM]
) -> None:
    model = make_model(torch.float16, device)
    optimizer = PagedAdamW(trained(model), loss_scale=LossScale(2.0**24))
    before, norms = values_of(model), []
    while optimizer.loss_scale.value > 2.0**10 and not (norms and math.isfinite(norms[-1])):
        assert all(torch.equal(a, b) for a, b in zip(before, values_of(model), strict=True))
        loss, norm = train_step(model, optimizer, make_batches(), rate=0.01, clip=1.0, step=1)
        assert math.isfinite(loss)
        norms.append(norm.item())
    assert len(norms) > 1
    assert optimizer.loss_scale == LossScale(2.0 ** (25 - len(norms)), good_steps=1)
    assert not any(torch.equal(a, b) for a, b in zip(before, values_of(model), strict=True))
    assert next(iter(optimizer.state_dict()["state"].values()))["step"] == 1  # those left out do not count

    reference = make_model(torch.float32, device)
    _, norm = train_step(
        reference, PagedAdamW(trained(reference)), make_batches(), rate=0.01, clip=1.0, step=1
    )
    assert norms[-1] == pytest.approx(norm.item(), rel=0.02)  # scaled back


def test_loss_scale_grows_shrinks_gives_up_and_travels(make_model: Callable[..., CausalLM]) -> None:
    scale = LossScale()
    for _ in range(GOOD_STEPS - 1):
        scale.succeeded()
    assert scale.value == 2.0**16
    scale.succeeded()
    assert scale == LossScale(2.0**17, 0)
    scale.succeeded()
    scale.overflowed()
    assert scale == LossScale(2.0**16, 0)
    scale.value = 1.0
    with pytest.raises(TrainError, match="not finite at a loss scale of 1; lower the learning rate"):
        scale.overflowed()

    model = make_model(torch.float16)
    optimizer = PagedAdamW(trained(model), loss_scale=LossScale(2.0**9, 3))
    saved = copy.deepcopy(optimizer.state_dict())
    other = PagedAdamW(trained(make_model(torch.float16)), loss_scale=LossScale())
    other.load_state_dict(saved)
    assert other.loss_scale == LossScale(2.0**9, 3)
    torch.optim.AdamW(trained(make_model(torch.float16))).load_state_dict(saved)  # torch minds it not


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., TrainOptions]:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 60)

    def build(name: str, **changes: Any) -> TrainOptions:
        settings: dict[str, Any] = {
            "data": (tmp_path / "text.txt",),
            "out": tmp_path / name,
            "lora": LoraConfig(rank=4, alpha=8, dropout=0.1),
            "lr": 1e-2,
            "steps": 6,
            "batch": 2,
            "accumulate": 2,
            "seq_len": 32,
        }
        return TrainOptions(**{**settings, **changes})

    return build


def bare(model: CausalLM) -> CausalLM:
    """The model without its adapters."""
    for name, layer in list(lora_layers(model)):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base)
    return model


def read_log(options: TrainOptions) -> list[dict[str, Any]]:
    return [json.loads(line) for line in options.log_path.read_text().splitlines()]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_half_precision_run_logs_its_scale(
    device: str, make_model: Callable[..., CausalLM], options: Callable[..., TrainOptions]
) -> None:
    run = options("half", steps=20)
    train(bare(make_model(torch.float16, device)), ByteTokenizer(), run)
    records = read_log(run)
    assert records[0]["loss_scale"] == 2.0**16
    assert [record["step"] for record in records] == list(range(1, 21))
    assert records[-1]["loss"] < records[0]["loss"] - 0.5


@pytest.mark.cuda
def test_run_on_a_gpu_learns_pages_and_gives_the_same_adapter(
    make_model: Callable[..., CausalLM], options: Callable[..., TrainOptions]
) -> None:
    adapters, losses = [], []
    for name, budget in (("resident", None), ("paged", 4096)):
        run = options(name, page_budget=budget, steps=20)
        with sdpa_kernel(SDPBackend.MATH):  # the others add gradients up in any order
            train(bare(make_model(torch.bfloat16, "cuda")), ByteTokenizer(), run)
        adapters.append((run.out / "adapter_model.safetensors").read_bytes())
        records = read_log(run)
        losses.append([record["loss"] for record in records])
        assert [record["step"] for record in records] == list(range(1, 21))
        timing = [json.loads(line) for line in run.timing_path.read_text().splitlines()]
        assert ("pages" in timing[-1]) == (budget is not None)
        assert all(record["grad_norm"] > 0 for record in records)
        assert all(record["gpu_memory_bytes"] > 0 for record in timing)
    assert timing[-1]["pages"]["bytes_in"] > 0
    assert losses[0] == losses[1]
    assert adapters[0] == adapters[1]
    assert losses[0][-1] < losses[0][0] - 0.5


@pytest.mark.cuda
@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_numbers_that_are_not_finite_stop_a_gpu_run_and_leave_parameters(
    what: str, make_model: Callable[..., CausalLM], options: Callable[..., TrainOptions],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = bare(make_model(torch.float32, "cuda"))
    kept: list[torch.Tensor] = []
    real = PagedAdamW.gradient_norm

    def poisoned(optimizer: PagedAdamW) -> torch.Tensor:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = real(optimizer)
        calls.append(len(calls) + 1)
        if len(calls) != 3:
            return norm
        kept.extend(p.detach().clone() for p in parameters)
        return norm * math.inf

    calls: list[int] = []
    if what == "gradient norm":
        monkeypatch.setattr(PagedAdamW, "gradient_norm", poisoned)
        with pytest.raises(TrainError, match="step 3: the gradient norm is not finite, got inf"):
            train(model, ByteTokenizer(), options("bad"))
        assert len(calls) == 4  # found out with the next step under way
        assert all(torch.equal(a, b) for a, b in zip(kept, trained(model), strict=True))
    else:
        with torch.no_grad():
            model.model.norm.weight.fill_(math.inf)
        with pytest.raises(TrainError, match="step 1: the loss is not finite, got nan"):
            train(model, ByteTokenizer(), options("bad"))
        assert not any(layer.lora_B.any() for _, layer in lora_layers(model))
    assert not options("bad").out.exists()


@pytest.mark.cuda
def test_update_waits_for_nothing(make_model: Callable[..., CausalLM]) -> None:
    for paging in ({}, {"page_bytes": 4096, "budget_bytes": 5 * 4096}):
        model = make_model(torch.float32, "cuda")
        optimizer = PagedAdamW(trained(model), **paging)
        train_step(model, optimizer, make_batches(), rate=0.01, clip=1.0, step=1)
        for p in trained(model):
            p.grad.normal_()
        torch.cuda.synchronize()
        torch.cuda._sleep(500_000_000)
        end = torch.cuda.Event()
        torch.cuda.set_sync_debug_mode("error")
        try:
            factor = (1.0 / (optimizer.gradient_norm() + 1e-6)).clamp(max=1.0)
            optimizer.step(gradient_factor=factor)
            optimizer.zero_grad(set_to_none=False)
            end.record()
            assert not end.query()  # the GPU is still asleep
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.cuda
def test_running_out_of_gpu_memory_pages_the_optimizer_and_changes_nothing(
    make_model: Callable[..., CausalLM],
) -> None:
    """A real limit, and a forward that wants more than it leaves while all state is on the GPU."""
    results, errors = [], 0
    for limited in (False, True):
        gc.collect()
        torch.cuda.empty_cache()  # no slab of pages in a larger block that others hold
        model = make_model(torch.bfloat16, "cuda", hidden_size=512, intermediate_size=1024)
        for _, layer in lora_layers(model):  # much state for a small model
            layer.lora_A.data = layer.lora_A.data.repeat(512, 1)
            layer.lora_B.data = layer.lora_B.data.repeat(1, 512) / 512
        optimizer = PagedAdamW(trained(model), lr=1e-3)
        resident = optimizer.pager.capacity_bytes
        assert resident > 200 << 20
        real = model.hidden_states

        def greedy(
            ids: torch.Tensor, real: Any = real, wanted: int = resident // 2, **named: Any
        ) -> torch.Tensor:
            nonlocal errors
            hidden = real(ids, **named)
            try:
                torch.empty(wanted, dtype=torch.uint8, device="cuda")
            except torch.OutOfMemoryError:
                errors += 1
                raise
            return hidden

        try:
            with sdpa_kernel(SDPBackend.MATH):  # the others add gradients up in any order
                train_step(model, optimizer, make_batches(2), rate=1e-3, clip=1.0, step=1)
                torch.cuda.empty_cache()
                if limited:
                    limit = torch.cuda.memory_reserved() + resident // 4
                    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
                model.hidden_states = greedy  # type: ignore[method-assign]
                for step in (2, 3):
                    train_step(model, optimizer, make_batches(2), rate=1e-3, clip=1.0, step=step)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert errors == limited
        kept = SLAB_PAGES * optimizer.pager.page_bytes if limited else resident
        assert optimizer.pager.capacity_bytes == kept
        results.append([value.cpu() for value in values_of(model)])
        optimizer.close()
        del model, optimizer, layer, real, greedy
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
