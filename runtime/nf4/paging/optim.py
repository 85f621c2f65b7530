"""PagedAdamW: AdamW (arXiv 1711.05101) whose moments lie in the pages of a `Pager`.

How it works. `nf4.paging.layout` says which moments lie in which page. A step sweeps the pages, one in use
and the next ones arriving. On a CPU it applies torch's own tensor operations, in the order in which
torch.optim.AdamW applies them, to each piece of a parameter in the page (`nf4.paging.cpu_adamw`); on a GPU
one kernel does that for all the pages that are there (`nf4.paging.fused_adamw`). Everything is elementwise,
or within a block of 256 elements that no page cuts, so page size and budget do not change the result. Every
other step sweeps backwards: what the last sweep left in the pool is used first, where a one-way sweep would
find nothing of use there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import TrainError
from ..training.loss_scale import LossScale
from .cpu_adamw import Scratch, Update, update_page
from .fused_adamw import ChunkTables, Setting
from .layout import FIELDS, StateLayout, check_page_bytes, default_page_bytes
from .pager import Pager
from .states import Transfer, flat_tensors, read_pages, steps_of, tensor_layout, write_pages
from .stores import MemoryStore

if TYPE_CHECKING:
    from .cuda_pager import CudaPager

_DTYPES = (torch.float32, torch.bfloat16)


class PagedAdamW(Optimizer):
    """AdamW with paged fp32 or 8-bit state, over fp32 or bf16 parameters.

    Equal bit for bit to itself for every page size and budget. With 32-bit states, on a CPU and in fp32 also
    to torch.optim.AdamW (no amsgrad, `foreach` and `fused` off, as is torch's default there); on a GPU
    the kernel rounds a little otherwise. 8-bit states take 2.03 bytes a parameter instead of 8; they are
    those of bitsandbytes but for very small second moments (`nf4.paging.blockwise`). All parameters are given
    at construction. Call `close`, or drop the optimizer, to give its memory and its page file back.

    A GPU keeps state within the budget and sends the rest to pinned host memory (`nf4.paging.cuda_pager`);
    a CPU sends it to a file. On a GPU a step starts work and waits for nothing. It is fastest where
    gradients stay where they are: `zero_grad(set_to_none=False)`.

    Args:
        params: parameters or parameter groups, contiguous, all on one device. Gradients have the
            parameter's type.
        lr, betas, eps, weight_decay: as torch.optim.AdamW; each may differ by group.
        state_bits: 32, or 8: blocks of 256 moments with 8-bit codes, in parameters of 4096 elements or more.
        page_bytes: bytes in a page, a multiple of 8. None: 4 MiB on a CPU, 8 MiB on a GPU, and at most a
            quarter of the budget: one page in use, one arriving, the rest worth finding again; no more than
            all states need.
        budget_bytes: the most state kept in memory, or on the GPU; None keeps all of it there.
        store: where pages go that the budget has no room for: "file" or "memory". None takes a file on a CPU,
            and memory, the host's, on a GPU, which has nothing else.
        backing: folder or free name for the page file (see `nf4.paging.stores.FileStore`); None takes a
            temporary one.
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
        state_bits: int = 32,
        page_bytes: int | None = None,
        budget_bytes: int | None = None,
        store: Literal["file", "memory"] | None = None,
        backing: str | os.PathLike[str] | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        given: list[Any] = list(params)
        if not given:
            raise TrainError("", "nothing to train: the optimizer got no parameters")
        if state_bits not in FIELDS:
            raise TrainError("", "bad number of bits for states", expected="32 or 8", got=state_bits)
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
        self.state_bits = state_bits
        self.loss_scale = loss_scale
        self._steps = [0] * len(self._params)  # updates that each parameter has had
        sizes = [p.numel() for p in self._params]
        if page_bytes is None:
            page_bytes = default_page_bytes(sizes, state_bits, device, budget_bytes)
        check_page_bytes(page_bytes, sizes, state_bits)
        self._layout = StateLayout.cut(sizes, page_bytes, state_bits)
        self._backwards = False
        self._tables: ChunkTables | None = None
        self._sharers: list[int] = []  # one parameter for each setting; these and the pages on a GPU only
        self._pages_in_use: list[int] = []
        self._pager = self._make_pager(device, budget_bytes, store, backing)

    def _make_pager(
        self,
        device: torch.device,
        budget_bytes: int | None,
        store: Literal["file", "memory"] | None,
        backing: str | os.PathLike[str] | None,
    ) -> Pager | CudaPager:
        if store not in ("file", "memory", None):
            raise TrainError("", "unknown page store", expected="file or memory", got=store)
        num_pages, page_bytes = len(self._layout.pages), self._layout.page_bytes
        if device.type == "cuda":
            if store == "file" or backing is not None:
                remedy = "leave the page file out: state of a GPU is paged to host memory"
                raise TrainError(backing or "", "page file for parameters on a GPU", remedy=remedy)
            from .cuda_pager import CudaPager

            self._tables = ChunkTables(self._params, self._layout)
            return CudaPager(num_pages, page_bytes, budget_bytes=budget_bytes, device=device)
        behind = None
        if store == "memory":
            if backing is not None:
                raise TrainError(backing, "page file for pages in memory", remedy="leave one of them out")
            behind = partial(MemoryStore, num_pages, page_bytes)
        return Pager(num_pages, page_bytes, budget_bytes=budget_bytes, backing=backing, make_store=behind)

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
            index: Update(p, gradient, factor, group, self._steps[index])
            for index, ((group, p), gradient) in enumerate(zip(self._line, gradients, strict=True))
            if gradient is not None
        }
        layout = self._layout
        pages = [
            k for k, pieces in enumerate(layout.pages) if any(piece.param in updates for piece in pieces)
        ]
        scratch = Scratch(max(p.numel() for p in self._params))
        for here in self.pager.sweep(self._in_sweep_order(pages)):
            for k, page in here:
                update_page(layout.pages[k], layout.fields(k, page), updates, scratch)

    def _follow(self, gradients: list[Tensor | None]) -> None:
        """Bring the tables up to date: parameters of one group and one step count share a setting."""
        assert self._tables is not None
        if not self._tables.follow(gradients):
            return
        numbers: dict[tuple[int, int], int] = {}
        self._sharers = []
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

        8-bit states are codes with exp_avg_absmax and exp_avg_sq_absmax beside them (see
        `nf4.paging.layout`). Beside the states "loss_scale", where there is one.
        """
        saved = super().state_dict()
        if self.loss_scale is not None:
            saved["loss_scale"] = self.loss_scale.state_dict()
        types = {field.dtype_name: field.dtype for fields in FIELDS.values() for field in fields}
        tensors = {
            name: torch.empty(shape, dtype=types[dtype])
            for name, (dtype, shape) in self.state_layout().items()
        }

        def put(name: str, offset: int, data: memoryview) -> None:
            tensors[name].view(-1).numpy().data.cast("B")[offset : offset + len(data)] = data

        self.write_state(put)
        for index, step in enumerate(self._steps):
            if step:
                saved["state"][index] = {"step": torch.tensor(float(step))}
        for name, tensor in tensors.items():
            number, _, field = name.partition(".")
            saved["state"][int(number)][field] = tensor
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` of this class or of torch.optim.AdamW gave, into the same pages.

        32-bit states become 8-bit ones where this optimizer has those, and the other way round.

        Raises:
            TrainError: moments that are missing, have another shape or dtype, or belong to amsgrad.
            ValueError: other parameter groups than ours.
        """
        states: dict[int, dict[str, Any]] = state_dict["state"]
        tensors: dict[str, Tensor] = {}
        for index, state in states.items():
            if index not in range(len(self._line)):
                raise TrainError("", "optimizer state of an unknown parameter", got=index)
            flat = flat_tensors(index, state, self._params[index], self.state_bits)
            tensors |= {f"{index}.{name}": tensor for name, tensor in flat.items()}
        steps = steps_of(states, len(self._params))
        super().load_state_dict({**state_dict, "state": {}})
        # torch's loader makes new group dictionaries; the line must follow them to see their rates.
        self._line = [(group, p) for group in self.param_groups for p in group["params"]]
        if self.loss_scale is not None and "loss_scale" in state_dict:
            self.loss_scale.load_state_dict(state_dict["loss_scale"])

        def get(name: str, offset: int, into: memoryview) -> None:
            into[:] = tensors[name].numpy().data.cast("B")[offset : offset + len(into)]

        self.read_state(steps, get)

    @property
    def steps(self) -> tuple[int, ...]:
        """Updates that each parameter has had."""
        return tuple(self._steps)

    def state_layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What `write_state` gives: `<number of the parameter>.<moment>` -> safetensors dtype, shape.

        A parameter that was never updated has none. 8-bit states have `.exp_avg_absmax` and
        `.exp_avg_sq_absmax`, too.
        """
        return tensor_layout(self._params, self._steps, self.state_bits)

    def write_state(self, put: Transfer) -> None:
        """Give away all moments piece by piece, with one page in memory at a time.

        Args:
            put: takes the name of a tensor of `state_layout`, a byte offset in it, and the bytes there.

        Raises:
            TrainError: the page file failed.
        """
        write_pages(self._layout, self.pager, self._steps, put)

    def read_state(self, steps: Sequence[int], get: Transfer) -> None:
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
        read_pages(self._layout, self.pager, self._steps, get)


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
