"""`nf4.load`: a packed file becomes a model whose weights are views of the mapped file, or of a GPU's memory.

The decoder is built without memory (on torch's meta device) from the embedded config.json, then every layer
is replaced by one over the file's tensors. Only norms and biases, a few KB each, are converted to the
compute dtype. Time and memory do not grow with the size of the weights. For a GPU the weights are read once,
past the mapping, and put there (`upload`), while the layers are built.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nf4format.container import Nf4File

from .device import resolve
from .errors import LoadError
from .model.config import ModelConfig
from .model.decoder import CausalLM
from .model.linear import PACKED_PARTS, KeptEmbedding, KeptLinear, NF4Embedding, NF4Linear
from .model.norm import RMSNorm
from .weights import Weights

if TYPE_CHECKING:
    from .calibration.original import OriginalFile
    from .upload import Slab

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TIED = {
    "lm_head.weight": "model.embed_tokens.weight",
    "model.embed_tokens.weight": "lm_head.weight",
}
# Old Llama checkpoints store the rotary frequencies, which follow from the config.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    adapter: str | os.PathLike[str] | None = None,
    verify: bool | None = None,
    mmap: bool = True,
) -> CausalLM:
    """Map a packed file and build its model, frozen and in evaluation mode.

    Args:
        path: a .nf4 file.
        device: "cpu", a GPU ("cuda", "cuda:1"), or "auto": a GPU where one can be used, else the CPU.
        dtype: of activations and results: torch.float32, torch.bfloat16, torch.float16 or their names. None
            takes the checkpoint's.
        adapter: a PEFT adapter directory to put on the model.
        verify: compare the bytes with their sums. None does so wherever they are read anyway: for a GPU, and
            with mmap=False. True reads a file that will be mapped, too; False compares nowhere.
        mmap: False reads the weights into memory, for a CPU. A mapping takes no time and no memory of its
            own, but a file that is cut short while mapped (on a network file system, or by whoever writes to
            it) ends the process with a bus error, which no program can catch; one that is read gives a
            FormatError. For a GPU the file is read in any case.

    Returns:
        The model; `model.source` is the open file, whose embedded files hold the tokenizer.

    Raises:
        FormatError: not a .nf4 file, or a damaged one.
        LoadError: a GPU that cannot be used or has too little memory; a family, device or dtype that is not
            supported; a tensor that is missing, unknown to the model, or of another shape than config.json
            says; an adapter that does not fit.
    """
    target = resolve(device, path)
    with _without_collections(), ExitStack() as reading:
        slab: Slab | None = None
        if target.type == "cuda":
            from .upload import Slab

            glanced = Slab.at_a_glance(path, target, check=verify is not False)
            slab = reading.enter_context(glanced or nullcontext())
        # On the way to a GPU nothing touches the mapping: it stands for the shapes of what comes.
        file = Nf4File.open(path, mmap=mmap or target.type == "cuda")
        try:
            if target.type == "cuda" and (slab is None or slab.region != file.region):
                reading.close()
                new = Slab(path, file.fileno(), file.region, target, check=verify is not False)
                slab = reading.enter_context(new)
            if target.type == "cpu" and not mmap:
                file.read_weights(check=verify is not False, threads=torch.get_num_threads())
            elif verify:
                _refuse_damage(file)
            model = _build(file, dtype, slab)
            if adapter is not None:
                from .adapters import load_adapter

                load_adapter(model, adapter)
        except BaseException:
            file.close()
            raise
    return model.eval()


@contextmanager
def _without_collections() -> Iterator[None]:
    """A model is thousands of objects and no garbage: a collection on the way would walk through all that the
    process has imported, several times as long as loading takes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _build(file: Nf4File, dtype: str | torch.dtype | None, slab: Slab | None) -> CausalLM:
    """The model over the mapped file, or over the slab, which this waits for."""
    config = ModelConfig.from_dict(file.config, f"{file.path}: config.json")
    with torch.device("meta"), _Unfilled():
        model = CausalLM(config)
    compute_dtype = _compute_dtype(file.path, dtype or config.dtype)
    places = _place_weights(model, Weights(file), compute_dtype, convert=slab is None)
    model.source = file
    if slab is not None:
        _look_at_slab(places, slab, file)
        model.slab = slab.memory
    return model


