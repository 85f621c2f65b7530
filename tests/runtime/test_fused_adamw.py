"""PagedAdamW's way on a GPU: its tables interpreted in numpy here, its kernels on a GPU."""

from __future__ import annotations

import copy
import ctypes
import gc
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nf4.errors import TrainError
from nf4.paging import fused_adamw
from nf4.paging.cuda_pager import SLAB_PAGES, CudaPager
from nf4.paging.fused_adamw import ChunkTables, Setting
from nf4.paging.layout import Piece, StateLayout
from nf4.paging.optim import PagedAdamW

SHAPES = [(1,), (7, 3), (33,), (129, 65), (2, 2, 2), (100, 401), (16, 4096)]
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def at(address: int, count: int, kind: Any = ctypes.c_float) -> np.ndarray:
    """[count] in this process's memory, float32 unless said otherwise."""
    return np.ctypeslib.as_array((kind * count).from_address(address))


class Interpreter:
    """nf4._cuda over host memory and float32 only; gives back the largest block and number of launches."""

    ADAMW_PAGES = 3

    def __init__(self) -> None:
        self.launches = 0

    def adamw(  # noqa: PLR0917 -- as the native function
        self, chunks: int, num_chunks: int, first_page: int, pages: list[int], page_elements: int,
        settings: list[Setting], gradient_factor: int, stream: int,
    ) -> None:  # fmt: skip
        assert len(pages) <= self.ADAMW_PAGES
        self.launches += 1
        factor = at(gradient_factor, 1)[0] if gradient_factor else np.float32(1)
        table = np.ctypeslib.as_array((ctypes.c_uint8 * (32 * num_chunks)).from_address(chunks))
        for row in table.view(fused_adamw._CHUNK):
            count, s = int(row["count"]), settings[row["setting"]]
            assert 0 < count <= fused_adamw.CHUNK_ELEMENTS
            p, g = at(int(row["parameter"]), count), at(int(row["gradient"]), count) * factor
            state = at(pages[row["page"] - first_page], 2 * page_elements)
            m, v = state[row["at"] :][:count], state[page_elements + row["at"] :][:count]
            m += np.float32(1 - s.beta1) * (g - m)
            v[:] = v * np.float32(s.beta2) + np.float32(1 - s.beta2) * g * g
            root = np.sqrt(v) / np.float32((1 - s.beta2**s.step) ** 0.5) + np.float32(s.eps)
            p *= np.float32(1 - s.lr * s.weight_decay)
            p -= np.float32(s.lr / (1 - s.beta1**s.step)) * (m / root)

    def adamw_8bit(  # noqa: PLR0917 -- as the native function
        self, chunks: int, num_chunks: int, first_page: int, pages: list[int], page_elements: int,
        settings: list[Setting], gradient_factor: int, tables: int, stream: int,
    ) -> None:  # fmt: skip
        """Each chunk with its moments in fp32, by the arithmetic above, and codes by the search trees."""
        levels, trees = at(tables, 1024).reshape(2, 2, 256)
        table = at(chunks, 32 * num_chunks, ctypes.c_uint8)
        for row in table.view(fused_adamw._CHUNK):
            count, begin = int(row["count"]), int(row["at"])
            assert begin % 256 == page_elements % 256 == 0
            blocks = -(-count // 256)
            page = pages[row["page"] - first_page]
            room = np.zeros((2, count), dtype=np.float32)
            moments = []
            for k in range(2):
                element = k * page_elements + begin
                codes = at(page + element, count, ctypes.c_uint8)
                absmax = at(page + 2 * page_elements + element // 256 * 4, blocks)
                room[k] = levels[k][codes] * np.repeat(absmax, 256)[:count]
                moments.append((codes, absmax))
            whole = np.array([row])
            whole["at"] = whole["page"] = 0
            self.launches -= 1
            self.adamw(
                whole.ctypes.data, 1, 0, [room.ctypes.data], room.shape[1], settings, gradient_factor, stream,
            )  # fmt: skip
            for values, tree, (codes, absmax) in zip(room, trees, moments, strict=True):
                padded = np.pad(values, (0, blocks * 256 - len(values))).reshape(-1, 256)
                absmax[:] = np.abs(padded).max(1)
                scaled = padded / np.where(absmax > 0, absmax, 1)[:, None]
                node = np.ones(padded.shape, dtype=np.int64)
                for _ in range(8):
                    node = 2 * node + (scaled > tree[node])
                codes[:] = (node - 256).reshape(-1)[: len(codes)]
        self.launches += 1

    def gradient_norm(self, chunks: int, num_chunks: int, sums: int, norm: int, stream: int) -> None:
        table = np.ctypeslib.as_array((ctypes.c_uint8 * (16 * num_chunks)).from_address(chunks))
        rows = table.view(fused_adamw._GRADIENT_CHUNK)
        squares = [np.square(at(int(row["gradient"]), int(row["count"])), dtype=np.float64) for row in rows]
        at(norm, 1)[0] = np.sqrt(sum(float(values.sum()) for values in squares))


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Interpreter:
    made = Interpreter()
    monkeypatch.setattr(fused_adamw, "kernels", lambda: made)
    monkeypatch.setattr(fused_adamw, "_current_stream", lambda device: nullcontext(0))
    return made


def make_parameters(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "weight_decay": 0.0, "lr": 1e-2}, {"params": params[2:]}]


def set_gradients(params: list[torch.nn.Parameter], step: int, *, in_place: bool = False) -> None:
    """From seed and step, over orders of magnitude; parameter 4 has none at every third step."""
    generator = torch.Generator().manual_seed(100 + step)
    for index, p in enumerate(params):
        scale = 10.0 ** torch.randint(-6, 3, p.shape, generator=generator)
        gradient = (torch.randn(p.shape, generator=generator) * scale).to(p)
        if index == 4 and step % 3 == 0:
            p.grad = None
        elif in_place and p.grad is not None:
            p.grad.copy_(gradient)
        else:
            p.grad = gradient


def exact_norm(params: list[torch.nn.Parameter]) -> float:
    return torch.cat([p.grad.double().flatten() for p in params if p.grad is not None]).norm().item()


@pytest.mark.parametrize("page_elements", [512 * 1024, 4096, 1000, 37])
def test_tables_say_what_to_update(page_elements: int, interpreter: Interpreter) -> None:
    params, expected = make_parameters(), make_parameters()
    reference = torch.optim.AdamW(groups(expected), **SETTINGS)
    layout = StateLayout.cut([p.numel() for p in params], 8 * page_elements)
    tables = ChunkTables(params, layout)
    memory = torch.zeros(len(layout.pages), 8 * page_elements, dtype=torch.uint8)
    steps = [0] * len(params)
    for step in range(1, 8):
        set_gradients(params, step)
        set_gradients(expected, step)
        reference.step()
        steps = [count + (p.grad is not None) for count, p in zip(steps, params, strict=True)]
        if tables.follow([p.grad for p in params]):
            tables.assign(list(range(len(params))))  # each its own
        settings = [
            Setting(group["lr"], *group["betas"], group["eps"], group["weight_decay"], steps[index])
            for index, group in enumerate([reference.param_groups[0]] * 2 + [reference.param_groups[1]] * 5)
        ]
        chosen = tables.pages()
        half = len(chosen) // 2
        for part in (chosen[half:], chosen[:half][::-1]):
            tables.update([(k, memory[k]) for k in part], settings, None)
        assert tables.gradient_norm().item() == pytest.approx(exact_norm(params), rel=1e-6)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("page_bytes", [1 << 20, 20 * 520, 520])
def test_tables_say_where_8_bit_states_are(page_bytes: int, interpreter: Interpreter) -> None:
    params, expected = make_parameters(), make_parameters()
    reference = PagedAdamW(groups(expected), **SETTINGS, state_bits=8)
    layout = StateLayout.cut([p.numel() for p in params], page_bytes, 8)
    assert 0 < layout.num_quantized < len(layout.pages)
    tables = ChunkTables(params, layout)
    memory = torch.zeros(len(layout.pages), page_bytes, dtype=torch.uint8)
    for step in range(1, 5):
        set_gradients(params, 3 * step + 1)
        set_gradients(expected, 3 * step + 1)
        reference.step()
        if tables.follow([p.grad for p in params]):
            tables.assign([0, 0, 1, 1, 1, 1, 1])
        settings = [
            Setting(group["lr"], *group["betas"], group["eps"], group["weight_decay"], step)
            for group in reference.param_groups
        ]
        interpreter.launches = 0
        tables.update([(k, memory[k]) for k in tables.pages()], settings, None)
        assert interpreter.launches == sum(
            -(-count // interpreter.ADAMW_PAGES)
            for count in (layout.num_quantized, len(layout.pages) - layout.num_quantized)
        )
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    states = reference.state_dict()["state"]
    for k, pieces in enumerate(layout.pages[: layout.num_quantized]):
        views = layout.fields(k, memory[k])
        for param, start, stop, at_element in pieces:
            for name in ("exp_avg", "exp_avg_sq"):
                ours = views[name][at_element : at_element + stop - start].int()
                theirs = states[param][name].view(-1)[start:stop].int()
                assert (ours - theirs).abs().max() <= 1
                assert (ours != theirs).float().mean() < 0.02


def test_tables_are_built_again_only_when_something_moves(interpreter: Interpreter) -> None:
    params = make_parameters()
    layout = StateLayout.cut([p.numel() for p in params], 8000)
    tables = ChunkTables(params, layout)
    set_gradients(params, 1)
    assert tables.follow([p.grad for p in params])
    set_gradients(params, 2, in_place=True)
    assert not tables.follow([p.grad for p in params])
    params[3].grad = None
    assert tables.follow([p.grad for p in params])
    tables.assign([0] * len(params))
    assert len(tables.pages()) < len(layout.pages)
    bad = [torch.zeros(1, dtype=torch.float64), *[None] * (len(params) - 1)]
    with pytest.raises(TrainError, match=r"gradient of parameter 0, expected float32 or bfloat16 on cpu"):
        tables.follow(bad)


def test_consecutive_pages_share_a_launch() -> None:
    memory = torch.zeros(10, 8, dtype=torch.uint8)
    pages = [(k, memory[k]) for k in (7, 1, 2, 3, 4, 9, 8)]
    runs = [(first, len(addresses)) for first, addresses in fused_adamw._runs(pages, 3)]
    assert runs == [(1, 3), (4, 1), (7, 3)]


def test_pieces_become_chunks_that_cover_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_adamw, "CHUNK_ELEMENTS", 10)
    cut = fused_adamw._cut([[Piece(0, 0, 25, 3)], [], [Piece(0, 25, 26, 0), Piece(2, 0, 10, 1)]])
    rows = list(zip(*(cut[name].tolist() for name in ("page", "param", "start", "at", "count")), strict=True))
    assert rows == [
        (0, 0, 0, 3, 10),
        (0, 0, 10, 13, 10),
        (0, 0, 20, 23, 5),
        (2, 0, 25, 0, 1),
        (2, 2, 0, 1, 10),
    ]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step, in_place=step % 2 == 0)
        for group in optimizer.param_groups:
            group["lr"] *= 0.97
        optimizer.step()


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value.cpu() for state in optimizer.state_dict()["state"].values() for value in state.values()]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_and_resident_and_torch_agree_on_a_gpu(dtype: torch.dtype) -> None:
    results = []
    for page_bytes, budget in ((4 << 20, None), (8 * 1000, None), (8 * 1000, 8 * 6000), (4096, 4096)):
        params = make_parameters("cuda", dtype)
        optimizer = PagedAdamW(groups(params), **SETTINGS, page_bytes=page_bytes, budget_bytes=budget)
        assert isinstance(optimizer.pager, CudaPager)
        train(optimizer, params, range(20))
        if budget is not None:
            assert optimizer.pager.resident_bytes <= optimizer.pager.capacity_bytes <= budget
            assert optimizer.pager.stats.bytes_in > 0
            assert optimizer.pager.stats.bytes_out > 0
        results.append([p.detach().cpu() for p in params] + state_of(optimizer))
        optimizer.close()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    reference = [torch.nn.Parameter(p.detach().float()) for p in make_parameters("cuda", dtype)]
    theirs = torch.optim.AdamW(groups(reference), **SETTINGS)
    train(theirs, reference, range(20))
    for ours, p in zip(results[0], reference, strict=False):
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(ours.float(), p.detach().cpu(), **tolerance)


