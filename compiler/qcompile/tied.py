"""Tied weights: a checkpoint that stores the output head beside an equal input embedding keeps it once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nf4format.checkpoint import Checkpoint, SourceTensor

from .errors import CompileError
from .order import execution_key
from .roles import Role, parse_name, role_of

# Modules that may be tied, by the last part of their path.
_INPUT_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared"}
)
_HEADS = frozenset({"lm_head", "embed_out", "output", "output_layer", "head", "decoder"})
_COMPARED_BYTES = 2 << 20


def find_aliases(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensors that need not be stored, each with the name of the equal one that is.

    Only where the configuration says `tie_word_embeddings`; both tensors are then read and compared.

    Raises:
        CompileError: the configuration ties the head to the embedding, and their bytes differ.
    """
    if not _declares_tied(checkpoint.config):
        return {}
    embeddings, heads = [], []
    for tensor in checkpoint.tensors.values():
        role, leaf = role_of(tensor.name, tensor.shape), parse_name(tensor.name).module.rsplit(".", 1)[-1]
        if len(tensor.shape) != 2:
            continue
        if role is Role.EMBEDDING and leaf in _INPUT_EMBEDDINGS:
            embeddings.append(tensor)
        elif role is Role.HEAD and leaf in _HEADS:
            heads.append(tensor)
    embeddings.sort(key=lambda tensor: execution_key(tensor.name, Role.EMBEDDING))
    aliases: dict[str, str] = {}
    stored: list[SourceTensor] = []
    for embedding in embeddings:  # encoder-decoder models have up to three copies
        equal = _equal_one(checkpoint, embedding, stored)
        if equal:
            aliases[embedding.name] = equal
        else:
            stored.append(embedding)
    for head in sorted(heads, key=lambda tensor: tensor.name):
        comparable = [tensor for tensor in stored if tensor.shape == head.shape]
        equal = _equal_one(checkpoint, head, comparable)
        if equal:
            aliases[head.name] = equal
        elif comparable:
            raise CompileError(
                checkpoint.path,
                "config.json says tie_word_embeddings, and the weights differ",
                tensor=head.name,
                expected=f"the bytes of '{comparable[0].name}'",
                got="others",
                remedy='set "tie_word_embeddings": false in config.json if the head is meant to differ, '
                "or take it out of the checkpoint",
            )
    return aliases


def _declares_tied(config: Mapping[str, Any]) -> bool:
    """The configuration's own word; multimodal ones may have it in a nested part only."""
    if "tie_word_embeddings" in config:
        return config["tie_word_embeddings"] is True
    return any(
        isinstance(part, Mapping) and part.get("tie_word_embeddings") is True for part in config.values()
    )


def _equal_one(checkpoint: Checkpoint, tensor: SourceTensor, others: list[SourceTensor]) -> str | None:
    return next((other.name for other in others if _equal(checkpoint, tensor, other)), None)


def _equal(checkpoint: Checkpoint, one: SourceTensor, other: SourceTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    buffers = (bytearray(_COMPARED_BYTES), bytearray(_COMPARED_BYTES))
    size = one.end - one.begin
    for offset in range(0, size, _COMPARED_BYTES):
        length = min(_COMPARED_BYTES, size - offset)
        views = [memoryview(buffer)[:length] for buffer in buffers]
        checkpoint.read_into(one.name, views[0], offset)
        checkpoint.read_into(other.name, views[1], offset)
        if views[0] != views[1]:
            return False
    return True