def build_original(file: OriginalFile, dtype: torch.dtype) -> CausalLM:
    """The model over a mapped checkpoint, on the CPU. Raises LoadError as `load` does."""
    return _build(cast(Nf4File, file), dtype, None)


def _look_at_slab(places: list[_Place], slab: Slab, file: Nf4File) -> None:
    """Let the model's tensors be views of the slab, or converted from it where the dtype is another."""
    converted = []
    for place in places:
        old, new = place.tensor, slab.tensor(file.header.entries[place.stored_name])
        place.put(new.view(old.shape))
        if new.dtype != old.dtype:
            converted.append((place, old.dtype))
    slab.wait()
    for place, dtype in converted:
        place.put(place.tensor.to(dtype))


class _Place(NamedTuple):
    """A tensor of the model, and the stored one that it comes from."""

    module: nn.Module
    attribute: str
    stored_name: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.attribute)

    def put(self, tensor: Tensor) -> None:
        is_parameter = self.attribute in self.module._parameters
        setattr(
            self.module, self.attribute, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        )


class _Unfilled(TorchFunctionMode):
    """Layers are made without random weights: even on the meta device these cost torch seconds of imports."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _place_weights(model: CausalLM, weights: Weights, dtype: torch.dtype, *, convert: bool) -> list[_Place]:
    """Replace each layer of a model on the meta device by one over the file's tensors of its name.

    Args:
        convert: norms and biases to the dtype; otherwise room for them, for what comes from elsewhere.
    """
    places: list[_Place] = []
    for path, module in list(model.named_modules()):
        name = f"{path}.weight"
        if model.config.tie_word_embeddings and name in _TIED and not weights.has(name):
            name = _TIED[name]
        if isinstance(module, RMSNorm):
            value = _small(weights, name, tuple(module.weight.shape), dtype, convert)
            module.weight = nn.Parameter(value, requires_grad=False)
            places.append(_Place(module, "weight", weights.stored_name(name)))
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            layer = _layer_over(module, path, name, weights, dtype, convert=convert)
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
            stored = weights.stored_name(name)
            parts = PACKED_PARTS if isinstance(layer, (NF4Linear, NF4Embedding)) else {"weight": ""}
            places += [_Place(layer, part, stored + suffix) for part, suffix in parts.items()]
            if getattr(layer, "bias", None) is not None:
                places.append(_Place(layer, "bias", weights.stored_name(f"{path}.bias")))
    unused = [name for name in weights.unused() if not name.endswith(_IGNORED_SUFFIX)]
    if unused:
        raise LoadError(
            weights.file.path,
            f"the file holds {len(unused)} tensors that this model does not use",
            tensor=unused[0],
            remedy="config.json names another architecture than the checkpoint has",
        )
    return places


def _layer_over(
    module: nn.Linear | nn.Embedding,
    path: str,
    name: str,
    weights: Weights,
    dtype: torch.dtype,
    *,
    convert: bool,
) -> nn.Module:
    """The layer for one on the meta device, over the file's tensors: packed or kept, as they are there."""
    shape = tuple(module.weight.shape)
    if isinstance(module, nn.Embedding):
        if weights.is_packed(name):
            return NF4Embedding(weights.packed(name, shape), dtype)
        return KeptEmbedding(weights.kept(name, shape))
    bias = None
    if module.bias is not None:
        bias = _small(weights, f"{path}.bias", (shape[0],), dtype, convert)
    if weights.is_packed(name):
        return NF4Linear(weights.packed(name, shape), bias)
    return KeptLinear(weights.kept(name, shape), bias)


def _small(weights: Weights, name: str, shape: tuple[int, ...], dtype: torch.dtype, convert: bool) -> Tensor:
    """A norm's weight or a bias, converted; or as much room, the file untouched."""
    stored = weights.kept(name, shape)
    return stored.to(dtype) if convert else torch.empty(shape, dtype=dtype)


def _compute_dtype(path: str | os.PathLike[str], dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in COMPUTE_DTYPES:
        raise LoadError(path, "dtype", expected=f"one of {', '.join(COMPUTE_DTYPES)}", got=name)
    return COMPUTE_DTYPES[name]


def _refuse_damage(file: Nf4File) -> None:
    damage = file.verify(threads=torch.get_num_threads())
    if damage:
        more = f" and {len(damage) - 1} more places" if len(damage) > 1 else ""
        raise LoadError(file.path, f"{damage[0]}{more}", remedy="fetch the file again or compile it again")