@pytest.mark.cuda
def test_paged_on_a_gpu_and_on_a_cpu_agree() -> None:
    ours, theirs = make_parameters("cuda"), make_parameters()
    first = PagedAdamW(groups(ours), **SETTINGS, page_bytes=8000, budget_bytes=40000)
    second = PagedAdamW(groups(theirs), **SETTINGS)
    factor = torch.tensor(0.37)
    for step in range(10):
        for params, optimizer in ((ours, first), (theirs, second)):
            set_gradients(params, step)
            optimizer.step(gradient_factor=factor.to(params[0].device))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
def test_resume_on_a_gpu_is_exact_and_stays_paged() -> None:
    params, resumed = make_parameters("cuda"), make_parameters("cuda")
    paging = {"page_bytes": 4096, "budget_bytes": 5 * 4096}
    optimizer = PagedAdamW(groups(params), **SETTINGS, **paging)
    train(optimizer, params, range(10))
    saved = copy.deepcopy(optimizer.state_dict())
    for p, q in zip(params, resumed, strict=True):
        q.data.copy_(p.data)
    others = []
    for changes in (paging, {}):  # into a paged one and into a resident one
        again = [torch.nn.Parameter(q.detach().clone()) for q in resumed]
        other = PagedAdamW(groups(again), **SETTINGS, **changes)
        other.load_state_dict(copy.deepcopy(saved))
        train(other, again, range(10, 20))
        others.append((again, other))
    train(optimizer, params, range(10, 20))
    for again, other in others:
        assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer), state_of(other), strict=True))
    assert others[0][1].pager.resident_bytes <= 5 * 4096


