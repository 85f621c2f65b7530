"""`nf4.load`: a packed file becomes a model whose weights are views of the mapped file, or of a GPU's memory.

The decoder is built without memory (on torch's meta device) from the embedded config.json, then every layer
is replaced by one over the file's tensors. Only norms and biases, a few KB each, are converted to the
compute dtype. Time and memory do not grow with the size of the weights. For a GPU the weights are then read
once, past the mapping, and put there (`upload`).
"""

from __future__ import annotations

import os

import torch
from torch import nn

from nf4format.container import Nf4File

from .config import ModelConfig
from .decoder import CausalLM, RMSNorm
from .device import resolve
from .errors import LoadError
from .linear import PACKED_PARTS, KeptEmbedding, KeptLinear, NF4Embedding, NF4Linear
from .weights import Weights

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
    verify: bool = False,
    mmap: bool = True,
) -> CausalLM:
    """Map a packed file and build its model, frozen and in evaluation mode.

    Args:
        path: a .nf4 file.
        device: "cpu", a GPU ("cuda", "cuda:1"), or "auto": a GPU where one can be used, else the CPU.
        dtype: of activations and results: torch.float32, torch.bfloat16, torch.float16 or their names. None
            takes the checkpoint's.
        adapter: a PEFT adapter directory to put on the model.
        verify: check every byte against its sum first; this reads the whole file. What goes to a GPU is
            checked in any case.
        mmap: False reads the weights into memory instead, for file systems on which a mapped file may be cut
            short while it is in use.

    Returns:
        The model; `model.source` is the open file, whose embedded files hold the tokenizer.

    Raises:
        FormatError: not a .nf4 file, or a damaged one.
        LoadError: a GPU that cannot be used or has too little memory; a family, device or dtype that is not
            supported; a tensor that is missing, unknown to the model, or of another shape than config.json
            says; an adapter that does not fit.
    """
    target = resolve(device, path)
    file = Nf4File.open(path, mmap=mmap)
    try:
        if verify:
            _refuse_damage(file)
        config = ModelConfig.from_dict(file.config, f"{file.path}: config.json")
        with torch.device("meta"):
            model = CausalLM(config)
        placed = _place_weights(model, Weights(file), _compute_dtype(path, dtype or config.dtype))
        model.source = file
        if target.type == "cuda":
            _move_to_gpu(model, placed, target)
        if adapter is not None:
            from .adapters import load_adapter

            load_adapter(model, adapter)
    except BaseException:
        file.close()
        raise
    return model.eval()


def _place_weights(model: CausalLM, weights: Weights, dtype: torch.dtype) -> list[tuple[nn.Module, str]]:
    """Replace each layer of a model on the meta device by one over the file's tensors of its name.

    Returns each new layer with the stored name of its weight.
    """
    placed: list[tuple[nn.Module, str]] = []
    for path, module in list(model.named_modules()):
        name = f"{path}.weight"
        if model.config.tie_word_embeddings and name in _TIED and not weights.has(name):
            name = _TIED[name]
        layer: nn.Module
        if isinstance(module, RMSNorm):
            value = weights.kept(name, tuple(module.weight.shape)).to(dtype)
            module.weight = nn.Parameter(value, requires_grad=False)
            continue
        if isinstance(module, nn.Linear):
            shape, bias = tuple(module.weight.shape), None
            if module.bias is not None:
                bias = weights.kept(f"{path}.bias", (shape[0],)).to(dtype)
            if weights.is_packed(name):
                layer = NF4Linear(weights.packed(name, shape), bias)
            else:
                layer = KeptLinear(weights.kept(name, shape), bias)
        elif isinstance(module, nn.Embedding):
            shape = tuple(module.weight.shape)
            if weights.is_packed(name):
                layer = NF4Embedding(weights.packed(name, shape), dtype)
            else:
                layer = KeptEmbedding(weights.kept(name, shape))
        else:
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        placed.append((layer, weights.stored_name(name)))
    unused = [name for name in weights.unused() if not name.endswith(_IGNORED_SUFFIX)]
    if unused:
        raise LoadError(
            weights.file.path,
            f"the file holds {len(unused)} tensors that this model does not use",
            tensor=unused[0],
            remedy="config.json names another architecture than the checkpoint has",
        )
    return placed


def _move_to_gpu(model: CausalLM, placed: list[tuple[nn.Module, str]], device: torch.device) -> None:
    """Let the layers look at a slab on the GPU instead of the mapping; norms and biases follow."""
    from .upload import Slab

    assert model.source is not None
    slab = Slab(model.source, device)
    for layer, name in placed:
        if isinstance(layer, (NF4Linear, NF4Embedding)):
            for buffer, suffix in PACKED_PARTS.items():
                dtype = getattr(layer, buffer).dtype
                setattr(layer, buffer, slab.tensor(name + suffix, dtype))
        else:
            old = layer.weight
            assert isinstance(old, torch.Tensor)
            layer.weight = slab.tensor(name, old.dtype).view(old.shape)
    model.to(device)
    model.slab = slab.memory


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
