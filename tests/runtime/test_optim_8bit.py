"""PagedAdamW with 8-bit states: against a plain twin, bitsandbytes, and itself with other pages."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from nf4.errors import TrainError
from nf4.paging.blockwise import BLOCK, DynamicMap, signed_map, unsigned_map
from nf4.paging.layout import LEAST_8BIT
from nf4.paging.optim import PagedAdamW

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(7, 3), (64, 64), (4095,), (129, 65), (100, 401), (4097,)]  # two of them keep 32 bits
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def make_parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """From seed and step, over orders of magnitude; parameter 4 has none at every third step."""
    generator = torch.Generator().manual_seed(100 + step)
    for index, p in enumerate(params):
        scale = 10.0 ** torch.randint(-3, 1, p.shape, generator=generator)
        gradient = torch.randn(p.shape, generator=generator) * scale
        p.grad = None if index == 4 and step % 3 == 0 else gradient.to(p)


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = optimizer.state_dict()["state"]
    return {f"{k}.{name}": value for k, state in states.items() for name, value in state.items()}


class Plain:
    """One parameter's blockwise AdamW over whole tensors, codes found by looking at every level."""

    def __init__(self, p: Tensor) -> None:
        self.p, self.count = p.detach().clone().view(-1), 0
        blocks = -(-p.numel() // BLOCK)
        self.moments = [
            (m, torch.zeros(blocks * BLOCK, dtype=torch.long), torch.zeros(blocks))
            for m in (signed_map(), unsigned_map())
        ]

    def step(self, gradient: Tensor, factor: float = 1.0) -> None:
        self.count += 1
        beta1, beta2 = SETTINGS["betas"]
        g = torch.nn.functional.pad(gradient.view(-1) * factor, (0, -len(self.p) % BLOCK))
        m, v = ((a[:, None] * q.levels[c].view(-1, BLOCK)).view(-1) for q, c, a in self.moments)
        m, v = (torch.nn.functional.pad(x[: len(self.p)], (0, -len(self.p) % BLOCK)) for x in (m, v))
        m = m.lerp(g, 1 - beta1)
        v = (v * beta2).addcmul(g, g, value=1 - beta2)
        root = v.sqrt() / (1 - beta2**self.count) ** 0.5 + SETTINGS["eps"]
        self.p *= 1 - SETTINGS["lr"] * SETTINGS["weight_decay"]
        size = len(self.p)
        self.p.addcdiv_(m[:size], root[:size], value=-SETTINGS["lr"] / (1 - beta1**self.count))
        self.moments = [(q, *self._coded(x, q)) for (q, _, _), x in zip(self.moments, (m, v), strict=True)]

    def _coded(self, values: Tensor, code_map: DynamicMap) -> tuple[Tensor, Tensor]:
        rows = values.view(-1, BLOCK)
        absmax = rows.abs().amax(1)
        scaled = torch.where(absmax[:, None] > 0, rows / absmax[:, None], 0.0).view(-1)
        return (scaled[:, None] > code_map.borders).sum(1), absmax


def test_equals_the_plain_twin_bit_for_bit() -> None:
    params = make_parameters()
    twins = {k: Plain(p) for k, p in enumerate(params) if p.numel() >= LEAST_8BIT}
    optimizer = PagedAdamW(params, **SETTINGS, state_bits=8)
    for step in range(8):
        set_gradients(params, step)
        for k, twin in twins.items():
            if params[k].grad is not None:
                twin.step(params[k].grad, 0.37)
        optimizer.step(gradient_factor=torch.tensor(0.37))
    states = optimizer.state_dict()["state"]
    assert len(twins) == 4
    for k, twin in twins.items():
        assert torch.equal(params[k].view(-1), twin.p)
        for name, (_, codes, absmax) in zip(("exp_avg", "exp_avg_sq"), twin.moments, strict=True):
            assert torch.equal(states[k][name].view(-1), codes[: params[k].numel()].to(torch.uint8))
            assert torch.equal(states[k][f"{name}_absmax"], absmax)


def test_small_parameters_are_those_of_32_bit_states() -> None:
    params, expected = make_parameters(), make_parameters()
    optimizer, reference = (
        PagedAdamW(params, **SETTINGS, state_bits=8),
        torch.optim.AdamW(expected, **SETTINGS),
    )
    train(optimizer, params, range(5))
    train(reference, expected, range(5))
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q) == (p.numel() < LEAST_8BIT)
        torch.testing.assert_close(p, q, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_pages_and_budget_change_no_bit(device: str, dtype: torch.dtype) -> None:
    results = []
    for page_bytes, budget, store in (
        (None, None, None), (1 << 20, None, None), (520, None, None), (1048, 10 * 1048, None),
        (5200, 5200, None), (5200, 11000, "memory"), (None, 6000, None),
    ):  # fmt: skip
        params = make_parameters(dtype, device)
        paging: dict[str, Any] = {"page_bytes": page_bytes, "budget_bytes": budget, "store": store}
        optimizer = PagedAdamW(params, **SETTINGS, state_bits=8, **paging)
        train(optimizer, params, range(7))
        assert (optimizer.pager.stats.bytes_in > 0) == (budget is not None)
        if budget is not None:
            assert optimizer.pager.resident_bytes <= optimizer.pager.capacity_bytes <= budget
        results.append([p.detach().cpu() for p in params] + list(state_of(optimizer).values()))
        optimizer.close()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cuda
def test_kernel_equals_the_cpu_but_for_a_few_neighbouring_codes() -> None:
    """Moments are rounded in another order there, by a bit; few of them lie so near a border."""
    ours, theirs = make_parameters(device="cuda"), make_parameters()
    first = PagedAdamW(ours, **SETTINGS, state_bits=8, page_bytes=5200, budget_bytes=40 * 5200)
    second = PagedAdamW(theirs, **SETTINGS, state_bits=8)
    factor = torch.tensor(0.37)
    for step in range(10):
        for params, optimizer in ((ours, first), (theirs, second)):
            set_gradients(params, step)
            optimizer.step(gradient_factor=factor.to(params[0].device))
    for p, q in zip(ours, theirs, strict=True):
        gap = (p.detach().cpu() - q.detach()).abs()
        assert gap.max() < 0.01
        assert (gap > 1e-5).float().mean() < 0.001
    for (name, a), b in zip(state_of(first).items(), state_of(second).values(), strict=True):
        if a.dtype == torch.uint8:
            differ = (a.int() - b.int()).abs()
            assert differ.max() <= 1
            assert (differ > 0).float().mean() < 0.001
        else:
            torch.testing.assert_close(a, b, rtol=1e-2 if "absmax" in name else 1e-5, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_encodes_exactly_as_the_cpu(dtype: torch.dtype) -> None:
    """Without memory of earlier steps the moments are the gradient and its square, exactly."""
    generator = torch.Generator().manual_seed(5)
    for size in (LEAST_8BIT, 100_003):
        gradient = torch.randn(size, generator=generator).to(dtype)
        gradient *= (10.0 ** -torch.randint(0, 10, (size,), generator=generator)).to(dtype)
        gradient[:300] = 0
        states = []
        for device in ("cuda", "cpu"):
            p = torch.nn.Parameter(torch.zeros(size + 1, dtype=dtype, device=device)[1:])  # not aligned
            optimizer = PagedAdamW([p], lr=0.0, betas=(0.0, 0.0), weight_decay=0.0, state_bits=8)
            p.grad = gradient.to(device)
            optimizer.step()
            assert not p.detach().any()
            states.append(state_of(optimizer))
        assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


@pytest.mark.cuda
def test_pressure_moves_8_bit_states_to_the_host_and_changes_nothing() -> None:
    results = []
    for pressed in (False, True):
        params = [torch.nn.Parameter(torch.full((3_000_000,), 0.5, device="cuda")) for _ in range(3)]
        optimizer = PagedAdamW(params, **SETTINGS, state_bits=8, page_bytes=1 << 20)
        for step in range(6):
            torch.manual_seed(step)
            for p in params:
                p.grad = torch.randn_like(p)
            if pressed and step == 3:
                assert optimizer.release_memory() > 0
            optimizer.step()
        assert (optimizer.pager.stats.bytes_in > 0) == pressed
        results.append([p.detach().clone() for p in params] + list(state_of(optimizer).values()))
        optimizer.close()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_arithmetic_of_bitsandbytes_gives_the_same() -> None:
    """From the same states, one step each: parameters to rounding, codes but for its coarser table."""
    functional = pytest.importorskip("bitsandbytes.functional")
    p = torch.nn.Parameter(torch.randn(64, 100, generator=torch.Generator().manual_seed(4)))
    options = {**SETTINGS, "eps": 1e-6}
    optimizer = PagedAdamW([p], **options, state_bits=8)
    for step in range(1, 13):
        gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        saved = copy.deepcopy(optimizer.state_dict()["state"].get(0))
        theirs = p.detach().clone()
        p.grad = gradient
        optimizer.step()
        ours = optimizer.state_dict()["state"][0]
        if saved is None:
            continue
        codes, absmaxes = ([saved[f"{n}{end}"] for n in ("exp_avg", "exp_avg_sq")] for end in ("", "_absmax"))
        before = [(c.clone(), a.clone()) for c, a in zip(codes, absmaxes, strict=True)]
        functional.optimizer_update_8bit_blockwise(
            "adam", gradient, theirs, codes[0], codes[1], *options["betas"], 0.0, 0.0, options["eps"], step,
            options["lr"], signed_map().levels, unsigned_map().levels, *absmaxes, options["weight_decay"],
        )  # fmt: skip
        torch.testing.assert_close(p.detach(), theirs, rtol=1e-6, atol=1e-7)
        for name, code, absmax, code_map, old in zip(
            ("exp_avg", "exp_avg_sq"), codes, absmaxes, (signed_map(), unsigned_map()), before, strict=True
        ):
            torch.testing.assert_close(ours[f"{name}_absmax"], absmax, rtol=1e-6, atol=0)
            assert not torch.equal(code, old[0])
            assert not torch.equal(absmax, old[1])
            levels, other = (code_map.levels[c.long()].view(-1, BLOCK) for c in (ours[name], code))
            spacing = code_map.levels.diff().max()
            assert (levels - other).abs().max() < spacing * 1.01  # at most a neighbour, or less than a step
            assert (code != ours[name]).float().mean() < 0.05


def test_second_moments_above_zero_stay_above_zero() -> None:
    """A gradient that shrinks beside a large one: nearest codes would make its update as large as 1 / eps."""
    p = torch.nn.Parameter(torch.zeros(LEAST_8BIT))
    optimizer = PagedAdamW([p], lr=1e-3, weight_decay=0.0, state_bits=8)
    for step in range(20):
        p.grad = torch.full_like(p, 2e-4 * 0.5**step)
        p.grad[::BLOCK] = 1.0
        before = p.detach().clone()
        optimizer.step()
        assert (p.detach() - before).abs().max() <= 2e-3


def test_gradients_that_are_not_finite_change_nothing() -> None:
    params = make_parameters()
    optimizer = PagedAdamW(params, **SETTINGS, state_bits=8)
    train(optimizer, params, range(2))
    kept, state = [p.detach().clone() for p in params], state_of(optimizer)
    set_gradients(params, 5)
    for bad in (float("nan"), float("inf")):
        optimizer.step(gradient_factor=torch.tensor(bad))
    assert all(torch.equal(p, q) for p, q in zip(params, kept, strict=True))
    assert all(torch.equal(state[name], value) for name, value in state_of(optimizer).items())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_resume_is_exact_into_other_pages(device: str) -> None:
    params, resumed, streamed = (make_parameters(device=device) for _ in range(3))
    optimizer = PagedAdamW(params, **SETTINGS, state_bits=8, page_bytes=5200, budget_bytes=11000)
    train(optimizer, params, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    file = {name: bytearray() for name in optimizer.state_layout()}
    assert {dtype for dtype, _ in optimizer.state_layout().values()} == {"F32", "U8"}

    def put(name: str, offset: int, data: memoryview) -> None:
        room = file[name]
        room.extend(bytes(max(0, offset + len(data) - len(room))))
        room[offset : offset + len(data)] = data

    def get(name: str, offset: int, into: memoryview) -> None:
        into[:] = file[name][offset : offset + len(into)]

    optimizer.write_state(put)
    items = {"F32": 4, "U8": 1}
    for name, (dtype, shape) in optimizer.state_layout().items():
        assert len(file[name]) == items[dtype] * torch.Size(shape).numel()
    steps = optimizer.steps
    for others in (resumed, streamed):
        for p, q in zip(params, others, strict=True):
            q.data.copy_(p.data)
    train(optimizer, params, range(4, 8))
    other = PagedAdamW(resumed, **SETTINGS, state_bits=8)
    train(other, [torch.nn.Parameter(q.detach().clone()) for q in resumed], range(1))
    other.load_state_dict(saved)
    last = PagedAdamW(streamed, **SETTINGS, state_bits=8, page_bytes=2080, budget_bytes=5000)
    last.read_state(steps, get)
    for again, others in ((other, resumed), (last, streamed)):
        train(again, others, range(4, 8))
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
        expected = state_of(optimizer)
        assert all(torch.equal(expected[name], value) for name, value in state_of(again).items())
        again.close()
    optimizer.close()


def test_states_of_32_and_8_bits_become_each_other() -> None:
    wide, narrow, back = (make_parameters() for _ in range(3))
    first = PagedAdamW(wide, **SETTINGS)
    train(first, wide, range(4))
    second = PagedAdamW(narrow, **SETTINGS, state_bits=8, page_bytes=5200, budget_bytes=5200)
    second.load_state_dict(first.state_dict())
    third = PagedAdamW(back, **SETTINGS)
    third.load_state_dict(second.state_dict())
    assert second.steps == third.steps == first.steps
    ours, theirs = state_of(third), state_of(first)
    for name, value in theirs.items():
        if ours[name].numel() < LEAST_8BIT:
            assert torch.equal(ours[name], value)
        else:
            # Levels are 0.9 / 64 apart, at most.
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0.008 * value.abs().max().item())


def test_wrong_states_and_settings_are_told() -> None:
    def optimizer() -> PagedAdamW:
        return PagedAdamW([torch.nn.Parameter(torch.zeros(5000))], state_bits=8)

    with pytest.raises(TrainError, match="bad number of bits for states, expected 32 or 8, got 4"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(3))], state_bits=4)
    with pytest.raises(TrainError, match="bad page size, expected a multiple of 8, at least 520, got 512"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(5000))], state_bits=8, page_bytes=512)
    with pytest.raises(TrainError, match="page budget is smaller than one page, expected at least 520 bytes"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(5000))], state_bits=8, budget_bytes=519)
    with pytest.raises(TrainError, match="unknown page store, expected file or memory, got tape"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(3))], store="tape")  # type: ignore[arg-type]
    with pytest.raises(TrainError, match="pages: page file for pages in memory"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(3))], store="memory", backing="pages")
    good = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.zeros(5000, dtype=torch.uint8),
        "exp_avg_sq": torch.zeros(5000, dtype=torch.uint8),
        "exp_avg_absmax": torch.zeros(20),
        "exp_avg_sq_absmax": torch.zeros(20),
    }
    groups = optimizer().state_dict()["param_groups"]
    optimizer().load_state_dict({"state": {0: good}, "param_groups": groups})
    for changes, message in (
        (
            {"exp_avg_absmax": torch.zeros(19)},
            r"exp_avg_absmax of parameter 0, expected \(20,\), got \(19,\)",
        ),
        ({"exp_avg": torch.zeros(5000)}, r"exp_avg of parameter 0, expected torch.uint8, got torch.float32"),
        ({"exp_avg_sq_absmax": None}, r"exp_avg_sq_absmax of parameter 0, expected \(20,\), got nothing"),
        ({"step": torch.tensor(-1.0)}, "step of parameter 0, expected a whole number, got -1"),
        ({"step": torch.tensor(float("nan"))}, "step of parameter 0, expected a whole number, got nan"),
    ):
        with pytest.raises(TrainError, match=message):
            optimizer().load_state_dict({"state": {0: {**good, **changes}}, "param_groups": groups})


def test_memory_in_use_never_exceeds_the_budget() -> None:
    """Looked at from another thread while steps run: the pool is one allocation, and it bounds the pages."""
    params = make_parameters()
    budget = 10_000
    optimizer = PagedAdamW(params, **SETTINGS, state_bits=8, page_bytes=2080, budget_bytes=budget)
    pager = optimizer.pager
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.append(max(pager.resident_bytes, pager._pool.untyped_storage().nbytes()))
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    train(optimizer, params, range(12))
    over.set()
    watcher.join()
    assert len(seen) > 10
    assert max(seen) <= budget < pager.num_pages * pager.page_bytes
    optimizer.close()