@pytest.mark.cuda
def test_pressure_gives_memory_back_and_changes_nothing() -> None:
    results = []
    for pressed in (False, True):
        params = [torch.nn.Parameter(torch.full((3_000_000,), 0.5, device="cuda")) for _ in range(3)]
        optimizer = PagedAdamW(params, **SETTINGS)
        for step in range(6):
            torch.manual_seed(step)
            for p in params:
                p.grad = torch.randn_like(p)
            if pressed and step == 3:
                gc.collect()
                before = torch.cuda.memory_allocated()
                given = optimizer.release_memory()
                if before:  # only the caching allocator counts; the rest is its rounding
                    assert abs(before - torch.cuda.memory_allocated() - given) <= 2 << 20
                pager = optimizer.pager
                assert given == (pager.num_pages - SLAB_PAGES) * pager.page_bytes > 0
                assert optimizer.release_memory() == 0
            optimizer.step()
        assert (optimizer.pager.stats.bytes_in > 0) == pressed
        results.append([p.detach().clone() for p in params] + state_of(optimizer))
        optimizer.close()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.cuda
def test_norm_and_factor_on_a_gpu() -> None:
    params = make_parameters("cuda")
    optimizer = PagedAdamW(params, **SETTINGS)
    set_gradients(params, 1)
    assert optimizer.gradient_norm().item() == pytest.approx(exact_norm(params), rel=1e-6)
    before = [p.detach().clone() for p in params]
    for bad in (float("nan"), float("inf")):
        optimizer.step(gradient_factor=torch.tensor(bad, device="cuda"))
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert not any(value.any() for value in state_of(optimizer) if value.ndim)
    params[0].grad.fill_(float("inf"))
    assert optimizer.gradient_norm().item() == float("inf")


@pytest.mark.cuda
def test_many_settings_take_more_launches() -> None:
    params = [torch.nn.Parameter(torch.ones(100, device="cuda")) for _ in range(21)]
    optimizer = PagedAdamW([{"params": [p], "lr": 0.01 * (k + 1)} for k, p in enumerate(params)])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for k, p in enumerate(params):
        rate = 0.01 * (k + 1)
        torch.testing.assert_close(p, torch.full_like(p, 1 - rate * 0.01 - rate))


@pytest.mark.cuda
def test_page_file_is_for_the_cpu(tmp_path: Any) -> None:
    with pytest.raises(TrainError, match="page file for parameters on a GPU; leave the page file out"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(3, device="cuda"))], backing=tmp_path / "pages")
