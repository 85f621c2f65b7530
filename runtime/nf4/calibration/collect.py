"""Second moments of what linear layers read, layer by layer and in bounded memory.

All windows of text go through a layer before the next one begins: what is in memory is one layer's moments,
and one batch of activations; the residual streams between layers lie in a file that the system may write out.
Weights are used where they are mapped, or copied to a GPU for as long as their layer runs. A second, packed
model may run beside the first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nf4format.scratch_file import float32_in_a_file
from nf4format.stats import EntrySpec, StatsWriter

from ..model.attention import attention_bias
from ..model.decoder import CausalLM
from ..model.layer import DecoderLayer
from ..model.rotary import rotary_table

BATCH_TOKENS = 4096  # in flight: enough rows for matrix products, little memory

Progress = Callable[[int, int], None]
"""Takes (layers times windows done, in all)."""


@dataclass(frozen=True)
class Reader:
    """Linear layers that read the same x.

    Attributes:
        name: of the entry in the file of statistics.
        inside: path in the layer (or the model) of the module whose first argument is x.
        linears: paths of the linear layers.
    """

    name: str
    inside: str
    linears: tuple[str, ...]


def layer_readers(layer: int) -> list[Reader]:
    """Those of one decoder layer, in the order in which they run; `inside` is relative to the layer."""
    prefix = f"model.layers.{layer}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return [
        Reader(f"{attention}.q_proj", "self_attn", tuple(f"{attention}.{x}_proj" for x in "qkv")),
        Reader(f"{attention}.o_proj", "self_attn.o_proj", (f"{attention}.o_proj",)),
        Reader(f"{mlp}.gate_proj", "mlp", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
        Reader(f"{mlp}.down_proj", "mlp.down_proj", (f"{mlp}.down_proj",)),
    ]


HEAD = Reader("lm_head", "", ("lm_head",))


def entry_specs(model: CausalLM, layers: range) -> list[EntrySpec]:
    """What statistics of these layers hold; with the last layer also the head's.

    Weights are described by the SHA-256 of their bytes, so this reads them.
    """
    readers = [reader for layer in layers for reader in layer_readers(layer)]
    if layers.stop == model.config.num_hidden_layers:
        readers.append(HEAD)
    specs = []
    for reader in readers:
        weights = {}
        for path in reader.linears:
            weight = model.get_submodule(path).get_buffer("weight")
            name = f"{path}.weight"
            if path == "lm_head" and model.config.tie_word_embeddings and not _holds(model, name):
                name = "model.embed_tokens.weight"
            data = weight.reshape(-1).view(torch.uint8).cpu().numpy()
            weights[name] = hashlib.sha256(data.data).hexdigest()
        features = model.get_submodule(reader.linears[0]).get_buffer("weight").shape[1]
        specs.append(EntrySpec(reader.name, int(features), weights))
    return specs


def _holds(model: CausalLM, name: str) -> bool:
    return model.source is not None and name in model.source.kept_names


class Moments:
    """Sums over tokens: of x xT, or of its diagonal; with a second model, of y yT and x yT."""

    def __init__(self, features: int, *, full: bool, cross: bool, device: torch.device) -> None:
        shape = (features, features) if full else (features,)
        self.moment = torch.zeros(shape, device=device)
        self.cross = torch.zeros(features, features, device=device) if cross else None

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """x, y [..., features]: what the original reads, and what the packed model does."""
        x = x.reshape(-1, x.shape[-1]).float()
        seen = x if y is None else y.reshape(-1, y.shape[-1]).float()
        if self.moment.dim() == 1:
            self.moment += seen.square().sum(0)
        else:
            self.moment.addmm_(seen.T, seen)
        if self.cross is not None:
            self.cross.addmm_(x.T, seen)


def collect(
    model: CausalLM,
    windows: Tensor,
    layers: range,
    writer: StatsWriter,
    *,
    full: bool,
    packed: CausalLM | None = None,
    device: torch.device,
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """Run the windows through the model and write the moments of these layers.

    Args:
        model: the original, with kept weights.
        windows: int64 [windows, length].
        layers: consecutive ones; those before are run and not measured.
        writer: made with the `entry_specs` of these layers.
        full: moments, not only their diagonals.
        packed: a model of the same shape that reads y.
        device: where layers run, wherever the models are.
        folder: on a disk with room for the residual streams: tokens times hidden size, one for each model.

    Raises:
        WriteError: there is no such room.
    """
    models = [model] if packed is None else [model, packed]
    tokens = windows.numel()
    last = layers.stop == model.config.num_hidden_layers
    with ExitStack() as stack:
        streams = [stack.enter_context(_Stream(one, windows, device, folder)) for one in models]
        stack.enter_context(torch.inference_mode())
        done = 0
        for layer in range(layers.stop):
            readers = layer_readers(layer) if layer in layers else []
            moments = _moments(model, readers, full=full, cross=packed is not None, device=device)
            for stream in streams:
                stream.enter_layer(layer)
            for rows in _batches(windows):
                captured = [stream.advance(rows, readers) for stream in streams]
                for reader in readers:
                    moments[reader.name].add(*(inputs[reader.name] for inputs in captured))
                done += rows.stop - rows.start
                if progress is not None:
                    progress(done, layers.stop * len(windows))
            for reader in readers:
                _put(writer, reader.name, moments[reader.name], tokens)
        if last:
            moments = _moments(model, [HEAD], full=full, cross=packed is not None, device=device)
            for rows in _batches(windows):
                moments[HEAD.name].add(*(stream.head_input(rows) for stream in streams))
            _put(writer, HEAD.name, moments[HEAD.name], tokens)


def _moments(
    model: CausalLM, readers: list[Reader], *, full: bool, cross: bool, device: torch.device
) -> dict[str, Moments]:
    found = {}
    for reader in readers:
        features = int(model.get_submodule(reader.linears[0]).in_features)  # type: ignore[arg-type]
        found[reader.name] = Moments(features, full=full, cross=cross, device=device)
    return found


def _put(writer: StatsWriter, name: str, moments: Moments, tokens: int) -> None:
    cross = None if moments.cross is None else (moments.cross / tokens).cpu().numpy()
    writer.put(name, (moments.moment / tokens).cpu().numpy(), cross)


def _batches(windows: Tensor) -> Iterator[slice]:
    step = max(1, BATCH_TOKENS // windows.shape[1])
    for start in range(0, len(windows), step):
        yield slice(start, min(start + step, len(windows)))


class _Stream:
    """The residual stream of one model over all windows, in an unlinked file."""

    def __init__(self, model: CausalLM, windows: Tensor, device: torch.device, folder: Path) -> None:
        self._model, self._windows, self._device, self._folder = model, windows, device, folder

    def __enter__(self) -> _Stream:
        model, (count, length), device = self._model, self._windows.shape, self._device
        decoder = model.model
        shape = (count, length, model.config.hidden_size)
        self._hidden = torch.from_numpy(float32_in_a_file(math.prod(shape), self._folder)).view(shape)
        positions = torch.arange(length, device=device)[None]
        self._angles = rotary_table(positions, decoder.frequencies.to(device), model.dtype)
        self._seen = {
            window: attention_bias(None, 0, length, window, device) for window in set(decoder.layer_windows)
        }
        with torch.inference_mode():
            for rows in _batches(self._windows):
                ids = self._windows[rows].to(model.device)
                self._hidden[rows] = decoder.embed_tokens(ids).float().cpu()
        return self

    def __exit__(self, *_: object) -> None:
        del self._hidden

    def enter_layer(self, layer: int) -> None:
        """Make ready a layer, and let go of the one before."""
        module = self._model.model.layers[layer]
        assert isinstance(module, DecoderLayer)
        self._layer, self._bias = module, self._seen[self._model.model.layer_windows[layer]]
        tensors = (*module.named_parameters(), *module.named_buffers())
        self._weights: dict[str, Tensor] = {}  # lets go of the layer's before
        self._weights = {
            name: tensor.to(self._device) for name, tensor in tensors if tensor.device != self._device
        }

    def advance(self, rows: slice, readers: list[Reader]) -> dict[str, Tensor]:
        """Run the layer over some windows; what its readers read, by name."""
        with _captured(self._layer, readers) as inputs:
            x = self._hidden[rows].to(self._device, self._model.dtype)
            x = functional_call(self._layer, self._weights, (x, *self._angles, self._bias))
            self._hidden[rows] = x.float().cpu()
        return inputs

    def head_input(self, rows: slice) -> Tensor:
        x = self._hidden[rows].to(self._model.device, self._model.dtype)
        return self._model.model.norm(x).to(self._device)


@contextmanager
def _captured(layer: nn.Module, readers: list[Reader]) -> Iterator[dict[str, Tensor]]:
    """What modules inside of the layer are called with, by the readers' names."""
    inputs: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[name] = arguments[0]

        return keep

    with ExitStack() as hooks:
        for reader in readers:
            module = layer.get_submodule(reader.inside)
            hooks.callback(module.register_forward_pre_hook(keeper(reader.name)).remove)
        yield inputs
