"""How layers run where a backward pass follows: by hand or by their modules, checkpointed, recorded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, device, nn
from torch.utils.checkpoint import checkpoint

from .checkpoints import Checkpoints, HostCheckpoints
from .layer import DecoderLayer
from .layer_graphs import LayerGraphs
from .layer_step import Context, LayerStep, can_step, stepped


class LayerPasses:
    """What a decoder keeps from one training pass to the next, and the choices that its user has.

    Attributes:
        gradient_checkpointing: when True, only each layer's input is kept, and the layer runs again in the
            backward pass.
        offload_checkpoints: when True too, these inputs wait in pinned host memory; on a GPU only.
        capture_graphs: when True, small batches of a shape that comes again are recorded and replayed (see
            layer_graphs); on a GPU only, and not with inputs in host memory. Gradients of adapters are then
            added to `.grad` without a hook of autograd being called.
        graphs: the recorded passes.
    """

    def __init__(self) -> None:
        self.gradient_checkpointing = False
        self.offload_checkpoints = False
        self.graphs = LayerGraphs()
        self._captures = False
        self._host_checkpoints: HostCheckpoints | None = None
        self._steps: dict[int, LayerStep] = {}

    @property
    def capture_graphs(self) -> bool:
        return self._captures

    @capture_graphs.setter
    def capture_graphs(self, value: bool) -> None:
        self._captures = value
        if not value:
            self._drop_graphs()

    def run(self, layers: Sequence[nn.Module], x_BTH: Tensor, contexts: Sequence[Context]) -> Tensor:
        """The last layer's output, ready for a backward pass.

        Args:
            layers: DecoderLayers.
            contexts: one a layer.
        """
        steps = [self._step(i, layer) if x_BTH.is_cuda else None for i, layer in enumerate(layers)]
        own = [step for step in steps if step is not None]
        if not any(step.parameters for step in own) and not x_BTH.requires_grad:
            own, steps = [], [None] * len(steps)
        keep = not self.gradient_checkpointing
        if self._captures and len(own) == len(layers) and (keep or not self.offload_checkpoints):
            replayed = self.graphs.run(x_BTH, own, contexts, keep=keep)
            if replayed is not None:
                return replayed
        checkpoints = None if keep else self._begin_checkpoints(x_BTH.device)
        for layer, step, context in zip(layers, steps, contexts, strict=True):
            if step is not None:
                x_BTH = stepped(x_BTH, step, context, checkpoints)
            elif keep:
                x_BTH = layer(x_BTH, *context)
            else:
                x_BTH = checkpoint(layer, x_BTH, *context, use_reentrant=False)
        return x_BTH

    def forget(self) -> None:
        """Drops all that holds addresses of parameters: they are about to move."""
        self._steps.clear()
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        """They are recorded again when their shapes come again."""
        self.graphs = LayerGraphs()

    def _step(self, index: int, layer: nn.Module) -> LayerStep | None:
        """The layer's step by hand, made once; None where it has to go by its modules."""
        assert isinstance(layer, DecoderLayer)
        if not can_step(layer):
            return None
        known = self._steps.get(index)
        if known is None or not known.is_of(layer):
            if known is not None:
                self._drop_graphs()  # recorded over the layers that there were
            known = self._steps[index] = LayerStep(layer)
        return known

    def _begin_checkpoints(self, place: device) -> Checkpoints:
        if not self.offload_checkpoints or place.type != "cuda":
            self._host_checkpoints = None
            return Checkpoints()
        if self._host_checkpoints is None:
            self._host_checkpoints = HostCheckpoints(place)
        self._host_checkpoints.begin()
        return self._host_checkpoints
