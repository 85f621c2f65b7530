"""Reads a finished file back and compares it with the checkpoint it was made from: every sum, every value."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nf4format.atomic import AtomicFile
from nf4format.audit import SCALE_ERROR
from nf4format.blocks import PackedTensor, dequantize
from nf4format.checkpoint import Checkpoint
from nf4format.codebook import BLOCK, NESTED_BLOCK
from nf4format.container import Nf4File
from nf4format.tensor_reader import TensorReader

from .emit import Emitted
from .errors import CompileError
from .plan import Plan
from .policy import Decision
from .quality import TensorError, all_segments, measure, to_float32

# Least part of a block's largest magnitude that quantize_search takes for its scale, before coding that.
_LEAST_MULTIPLIER = 0.7
_REMEDY = "run it again; if that repeats, memory or disk of this machine is failing"


def verify_output(
    checkpoint: Checkpoint,
    plan: Plan,
    emitted: dict[str, Emitted],
    file: AtomicFile,
    *,
    level: int,
    jobs: int,
) -> dict[str, TensorError]:
    """Read everything back from the disk and compare.

    Args:
        level: the optimisation level it was written with: how far from the original a value may be.
        file: sealed, not yet renamed: a file that fails never reaches its destination.

    Returns:
        Name -> error of each packed tensor over all its values.

    Raises:
        CompileError: a sum, a decoded value, kept bytes or an embedded file differ; the checkpoint changed.
        FormatError: the file does not open.
    """
    os.fsync(file.fd)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)  # so that what is read comes from the disk
    with Nf4File.from_descriptor(file.fd, file.path) as packed_file:
        damage = packed_file.verify(threads=jobs)
        if damage:
            raise CompileError(file.path, str(damage[0]), remedy=_REMEDY)
        for name, content in checkpoint.files.items():
            if packed_file.file(name) != content:
                raise CompileError(
                    file.path, f"embedded file {name} differs from the original", remedy=_REMEDY
                )
        verifier = _Verifier(checkpoint, emitted, packed_file, level)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                errors = dict(pool.map(verifier.check, plan.decisions))
            except BaseException:
                verifier.cancelled.set()
                raise
    return {name: error for name, error in errors.items() if error is not None}


class _Verifier:
    def __init__(
        self, checkpoint: Checkpoint, emitted: dict[str, Emitted], packed_file: Nf4File, level: int
    ) -> None:
        self.cancelled = threading.Event()
        allowed = (allowed_difference, allowed_difference_searched, allowed_difference_calibrated)
        self._allowed = allowed[min(level, 2)]
        self._checkpoint, self._emitted, self._packed_file = checkpoint, emitted, packed_file

    def check(self, decision: Decision) -> tuple[str, TensorError | None]:
        """Compare one tensor."""
        name = decision.name
        reader = TensorReader(self._checkpoint, name, cancelled=self.cancelled)
        error = None
        if decision.quantize:
            error = self._check_packed(name, reader)
        else:
            stored = self._packed_file.kept(name)[0].data
            for offset, chunk in reader.byte_chunks():
                if stored[offset : offset + len(chunk)] != chunk:
                    problem = f"bytes {offset} to {offset + len(chunk)} differ from the checkpoint's"
                    raise CompileError(self._packed_file.path, problem, tensor=name, remedy=_REMEDY)
        if reader.sha256() != self._emitted[name].sha256:
            raise CompileError(
                self._checkpoint.path / self._checkpoint.tensors[name].file,
                "the weights changed while they were compiled",
                tensor=name,
                expected=f"SHA-256 {self._emitted[name].sha256}",
                got=reader.sha256(),
                remedy="let no one write to the checkpoint, and run it again",
            )
        return name, error

    def _check_packed(self, name: str, reader: TensorReader) -> TensorError:
        packed = self._packed_file.packed(name)

        def decode(start: int, stop: int) -> np.ndarray:
            decoded = to_float32(dequantize(packed, start=start, stop=stop), reader.dtype)
            original = to_float32(reader.read_values(start, stop), reader.dtype)
            excess = np.abs(decoded - original) - self._allowed(packed, original, start)
            worst = int(excess.argmax())
            if excess[worst] > 0:
                raise CompileError(
                    self._packed_file.path,
                    f"value {start + worst} decodes wrongly",
                    tensor=name,
                    expected=f"about {original[worst]}",
                    got=decoded[worst],
                    remedy=_REMEDY,
                )
            return decoded

        segments = all_segments(reader.num_values)
        return measure(reader.num_values, reader.dtype, segments, reader.read_values, decode)


def allowed_difference(packed: PackedTensor, original: np.ndarray, start: int) -> np.ndarray:
    """Most by which the values of a segment may differ from what they decode to, if scales are absmax.

    Half the widest gap between levels times the block's scale, plus the error of the scale's own 8-bit code,
    plus roundings: of the scale to float32, of the value to bfloat16.

    Args:
        original: float32 [<= SEGMENT], the values from `start`, a multiple of SEGMENT.
    """
    padded = np.zeros(-(-original.size // BLOCK) * BLOCK, np.float32)
    padded[: original.size] = np.abs(original)
    scales = padded.reshape(-1, BLOCK).max(axis=1)
    scale_errors = _nested_of_blocks(packed, start, scales.size) * SCALE_ERROR
    roundings = 2**-8 * (scales + scale_errors) + 2**-22 * abs(packed.nested_offset) + 2**-24
    bound = _level_error(packed) * scales + scale_errors + roundings
    return np.repeat(bound, BLOCK)[: original.size].astype(np.float32)


def allowed_difference_searched(packed: PackedTensor, original: np.ndarray, start: int) -> np.ndarray:
    """The same if scales were searched for.

    Codes are the nearest for the scale as it is decoded: half the widest gap between levels times the scale,
    and for values beyond the last level what they exceed it by. That is limited too, because scales are not
    much smaller than the block's largest magnitude. Plus roundings.
    """
    magnitudes = np.abs(original)
    first, num_blocks = start // BLOCK, -(-original.size // BLOCK)
    nested = _nested_of_blocks(packed, start, num_blocks)
    entries = packed.absmax[first : first + num_blocks]
    scales = np.abs(packed.nested_quant_map[entries] * nested + np.float32(packed.nested_offset))
    of_values = np.repeat(scales, BLOCK)[: original.size]
    # A code of the scale may be the neighbour of the nearest one.
    least = _LEAST_MULTIPLIER * magnitudes - np.repeat(nested * 3 * SCALE_ERROR, BLOCK)[: original.size]
    exceeding = np.clip(magnitudes - np.maximum(of_values, least), 0, None)
    return (_level_error(packed) * of_values + exceeding + 2**-8 * (of_values + magnitudes) + 2**-24).astype(
        np.float32
    )


def allowed_difference_calibrated(packed: PackedTensor, original: np.ndarray, start: int) -> np.ndarray:
    """The same if codes were chosen for what they do at the output: any level may stand for any value."""
    nested = _nested_of_blocks(packed, start, -(-original.size // BLOCK))
    of_values = np.repeat(nested, BLOCK)[: original.size]
    return ((1 + 2**-7) * (of_values + np.abs(original)) + 2**-24).astype(np.float32)


def _level_error(packed: PackedTensor) -> float:
    """Farthest that a value in [-1, 1] may be from its level."""
    levels = packed.quant_map.astype(np.float64)
    return float(max(np.diff(levels).max() / 2, 1 + levels[0], 1 - levels[15]))


def _nested_of_blocks(packed: PackedTensor, start: int, num_blocks: int) -> np.ndarray:
    """nested_absmax of each block from value `start`, a multiple of SEGMENT: float32 [num_blocks]."""
    first = start // (BLOCK * NESTED_BLOCK)
    groups = packed.nested_absmax[first : first + -(-num_blocks // NESTED_BLOCK)]
    return np.repeat(groups, NESTED_BLOCK)[:num_blocks]
