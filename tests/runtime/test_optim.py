"""PagedAdamW against torch.optim.AdamW, bit for bit, whatever the pages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from nf4.errors import TrainError
from nf4.paging.optim import PagedAdamW

# Odd sizes; the last one and the fourth cross torch's chunks.
SHAPES = [(1,), (7, 3), (33,), (129, 65), (2, 2, 2), (100, 401)]
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def make_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "weight_decay": 0.0, "lr": 1e-2}, {"params": params[2:]}]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    """Gradients from seed and step, over orders of magnitude; parameter 4 has none at every third step."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for index, p in enumerate(params):
            scale = 10.0 ** torch.randint(-6, 3, p.shape, generator=generator)
            gradient = torch.randn(p.shape, generator=generator) * scale
            p.grad = None if index == 4 and step % 3 == 0 else gradient
        for group in optimizer.param_groups:  # as a schedule does
            group["lr"] *= 0.97
        optimizer.step()


def expect_equal(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def torch_result() -> tuple[list[torch.nn.Parameter], dict[str, Any]]:
    params = make_parameters()
    optimizer = torch.optim.AdamW(groups(params), **SETTINGS)
    train(optimizer, params, range(22))
    return params, optimizer.state_dict()


@pytest.mark.parametrize(
    ("page_bytes", "budget_bytes"),
    [
        (4 << 20, None),
        (4096, None),
        (4096, 4096),
        (4096, 5 * 4096),
        (8 * 371, 3 * 8 * 371),
        (64 << 10, 130 << 10),
    ],
)
def test_equals_torch_bit_for_bit_for_any_pages(
    page_bytes: int, budget_bytes: int | None, torch_result: tuple[list[torch.nn.Parameter], dict[str, Any]]
) -> None:
    params = make_parameters()
    optimizer = PagedAdamW(groups(params), **SETTINGS, page_bytes=page_bytes, budget_bytes=budget_bytes)
    train(optimizer, params, range(22))
    expect_equal(params, torch_result[0])
    state, theirs = optimizer.state_dict()["state"], torch_result[1]["state"]
    assert state.keys() == theirs.keys()
    for index, entry in theirs.items():
        assert entry.keys() == state[index].keys()
        assert all(torch.equal(entry[name], state[index][name]) for name in entry)
    stats = optimizer.pager.stats
    if budget_bytes is None:
        assert stats.bytes_in == stats.bytes_out == 0
    else:
        assert stats.bytes_in > 0
        assert optimizer.pager.capacity_bytes <= budget_bytes
    optimizer.close()


@pytest.mark.parametrize("budget_bytes", [None, 800])
def test_bfloat16_parameters_are_rounded_once_a_step(budget_bytes: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    ours = torch.nn.Parameter(torch.randn(500, generator=generator).bfloat16())
    theirs = torch.nn.Parameter(ours.detach().float())
    optimizer = PagedAdamW([ours], **SETTINGS, page_bytes=800, budget_bytes=budget_bytes)
    reference = torch.optim.AdamW([theirs], **SETTINGS)
    for _ in range(5):
        ours.grad = torch.randn(500, generator=generator).bfloat16()
        theirs.grad = ours.grad.float()
        optimizer.step()
        reference.step()
        theirs.data.copy_(theirs.data.bfloat16().float())
    assert torch.equal(ours.float(), theirs)
    optimizer.close()


def test_factor_multiplies_gradients_and_one_not_finite_changes_nothing() -> None:
    ours, theirs = torch.nn.Parameter(torch.ones(9)), torch.nn.Parameter(torch.ones(9))
    optimizer, reference = PagedAdamW([ours], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS)
    ours.grad, theirs.grad = torch.arange(9.0), torch.arange(9.0) * 0.3
    for bad in (float("nan"), float("inf")):
        optimizer.step(gradient_factor=torch.tensor(bad))
    assert torch.equal(ours, torch.ones(9))
    assert optimizer.state_dict()["state"] == {}
    optimizer.step(gradient_factor=torch.tensor(0.3))
    reference.step()
    assert torch.equal(ours, theirs)


def test_alternate_sweeps_find_the_resident_pages() -> None:
    p = torch.nn.Parameter(torch.zeros(1000))
    optimizer = PagedAdamW([p], page_bytes=800, budget_bytes=5 * 800)  # 10 pages, 5 resident
    p.grad = torch.ones(1000)
    for _ in range(4):
        optimizer.step()
    moved = optimizer.pager.stats.bytes_in
    optimizer.step()
    # The other half; one-way sweeps would read all ten.
    assert optimizer.pager.stats.bytes_in - moved == 5 * 800
    optimizer.close()


def test_resume_is_exact_and_stays_paged() -> None:
    params, resumed = make_parameters(), make_parameters()
    paging = {"page_bytes": 4096, "budget_bytes": 2 * 4096}
    optimizer = PagedAdamW(groups(params), **SETTINGS, **paging)
    train(optimizer, params, range(10))
    saved = copy.deepcopy(optimizer.state_dict())
    for p, q in zip(params, resumed, strict=True):
        q.data.copy_(p.data)
    train(optimizer, params, range(10, 20))
    other = PagedAdamW(groups(resumed), **SETTINGS, **paging)
    # The sweep's direction may differ.
    train(other, [torch.nn.Parameter(q.detach().clone()) for q in resumed], range(1))
    other.load_state_dict(saved)
    train(other, resumed, range(10, 20))
    expect_equal(resumed, params)
    assert other.pager.resident_bytes <= 2 * 4096
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    optimizer.close()
    other.close()


def test_state_travels_to_torch_and_back() -> None:
    ours, theirs = make_parameters(), make_parameters()
    first = torch.optim.AdamW(groups(theirs), **SETTINGS)
    train(first, theirs, range(5))
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
    paged = PagedAdamW(groups(ours), **SETTINGS, page_bytes=4096, budget_bytes=4096)
    paged.load_state_dict(first.state_dict())
    train(paged, ours, range(5, 8))
    train(first, theirs, range(5, 8))
    expect_equal(ours, theirs)
    first.load_state_dict(paged.state_dict())
    train(paged, ours, range(8, 10))
    train(first, theirs, range(8, 10))
    expect_equal(ours, theirs)
    paged.close()


def test_learning_rate_scheduler_drives_it() -> None:
    params, theirs = make_parameters(), make_parameters()
    for optimizer, values in (
        (PagedAdamW(params, lr=1e-2), params),
        (torch.optim.AdamW(theirs, lr=1e-2), theirs),
    ):
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for _ in range(5):
            for p in values:
                p.grad = torch.full_like(p, 0.5)
            optimizer.step()
            scheduler.step()
    expect_equal(params, theirs)


def test_what_cannot_be_optimized_is_told() -> None:
    with pytest.raises(TrainError, match="nothing to train"):
        PagedAdamW([])
    with pytest.raises(
        TrainError, match=r"parameter 1 cannot be trained, expected contiguous float32 or .* got.*float16"
    ):
        PagedAdamW(
            [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))]
        )
    with pytest.raises(TrainError, match="bad lr, expected at least 0, got -1"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(3))], lr=-1)
    with pytest.raises(TrainError, match="bad page size, expected a multiple of 8, at least 8, got 100"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(3))], page_bytes=100)
    optimizer = PagedAdamW([torch.nn.Parameter(torch.zeros(3))])
    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(3)}
    saved = {"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]}
    with pytest.raises(TrainError, match=r"exp_avg of parameter 0, expected \(3,\), got \(4,\)"):
        optimizer.load_state_dict(saved)
    with pytest.raises(TrainError, match="amsgrad"):
        optimizer.load_state_dict({**saved, "state": {0: {**state, "max_exp_avg_sq": torch.zeros(3)}}})
