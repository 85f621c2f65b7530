"""One step of training: micro-batches forward and backward, clipping, update.

On a GPU nothing in it waits: loss and norm stay there, and so does the decision that a step with a loss or
norm that is not finite changes nothing. Who reads the numbers later decides what to do about it.

Running out of GPU memory is answered once: optimizer pages go to the host and the step begins again, from
gradients and random numbers as they were. So a run that had to do so ends with the same bytes as one that
had not, without a second copy of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..data.batches import Batch
from ..errors import TrainError
from ..model.decoder import CausalLM
from ..paging.optim import PagedAdamW
from .loss import backward_loss, labelled_positions

T = TypeVar("T")

Places = Callable[[Sequence[Batch]], str]
RATE_FACTOR = "rate_factor"  # of a parameter group: its learning rate is that of the step times this


def train_step(
    model: CausalLM,
    optimizer: PagedAdamW,
    batches: Sequence[Batch],
    *,
    rate: float,
    clip: float,
    step: int,
    before_update: Callable[[], None] = lambda: None,
    places: Places = lambda batches: "",
) -> tuple[Tensor, Tensor]:
    """One optimizer step over its micro-batches: (mean loss a labelled token, gradient norm before clipping).

    Both are scalars on the model's device, float64 and float32, normalised by the labelled tokens of the
    whole step, so 1 x 8 sequences and 8 x 1 agree. On a GPU reading them is what waits.

    On a CPU, and with loss scaling, a loss that is not finite raises. On a GPU without loss scaling it is
    returned, and parameters and moments are as before. With loss scaling a norm that is not finite only
    lowers the scale (see `LossScale`); the update is left out.

    Args:
        batches: micro-batches, on any device.
        rate: learning rate.
        clip: the most the norm may be; 0 leaves it alone.
        step: for messages.
        before_update: called when gradients are on their way, before parameters change: the time to look at
            the step before, as the GPU is busy with this one.
        places: says for messages where the examples of batches are from.

    Raises:
        TrainError: loss or gradient is not finite, parameters as before the step; not enough memory.
    """
    fresh = [p for group in optimizer.param_groups for p in group["params"] if p.grad is None]
    random = _RandomState(model.device)

    def undo() -> None:
        for p in fresh:
            p.grad = None
        optimizer.zero_grad(set_to_none=False)
        random.restore()

    loss = relieved(
        optimizer, lambda: _forward_backward(model, optimizer, batches, step, places), f"step {step}", undo
    )
    scale = optimizer.loss_scale
    unscale = 1.0 if scale is None else 1 / scale.value
    norm = optimizer.gradient_norm() * unscale
    factor = ((clip or math.inf) / (norm + 1e-6)).clamp(max=1.0) * unscale
    before_update()
    if loss.is_cuda and scale is None:
        is_finite = loss.isfinite() & norm.isfinite()
        _update(optimizer, rate, torch.where(is_finite, factor, math.nan))
    else:
        loss_value, norm_value = torch.stack((loss, norm.double())).tolist()
        if not math.isfinite(loss_value):
            raise not_finite("loss", step, loss_value, places(batches))
        if math.isfinite(norm_value):
            _update(optimizer, rate, factor)
            if scale is not None:
                scale.succeeded()
        elif scale is None:
            raise not_finite("gradient norm", step, norm_value, places(batches))
        else:
            scale.overflowed()
    optimizer.zero_grad(set_to_none=False)  # the buffers are needed again at once
    return loss, norm


def relieved(
    optimizer: PagedAdamW, work: Callable[[], T], what: str, undo: Callable[[], None] = lambda: None
) -> T:
    """What `work` returns; where GPU memory runs out, optimizer pages go to the host and it begins again.

    Args:
        what: for messages.
        undo: takes back what the first attempt changed.

    Raises:
        TrainError: the memory does not suffice then either.
    """
    reason = None
    for is_last in (False, True):
        try:
            return work()
        except torch.OutOfMemoryError as error:
            reason = ". ".join(str(error).split(". ")[:2])  # what, and how much
        # Past the handler nothing holds the attempt's traceback, and with it activations.
        if not is_last:
            undo()
            optimizer.release_memory()
            if optimizer.device.type == "cuda":
                torch.cuda.empty_cache()
    raise TrainError(
        "",
        f"{what}: not enough GPU memory, with optimizer state on the host",
        got=reason,
        remedy="use --checkpointing, or lower --batch or --seq-len",
    )


def not_finite(what: str, step: int, value: float, places: str = "") -> TrainError:
    """The error of a run whose numbers went wrong."""
    return TrainError(
        "",
        f"step {step}: the {what} is not finite",
        got=f"{value} from {places}" if places else value,
        remedy="lower --lr, or use --dtype float32",
    )


def _forward_backward(
    model: CausalLM, optimizer: PagedAdamW, batches: Sequence[Batch], step: int, places: Places
) -> Tensor:
    labels = sum(batch.num_labels for batch in batches)
    scale = 1.0 if optimizer.loss_scale is None else optimizer.loss_scale.value
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for number, batch in enumerate(batches, 1):
        moved = batch.to(model.device)
        # Padding stands on the right, where no real token looks: no mask, whose look would wait for the GPU.
        # No name for the hidden states: they would stay through the backward pass.
        states, targets = labelled_positions(
            model.hidden_states(moved.input_ids, segments=moved.segments), batch.labels
        )
        loss = backward_loss(model.head, states, targets, model.config.vocab_size, scale=scale / labels)
        if not loss.is_cuda and not loss.isfinite():
            what = f"loss, micro-batch {number} of {len(batches)},"
            raise not_finite(what, step, loss.item(), places([batch]))
        total += loss
    return total / labels


def _update(optimizer: PagedAdamW, rate: float, factor: Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_FACTOR, 1.0)
    optimizer.step(gradient_factor=factor)


class _RandomState:
    """The states of torch's generators, for dropout that repeats."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._host)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu, self._device)
