"""The GPU's pager: on fake streams that run in every order that its events allow, and on a GPU."""

from __future__ import annotations

import gc
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from nf4.errors import TrainError
from nf4.paging import cuda_pager
from nf4.paging.cuda_pager import SLAB_PAGES, CudaPager

PAGE = 16
CPU = torch.device("cpu")


class Machine:
    """Streams whose work waits in queues until `run`, which takes it from them in random order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.compute = Stream(self)
        self.current = [self.compute]
        self.copied_pages: list[int] = []  # of each copy

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            ready = [stream for stream in self.streams if stream.is_ready()]
            assert ready, "streams wait for each other"
            self.random.choice(ready).run_one()

    def run_some(self) -> None:
        for _ in range(self.random.randint(0, 6)):
            ready = [stream for stream in self.streams if stream.is_ready()]
            if ready:
                self.random.choice(ready).run_one()

    def run_all(self) -> None:
        self.run(lambda: not any(stream.queue for stream in self.streams))


class Stream:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.queue: deque[tuple[Callable[[], bool], Callable[[], Any]]] = deque()
        machine.streams.append(self)

    def add(self, work: Callable[[], Any], ready: Callable[[], bool] = lambda: True) -> None:
        self.queue.append((ready, work))

    def is_ready(self) -> bool:
        return bool(self.queue) and self.queue[0][0]()

    def run_one(self) -> None:
        self.queue.popleft()[1]()

    def wait_event(self, event: Event) -> None:
        wanted = event.recorded  # later records do not matter, as on a GPU
        self.add(lambda: None, lambda: event.done >= wanted)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.machine)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.machine.run(lambda: not self.queue)


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.recorded = self.done = 0

    def record(self, stream: Stream | None = None) -> None:
        self.recorded += 1
        number = self.recorded

        def finish() -> None:
            self.done = number

        (stream or self.machine.current[-1]).add(finish)

    def query(self) -> bool:
        return self.done == self.recorded

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class FakeCuda:
    """What cuda_pager uses of torch.cuda."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self.machine)

    def Event(self, enable_timing: bool = False) -> Event:
        return Event(self.machine)

    def current_stream(self, device: torch.device) -> Stream:
        return self.machine.current[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.machine.current.append(stream)
        yield
        self.machine.current.pop()


class Arena:
    def __init__(self, num_pages: int, page_bytes: int) -> None:
        self.pages = torch.full((num_pages, page_bytes), 99, dtype=torch.uint8)

    def close(self) -> None:
        pass


@pytest.fixture
def make_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Machine]:
    """A function seed -> a machine on which CudaPagers made from then on run."""

    def make(seed: int) -> Machine:
        machine = Machine(seed)

        def copy(target: Tensor, source: Tensor) -> None:
            machine.copied_pages.append(len(target))
            machine.current[-1].add(lambda: target.copy_(source))

        def clear(target: Tensor) -> None:
            machine.current[-1].add(target.zero_)

        monkeypatch.setattr(cuda_pager, "cuda", FakeCuda(machine))
        monkeypatch.setattr(cuda_pager, "_copy", copy)
        monkeypatch.setattr(cuda_pager, "_clear", clear)
        monkeypatch.setattr(cuda_pager, "PinnedArena", Arena)
        return machine

    return make


def sweep(
    machine: Machine, pager: CudaPager, order: list[int], expected: list[int], value: int | None
) -> None:
    """Compare each page with what it should hold, and write `value` unless None: work for the GPU."""

    def kernel(memory: Tensor, was: int, becomes: int | None) -> None:
        assert memory.tolist() == [was] * PAGE
        if becomes is not None:
            memory.fill_(becomes)

    seen = []
    for pages in pager.sweep(order, write=value is not None):
        assert pager.resident_bytes <= pager.capacity_bytes
        for k, memory in pages:
            seen.append(k)
            was = expected[k]
            machine.compute.add(lambda memory=memory, was=was: kernel(memory, was, value))
            if value is not None:
                expected[k] = value
        machine.run_some()
    assert seen == order


@pytest.mark.parametrize("seed", range(150))
def test_every_order_of_copies_and_kernels_gives_the_same_pages(
    seed: int, make_machine: Callable[[int], Machine]
) -> None:
    machine = make_machine(seed)
    choose = machine.random
    num_pages = choose.randint(1, 24)
    slots = choose.randint(1, num_pages)
    budget = None if slots == num_pages and choose.random() < 0.5 else slots * PAGE + PAGE // 2
    pager = CudaPager(num_pages, PAGE, budget_bytes=budget, device=CPU)
    expected = [0] * num_pages
    everything = list(range(num_pages))
    for number in range(1, 16):
        kind = choose.random()
        order = everything if kind < 0.3 else everything[::-1]
        if kind > 0.6:
            order = choose.sample(everything, choose.randint(0, min(num_pages, 3)))
        sweep(machine, pager, order, expected, number if choose.random() < 0.5 else None)
        assert pager.capacity_bytes <= slots * PAGE
        if choose.random() < 0.1:
            given = pager.shrink()
            assert pager.capacity_bytes <= SLAB_PAGES * PAGE
            assert given == max(0, slots - SLAB_PAGES) * PAGE
            slots = min(slots, SLAB_PAGES)
    sweep(machine, pager, everything, expected, None)
    machine.run_all()
    pager.close()


