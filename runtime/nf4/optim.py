"""PagedAdamW: AdamW (arXiv 1711.05101) whose moments live in the pages of a `Pager`.

How it works. All parameters, in the order of their groups, make one line of elements; page k holds
the moments of elements k*E .. (k+1)*E of that line, E = page_bytes / 8::

    page k, fp32   | exp_avg of E elements | exp_avg_sq of the same E elements |

so a page belongs to many small parameters or a part of a large one. A step sweeps the pages, one
in use and the next one arriving, and applies torch's own tensor operations, in the order in which
torch.optim.AdamW applies them, to each piece of a parameter in the page. They are elementwise, so
page size and budget do not change the result. Every other step sweeps backwards: what the last
sweep left in the pool is used first, where a one-way sweep would find nothing of use there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import ops_cuda
from .errors import TrainError
from .pager import Pager

STATE_BYTES = 8  # of one element: two fp32 moments
DEFAULT_PAGE_BYTES = 4 << 20  # large enough for full disk and PCIe speed, small enough for a tight budget


class _Piece(NamedTuple):
    """Elements [start, stop) of a parameter, whose moments begin at element `at` of a page."""

    param: int
    start: int
    stop: int
    at: int


class PagedAdamW(Optimizer):
    """AdamW over fp32 parameters with paged state.

    Equal bit for bit to itself for every page size and budget, and to torch.optim.AdamW (no
    amsgrad, `foreach` and `fused` off, as is torch's default on a CPU). All parameters are given at
    construction. Call `close`, or drop the optimizer, to remove its page file.

    Args:
        params: parameters or parameter groups, fp32, contiguous, all on one device. On a GPU all state is
            resident and the update is one fused kernel a piece, which rounds a little otherwise than torch.
        lr, betas, eps, weight_decay: as torch.optim.AdamW; each may differ by group.
        page_bytes: bytes in a page, a multiple of 8.
        budget_bytes: the most state kept in memory; None keeps all of it there.
        backing: path of the page file; None takes a temporary one.

    Raises:
        TrainError: nothing to train, a parameter or setting that cannot be used, or no room for the
            page file.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        page_bytes: int = DEFAULT_PAGE_BYTES,
        budget_bytes: int | None = None,
        backing: str | os.PathLike[str] | None = None,
    ) -> None:
        given: list[Any] = list(params)
        if not given:
            raise TrainError("", "nothing to train: the optimizer got no parameters")
        if page_bytes < STATE_BYTES or page_bytes % STATE_BYTES:
            raise TrainError("", "bad page size", expected=f"a multiple of {STATE_BYTES}", got=page_bytes)
        self._pager: Pager | None = None
        super().__init__(given, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            _check_settings(group)
        self._line = [(group, p) for group in self.param_groups for p in group["params"]]
        device = self._line[0][1].device
        for index, (_, p) in enumerate(self._line):
            if p.dtype != torch.float32 or not p.is_contiguous() or p.device != device:
                raise TrainError(
                    "",
                    f"parameter {index} cannot be trained",
                    expected=f"contiguous float32 on {device}",
                    got=f"{p.dtype} on {p.device}, strides {tuple(p.stride())}",
                )
        self._page_elements = page_bytes // STATE_BYTES
        self._pieces = _cut([p.numel() for _, p in self._line], self._page_elements)
        most = max(p.numel() for _, p in self._line)
        self._scratch = torch.empty(min(self._page_elements, most), device=device)
        self._backwards = False
        if device.type == "cuda" and budget_bytes is not None:
            remedy = "leave the budget out, or train on the CPU"
            raise TrainError("", "optimizer state on a GPU is not paged in this version", remedy=remedy)
        self._pager = Pager(
            len(self._pieces), page_bytes, budget_bytes=budget_bytes, backing=backing, device=device
        )

    @property
    def pager(self) -> Pager:
        """The pages, with their counters."""
        if self._pager is None:
            raise RuntimeError("the optimizer is not built yet")
        return self._pager

    def close(self) -> None:
        """Give the state back and remove the page file."""
        self.pager.close()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only during construction: a later group would change where every page begins."""
        if self._pager is not None:
            raise RuntimeError("PagedAdamW takes all its parameters at construction")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Raises:
            TrainError: the page file failed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates: dict[int, _Update] = {}
        for index, (group, p) in enumerate(self._line):
            if p.grad is not None:
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                state["step"] += 1
                updates[index] = _Update(p, group, state["step"].item())
        pages = [
            k for k, pieces in enumerate(self._pieces) if any(piece.param in updates for piece in pieces)
        ]
        if self._backwards:
            pages.reverse()
        self._backwards = not self._backwards
        for position, k in enumerate(pages):
            with self.pager.page(k) as page:
                if position + 1 < len(pages):
                    self.pager.prefetch(pages[position + 1])
                exp_avg, exp_avg_sq = page.view(torch.float32).view(2, -1)
                for piece in self._pieces[k]:
                    if piece.param in updates:
                        size = piece.stop - piece.start
                        updates[piece.param].apply(
                            piece,
                            exp_avg.narrow(0, piece.at, size),
                            exp_avg_sq.narrow(0, piece.at, size),
                            self._scratch.narrow(0, 0, size),
                        )
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Copies in torch.optim.AdamW's layout: step, exp_avg and exp_avg_sq of each parameter."""
        saved = super().state_dict()
        for index, state in saved["state"].items():
            p = self._line[index][1]
            moments = torch.empty(2, p.numel())
            self._transfer(index, moments, into_pages=False)
            saved["state"][index] = {
                "step": state["step"].clone(),
                "exp_avg": moments[0].view_as(p),
                "exp_avg_sq": moments[1].view_as(p),
            }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` of this class or of torch.optim.AdamW gave, into the same pages.

        Raises:
            TrainError: moments that are missing, have another shape, or belong to amsgrad.
            ValueError: other parameter groups than ours.
        """
        steps = {index: {"step": _step_of(state)} for index, state in state_dict["state"].items()}
        for index, state in state_dict["state"].items():
            if index not in range(len(self._line)):
                raise TrainError("", "optimizer state of an unknown parameter", got=index)
            _check_state(index, state, self._line[index][1])
        super().load_state_dict({**state_dict, "state": steps})
        # torch's loader makes new group dictionaries; the line must follow them to see their rates.
        self._line = [(group, p) for group in self.param_groups for p in group["params"]]
        for index, (_, p) in enumerate(self._line):
            state = state_dict["state"].get(index)
            moments = torch.zeros(2, p.numel())
            if state is not None:
                moments[0] = state["exp_avg"].reshape(-1)
                moments[1] = state["exp_avg_sq"].reshape(-1)
            self._transfer(index, moments, into_pages=True)

    def _transfer(self, index: int, moments: Tensor, *, into_pages: bool) -> None:
        """Copy one parameter's moments, fp32 [2, n], into its pages or out of them."""
        for k, pieces in enumerate(self._pieces):
            for piece in pieces:
                if piece.param == index:
                    with self.pager.page(k, write=into_pages) as page:
                        state = page.view(torch.float32).view(2, -1)
                        paged = state[:, piece.at : piece.at + piece.stop - piece.start]
                        flat = moments[:, piece.start : piece.stop]
                        if into_pages:
                            paged.copy_(flat)
                        else:
                            flat.copy_(paged)


class _Update:
    """One parameter's AdamW update of this step, applied piece by piece."""

    def __init__(self, p: Tensor, group: dict[str, Any], step: float) -> None:
        if p.grad is None or p.grad.is_sparse:
            raise TrainError("", "sparse gradients are not supported")
        self.param = p.view(-1)
        self.grad = p.grad.reshape(-1)
        self.group, self.step = group, round(step)
        self.beta1, self.beta2 = group["betas"]
        self.eps = group["eps"]
        self.decay = 1 - group["lr"] * group["weight_decay"] if group["weight_decay"] else None
        self.step_size = group["lr"] / (1 - self.beta1**step)
        self.correction2_sqrt = (1 - self.beta2**step) ** 0.5

    def apply(self, piece: _Piece, exp_avg: Tensor, exp_avg_sq: Tensor, scratch: Tensor) -> None:
        """The operations and their order are torch's: reordering them changes last bits."""
        param = self.param[piece.start : piece.stop]
        grad = self.grad[piece.start : piece.stop]
        if param.is_cuda:
            settings = {key: self.group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            ops_cuda.adamw(param, grad, exp_avg, exp_avg_sq, **settings, step=self.step)
            return
        if self.decay is not None:
            param.mul_(self.decay)
        exp_avg.lerp_(grad, 1 - self.beta1)
        exp_avg_sq.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        denominator = torch.sqrt(exp_avg_sq, out=scratch).div_(self.correction2_sqrt).add_(self.eps)
        param.addcdiv_(exp_avg, denominator, value=-self.step_size)


def _cut(sizes: list[int], page_elements: int) -> list[list[_Piece]]:
    """Lay parameters of these sizes end to end and cut the line into pages."""
    pages: list[list[_Piece]] = [[]]
    at = 0
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            if at == page_elements:
                pages.append([])
                at = 0
            stop = min(size, start + page_elements - at)
            pages[-1].append(_Piece(index, start, stop, at))
            at += stop - start
            start = stop
    return pages


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


def _step_of(state: dict[str, Any]) -> Tensor:
    return torch.as_tensor(state.get("step", 0.0), dtype=torch.float32).clone()


def _check_state(index: int, state: dict[str, Any], p: Tensor) -> None:
    if "max_exp_avg_sq" in state:
        raise TrainError(
            "", f"optimizer state of parameter {index} belongs to amsgrad, which is not supported"
        )
    for name in ("exp_avg", "exp_avg_sq"):
        got = tuple(state[name].shape) if name in state else "nothing"
        if got != tuple(p.shape):
            raise TrainError("", f"{name} of parameter {index}", expected=tuple(p.shape), got=got)
