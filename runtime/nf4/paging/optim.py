"""PagedAdamW: AdamW (arXiv 1711.05101) whose moments live in the pages of a `Pager`.

How it works. All parameters, in the order of their groups, make one line of elements; page k holds
the moments of elements k*E .. (k+1)*E of that line, E = page_bytes / 8::

    page k, fp32   | exp_avg of E elements | exp_avg_sq of the same E elements |

so a page belongs to many small parameters or a part of a large one. A step sweeps the pages, one
in use and the next one arriving. On a CPU it applies torch's own tensor operations, in the order in
which torch.optim.AdamW applies them, to each piece of a parameter in the page; on a GPU one kernel
does that for all the pages that are there (`nf4.paging.fused_adamw`). Everything is elementwise, so page
size and budget do not change the result. Every other step sweeps backwards: what the last sweep left
in the pool is used first, where a one-way sweep would find nothing of use there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import TrainError
from ..training.loss_scale import LossScale
from .fused_adamw import ChunkTables, Piece, Setting
from .pager import Pager

if TYPE_CHECKING:
    from .cuda_pager import CudaPager

STATE_BYTES = 8  # of one element: two fp32 moments
# Large enough for the full speed of a disk, and of a GPU's link; small enough for a tight budget.
DEFAULT_PAGE_BYTES = {"cpu": 4 << 20, "cuda": 8 << 20}
MOMENTS = ("exp_avg", "exp_avg_sq")  # in the order of a page's rows; torch's names
_DTYPES = (torch.float32, torch.bfloat16)


class PagedAdamW(Optimizer):
    """AdamW with paged fp32 state, over fp32 or bf16 parameters.

    Equal bit for bit to itself for every page size and budget. On a CPU and in fp32 also to
    torch.optim.AdamW (no amsgrad, `foreach` and `fused` off, as is torch's default there); on a GPU
    the kernel rounds a little otherwise. All parameters are given at construction. Call `close`, or
    drop the optimizer, to give its memory and its page file back.

    A GPU keeps state within the budget and sends the rest to pinned host memory (`nf4.paging.cuda_pager`);
    a CPU sends it to a file. On a GPU a step starts work and waits for nothing. It is fastest where
    gradients stay where they are: `zero_grad(set_to_none=False)`.

    Args:
        params: parameters or parameter groups, contiguous, all on one device. Gradients have the
            parameter's type.
        lr, betas, eps, weight_decay: as torch.optim.AdamW; each may differ by group.
        page_bytes: bytes in a page, a multiple of 8. None: 4 MiB on a CPU, 8 MiB on a GPU, and at most a
            quarter of the budget: one page in use, one arriving, the rest worth finding again.
        budget_bytes: the most state kept in memory, or on the GPU; None keeps all of it there.
        backing: path of the page file; None takes a temporary one. Not for parameters on a GPU.
        loss_scale: travels with the state; `nf4.training.step.train_step` uses it, `step` does not.

    Raises:
        TrainError: nothing to train, a parameter or setting that cannot be used, or no room for the
            page file or the host memory.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        page_bytes: int | None = None,
        budget_bytes: int | None = None,
        backing: str | os.PathLike[str] | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        given: list[Any] = list(params)
        if not given:
            raise TrainError("", "nothing to train: the optimizer got no parameters")
        if page_bytes is not None and (page_bytes < STATE_BYTES or page_bytes % STATE_BYTES):
            raise TrainError("", "bad page size", expected=f"a multiple of {STATE_BYTES}", got=page_bytes)
        self._pager: Pager | CudaPager | None = None
        super().__init__(given, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            _check_settings(group)
        self._line = [(group, p) for group in self.param_groups for p in group["params"]]
        self._params = [p for _, p in self._line]
        device = self._params[0].device
        for index, p in enumerate(self._params):
            if p.dtype not in _DTYPES or not p.is_contiguous() or p.device != device:
                raise TrainError(
                    "",
                    f"parameter {index} cannot be trained",
                    expected=f"contiguous float32 or bfloat16 on {device}",
                    got=f"{p.dtype} on {p.device}, strides {tuple(p.stride())}",
                )
        if page_bytes is None:
            page_bytes = _page_bytes(device, budget_bytes)
        self.loss_scale = loss_scale
        self._steps = [0] * len(self._params)  # updates that each parameter has had
        self._page_elements = page_bytes // STATE_BYTES
        self._pieces = _cut([p.numel() for p in self._params], self._page_elements)
        self._backwards = False
        self._tables: ChunkTables | None = None
        if device.type == "cuda":
            if backing is not None:
                remedy = "leave the page file out: state of a GPU is paged to host memory"
                raise TrainError(backing, "page file for parameters on a GPU", remedy=remedy)
            from .cuda_pager import CudaPager

            self._tables = ChunkTables(self._params, self._pieces, self._page_elements)
            self._pager = CudaPager(len(self._pieces), page_bytes, budget_bytes=budget_bytes, device=device)
        else:
            self._pager = Pager(len(self._pieces), page_bytes, budget_bytes=budget_bytes, backing=backing)

    @property
    def pager(self) -> Pager | CudaPager:
        """The pages, with their counters."""
        if self._pager is None:
            raise RuntimeError("the optimizer is not built yet")
        return self._pager

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._params[0].device

    def close(self) -> None:
        """Give the state back and remove the page file."""
        self.pager.close()

    def release_memory(self) -> int:
        """Under memory pressure: send all state but a few pages from the GPU to the host, for good.

        Returns:
            The bytes that went back to the GPU's allocator; 0 on a CPU.

        Raises:
            TrainError: the host has no memory for the pages.
        """
        return 0 if isinstance(self.pager, Pager) else self.pager.shrink()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only during construction: a later group would change where every page begins."""
        if self._pager is not None:
            raise RuntimeError("PagedAdamW takes all its parameters at construction")
        super().add_param_group(param_group)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The Euclidean norm of all gradients, float32 without shape, on their device; nothing waits.

        Raises:
            TrainError: a gradient that cannot be used.
        """
        if self._tables is None:
            return torch.nn.utils.get_total_norm([p.grad for p in self._params if p.grad is not None])
        self._follow(self._gradients())
        return self._tables.gradient_norm()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, gradient_factor: Tensor | None = None
    ) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: as in torch.
            gradient_factor: float32 without shape, on the parameters' device; gradients count times
                this. Where it is not finite, parameters and moments stay as they are; on a GPU, where
                nobody waits to see that, the step is counted all the same.

        Raises:
            TrainError: the page file failed, or a gradient cannot be used.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._tables is None and gradient_factor is not None and not gradient_factor.isfinite():
            return loss
        gradients = self._gradients()
        for index, gradient in enumerate(gradients):
            self._steps[index] += gradient is not None
        if self._tables is None:
            self._update_on_cpu(gradients, gradient_factor)
        else:
            self._update_on_gpu(gradients, gradient_factor, self._tables)
        self._backwards = not self._backwards
        return loss

    def _gradients(self) -> list[Tensor | None]:
        gradients = [p.grad for p in self._params]
        if any(g is not None and g.layout is not torch.strided for g in gradients):
            raise TrainError("", "sparse gradients are not supported")
        return [None if g is None else g.contiguous() for g in gradients]

    def _in_sweep_order(self, pages: list[int]) -> list[int]:
        return pages[::-1] if self._backwards else pages

    def _update_on_cpu(self, gradients: list[Tensor | None], factor: Tensor | None) -> None:
        updates = {
            index: _Update(p, gradient, factor, group, self._steps[index])
            for index, ((group, p), gradient) in enumerate(zip(self._line, gradients, strict=True))
            if gradient is not None
        }
        pages = [
            k for k, pieces in enumerate(self._pieces) if any(piece.param in updates for piece in pieces)
        ]
        scratch = torch.empty(min(self._page_elements, max(p.numel() for p in self._params)))
        for here in self.pager.sweep(self._in_sweep_order(pages)):
            for k, page in here:
                exp_avg, exp_avg_sq = page.view(torch.float32).view(2, -1)
                for piece in self._pieces[k]:
                    if piece.param in updates:
                        size = piece.stop - piece.start
                        updates[piece.param].apply(
                            piece,
                            exp_avg.narrow(0, piece.at, size),
                            exp_avg_sq.narrow(0, piece.at, size),
                            scratch.narrow(0, 0, size),
                        )

    def _follow(self, gradients: list[Tensor | None]) -> None:
        """Bring the tables up to date: parameters of one group and one step count share a setting."""
        assert self._tables is not None
        if not self._tables.follow(gradients):
            return
        numbers: dict[tuple[int, int], int] = {}
        self._sharers: list[int] = []  # one parameter for each setting
        settings = [0] * len(self._params)
        for index, (group, _) in enumerate(self._line):
            if gradients[index] is not None:
                key = (id(group), self._steps[index])
                if key not in numbers:
                    numbers[key] = len(numbers)
                    self._sharers.append(index)
                settings[index] = numbers[key]
        self._tables.assign(settings)
        self._pages_in_use = self._tables.pages()

    def _update_on_gpu(
        self, gradients: list[Tensor | None], factor: Tensor | None, tables: ChunkTables
    ) -> None:
        self._follow(gradients)
        settings = []
        for index in self._sharers:
            group = self._line[index][0]
            beta1, beta2 = group["betas"]
            step = self._steps[index]
            settings.append(Setting(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], step))
        for pages in self.pager.sweep(self._in_sweep_order(self._pages_in_use)):
            tables.update(pages, settings, factor)

    def state_dict(self) -> dict[str, Any]:
        """Copies in torch.optim.AdamW's layout: step, exp_avg and exp_avg_sq of each parameter.

        Beside them "loss_scale", where there is one.
        """
        saved = super().state_dict()
        if self.loss_scale is not None:
            saved["loss_scale"] = self.loss_scale.state_dict()
        flat = {name: torch.empty(shape).view(-1) for name, (_, shape) in self.state_layout().items()}

        def put(name: str, offset: int, data: memoryview) -> None:
            flat[name].numpy().data.cast("B")[offset : offset + len(data)] = data

        self.write_state(put)
        for index, (p, step) in enumerate(zip(self._params, self._steps, strict=True)):
            if step:
                saved["state"][index] = {"step": torch.tensor(float(step))} | {
                    name: flat[f"{index}.{name}"].view(p.shape) for name in MOMENTS
                }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` of this class or of torch.optim.AdamW gave, into the same pages.

        Raises:
            TrainError: moments that are missing, have another shape, or belong to amsgrad.
            ValueError: other parameter groups than ours.
        """
        states: dict[int, dict[str, Any]] = state_dict["state"]
        for index, state in states.items():
            if index not in range(len(self._line)):
                raise TrainError("", "optimizer state of an unknown parameter", got=index)
            _check_state(index, state, self._params[index])
        super().load_state_dict({**state_dict, "state": {}})
        # torch's loader makes new group dictionaries; the line must follow them to see their rates.
        self._line = [(group, p) for group in self.param_groups for p in group["params"]]
        if self.loss_scale is not None and "loss_scale" in state_dict:
            self.loss_scale.load_state_dict(state_dict["loss_scale"])
        flat = {
            f"{index}.{name}": state[name].detach().cpu().float().contiguous().view(-1)
            for index, state in states.items()
            for name in MOMENTS
        }

        def get(name: str, offset: int, into: memoryview) -> None:
            into[:] = flat[name].numpy().data.cast("B")[offset : offset + len(into)]

        self.read_state(
            [round(float(states.get(index, {}).get("step", 0))) for index in range(len(self._params))], get
        )

    @property
    def steps(self) -> tuple[int, ...]:
        """Updates that each parameter has had."""
        return tuple(self._steps)

    def state_layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What `write_state` gives: `<number of the parameter>.<moment>` -> safetensors dtype, shape.

        A parameter that was never updated has none.
        """
        return {
            f"{index}.{name}": ("F32", tuple(p.shape))
            for index, (p, step) in enumerate(zip(self._params, self._steps, strict=True))
            if step
            for name in MOMENTS
        }

    def write_state(self, put: Callable[[str, int, memoryview], None]) -> None:
        """Give away all moments piece by piece, with one page in memory at a time.

        Args:
            put: takes the name of a tensor of `state_layout`, a byte offset in it, and the bytes there.

        Raises:
            TrainError: the page file failed.
        """
        for pages in self.pager.sweep(list(range(len(self._pieces))), write=False):
            for k, page in pages:
                rows = page.cpu().view(torch.float32).view(2, -1).numpy()
                for param, start, stop, at in self._pieces[k]:
                    if self._steps[param]:
                        for row, name in zip(rows, MOMENTS, strict=True):
                            data = row[at : at + stop - start].data.cast("B")
                            put(f"{param}.{name}", STATE_BYTES // 2 * start, data)

    def read_state(self, steps: Sequence[int], get: Callable[[str, int, memoryview], None]) -> None:
        """Take all moments back piece by piece; those of parameters without an update become zeros.

        Args:
            steps: updates that each parameter has had.
            get: fills a buffer from a tensor of `state_layout`, beginning at a byte offset.

        Raises:
            TrainError: the page file failed.
        """
        self._steps = list(steps)
        if self._tables is not None:
            self._tables.forget()  # which parameters share a setting
        for pages in self.pager.sweep(list(range(len(self._pieces)))):
            for k, page in pages:
                moments = torch.zeros(2, self._page_elements)
                for param, start, stop, at in self._pieces[k]:
                    if self._steps[param]:
                        for row, name in zip(moments.numpy(), MOMENTS, strict=True):
                            data = row[at : at + stop - start].data.cast("B")
                            get(f"{param}.{name}", STATE_BYTES // 2 * start, data)
                page.copy_(moments.view(-1).view(torch.uint8))


class _Update:
    """One parameter's AdamW update of this step on a CPU, applied piece by piece."""

    def __init__(
        self, p: Tensor, gradient: Tensor, factor: Tensor | None, group: dict[str, Any], step: int
    ) -> None:
        self.param, self.grad = p.view(-1), gradient.view(-1)
        self.factor = None if factor is None or factor == 1 else factor
        self.beta1, self.beta2 = group["betas"]
        self.eps = group["eps"]
        self.decay = 1 - group["lr"] * group["weight_decay"] if group["weight_decay"] else None
        self.step_size = group["lr"] / (1 - self.beta1**step)
        self.correction2_sqrt = (1 - self.beta2**step) ** 0.5

    def apply(self, piece: Piece, exp_avg: Tensor, exp_avg_sq: Tensor, scratch: Tensor) -> None:
        """The operations and their order are torch's: reordering them changes last bits."""
        stored = self.param[piece.start : piece.stop]
        param = stored.float()  # itself, where it is fp32
        grad = self.grad[piece.start : piece.stop].float()
        if self.factor is not None:
            grad = grad * self.factor
        if self.decay is not None:
            param.mul_(self.decay)
        exp_avg.lerp_(grad, 1 - self.beta1)
        exp_avg_sq.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        denominator = torch.sqrt(exp_avg_sq, out=scratch).div_(self.correction2_sqrt).add_(self.eps)
        param.addcdiv_(exp_avg, denominator, value=-self.step_size)
        if param is not stored:
            stored.copy_(param)


def _cut(sizes: list[int], page_elements: int) -> list[list[Piece]]:
    """Lay parameters of these sizes end to end and cut the line into pages."""
    pages: list[list[Piece]] = [[]]
    at = 0
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            if at == page_elements:
                pages.append([])
                at = 0
            stop = min(size, start + page_elements - at)
            pages[-1].append(Piece(index, start, stop, at))
            at += stop - start
            start = stop
    return pages


def _page_bytes(device: torch.device, budget: int | None) -> int:
    most = DEFAULT_PAGE_BYTES[device.type]
    return most if budget is None else max(STATE_BYTES, min(most, budget // 4 // STATE_BYTES * STATE_BYTES))


def _check_settings(group: dict[str, Any]) -> None:
    limits = {
        "lr": (group["lr"], group["lr"] >= 0, "at least 0"),
        "betas": (group["betas"], all(0 <= beta < 1 for beta in group["betas"]), "two numbers in [0, 1)"),
        "eps": (group["eps"], group["eps"] >= 0, "at least 0"),
        "weight_decay": (group["weight_decay"], group["weight_decay"] >= 0, "at least 0"),
    }
    for name, (value, good, expected) in limits.items():
        if not good:
            raise TrainError("", f"bad {name}", expected=expected, got=value)


def _check_state(index: int, state: dict[str, Any], p: Tensor) -> None:
    if "max_exp_avg_sq" in state:
        raise TrainError(
            "", f"optimizer state of parameter {index} belongs to amsgrad, which is not supported"
        )
    for name in MOMENTS:
        got = tuple(state[name].shape) if name in state else "nothing"
        if got != tuple(p.shape):
            raise TrainError("", f"{name} of parameter {index}", expected=tuple(p.shape), got=got)
