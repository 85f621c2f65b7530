"""Ordinary safetensors files of ours (adapters, training state): laid out first, then written in pieces.

Equal tensors and metadata give equal bytes, whatever the order in which they are given and written.
"""

from __future__ import annotations

from collections.abc import Mapping

from .atomic import AtomicFile
from .dtypes import element_bytes
from .header import PREFIX_BYTES, Header, TensorEntry, encode_header, header_json, tensor_bytes, valid_name

TensorSpec = tuple[str, tuple[int, ...]]
"""safetensors dtype, shape."""


def plan_tensors(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> Header:
    """Where each tensor will lie: wide elements first, so that all are aligned, then by name.

    Raises:
        ValueError: a name that is not allowed, an unknown dtype, or a shape out of bounds.
    """
    relative = []
    position = 0
    for name in sorted(tensors, key=lambda name: (-element_bytes(tensors[name][0]), name)):
        dtype, shape = tensors[name]
        if not valid_name(name):
            raise ValueError(f"{name!r} is not a tensor name")
        size = tensor_bytes(dtype, shape)
        relative.append(TensorEntry(name, dtype, tuple(shape), position, position + size))
        position += size
    known = {"format": "pt", **dict(sorted(metadata.items()))}
    # As safetensors' own writer aligns it.
    data_start = -(-(PREFIX_BYTES + len(header_json(known, relative, 0))) // 8) * 8
    entries = {
        e.name: TensorEntry(e.name, e.dtype, e.shape, e.begin + data_start, e.end + data_start)
        for e in relative
    }
    return Header(entries, known, data_start, data_start + position)


def begin_tensors(file: AtomicFile, plan: Header) -> None:
    """Claim the space of a planned file and write its header; tensors go to `plan.entries[name].begin`.

    Raises:
        WriteError: no room on the disk.
    """
    file.preallocate(plan.file_bytes)
    write_header(file, plan)


def write_header(file: AtomicFile, plan: Header) -> None:
    """Write the header of a planned file, perhaps again with other metadata of the same length."""
    file.pwrite(encode_header(plan.metadata, plan.entries.values(), plan.data_start), 0)
