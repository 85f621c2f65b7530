"""A step's loss and gradients are the same however its examples come together: padded, packed, one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nf4
from nf4.data.batches import Batch, pack_batch
from nf4.data.dataset import Example, ListDataset, Source
from nf4.data.plan import Batches, BatchOptions
from nf4.lora import LoraConfig, add_lora, lora_layers
from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM
from nf4.paging.optim import PagedAdamW
from nf4.training.determinism import deterministic
from nf4.training.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

SEQ_LEN = 40
LENGTHS = (40, 3, 17, 22, 9, 2, 31, 16)


def examples() -> list[Example]:
    """With a label here and there."""
    rng = np.random.default_rng(0)
    made = []
    for length in LENGTHS:
        labelled = rng.random(length) < 0.4
        labelled[-1], labelled[0] = True, False
        made.append(Example(rng.integers(3, 320, length).astype(np.int32), labelled))
    return made


class Kept:
    """In place of an optimizer: keeps the gradients of a step, in whatever dtype, and changes nothing."""

    loss_scale = None

    def __init__(self, model: CausalLM) -> None:
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.param_groups: list[dict[str, Any]] = [{"params": list(self._named.values()), "lr": 0.0}]
        self.device = model.device
        self.gradients: dict[str, Tensor] = {}

    def gradient_norm(self) -> Tensor:
        return torch.ones((), device=self.device)

    def step(self, gradient_factor: Tensor) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self._named.items() if p.grad is not None}

    def zero_grad(self, set_to_none: bool) -> None:
        for p in self._named.values():
            if p.grad is not None:
                p.grad.zero_()


@pytest.fixture(params=["llama", "mistral", "qwen3"])
def make_model(
    request: pytest.FixtureRequest, family_config: Callable[..., dict[str, Any]]
) -> Callable[..., CausalLM]:
    """A small model with adapters, dense on a CPU, packed on a GPU, where the hand-made layer step trains it.

    Mistral's looks back over a window shorter than the examples.
    """
    window = {"sliding_window": 11} if request.param == "mistral" else {}

    def build(dtype: torch.dtype, device: str = "cpu") -> CausalLM:
        torch.manual_seed(0)
        if device == "cpu":
            shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
            model = CausalLM(ModelConfig.from_dict(family_config(request.param, **shape, **window)))
        else:
            packed = request.getfixturevalue("make_packed")(request.param, **window)
            model = nf4.load(packed, device=device, dtype=str(dtype).removeprefix("torch."))
        add_lora(model, LoraConfig(rank=4, alpha=8))
        for _, layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora_B.data, std=0.1)
        return (model.to(device, dtype) if device == "cpu" else model).train()

    return build


def steps(packing: str, batch: int, accumulate: int) -> list[Batch]:
    """The one step of all examples."""
    source = Source(ListDataset(examples()), 1.0)
    options = BatchOptions(batch, accumulate, SEQ_LEN, packing)
    return Batches([source], options, seed=1).step(0)


def arrangements() -> dict[str, list[Batch]]:
    return {
        "8 x 1": steps("none", 8, 1),
        "1 x 8": steps("none", 1, 8),
        "3 x 3": steps("none", 3, 3),
        "packed": steps("best-fit", 4, 1),
        "packed, accumulated": steps("best-fit", 1, 4),
        "packed into one row": [pack_batch(examples())],
    }


def by_hand(model: CausalLM) -> tuple[float, dict[str, Tensor]]:
    """Mean loss of the labelled tokens and its gradients, an example at a time, by autograd."""
    everything = examples()
    count = sum(int(example.labelled.sum()) for example in everything)
    total = 0.0
    for ids, labelled in everything:
        tokens = torch.tensor(ids[None], dtype=torch.int64, device=model.device)
        wanted = torch.tensor(labelled[1:], device=model.device)
        logits = model(tokens)[0, :-1]
        loss = F.cross_entropy(logits[wanted], tokens[0, 1:][wanted], reduction="sum") / count
        loss.backward()
        total += loss.item()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, gradients


def by_step(model: CausalLM, batches: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
    optimizer = Kept(model)
    loss, _ = train_step(model, cast(PagedAdamW, optimizer), batches, rate=1.0, clip=0.0, step=1)
    return loss.item(), optimizer.gradients


def largest_difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert ours.keys() == expected.keys()
    return max(((ours[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_arrangements_agree_in_float64(make_model: Callable[..., CausalLM], checkpointing: bool) -> None:
    model = make_model(torch.float64)
    expected_loss, expected = by_hand(model)
    model.passes.gradient_checkpointing = checkpointing
    assert sum(batch.num_tokens for batch in steps("best-fit", 4, 1)) == sum(LENGTHS)
    for name, batches in arrangements().items():
        loss, gradients = by_step(model, batches)
        assert loss == pytest.approx(expected_loss, rel=1e-12), name
        assert largest_difference(gradients, expected) < 1e-7, name  # fp32, where micro-batches are added up


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 6e-2)])
def test_arrangements_agree_on_a_gpu(
    make_model: Callable[..., CausalLM], dtype: torch.dtype, tolerance: float
) -> None:
    """With checkpointing and without, and with passes of shapes that come again recorded."""
    model = make_model(dtype, "cuda")
    expected_loss, expected = by_hand(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # recorded passes add to what is there
    for checkpointing in (False, True):
        model.passes.gradient_checkpointing = checkpointing
        model.passes.capture_graphs = True
        for name, batches in arrangements().items():
            for _ in range(4):
                loss, gradients = by_step(model, batches)
                assert loss == pytest.approx(expected_loss, rel=tolerance), name
                assert largest_difference(gradients, expected) < tolerance, name
        model.passes.capture_graphs = False


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_steps_repeat_on_a_gpu(make_model: Callable[..., CausalLM], dtype: torch.dtype) -> None:
    model = make_model(dtype, "cuda")
    batches = steps("best-fit", 2, 2)
    with deterministic(model.device):
        results = [by_step(model, batches) for _ in range(3)]
    for loss, gradients in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.float32, marks=pytest.mark.cuda),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.cuda),
    ],
)
def test_a_changed_example_leaves_the_others_of_its_row_as_they_are(
    make_model: Callable[..., CausalLM], device: str, dtype: torch.dtype
) -> None:
    model = make_model(dtype, device)
    everything = examples()
    changed = list(everything)
    changed[3] = Example((everything[3].ids + 1) % 320, everything[3].labelled)

    def hidden(made: list[Example], checkpointing: bool) -> list[Tensor]:
        model.passes.gradient_checkpointing = checkpointing
        batch = pack_batch(made).to(model.device)
        states = model.hidden_states(batch.input_ids, segments=batch.segments)
        return list(model.head(states)[0].detach().split(LENGTHS))

    for checkpointing in (False, True):
        before, after = hidden(everything, checkpointing), hidden(changed, checkpointing)
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(a, b) == (i != 3)
