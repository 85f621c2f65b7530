"""A safetensors or .nf4 file taken apart, to be put together with changes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from nf4format.header import Header, TensorEntry
from nf4format.sums import CHUNK_BYTES, SUMS_NAME, encode_sums, sums_bytes, xxh3

RawTensor = tuple[str, list[Any], bytes]  # dtype, shape, bytes

_PAGE = 4096


class Draft:
    """A file taken apart, with the offsets of its header to be made anew or overridden."""

    def __init__(self, data: bytes) -> None:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        self.metadata: Any = header.pop("__metadata__", {})
        self.tensors: list[tuple[str, RawTensor]] = []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            raw = data[8 + length + begin : 8 + length + end]
            self.tensors.append((name, (entry["dtype"], entry["shape"], raw)))
        self.page = _PAGE
        self.offsets: dict[int, list[Any]] = {}  # index of a tensor -> data_offsets to claim
        self.extra: dict[int, tuple[str, Any]] = {}  # index of a tensor -> one more field

    def names(self) -> list[str]:
        return [name for name, _ in self.tensors]

    def put(self, index: int, *, name: str | None = None, tensor: RawTensor | None = None) -> None:
        old_name, old = self.tensors[index]
        self.tensors[index] = (old_name if name is None else name, old if tensor is None else tensor)

    def encode(self, *, fresh_sums: bool, change: Callable[[bytes], bytes] | None = None) -> bytes:
        if fresh_sums and self.names()[-1:] == [SUMS_NAME]:
            covered = sum(len(raw) for _, (_, _, raw) in self.tensors[:-1])
            files = sum(name.startswith("__file__/") for name in self.names())
            size = sums_bytes(covered, files)
            self.tensors[-1] = (SUMS_NAME, ("U8", [size], bytes(size)))
        parts = (
            [f'"__metadata__":{json.dumps(self.metadata, separators=(",", ":"))}']
            if self.metadata is not None
            else []
        )
        position = 0
        for index, (name, (dtype, shape, raw)) in enumerate(self.tensors):
            fields: dict[str, Any] = {"dtype": dtype, "shape": shape}
            fields["data_offsets"] = self.offsets.get(index, [position, position + len(raw)])
            if index in self.extra:
                key, value = self.extra[index]
                fields[key] = value
            parts.append(f"{json.dumps(name)}:{json.dumps(fields, separators=(',', ':'))}")
            position += len(raw)
        text = ("{" + ",".join(parts) + "}").encode()
        if change is not None:
            text = change(text)
        text += b" " * (-(8 + len(text)) % self.page)
        head = struct.pack("<Q", len(text)) + text
        data = [raw for _, (_, _, raw) in self.tensors]
        if fresh_sums and self.names()[-1:] == [SUMS_NAME]:
            data[-1] = _sums(head, self.names(), data)
        return head + b"".join(data)


def _sums(head: bytes, names: list[str], data: list[bytes]) -> bytes:
    """The table for these tensors, as the format has it."""
    entries, position = {}, len(head)
    for index, (name, raw) in enumerate(zip(names, data, strict=True)):
        key = name if index == len(names) - 1 or name.startswith("__file__/") else str(index)
        entries[f"{key}"] = TensorEntry(name, "U8", (len(raw),), position, position + len(raw))
        position += len(raw)
    region = b"".join(data[:-1])
    numbers = [xxh3(region[at : at + CHUNK_BYTES]) for at in range(0, len(region), CHUNK_BYTES)]
    files = [entry for entry in entries.values() if entry.name.startswith("__file__/")]
    numbers += [xxh3(region[entry.begin - len(head) : entry.end - len(head)]) for entry in files]
    try:
        return encode_sums(Header(entries, {}, len(head), position), head, numbers)
    except ValueError:  # two files of one name: any table will do
        return data[-1]
