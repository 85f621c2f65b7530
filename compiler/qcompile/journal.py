"""Which tensors of an unfinished output are done, so that an interrupted run can go on.

Lines of text, each `<XXH3-64 of the rest, 16 hex digits> <JSON>`. The first names the plan; each other one
is a tensor: the byte ranges of the output that hold it, with their sums, and what the summary tells of it.
A line is appended only after the ranges are on the disk (fdatasync). Nothing is believed when it is read: a
line that does not match its sum ends the journal, and ranges are hashed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from nf4format import _native
from nf4format.atomic import surely, write_error
from nf4format.checkpoint import Checkpoint
from nf4format.errors import Nf4Error
from nf4format.files import read_file
from nf4format.layout import COMPANIONS
from nf4format.resumable import ResumableFile
from nf4format.strictjson import parse_object

from .emit import Emitted
from .errors import CompileError
from .options import CompileOptions
from .plan import Plan
from .quality import TensorError
from .summary import OutputError

FORMAT = 1
# What a kill may cost: work on the tensors since the last line.
SYNC_BYTES = 256 << 20
SYNC_SECONDS = 10.0
_PERIOD_S = 0.25
_MAX_BYTES = 1 << 30

Ranges = list[tuple[int, int]]


class Journal:
    """The journal of a file being written; a context manager, whose thread appends to it now and then.

    Nothing is written for an output that is done before anything is due. If the block ends by an exception
    and the file is to be kept, what is done is noted first.

    Attributes:
        output_errors: of the tensors that `finished` gave, where they are known.
    """

    def __init__(self, file: ResumableFile, key: str, plan: Plan) -> None:
        """`key`: from `plan_key`.

        Raises:
            CompileError: the file was left by a run with another plan.
        """
        self._file, self._key = file, key
        self._ranges = _tensor_ranges(plan)
        self._fd = -1
        self._lock = threading.Lock()  # of the three that follow
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._pending_since = 0.0
        self._done = threading.Event()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self.output_errors: dict[str, OutputError] = {}
        self._left: list[dict[str, Any]] = []
        self._whole_bytes = 0
        if file.is_resumed:
            self._left, self._whole_bytes = _read(file.journal_path)
            if self._left and self._left[0].get("plan") != key:
                raise CompileError(
                    file.path,
                    "what an earlier run left was made from other weights, with other options, on another "
                    "device or by another version",
                    remedy="give what that run was given, or begin anew without --resume",
                )

    def finished(self, threads: int) -> dict[str, Emitted]:
        """The tensors that are done, by name: those whose bytes in the file have the sums that were noted."""
        found: dict[str, Emitted] = {}
        for record in self._left[1:]:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                name = record["name"]
                ranges = self._ranges[name]
                if record["ranges"] == self._with_sums(ranges, threads):
                    found[name] = _emitted(record)
                    if record["output"] is not None:
                        self.output_errors[name] = OutputError(**record["output"])
        return found

    def add(self, name: str, emitted: Emitted, output: OutputError | None) -> None:
        """Note a tensor that is written, and its error at the output. Called by any thread.

        Raises:
            WriteError: the disk failed meanwhile.
        """
        self.check()
        ranges = self._ranges[name]
        try:
            record = {
                "name": name,
                "ranges": self._with_sums(ranges, 1),
                "sha256": emitted.sha256,
                "seconds": emitted.seconds,
                "error": None if emitted.error is None else dataclasses.asdict(emitted.error),
                "negative_scales": emitted.negative_scales,
                "output": None if output is None else dataclasses.asdict(output),
            }
            line = _line(record)
        except ValueError:  # such as an error that is infinite, of enormous weights
            return  # a later run does this tensor again
        with self._lock:
            if not self._pending:
                self._pending_since = time.monotonic()
            self._pending.append(line)
            self._pending_bytes += sum(end - begin for begin, end in ranges)

    def check(self) -> None:
        """Raise WriteError if the bytes written could not be brought to the disk."""
        if self._failure is not None:  # the kernel may have dropped the pages: never tried again
            raise write_error(self._file.path, self._failure)

    def __enter__(self) -> Journal:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        surely(self._stop)
        try:
            if kind is not None and self._file.keep:
                self._flush()
        finally:
            if self._fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(self._fd)
                self._fd = -1
        if kind is None:
            self.check()

    def _stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(_PERIOD_S):
            if self._is_due():
                self._flush()

    def _is_due(self) -> bool:
        with self._lock:
            waited = time.monotonic() - self._pending_since
            return bool(self._pending) and (self._pending_bytes >= SYNC_BYTES or waited >= SYNC_SECONDS)

    def _flush(self) -> None:
        """Bring what is pending to the disk, and then note it."""
        with self._lock:
            lines, self._pending, self._pending_bytes = self._pending, [], 0
        if not lines or self._failure is not None:
            return
        try:
            os.fdatasync(self._file.fd)
        except OSError as error:
            self._failure = error
            return
        # Without a journal the output is as good; only that it could not be resumed.
        with contextlib.suppress(OSError, Nf4Error):
            if self._fd < 0:
                self._fd = self._open()
                if not self._whole_bytes:
                    lines.insert(0, _line({"format": FORMAT, "plan": self._key}))
            data = b"".join(lines)
            while data:
                data = data[os.write(self._fd, data) :]
            os.fdatasync(self._fd)

    def _open(self) -> int:
        path = self._file.journal_path
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags, 0o666)
        try:
            os.ftruncate(fd, self._whole_bytes)  # a torn line at its end
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _with_sums(self, ranges: Ranges, threads: int) -> list[list[Any]]:
        sums, failure = _native.hash_ranges(self._file.fd, ranges, threads, None)
        if failure is not None:
            raise ValueError("the file cannot be read, or is shorter than the plan")
        return [[begin, end, f"{value:016x}"] for (begin, end), value in zip(ranges, sums, strict=True)]


def plan_key(checkpoint: Checkpoint, plan: Plan, options: CompileOptions, device: str) -> str:
    """SHA-256 (hex) of all that decides bytes; weights and statistics by sizes and times of their files.

    `device`: what rounds by statistics, if anything is: devices round differently.
    """
    stats = [Path(path).stat() for path in options.stats]
    parts = {
        "header": hashlib.sha256(plan.layout.header_bytes()).hexdigest(),  # options and version are in it
        "levels": hashlib.sha256(options.level_table().tobytes()).hexdigest(),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in checkpoint.files.items()},
        "shards": checkpoint.sizes_and_times(),
        "stats": [(status.st_size, status.st_mtime_ns) for status in stats],
        "device": device if stats else "any",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tensor_ranges(plan: Plan) -> dict[str, Ranges]:
    """The byte ranges of the output that each tensor becomes."""
    found: dict[str, Ranges] = {}
    for decision in plan.decisions:
        suffixes = ("", *COMPANIONS) if decision.quantize else ("",)
        entries = [plan.layout.entries[decision.name + suffix] for suffix in suffixes]
        found[decision.name] = [(entry.begin, entry.end) for entry in entries]
    return found


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode("ascii")
    return b"%s %s\n" % (xxhash.xxh3_64_hexdigest(text).encode(), text)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a journal up to the first that is damaged, and where they end."""
    try:
        data = read_file(path, _MAX_BYTES, follow=False)
    except Nf4Error:
        return [], 0
    records: list[dict[str, Any]] = []
    end = 0
    while (newline := data.find(b"\n", end)) >= 0:
        digits, _, text = data[end:newline].partition(b" ")
        if digits != xxhash.xxh3_64_hexdigest(text).encode():
            break
        try:
            record = parse_object(text)
        except ValueError:
            break
        if not records and record.get("format") != FORMAT:
            break
        records.append(record)
        end = newline + 1
    return records, end


def _emitted(record: dict[str, Any]) -> Emitted:
    error = record["error"]
    return Emitted(
        record["sha256"],
        record["seconds"],
        None if error is None else TensorError(**error),
        record["negative_scales"],
    )
