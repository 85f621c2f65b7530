"""A decoder layer's training step by hand, with checkpointing and without.

What autograd cannot do by itself, and this does:

* Checkpointing keeps the layer's input and computes the rest again, but for the last product, which nothing
  in backward needs. The weights decoded for that serve the gradients too: two decodings a step, not three.
* The MLP goes by blocks of rows, forward and backward, so its wide activations exist for a block at a time.
* LoRA rides along in the large products (shared_input), and norms, rotation and SwiGLU run fused (fused).

Shapes: B batch, T tokens, M = B * T rows, H hidden, N query heads, G key/value heads, D head size. Gradients
carry the name of what they belong to: grad_x is that of x.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops import fused
from .attention import Seen, attend
from .checkpoints import Checkpoints
from .norm import RMSNorm
from .rotary import rotate
from .shared_input import SharedInput, can_share

if TYPE_CHECKING:
    from .layer import DecoderLayer

ROWS = 2048  # of an MLP block: enough for full matrix products, little beside the weights


class Context(NamedTuple):
    """What all layers of a pass share: the rotary table, P = 1 or B, and who sees whom (attention.attend)."""

    cos_PTD: Tensor
    sin_PTD: Tensor
    seen: Seen


def can_step(layer: DecoderLayer) -> bool:
    """Whether this layer can go by `stepped`: nothing but LoRA trains, and without dropout."""
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if layer.self_attn.has_qk_norm:
        norms += [layer.self_attn.q_norm, layer.self_attn.k_norm]
    are_frozen = all(isinstance(norm, RMSNorm) and not norm.weight.requires_grad for norm in norms)
    return are_frozen and can_share(_linears(layer))


def stepped(x_BTH: Tensor, step: LayerStep, context: Context, checkpoints: Checkpoints | None) -> Tensor:
    """The layer's output, with gradients for x and the layer's adapters.

    With checkpoints only x waits there for the backward pass; without, everything that it needs is kept.
    """
    return _Step.apply(x_BTH, step, context, checkpoints, *step.parameters)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTH: Tensor,
        step: LayerStep,
        context: Context,
        checkpoints: Checkpoints | None,
        *parameters: Tensor,
    ) -> Tensor:
        x_BTH = x_BTH.contiguous()
        wants = any(ctx.needs_input_grad)
        if wants:
            ctx.step, ctx.context = step, context
            ctx.input = (checkpoints or Checkpoints()).keep(x_BTH)
        with torch.cuda.device_of(x_BTH):
            y_BTH, ctx.kept = step.forward(x_BTH, context, keep=wants and checkpoints is None)
        return y_BTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTH: Tensor) -> tuple[Tensor | None, ...]:
        x_BTH = ctx.input.take()
        kept, ctx.kept = ctx.kept, None
        parameters = ctx.step.parameters
        gradients = [torch.empty_like(parameter, dtype=torch.float32) for parameter in parameters]
        with torch.cuda.device_of(grad_BTH):
            grad_x = ctx.step.backward(
                x_BTH,
                kept,
                grad_BTH.contiguous(),
                ctx.context,
                gradients,
                add=False,
                wants_grad_x=ctx.needs_input_grad[0],
            )
        rounded = [gradient.to(p.dtype) for gradient, p in zip(gradients, parameters, strict=True)]
        return grad_x, None, None, None, *rounded


class _Attended(NamedTuple):
    """What backward needs of a layer's attention."""

    leaves: Sequence[Tensor]  # q, k and v heads
    attended_BNTD: Tensor  # with a graph back to the leaves
    thin_qkv_MR: Tensor
    thin_o_MR: Tensor
    projected_MH: Tensor  # what goes to the residual stream; later the sum with x


class Kept(NamedTuple):
    """Activations of a pass that need not be computed again. The sum of attention and x is in place."""

    attended: _Attended
    both_ML: Tensor  # gate and up


