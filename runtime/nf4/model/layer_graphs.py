"""Passes through all layers as CUDA graphs, for batches so small that starting kernels outlasts running them.

A layer's step starts about a hundred kernels; with few tokens the GPU mostly waits for the next one. Once a
shape has come up often enough, its pass forward and its pass backward are recorded, and from then on replayed
from static buffers. The backward graph adds to the gradients where they lie, so it holds for as long as they
stay there.

A replayed pass rounds a little otherwise than one layer by layer: gradients are added in another order. For
a run that goes on from a checkpoint to take the same way for every pass as one never stopped, what decides it
travels with the checkpoint (`history`), and passes recorded before are recorded again at their next turn.

One recorded pass can be under way at a time: what it keeps for its backward lies in memory that all graphs
share. A second one, and everything that was not recorded, goes layer by layer as without graphs.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layer_step import Context, Kept, LayerStep

MOST_TOKENS = 2048  # of a batch; with more the GPU is busy anyway
PASSES_BEFORE = 2  # without graphs, which also settle what libraries choose at first use
MOST_GRAPHS = 8  # shapes; those that come later stay without


class LayerGraphs:
    """The recorded passes of one decoder."""

    def __init__(self) -> None:
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self._passes: Counter[tuple[Any, ...]] = Counter()
        # Recorded before the run was stopped, and not yet again.
        self._owed: set[tuple[Any, ...]] = set()
        self._pool: Any = None
        self._is_full = False
        self._under_way: weakref.ref[_Token] | None = None

    def run(
        self, x_BTH: Tensor, steps: Sequence[LayerStep], contexts: Sequence[Context], *, keep: bool
    ) -> Tensor | None:
        """The last layer's output, or None where this pass has to go layer by layer.

        keep: as `LayerStep.forward` takes it.
        """
        parameters = [parameter for step in steps for parameter in step.parameters]
        is_busy = self._under_way is not None and self._under_way() is not None
        is_plain = all(context.seen is None for context in contexts)
        has_gradients = all(parameter.grad is not None for parameter in parameters)
        if (
            is_busy
            or not (is_plain and parameters and has_gradients)
            or len(x_BTH[0]) * len(x_BTH) > MOST_TOKENS
        ):
            return None
        cos_shape = tuple(contexts[0].cos_PTD.shape)
        key = (tuple(x_BTH.shape), str(x_BTH.dtype), x_BTH.requires_grad, cos_shape, keep)
        recorded = self._recorded.get(key)
        if recorded is None or not recorded.holds(parameters):
            self._recorded.pop(key, None)
            self._passes[key] += 1
            is_owed = key in self._owed
            self._is_full |= len(self._recorded) + len(self._owed) - is_owed >= MOST_GRAPHS
            if not is_owed and (self._passes[key] <= PASSES_BEFORE or self._is_full):
                return None
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._owed.discard(key)
            try:
                if is_owed:
                    _rehearse(x_BTH, steps, contexts[0], keep)
                recorded = self._recorded[key] = _Recorded(x_BTH, steps, contexts[0], keep, self._pool)
            except torch.OutOfMemoryError:
                self._is_full = True  # what graphs keep is missing elsewhere
                return None
        token = _Token()
        self._under_way = weakref.ref(token)
        output: Tensor = _Replay.apply(x_BTH, recorded, token, contexts[0], parameters[0])
        return output

    def history(self) -> dict[str, Any]:
        """What decides for each shape whether it is recorded, as JSON values."""
        shapes = [
            {
                "input": list(shape),
                "dtype": dtype,
                "requires_grad": requires_grad,
                "angles": list(angles),
                "keep": keep,
                "passes": passes,
                "is_recorded": key in self._recorded or key in self._owed,
            }
            for key, passes in self._passes.items()
            for shape, dtype, requires_grad, angles, keep in [key]
        ]
        return {"shapes": shapes, "is_full": self._is_full}

    def follow(self, history: Mapping[str, Any]) -> None:
        """Decide from now on as where `history` was taken.

        Raises:
            KeyError, TypeError, ValueError: not what `history` gives.
        """
        for shape in history["shapes"]:
            key = (
                tuple(map(int, shape["input"])),
                str(shape["dtype"]),
                bool(shape["requires_grad"]),
                tuple(map(int, shape["angles"])),
                bool(shape["keep"]),
            )
            self._passes[key] = int(shape["passes"])
            if shape["is_recorded"]:
                self._owed.add(key)
        self._is_full = bool(history["is_full"])


def _rehearse(x_BTH: Tensor, steps: Sequence[LayerStep], context: Context, keep: bool) -> None:
    """A pass that leaves nothing: libraries choose and load at first use, which cannot be recorded."""
    with torch.no_grad():
        y, kept = x_BTH.detach(), []
        for step in steps:
            x = y
            y, activations = step.forward(x, context, keep=keep)
            kept.append((x, activations))
        grad: Tensor | None = torch.zeros_like(y)
        for i, step in reversed(list(enumerate(steps))):
            assert grad is not None
            gradients = [torch.zeros_like(parameter) for parameter in step.parameters]
            wants = i > 0 or x_BTH.requires_grad
            grad = step.backward(*kept.pop(), grad, context, gradients, add=True, wants_grad_x=wants)


class _Token:
    """Lives until a pass has gone backward, or cannot any more."""


class _Recorded:
    """Both passes of one shape, and the buffers that they start from and end in."""

    def __init__(
        self, x_BTH: Tensor, steps: Sequence[LayerStep], context: Context, keep: bool, pool: Any
    ) -> None:
        parameters = [parameter for step in steps for parameter in step.parameters]
        self._addresses = _addresses(parameters)
        self.x, self.y, self.grad_y = (torch.empty_like(x_BTH) for _ in range(3))
        self.grad_x = torch.empty_like(x_BTH) if x_BTH.requires_grad else None
        self.context = Context(context.cos_PTD.clone(), context.sin_PTD.clone(), None)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        kept: list[tuple[Tensor, Kept | None]] = []
        # Other threads may go on calling CUDA meanwhile.
        how = {"pool": pool, "capture_error_mode": "thread_local"}
        with torch.no_grad(), torch.cuda.graph(self.forward, **how):
            y = self.x
            for step in steps:
                x = y
                y, activations = step.forward(x, self.context, keep=keep)
                kept.append((x, activations))
            self.y.copy_(y)
        with torch.no_grad(), torch.cuda.graph(self.backward, **how):
            grad: Tensor | None = self.grad_y
            for i, step in reversed(list(enumerate(steps))):
                assert grad is not None
                gradients = [parameter.grad for parameter in step.parameters if parameter.grad is not None]
                wants = i > 0 or self.grad_x is not None
                grad = step.backward(*kept.pop(), grad, self.context, gradients, add=True, wants_grad_x=wants)
            if self.grad_x is not None and grad is not None:
                self.grad_x.copy_(grad)

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether adapters and their gradients still lie where they were recorded."""
        return self._addresses == _addresses(parameters)


class _Replay(torch.autograd.Function):
    """Gradients of the adapters are added to where they lie, and not returned."""

    @staticmethod
    def forward(
        ctx: Any, x_BTH: Tensor, recorded: _Recorded, token: _Token, context: Context, _: Tensor
    ) -> Tensor:
        recorded.x.copy_(x_BTH)
        recorded.context.cos_PTD.copy_(context.cos_PTD)
        recorded.context.sin_PTD.copy_(context.sin_PTD)
        recorded.forward.replay()
        ctx.recorded, ctx.token = recorded, token
        return recorded.y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTH: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.token is None:
            raise RuntimeError("backward went through these layers before: their inputs are gone")
        ctx.token = None
        recorded: _Recorded = ctx.recorded
        recorded.grad_y.copy_(grad_BTH)
        recorded.backward.replay()
        return None if recorded.grad_x is None else recorded.grad_x.clone(), None, None, None, None


def _addresses(parameters: Sequence[Tensor]) -> list[int]:
    gradients = [parameter.grad for parameter in parameters]
    return [tensor.data_ptr() for tensor in (*parameters, *gradients) if tensor is not None]
