"""Mutators that know the formats: most of what they make is nearly right, so that it reaches the deep checks.

    container(seed, rng)   a .nf4 file: its tensors, constants, metadata, header text, sums or bytes changed
    source(seed, rng)      a safetensors file of a checkpoint: the same without sums and profile
    document(seed, rng)    a JSON text: index or config (changed_texts)

Each takes a good file and a `random.Random`, and gives the bytes of a changed one. The same seed file and
random state give the same bytes.
"""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
from changed_texts import NAMES, VALUES, damaged, document, text_change
from draft import Draft

from nf4format.container import config_sha256
from nf4format.layout import QUANT_STATE

__all__ = ["container", "document", "source"]

_DTYPES = ["F32", "BF16", "F16", "F64", "U8", "I8", "I64", "BOOL", "F4", "F8_E4M3", "C64", "f32", "", "NF4"]
_FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 3.4e38, math.inf, -math.inf, math.nan, 2.0]


def container(seed: bytes, rng: random.Random) -> bytes:
    """A changed .nf4 file; about two thirds have sums that fit what was changed."""
    if rng.random() < 0.15:
        return damaged(seed, rng)
    draft = Draft(seed)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        (rng.choice(_EDITS) if draft.tensors else _metadata)(draft, rng)
    data = draft.encode(fresh_sums=rng.random() < 0.8, change=text_change(rng))
    return damaged(data, rng) if rng.random() < 0.1 else data


def source(seed: bytes, rng: random.Random) -> bytes:
    """A changed safetensors file."""
    if rng.random() < 0.15:
        return damaged(seed, rng)
    draft = Draft(seed)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        (rng.choice(_SOURCE_EDITS) if draft.tensors else _metadata)(draft, rng)
    draft.page = rng.choice([8, 8, 8, 1])
    data = draft.encode(fresh_sums=False, change=text_change(rng))
    return damaged(data, rng) if rng.random() < 0.15 else data


def _rename(draft: Draft, rng: random.Random) -> None:
    index = rng.randrange(len(draft.tensors))
    name = draft.tensors[index][0]
    names = draft.names()
    choices = [*NAMES, rng.choice(names), name + ".absmax", name + QUANT_STATE, name.upper(), name[:-1]]
    draft.put(index, name=rng.choice(choices))


def _drop(draft: Draft, rng: random.Random) -> None:
    if len(draft.tensors) > 1:
        del draft.tensors[rng.randrange(len(draft.tensors))]


def _double(draft: Draft, rng: random.Random) -> None:
    index = rng.randrange(len(draft.tensors))
    name, tensor = draft.tensors[index]
    draft.tensors.insert(rng.randrange(len(draft.tensors)), (rng.choice([name, name + "2"]), tensor))


def _swap(draft: Draft, rng: random.Random) -> None:
    one, other = rng.randrange(len(draft.tensors)), rng.randrange(len(draft.tensors))
    draft.tensors[one], draft.tensors[other] = draft.tensors[other], draft.tensors[one]


