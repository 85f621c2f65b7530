"""What a run has done so far: numbers of its steps, read late so that no GPU waits, summed up and logged."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import TrainError
from ..paging.optim import PagedAdamW
from .runlog import RunLog
from .sinks import Sinks
from .step import not_finite
from .weight_change import WeightNorms


@dataclass
class TrainSummary:
    """How a run went.

    Attributes:
        steps, tokens: optimizer steps done, and tokens that went through the model for them; those before a
            checkpoint that the run went on from included.
        seconds: spent in these steps, evaluations and saves not counted.
        evaluations: step -> mean negative log-likelihood, in nats, on the evaluation data.
        stopped_by: name of the signal that ended the run early, or None.
        gave_up: whether early stopping ended it.
        last_loss: of the last step, or None. weights: norms of the adapter at the end, or None.
    """

    out: Path
    log: Path
    best: Path
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluations: dict[int, float] = field(default_factory=dict)
    stopped_by: str | None = None
    gave_up: bool = False
    last_loss: float | None = None
    weights: WeightNorms | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class StepNumbers:
    """Loss, norm and duration of a step, which begins when this is made. From a GPU they come while it works
    on: `send` waits for nothing, `read` for the step's end.

    Attributes:
        step, tokens, rate: number, tokens and learning rate of the step.
        places: says where its examples are from.
        loss_scale: its loss scale, or None.
    """

    def __init__(
        self, step: int, tokens: int, rate: float, optimizer: PagedAdamW, places: Callable[[], str]
    ) -> None:
        self.step, self.tokens, self.rate, self.places = step, tokens, rate, places
        self.loss_scale = None if optimizer.loss_scale is None else optimizer.loss_scale.value
        self._is_cuda = optimizer.device.type == "cuda"
        if self._is_cuda:
            self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._begin.record()
        else:
            self._began = time.perf_counter()

    def send(self, loss: Tensor, norm: Tensor) -> None:
        """The results of the step, once all its work has been started."""
        self._values = torch.stack((loss.double(), norm.double()))
        if self._is_cuda:
            values = torch.empty(2, dtype=torch.float64, pin_memory=True)
            self._values = values.copy_(self._values, non_blocking=True)
            self._end.record()
        else:
            self._seconds = time.perf_counter() - self._began

    def read(self) -> tuple[float, float, float]:
        """Loss, norm, and seconds from start to end."""
        if self._is_cuda:
            self._end.synchronize()
            self._seconds = self._begin.elapsed_time(self._end) / 1000
        loss, norm = self._values.tolist()
        return loss, norm, self._seconds


class StepReports:
    """Takes the numbers of each step, and writes them to summary, log and bar when `catch_up` is called.

    Args:
        logs: of what is computed, of how long it takes, and where numbers go besides.
        say: told at the start, and whenever that changes, how much optimizer state is paged.
    """

    def __init__(
        self,
        summary: TrainSummary,
        logs: tuple[RunLog, RunLog, Sinks],
        bar: tqdm,
        optimizer: PagedAdamW,
        say: Callable[[str], None],
    ) -> None:
        self._summary, self._bar, self._optimizer = summary, bar, optimizer
        self._log, self._timing, self._sinks = logs
        self._say = say
        self._unread: list[StepNumbers] = []
        self._state_bytes = optimizer.pager.num_pages * optimizer.pager.page_bytes
        self._capacity_told = self._state_bytes
        self._tell_paging()

    @property
    def unread(self) -> int:
        """Steps added and not reported yet."""
        return len(self._unread)

    def add(self, numbers: StepNumbers) -> None:
        """A step whose work has been started."""
        self._unread.append(numbers)

    def catch_up(self) -> None:
        """Report every step added so far; waits for the last one's end.

        Raises:
            TrainError: a loss or norm is not finite, or the log cannot be written.
        """
        while self._unread:
            self._report(self._unread.pop(0))

    def _report(self, numbers: StepNumbers) -> None:
        loss, norm, elapsed = numbers.read()
        self._check(numbers, loss, norm)
        summary = self._summary
        summary.last_loss = loss
        summary.steps, summary.tokens = numbers.step, summary.tokens + numbers.tokens
        summary.seconds += elapsed
        memory = memory_bytes()
        record: dict[str, Any] = {
            "step": numbers.step,
            "loss": loss,
            "lr": numbers.rate,
            "grad_norm": norm,
            "tokens": summary.tokens,
        }
        if numbers.loss_scale is not None:
            record["loss_scale"] = numbers.loss_scale
        timing: dict[str, Any] = {
            "step": numbers.step,
            "seconds": round(elapsed, 6),
            "tokens_per_second": round(numbers.tokens / elapsed, 1),
            "memory_bytes": memory,
        }
        device, pager = self._optimizer.device, self._optimizer.pager
        if device.type == "cuda":
            # Reserved, not allocated: the latter leaves out what CUDA graphs work in.
            timing["gpu_memory_bytes"] = torch.cuda.max_memory_reserved(device)
        if pager.capacity_bytes < self._state_bytes:
            timing["pages"] = asdict(pager.stats)
            self._tell_paging()
        self._log.write(**record)
        self._timing.write(**timing)
        self._sinks.write(numbers.step, record | timing)
        self._bar.update()
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, {summary.tokens_per_second:,.0f} tokens/s, {memory / 2**20:,.0f} MiB"
        )

    @staticmethod
    def _check(numbers: StepNumbers, loss: float, norm: float) -> None:
        if not math.isfinite(loss):
            raise not_finite("loss", numbers.step, loss, numbers.places())
        if not math.isfinite(norm) and numbers.loss_scale is None:
            raise not_finite("gradient norm", numbers.step, norm, numbers.places())
        for what, value in (("loss", loss), ("gradient", norm)):
            if value == 0:
                raise TrainError(
                    "",
                    f"step {numbers.step}: the {what} is exactly 0: nothing is learned",
                    got=numbers.places(),
                    remedy="look at tokens and labels with --show-example",
                )

    def _tell_paging(self) -> None:
        capacity = self._optimizer.pager.capacity_bytes
        if capacity != self._capacity_told:
            self._capacity_told = capacity
            place = "on the GPU" if self._optimizer.device.type == "cuda" else "in memory"
            kept = f"at most {capacity:,} of them {place}, the rest paged"
            self._say(f"optimizer state: {self._state_bytes:,} bytes, {kept}")


def memory_bytes() -> int:
    """Memory of this process that is in RAM now, mapped files included; the peak where only that is known."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
