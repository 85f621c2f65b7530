"""A .nf4 file against the checkpoint it was made from: everything is encoded again and compared, bit for bit.

The level that the file states decides how. Nothing is written, and no more than one packed tensor and its
scales is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from .audit import Finding, stated_level
from .blocks import NonFinite, PackedTensor
from .checkpoint import Checkpoint, SourceTensor, source_hash
from .codebook import BLOCK
from .container import Nf4File
from .dtypes import SAFETENSORS_NAME
from .encode import ENCODERS, Encoder
from .errors import FormatError
from .sums import Progress
from .tensor_reader import TensorReader

_MISSING: Final = "missing in the checkpoint"


def compare(
    file: Nf4File, checkpoint: Checkpoint, *, threads: int = 1, progress: Progress | None = None
) -> Iterator[Finding]:
    """Every tensor and embedded file that is not what the checkpoint gives, each told once.

    Args:
        progress: called with the number of the checkpoint's bytes read since.

    Raises:
        FormatError: the file states a level that cannot be repeated here; either side cannot be read, or the
            checkpoint changed meanwhile.
    """
    level = stated_level(file)
    if level not in ENCODERS:
        problem = "its optimisation level cannot be repeated by this version"
        expected = " or ".join(map(str, ENCODERS))
        remedy = "upgrade nf4; without --against, sums and constants are checked"
        raise FormatError(file.path, problem, expected=expected, got=level, remedy=remedy)
    hashes: dict[str, str] = {}
    packed_names = frozenset(file.packed_names)
    for name in (*file.packed_names, *file.kept_names):
        if name not in checkpoint.tensors:
            yield Finding(name, _MISSING)
            continue
        source = TensorReader(checkpoint, name, on_read=progress)
        if name in packed_names:
            other = _packed(file.packed(name), checkpoint.tensors[name], source, ENCODERS[level], threads)
        else:
            other = _kept(file, name, checkpoint.tensors[name], source)
        if other:
            yield Finding(name, other)
        hashes[name] = source.sha256()
    for alias, stored in file.aliases.items():
        if alias not in checkpoint.tensors:
            yield Finding(alias, _MISSING)
            continue
        hashes[alias] = TensorReader(checkpoint, alias, on_read=progress).sha256()
        if hashes[alias] != hashes.get(stored):
            yield Finding(alias, f"tied to {stored!a}, whose bytes in the checkpoint are others")
    for name in checkpoint.tensors.keys() - hashes.keys():
        yield Finding(name, "in the checkpoint, and not in the file")
    yield from _files(file, checkpoint)
    checkpoint.check_unchanged()
    if hashes.keys() == checkpoint.tensors.keys():
        digest = source_hash(checkpoint.tensors.values(), hashes)
        if digest != file.source_fingerprint:
            yield Finding(None, f"nf4.source_sha256 is {file.source_fingerprint}, the checkpoint's {digest}")


def _files(file: Nf4File, checkpoint: Checkpoint) -> Iterator[Finding]:
    ours = set(file.file_names)
    for name in sorted(ours - checkpoint.files.keys()):
        yield Finding(None, f"embedded file {name}: not in the checkpoint")
    for name, content in checkpoint.files.items():
        if name not in ours:
            yield Finding(None, f"embedded file {name}: in the checkpoint, and not in the file")
        elif file.file(name) != content:
            yield Finding(None, f"embedded file {name}: other than the checkpoint's")


class _Codes:
    """Takes an encoder's codes and compares them with a file's."""

    def __init__(self, packed: PackedTensor) -> None:
        self._packed = packed
        self.blocks, self.first = 0, -1

    def __call__(self, start: int, codes: np.ndarray) -> None:
        stored = self._packed.codes[start // 2 : start // 2 + codes.size]
        if stored.size == codes.size and np.array_equal(stored, codes):
            return
        other = np.unique(np.flatnonzero(stored != codes[: stored.size]) // (BLOCK // 2))
        self.blocks += other.size
        if self.first < 0 and other.size:
            self.first = start // BLOCK + int(other[0])


def _packed(
    packed: PackedTensor, tensor: SourceTensor, source: TensorReader, encode: Encoder, threads: int
) -> str | None:
    """What of a packed weight is another than its encoding now, or None."""
    stored = f"{SAFETENSORS_NAME[packed.dtype]} {list(packed.shape)}"
    if stored != f"{tensor.dtype} {list(tensor.shape)}":
        return f"made from {stored}, the checkpoint has {tensor.dtype} {list(tensor.shape)}"
    codes = _Codes(packed)
    scales = np.empty(packed.absmax.size, np.float32)
    try:
        constants = encode(source, codes, lambda: threads, scales, levels=packed.quant_map)
    except NonFinite as error:
        return f"the checkpoint has a value that is not finite, at {error.index} (flat index)"
    parts = []
    if codes.blocks:
        parts.append(f"codes of {codes.blocks} blocks of {packed.absmax.size}, the first is {codes.first}")
    pairs: list[tuple[str, np.ndarray, np.ndarray]] = [
        ("absmax", packed.absmax, constants.absmax),
        ("nested_absmax", packed.nested_absmax.view(np.uint32), constants.nested_absmax.view(np.uint32)),
    ]
    for name, ours, again in pairs:
        other = np.flatnonzero(ours != again)
        if other.size:
            parts.append(f"{other.size} {name} of {ours.size}, the first is {other[0]}")
    if packed.nested_offset != constants.nested_offset:
        parts.append(f"nested_offset {packed.nested_offset} instead of {constants.nested_offset}")
    return f"not what the checkpoint encodes to: {'; '.join(parts)}" if parts else None


def _kept(file: Nf4File, name: str, tensor: SourceTensor, source: TensorReader) -> str | None:
    data, dtype, shape = file.kept(name)
    if (dtype, shape) != (tensor.dtype, tensor.shape):
        return f"{dtype} {list(shape)}, the checkpoint has {tensor.dtype} {list(tensor.shape)}"
    for offset, chunk in source.byte_chunks():
        if data[offset : offset + len(chunk)].data != chunk:
            return f"bytes {offset} to {offset + len(chunk)} of it differ from the checkpoint's"
    return None