class LayerStep:
    """The products of one layer, made once, and its passes.

    Attributes:
        parameters: what trains, in the order of the gradients.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._linears = _linears(layer)
        self._attention_module = attention
        self._input_norm, self._middle_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._qkv = SharedInput((attention.q_proj, attention.k_proj, attention.v_proj))
        self._o = SharedInput((attention.o_proj,))
        self._gate_up = SharedInput((mlp.gate_proj, mlp.up_proj))
        self._down = SharedInput((mlp.down_proj,))
        self._hidden = self._qkv.inputs
        groups = (self._qkv, self._o, self._gate_up, self._down)
        self.parameters = [p for group in groups for p in group.parameters]

    def is_of(self, layer: DecoderLayer) -> bool:
        """Whether the layer still consists of the modules that this was made from."""
        return all(map(operator.is_, self._linears, _linears(layer)))

    def forward(self, x_BTH: Tensor, context: Context, *, keep: bool = False) -> tuple[Tensor, Kept | None]:
        """The layer's output, and what backward would compute again otherwise."""
        x_MH = x_BTH.flatten(0, 1)
        attended = self._attention(x_BTH, self._qkv.matrix(x_MH), self._o.matrix(x_MH), context, grad=keep)
        middle_MH = attended.projected_MH
        kept = Kept(attended, x_MH.new_empty(len(x_MH), self._wide_both())) if keep else None
        del attended
        y_MH = torch.empty_like(middle_MH) if keep else middle_MH

        gate_up, down = self._gate_up.matrix(x_MH), self._down.matrix(x_MH)
        for rows, block in self._blocks(x_MH, kept, backward=False):
            self._add_and_norm(x_MH[rows], middle_MH[rows], block.normed)
            self._gate_up.thin(gate_up, block.normed_ML)
            self._gate_up.project(gate_up, block.normed_ML, out=block.both)
            fused.swiglu(block.both, out=block.inner)
            self._down.thin(down, block.inner_ML)
            if keep:
                y_MH[rows] = middle_MH[rows]
            self._down.project(down, block.inner_ML, out=y_MH[rows], add=True)
        return y_MH.view(x_BTH.shape), kept

    def backward(
        self,
        x_BTH: Tensor,
        kept: Kept | None,
        grad_BTH: Tensor,
        context: Context,
        gradients: Sequence[Tensor],
        *,
        add: bool,
        wants_grad_x: bool,
    ) -> Tensor | None:
        """Gradient of x, from what forward took and kept, and its output's gradient.

        gradients: of `parameters`, fp32 or in their dtype; written, or added to.
        """
        x_MH, grad_y_MH = x_BTH.flatten(0, 1), grad_BTH.flatten(0, 1)
        of_qkv, of_o, of_mlp = self._split(gradients)
        qkv, o = self._qkv.matrix(x_MH), self._o.matrix(x_MH)
        attended = kept.attended if kept else self._attention(x_BTH, qkv, o, context, grad=True)
        leaves, attended_BNTD, thin_qkv_MR, thin_o_MR, middle_MH = attended
        del attended

        grad_middle_ML = self._mlp_backward(x_MH, middle_MH, kept, grad_y_MH, of_mlp, add=add)
        del middle_MH, kept

        self._o.thin_back(o, grad_middle_ML)
        self._o.put_gradients(of_o, _side_by_side(attended_BNTD), thin_o_MR, grad_middle_ML, add=add)
        grad_attended_BTND = self._o.project_back(o, grad_middle_ML).view(
            *x_BTH.shape[:2], -1, self._attention_module.head_dim
        )
        grads = torch.autograd.grad(attended_BNTD, leaves, grad_attended_BTND.transpose(1, 2))
        del attended_BNTD, grad_attended_BTND, leaves

        grad_heads_ML = self._merge_heads(grads, context)
        del grads
        self._qkv.thin_back(qkv, grad_heads_ML)
        normed_MH = torch.empty_like(x_MH)
        self._norm_input(x_MH, normed_MH)
        self._qkv.put_gradients(of_qkv, normed_MH, thin_qkv_MR, grad_heads_ML, add=add)
        if not wants_grad_x:
            return None
        grad_x_MH = self._qkv.project_back(qkv, grad_heads_ML, out=normed_MH)
        norm, passed = self._input_norm, grad_middle_ML[:, : self._hidden]
        fused.rms_norm_backward(grad_x_MH, x_MH, norm.weight, norm.eps, passed=passed, out=grad_x_MH)
        return grad_x_MH.view(x_BTH.shape)

    def _attention(self, x_BTH: Tensor, qkv: Tensor, o: Tensor, context: Context, *, grad: bool) -> _Attended:
        """From the layer's input to what attention gives to the residual stream."""
        heads_MW, thin_qkv_MR = self._project_heads(x_BTH.flatten(0, 1), qkv, context)
        leaves = [head.detach().requires_grad_(grad) for head in self._heads(heads_MW, x_BTH)]
        with torch.set_grad_enabled(grad):
            attended_BNTD = self._attend(context, *leaves)
        projected_MH, thin_o_MR = self._project_attended(attended_BNTD.detach(), o)
        return _Attended(leaves, attended_BNTD, thin_qkv_MR, thin_o_MR, projected_MH)

    def _split(self, gradients: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
        """Those of q/k/v, of o, and of the MLP."""
        first = len(self._qkv.parameters)
        second = first + len(self._o.parameters)
        return gradients[:first], gradients[first:second], gradients[second:]

    def _mlp_backward(
        self,
        x_MH: Tensor,
        middle_MH: Tensor,
        kept: Kept | None,
        grad_y_MH: Tensor,
        gradients: Sequence[Tensor],
        *,
        add: bool,
    ) -> Tensor:
        """Gradient of the residual stream in front of the MLP, with room for o_proj's adapter.

        middle_MH is that stream in front of the MLP; where nothing was kept, x is yet to be added to it.
        """
        gate_up, down = self._gate_up.matrix(x_MH), self._down.matrix(x_MH)
        of_gate_up = gradients[: len(self._gate_up.parameters)]
        of_down = gradients[len(self._gate_up.parameters) :]
        grad_middle_ML = x_MH.new_empty(len(x_MH), self._hidden + self._o.room)
        norm = self._middle_norm
        for rows, block in self._blocks(x_MH, kept, backward=True):
            adds = add or rows.start > 0
            middle = middle_MH[rows]
            if kept:
                fused.rms_norm(middle, norm.weight, norm.eps, out=block.normed)
                self._gate_up.thin(gate_up, block.normed_ML)
            else:
                self._add_and_norm(x_MH[rows], middle, block.normed)
                self._gate_up.thin(gate_up, block.normed_ML)
                self._gate_up.project(gate_up, block.normed_ML, out=block.both)
            fused.swiglu(block.both, out=block.inner)
            self._down.thin(down, block.inner_ML)

            fused.copy_rows(grad_y_MH[rows], block.grad_y)
            self._down.thin_back(down, block.grad_y_ML)
            thin = block.inner_ML[:, self._down.inputs :]
            self._down.put_gradients(of_down, block.inner, thin, block.grad_y_ML, add=adds)
            self._down.project_back(down, block.grad_y_ML, out=block.inner)
            fused.swiglu_backward(block.both, block.inner)
            self._gate_up.thin_back(gate_up, block.both_ML)
            thin = block.normed_ML[:, self._hidden :]
            self._gate_up.put_gradients(of_gate_up, block.normed, thin, block.both_ML, add=adds)
            self._gate_up.project_back(gate_up, block.both_ML, out=block.normed)
            fused.rms_norm_backward(
                block.normed,
                middle,
                norm.weight,
                norm.eps,
                passed=grad_y_MH[rows],
                out=grad_middle_ML[rows, : self._hidden],
            )
        return grad_middle_ML

    def _blocks(self, x_MH: Tensor, kept: Kept | None, *, backward: bool) -> Iterator[tuple[slice, _Block]]:
        """Blocks of at most ROWS rows, all in the same buffers but for what is kept."""
        most = min(ROWS, len(x_MH))
        normed_ML = x_MH.new_empty(most, self._hidden + self._gate_up.room)
        both_ML = x_MH.new_empty(0 if kept else most, self._wide_both())
        inner_ML = x_MH.new_empty(most, self._down.inputs + self._down.room)
        grad_y_ML = x_MH.new_empty(most if backward else 0, self._hidden + self._down.room)
        for first in range(0, len(x_MH), ROWS):
            rows = slice(first, min(first + ROWS, len(x_MH)))
            here = slice(rows.stop - first)
            yield (
                rows,
                _Block(
                    normed_ML[here],
                    kept.both_ML[rows] if kept else both_ML[here],
                    inner_ML[here],
                    grad_y_ML[here],
                    normed_ML[here, : self._hidden],
                    (kept.both_ML[rows] if kept else both_ML[here])[:, : self._gate_up.outputs],
                    inner_ML[here, : self._down.inputs],
                    grad_y_ML[here, : self._hidden],
                ),
            )

    def _wide_both(self) -> int:
        return self._gate_up.outputs + self._gate_up.room

    def _norm_input(self, x_MH: Tensor, out: Tensor) -> None:
        norm = self._input_norm
        fused.rms_norm(x_MH, norm.weight, norm.eps, out=out)

    def _add_and_norm(self, x_MH: Tensor, middle_MH: Tensor, out: Tensor) -> None:
        """Adds x to what attention gave, in place, and norms the sum."""
        norm = self._middle_norm
        fused.rms_norm(x_MH, norm.weight, norm.eps, out=out, residual=middle_MH)

    def _project_heads(self, x_MH: Tensor, qkv: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Query, key and value heads in a row, rotated; and the thin product."""
        normed_ML = x_MH.new_empty(len(x_MH), self._hidden + self._qkv.room)
        self._norm_input(x_MH, normed_ML[:, : self._hidden])
        self._qkv.thin(qkv, normed_ML)
        heads_MW = x_MH.new_empty(len(x_MH), self._qkv.outputs)
        self._qkv.project(qkv, normed_ML, out=heads_MW)
        if not self._attention_module.has_qk_norm:
            rotated = self._qkv.outputs - self._width(self._attention_module.v_proj)
            fused.rotate(heads_MW[:, :rotated], *_table(context))
        return heads_MW, normed_ML[:, self._hidden :].clone()

    def _heads(self, heads_MW: Tensor, x_BTH: Tensor) -> Sequence[Tensor]:
        """q [B, N, T, D], k and v [B, G, T, D], views."""
        size = self._attention_module.head_dim
        key_heads = self._width(self._attention_module.v_proj) // size
        heads_BNTD = heads_MW.view(*x_BTH.shape[:2], -1, size).transpose(1, 2)
        return heads_BNTD.split([heads_BNTD.shape[1] - 2 * key_heads, key_heads, key_heads], dim=1)

    def _attend(self, context: Context, q_BNTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        if self._attention_module.has_qk_norm:
            q_BNTD, k_BGTD = self._attention_module.q_norm(q_BNTD), self._attention_module.k_norm(k_BGTD)
            q_BNTD, k_BGTD = (rotate(x, context.cos_PTD, context.sin_PTD) for x in (q_BNTD, k_BGTD))
        return attend(q_BNTD, k_BGTD, v_BGTD, context.seen)

    def _project_attended(self, attended_BNTD: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
        """What attention adds to the residual stream, and the thin product."""
        attended_MA = _side_by_side(attended_BNTD)
        attended_ML = attended_MA.new_empty(len(attended_MA), self._o.inputs + self._o.room)
        fused.copy_rows(attended_MA, attended_ML[:, : self._o.inputs])
        self._o.thin(o, attended_ML)
        projected_MH = attended_MA.new_empty(len(attended_MA), self._hidden)
        self._o.project(o, attended_ML, out=projected_MH)
        return projected_MH, attended_ML[:, self._o.inputs :].clone()

    def _merge_heads(self, grads: Sequence[Tensor], context: Context) -> Tensor:
        """Gradients of q, k and v side by side as they were before the rotation, and room behind them."""
        first, rows = 0, grads[0].shape[0] * grads[0].shape[2]
        merged_ML = grads[0].new_empty(rows, self._qkv.outputs + self._qkv.room)
        for i, grad_BNTD in enumerate(grads):
            grad = _side_by_side(grad_BNTD)
            place = merged_ML[:, first : first + grad.shape[1]]
            if i < 2 and not self._attention_module.has_qk_norm:
                fused.rotate(grad, *_table(context), out=place, backward=True)
            else:
                fused.copy_rows(grad, place)
            first += grad.shape[1]
        return merged_ML

    @staticmethod
    def _width(layer: nn.Module) -> int:
        return int(layer.out_features)  # type: ignore[arg-type]


class _Block(NamedTuple):
    """Buffers of one block of rows of the MLP; those in ML have room behind them for a thin product."""

    normed_ML: Tensor
    both_ML: Tensor  # gate and up
    inner_ML: Tensor
    grad_y_ML: Tensor
    normed: Tensor
    both: Tensor
    inner: Tensor
    grad_y: Tensor


def _linears(layer: DecoderLayer) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _table(context: Context) -> tuple[Tensor, Tensor]:
    return context.cos_PTD.flatten(0, 1), context.sin_PTD.flatten(0, 1)


def _side_by_side(heads_BNTD: Tensor) -> Tensor:
    """[B, N, T, D] as [B * T, N * D]; a view where memory has the tokens outermost, as attention has it."""
    return heads_BNTD.detach().transpose(1, 2).flatten(2).flatten(0, 1)