def _resize(draft: Draft, rng: random.Random) -> None:
    """Other bytes, with or without a shape to fit."""
    index = rng.randrange(len(draft.tensors))
    dtype, shape, raw = draft.tensors[index][1]
    raw = raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.5 else raw + bytes(rng.choice([1, 4, 64]))
    if shape and rng.random() < 0.7:
        shape = [len(raw)] if dtype == "U8" and len(shape) == 1 else [len(raw) // 4, *shape[1:]]
    draft.put(index, tensor=(dtype, shape, raw))


def _retype(draft: Draft, rng: random.Random) -> None:
    index = rng.randrange(len(draft.tensors))
    _, shape, raw = draft.tensors[index][1]
    draft.put(index, tensor=(rng.choice(_DTYPES), shape, raw))


def _reshape(draft: Draft, rng: random.Random) -> None:
    index = rng.randrange(len(draft.tensors))
    dtype, shape, raw = draft.tensors[index][1]
    shape = list(shape)
    change = rng.randrange(4)
    if change == 0 and shape:
        shape[rng.randrange(len(shape))] = rng.choice(VALUES)
    elif change == 1:
        shape = [*shape, 1]
    elif change == 2:
        shape = [1] * rng.choice([1, 8, 9, 100]) + shape
    else:
        rng.shuffle(shape)
    draft.put(index, tensor=(dtype, shape, raw))


def _offset(draft: Draft, rng: random.Random) -> None:
    index = rng.randrange(len(draft.tensors))
    begin = sum(len(raw) for _, (_, _, raw) in draft.tensors[:index])
    claimed: list[Any] = [begin, begin + len(draft.tensors[index][1][2])]
    at = rng.randrange(2)
    claimed[at] = rng.choice([rng.choice(VALUES), claimed[at] + rng.choice([-64, -1, 1, 64])])
    draft.offsets[index] = (
        claimed if rng.random() < 0.9 else rng.choice([[], [begin], [*claimed, 0], None, "0"])
    )


def _field(draft: Draft, rng: random.Random) -> None:
    draft.extra[rng.randrange(len(draft.tensors))] = (
        rng.choice(["x", "shape", "Dtype"]),
        rng.choice(VALUES),
    )


def _content(draft: Draft, rng: random.Random) -> None:
    index = rng.randrange(len(draft.tensors))
    dtype, shape, raw = draft.tensors[index][1]
    if raw:
        changed = bytearray(raw)
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        draft.put(index, tensor=(dtype, shape, bytes(changed)))


def _metadata(draft: Draft, rng: random.Random) -> None:
    if not isinstance(draft.metadata, dict) or rng.random() < 0.05:
        draft.metadata = rng.choice([None, {}, [], "x", {"format": "pt"}])
        return
    key = rng.choice([*draft.metadata, "nf4.new", ""])
    change = rng.randrange(4)
    if change == 0:
        draft.metadata.pop(key, None)
    elif change == 1:
        draft.metadata[key] = rng.choice(["", "0", "1", "2", "64", "{}", "\ud800", "\x1b[2J", "x" * 999])
    elif change == 2:
        draft.metadata[key] = rng.choice(VALUES)
    else:
        items = list(draft.metadata.items())
        rng.shuffle(items)
        draft.metadata = dict(items)


# Of .nf4 files alone.


def _float(draft: Draft, rng: random.Random) -> None:
    """A constant of a packed weight: a scale, a level, an entry of a map."""
    indices = [
        i for i, (name, tensor) in enumerate(draft.tensors) if tensor[0] == "F32" and len(tensor[2]) >= 4
    ]
    if indices:
        index = rng.choice(indices)
        dtype, shape, raw = draft.tensors[index][1]
        values = np.frombuffer(raw[: len(raw) // 4 * 4], np.float32).copy()
        values[rng.randrange(values.size)] = rng.choice(_FLOATS)
        draft.put(index, tensor=(dtype, shape, values.tobytes()))


def _embedded_json(draft: Draft, rng: random.Random) -> None:
    """A quant_state, config.json or tokenizer file, changed as JSON; honest about config.json's hash."""
    indices = [
        i for i, (name, tensor) in enumerate(draft.tensors)
        if name.endswith(QUANT_STATE) or (name.startswith("__file__/") and tensor[2][:1] == b"{")
    ]  # fmt: skip
    if not indices:
        return
    index = rng.choice(indices)
    name, (dtype, _, raw) = draft.tensors[index]
    try:
        text = document(raw, rng)
    except ValueError:  # changed before
        return
    if name.endswith(QUANT_STATE) and rng.random() < 0.8:
        text = text.ljust(len(raw), b" ")
    draft.put(index, tensor=(dtype, [len(text)], text))
    if name == "__file__/config.json" and isinstance(draft.metadata, dict) and rng.random() < 0.9:
        draft.metadata["nf4.config_sha256"] = config_sha256(text)


def _aliases(draft: Draft, rng: random.Random) -> None:
    if isinstance(draft.metadata, dict):
        names = [*draft.names(), *NAMES, "alias"]
        aliases = {rng.choice(names): rng.choice([rng.choice(names), rng.choice(VALUES)]) for _ in range(2)}
        draft.metadata["nf4.aliases"] = json.dumps(aliases)


_SOURCE_EDITS = [
    _rename,
    _drop,
    _double,
    _swap,
    _resize,
    _retype,
    _reshape,
    _offset,
    _field,
    _content,
    _metadata,
]
_EDITS = [*_SOURCE_EDITS, _float, _float, _embedded_json, _embedded_json, _embedded_json, _aliases, _content]
