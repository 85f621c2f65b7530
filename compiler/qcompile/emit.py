"""Writes every tensor of the plan at its place: encoded or copied, in parallel, in bounded memory.

Threads take tensors from one list, the largest first. A tensor is read once, front to back. What a byte of
the output becomes depends on its tensor alone, so that the number of threads and their timing cannot show.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from nf4format.atomic import AtomicFile
from nf4format.blocks import NonFinite, first_nonfinite
from nf4format.checkpoint import Checkpoint
from nf4format.codebook import NESTED_MAP, NF4_LEVELS
from nf4format.encode import Constants, Encoder
from nf4format.files import pread_exactly
from nf4format.layout import FILE_PREFIX, QUANT_STATE, quant_state_json
from nf4format.tensor_reader import CHUNK_BYTES, Cancelled, TensorReader

from .errors import CompileError
from .plan import Plan
from .policy import Decision
from .quality import TensorError, decode_segment, measure, sampled_segments, to_float32
from .scratch import Scratch

Progress = Callable[[int, int], None]
"""Takes the bytes of the checkpoint just read and those to be read in all; called by one thread at a time."""

_STEP_SECONDS = 0.5


@dataclass(frozen=True)
class Emitted:
    """What is known of a tensor once it is written.

    Attributes:
        sha256: of its bytes in the checkpoint.
        seconds: time from the first byte read to the last written.
        error: what encoding cost, for a packed tensor; None for a kept one.
        negative_scales: share of its blocks whose scale is below zero; 0 for a kept one.
    """

    sha256: str
    seconds: float
    error: TensorError | None = None
    negative_scales: float = 0.0


def emit_tensors(
    checkpoint: Checkpoint,
    plan: Plan,
    encoder_of: Callable[[Decision], Encoder],
    file: AtomicFile,
    *,
    levels: np.ndarray = NF4_LEVELS,
    jobs: int,
    done: Mapping[str, Emitted] = MappingProxyType({}),
    note: Callable[[str, Emitted], None] = lambda name, emitted: None,
    progress: Progress | None = None,
) -> dict[str, Emitted]:
    """Write all tensors of the plan into the file.

    Args:
        encoder_of: the encoder of each packed tensor.
        levels: what the encoder's codes stand for, float32 [16].
        jobs: number of threads.
        done: tensors that are in the file already.
        note: is told of each tensor written, in its thread.

    Returns:
        name -> what is known of it, in the plan's order.

    Raises:
        CompileError: a NaN, or an infinity in a weight to be packed.
        FormatError: a shard cannot be read.
        OSError: the output cannot be written.
    """
    to_do = [decision for decision in plan.decisions if decision.name not in done]
    emitter = _Emitter(checkpoint, plan, encoder_of, file, levels=levels, jobs=jobs, progress=progress)
    emitter.skip([decision for decision in plan.decisions if decision.name in done])
    largest_first = sorted(to_do, key=lambda decision: -decision.source_bytes)

    def emit(decision: Decision) -> Emitted:
        emitted = emitter.emit(decision)
        note(decision.name, emitted)
        return emitted

    with ThreadPoolExecutor(jobs, thread_name_prefix="emit") as pool:
        futures: dict[str, Future[Emitted]] = {}
        try:
            for decision in largest_first:
                futures[decision.name] = pool.submit(emit, decision)
            _wait(futures.values())
        finally:  # after a failure, and after Ctrl-C, which arrives in this thread
            emitter.cancelled.set()
            pool.shutdown(cancel_futures=True)
    failures = [
        error for future in futures.values() if not future.cancelled() and (error := future.exception())
    ]
    for error in failures:
        if not isinstance(error, Cancelled):
            raise error
    emitted = {name: future.result() for name, future in futures.items()} | dict(done)
    return {decision.name: emitted[decision.name] for decision in plan.decisions}


def _wait(futures: Collection[Future[Emitted]]) -> None:
    """Until all are done or one has failed; in steps, as this thread does not see a signal while it waits if
    another thread has taken it, or if it came just before the wait began."""
    while True:
        done, not_done = wait(futures, timeout=_STEP_SECONDS, return_when=FIRST_EXCEPTION)
        if not not_done or any(future.exception() for future in done):
            return


def emit_files(checkpoint: Checkpoint, plan: Plan, file: AtomicFile) -> None:
    """Write the embedded files: configuration, tokenizer, chat template."""
    for name in plan.layout.files:
        file.pwrite(checkpoint.files[name], plan.layout.entries[FILE_PREFIX + name].begin)


class _Emitter:
    """What the threads share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        encoder_of: Callable[[Decision], Encoder],
        file: AtomicFile,
        *,
        levels: np.ndarray,
        jobs: int,
        progress: Progress | None,
    ) -> None:
        self.cancelled = threading.Event()
        self._checkpoint, self._layout, self._file = checkpoint, plan.layout, file
        self._encoder_of = encoder_of
        self._levels, self._progress, self._jobs = levels, progress, jobs
        self._lock = threading.Lock()
        self._unfinished = len(plan.decisions)
        self._total_bytes = sum(decision.source_bytes for decision in plan.decisions)
        self._local = threading.local()
        self._scratch = Scratch(file.path.parent)
        self._specs = {spec.name: spec for spec in plan.layout.packed}

    def skip(self, decisions: Sequence[Decision]) -> None:
        """Leave out tensors that are done."""
        self._unfinished -= len(decisions)
        num_bytes = sum(decision.source_bytes for decision in decisions)
        if num_bytes:
            self._advance(num_bytes)

    def emit(self, decision: Decision) -> Emitted:
        """Write one tensor."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = bytearray(CHUNK_BYTES)
        reader = TensorReader(
            self._checkpoint, decision.name, buffer=buffer, cancelled=self.cancelled, on_read=self._advance
        )
        started = time.perf_counter()
        error, negative_scales = None, 0.0
        if decision.quantize:
            error, negative_scales = self._pack(decision, reader)
        else:
            self._copy(decision.name, reader)
        with self._lock:
            self._unfinished -= 1
        return Emitted(reader.sha256(), time.perf_counter() - started, error, negative_scales)

    def _pack(self, decision: Decision, reader: TensorReader) -> tuple[TensorError, float]:
        name, entries = decision.name, self._layout.entries
        codes_begin = entries[name].begin

        def write_codes(start: int, codes: np.ndarray) -> None:
            self._file.pwrite(codes.data, codes_begin + start // 2)

        def decode(start: int, stop: int) -> np.ndarray:
            # From the file: what is measured is what was written.
            size, begin = -(-(stop - start) // 2), codes_begin + start // 2
            codes = np.frombuffer(pread_exactly(self._file.fd, size, begin, self._file.path), np.uint8)
            return decode_segment(codes, constants, start, stop, reader.dtype, levels=self._levels)

        with self._scratch.scales(reader.num_values) as scales:
            try:
                encoder = self._encoder_of(decision)
                constants = encoder(reader, write_codes, self._threads, scales, levels=self._levels)
            except NonFinite as error:
                raise self._not_finite(name, reader, error.index, "finite values") from None
            self._write_constants(name, constants)
            measured = measure(
                reader.num_values,
                reader.dtype,
                sampled_segments(reader.num_values),
                reader.read_values,
                decode,
            )
            return measured, constants.negative_scales()

    def _write_constants(self, name: str, constants: Constants) -> None:
        entries = self._layout.entries
        state_entry = entries[name + QUANT_STATE]
        state = quant_state_json(
            self._specs[name], constants.nested_offset, state_entry.end - state_entry.begin
        )
        parts: dict[str, bytes | memoryview] = {
            ".absmax": constants.absmax.data,
            ".quant_map": self._levels.tobytes(),
            ".nested_absmax": constants.nested_absmax.data,
            ".nested_quant_map": NESTED_MAP.tobytes(),
            QUANT_STATE: state,
        }
        for suffix, data in parts.items():
            self._file.pwrite(data, entries[name + suffix].begin)

    def _copy(self, name: str, reader: TensorReader) -> None:
        """Copy a tensor's bytes. Other dtypes than the codec's are not looked at."""
        begin = self._layout.entries[name].begin
        if not reader.num_values:
            for offset, chunk in reader.byte_chunks():
                self._file.pwrite(chunk, begin + offset)
            return
        for start, values in reader.chunks():
            # Infinities may be meant (masks); a NaN never is.
            index = first_nonfinite(values, reader.dtype, nan_only=True)
            if index is not None:
                raise self._not_finite(name, reader, start + index, "no NaN")
            self._file.pwrite(values.data, begin + start * values.itemsize)

    def _threads(self) -> int:
        """Cores that this tensor may use: its own, and its share of those that have no tensor left to do."""
        return max(1, self._jobs // max(1, self._unfinished))

    def _advance(self, num_bytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._progress(num_bytes, self._total_bytes)

    def _not_finite(self, name: str, reader: TensorReader, index: int, expected: str) -> CompileError:
        tensor = self._checkpoint.tensors[name]
        position = [int(axis) for axis in np.unravel_index(index, tensor.shape)]
        value = to_float32(reader.read_values(index, index + 1), reader.dtype)[0]
        return CompileError(
            self._checkpoint.path / tensor.file,
            tensor=name,
            expected=expected,
            got=f"{value} at index {position}",
            remedy="the checkpoint is damaged or its training diverged: fetch it again or take another",
        )