def test_nothing_moves_while_all_pages_fit(make_machine: Callable[[int], Machine]) -> None:
    machine = make_machine(0)
    pager = CudaPager(9, PAGE, device=CPU)
    for order in (list(range(9)), list(range(9))[::-1]):
        assert [len(pages) for pages in pager.sweep(order)] == [9]  # one group: one launch
    assert len(machine.streams) == 1
    assert not machine.compute.queue  # not even an event
    assert (pager.stats.hits, pager.stats.misses, pager.stats.bytes_in) == (18, 0, 0)


def test_alternate_sweeps_move_what_does_not_fit_and_no_more(make_machine: Callable[[int], Machine]) -> None:
    machine = make_machine(1)
    pager = CudaPager(20, PAGE, budget_bytes=8 * PAGE, device=CPU)
    expected = [0] * 20
    order = list(range(20))
    for number in range(1, 6):
        before = pager.stats.bytes_in, pager.stats.bytes_out
        sweep(machine, pager, order, expected, number)
        machine.run_all()
        moved = pager.stats.bytes_in - before[0], pager.stats.bytes_out - before[1]
        assert moved == ((0, 12 * PAGE) if number == 1 else (12 * PAGE, 12 * PAGE))
        order.reverse()
    assert pager.stats.misses == 0  # everything was fetched ahead
    assert pager.stats.stall_seconds > 0


def test_neighbours_move_in_one_copy_of_bounded_size(
    make_machine: Callable[[int], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_pager, "MOST_COPY_BYTES", 4 * PAGE)
    machine = make_machine(4)
    pager = CudaPager(72, PAGE, budget_bytes=32 * PAGE, device=CPU)  # groups of 8, as large as a slab
    expected = [0] * 72
    order = list(range(72))
    for number in range(1, 8):
        machine.copied_pages.clear()
        sweep(machine, pager, order, expected, number)
        assert machine.copied_pages == [4] * (10 if number == 1 else 20)  # 40 pages out, and 40 in
        order.reverse()
    machine.run_all()


def test_pages_read_only_are_not_written_back(make_machine: Callable[[int], Machine]) -> None:
    machine = make_machine(2)
    pager = CudaPager(6, PAGE, budget_bytes=2 * PAGE, device=CPU)
    expected = [0] * 6
    sweep(machine, pager, list(range(6)), expected, 1)
    before = pager.stats.bytes_out
    sweep(machine, pager, list(range(6))[::-1], expected, None)
    sweep(machine, pager, list(range(6)), expected, None)
    machine.run_all()
    assert pager.stats.bytes_out == before + 2 * PAGE  # those that were still to be written


def test_budget_below_a_page_is_told() -> None:
    with pytest.raises(TrainError, match="smaller than one page, expected at least 16 bytes, got 15"):
        CudaPager(4, PAGE, budget_bytes=15, device=CPU)


def test_pool_takes_the_memory_there_is(
    make_machine: Callable[[int], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_machine(3)
    real, made = torch.zeros, []

    def scarce(*shape: int, **options: Any) -> Tensor:
        if len(made) == most:
            raise torch.OutOfMemoryError("no memory")
        made.append(shape)
        return real(*shape, **options)

    monkeypatch.setattr(torch, "zeros", scarce)
    most = 2
    assert CudaPager(20, PAGE, device=CPU).capacity_bytes == 2 * SLAB_PAGES * PAGE
    made.clear()
    most = 0
    with pytest.raises(TrainError, match="no room for optimizer state, expected 128 bytes of GPU memory"):
        CudaPager(20, PAGE, device=CPU)


@pytest.mark.cuda
@pytest.mark.parametrize("budget_pages", [1, 2, 5, None])
def test_pages_on_a_gpu(budget_pages: int | None) -> None:
    page_bytes, num_pages = 4 << 20, 23
    device = torch.device("cuda")
    gc.collect()
    before = torch.cuda.memory_allocated()
    budget = None if budget_pages is None else budget_pages * page_bytes
    pager = CudaPager(num_pages, page_bytes, budget_bytes=budget, device=device)
    slots = budget_pages or num_pages
    assert pager.capacity_bytes == slots * page_bytes
    rounding = 2 << 20  # the allocator's
    assert 0 <= torch.cuda.memory_allocated() - before - pager.capacity_bytes <= rounding
    expected = torch.zeros(num_pages, page_bytes // 4, dtype=torch.int32, device=device)
    order = list(range(num_pages))
    wrong = torch.zeros((), dtype=torch.int64, device=device)

    def change(number: int) -> None:
        for pages in pager.sweep(order):
            for k, memory in pages:
                values = memory.view(torch.int32)
                wrong.add_((values != expected[k]).sum())
                values.add_(number * (k + 1))
                expected[k] += number * (k + 1)
        order.reverse()

    for number in range(1, 8):
        change(number)
        if number == 5:
            given = pager.shrink()
            left = torch.cuda.memory_allocated() - before - expected.nbytes
            assert left <= min(slots, SLAB_PAGES) * page_bytes + 2 * rounding
            assert given == max(0, slots - SLAB_PAGES) * page_bytes
    assert wrong.item() == 0
    pager.close()
