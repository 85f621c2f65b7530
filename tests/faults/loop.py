"""Runs writers again and again, the k-th call of a kind failing, for every k until none fails any more.

Started with the injector preloaded (see test_faults.py). After each run the output is the old one or the new
one, whole, and nothing lies beside it; what was raised is a typed error of one line.
usage: python loop.py PLACE quick|full [PATTERN]; prints one JSON object for each loop.
"""

from __future__ import annotations

import ctypes
import errno
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from writers import Adapters, Checkpoints, Compile, Exports, Files, Tokens, Writer

from nf4format.errors import Nf4Error

# As in injector.c.
KINDS = [
    "none", "write", "read", "sync", "allocate", "rename", "rename_flags", "open", "mkdir", "link", "mmap",
    "malloc", "close", "lock",
]  # fmt: skip
ONCE, FROM_THEN_ON, SHORT_ONCE, SHORT_FROM_THEN_ON = range(4)
MODE_NAMES = ("once", "from then on", "short once", "always short")
E = errno
Snapshot = dict[str, bytes]

LIB = ctypes.CDLL(None)
LIB.fault_arm.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int]
LIB.fault_disarm.restype = ctypes.c_long


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and whether the writer gets over it."""

    kind: str
    code: int = 0
    mode: int = ONCE
    harmless: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {errno.errorcode.get(self.code, '')} {MODE_NAMES[self.mode]}".replace("  ", " ")


QUICK = [
    Fault("write", E.ENOSPC),
    Fault("write", mode=SHORT_FROM_THEN_ON, harmless=True),
    Fault("write", E.EINTR, harmless=True),
    Fault("read", E.EIO),
    Fault("sync", E.EIO),
    Fault("allocate", E.ENOSPC),
    Fault("rename", E.EIO),
    Fault("rename_flags", E.EINVAL, FROM_THEN_ON, harmless=True),
    Fault("open", E.EMFILE),
    Fault("mkdir", E.EACCES),
    Fault("link", E.EPERM, FROM_THEN_ON),
    Fault("mmap", E.ENOMEM),
    Fault("malloc", E.ENOMEM),
    Fault("close", E.EIO),
    Fault("lock", E.EWOULDBLOCK),
]
FULL = [
    *QUICK,
    *(Fault("write", code) for code in (E.EIO, E.EDQUOT, E.EFBIG)),
    *(Fault("write", code, FROM_THEN_ON) for code in (E.ENOSPC, E.EIO)),
    Fault("write", mode=SHORT_ONCE, harmless=True),
    Fault("read", E.EIO, FROM_THEN_ON),
    Fault("read", E.EINTR, harmless=True),
    Fault("read", mode=SHORT_ONCE, harmless=True),
    Fault("read", mode=SHORT_FROM_THEN_ON, harmless=True),
    *(Fault("sync", code, mode) for code in (E.EIO, E.ENOSPC) for mode in (ONCE, FROM_THEN_ON)),
    Fault("sync", E.EINTR, harmless=True),
    *(Fault("allocate", code) for code in (E.EIO, E.EFBIG)),
    Fault("allocate", E.EINTR, harmless=True),
    *(Fault("rename", code, mode) for code in (E.ENOSPC, E.EACCES) for mode in (ONCE, FROM_THEN_ON)),
    *(Fault("open", code) for code in (E.EACCES, E.ENOMEM, E.EIO, E.ENOENT)),
    Fault("open", E.EINTR, harmless=True),
    Fault("mkdir", E.ENOSPC),
    Fault("link", E.EIO),
    Fault("lock", E.ENOLCK, FROM_THEN_ON),
]


def snapshot(folder: Path) -> Snapshot:
    """Every file below a folder, and the directories."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_file = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = path.read_bytes() if is_file else b""
    return found


def without_partial(found: Snapshot) -> Snapshot:
    return {name: data for name, data in found.items() if ".partial" not in name}


def without_user(found: Snapshot) -> Snapshot:
    return {name: data for name, data in found.items() if "/mine" not in name}


def is_typed(error: BaseException, fault: Fault) -> bool:
    """A problem told in one line; out of memory may be torch's or numpy's own."""
    if isinstance(error, Nf4Error):
        return "\n" not in str(error)
    if fault.kind in ("malloc", "mmap"):
        return isinstance(error, MemoryError) or "allocate memory" in str(error)
    return False


def one_run(writer: Writer, fault: Fault, k: int, old: Snapshot, new: Snapshot) -> tuple[int, list[str]]:
    """Let the k-th call fail. Returns the calls of that kind, and what is wrong."""
    writer.begin()
    error: BaseException | None = None
    LIB.fault_arm(KINDS.index(fault.kind), k, fault.code, fault.mode)
    try:
        writer.run()
    except Exception as raised:
        error = raised
    finally:
        calls = LIB.fault_disarm()
    problems = []
    found = snapshot(writer.results)
    # Kept where asked for; where removing fails too; and where it is locked, as then it is another run's.
    keeps = "--resume" in writer.name or fault.mode == FROM_THEN_ON or fault.kind == "lock"
    judged = without_partial(found) if keeps and error is not None else found
    if fault.kind == "rename" and fault.mode == FROM_THEN_ON:
        # The user's directory is under the one name or the other.
        judged, old, new = (without_user(files) for files in (judged, old, new))
        if error is not None and writer.begins_with_user_file and not any(writer.results.rglob("notes")):
            problems.append("the user's file is gone")
    if judged not in (old, new):
        problems.append(f"neither old nor new: {sorted(judged)}")
    if error is None and judged != new:
        problems.append("no error, and not the new output")
    if error is not None and not is_typed(error, fault):
        problems.append(f"{type(error).__name__}: {error}")
    if error is not None and fault.harmless:
        problems.append(f"not survived: {error}")
    if error is not None and judged == old:
        writer.go_on()
        if "--resume" in writer.name and snapshot(writer.results) != new:
            problems.append("not resumed to the right bytes")
    return calls, [f"call {k}: {problem}" for problem in problems]


def loop(writer: Writer, fault: Fault, old: Snapshot, new: Snapshot) -> dict[str, Any]:
    """Every k until no call is left to fail."""
    problems: list[str] = []
    started = time.perf_counter()
    k = 0
    while True:
        k += 1
        calls, found = one_run(writer, fault, k, old, new)
        problems += found
        if calls < k or k > 500:
            break
    return {
        "loop": f"{writer.name}: {fault}",
        "failed": k - 1,
        "seconds": round(time.perf_counter() - started, 2),
        "problems": problems,
    }


def writers(place: Path, full: bool) -> Iterator[Callable[[], Writer]]:
    yield lambda: Files(place)
    yield lambda: Compile(place, "--force", old=True)
    yield lambda: Compile(place, "--resume")
    if full:
        yield lambda: Compile(place)
        yield lambda: Compile(place, "--verify")
        yield lambda: Compile(place, "--force", "--resume", "--verify", old=True)
    yield lambda: Adapters(place)
    yield lambda: Checkpoints(place)
    yield lambda: Exports(place)
    yield lambda: Tokens(place)


def main(where: str, extent: str, pattern: str = "") -> None:
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    place = Path(where)
    LIB.fault_place(str(place).encode())
    for make in writers(place, extent == "full"):
        writer = make()
        if pattern not in writer.name:
            continue
        writer.begin()
        old = snapshot(writer.results)
        writer.run()  # imports what it imports
        writer.begin()
        writer.run()
        new = snapshot(writer.results)
        faults = FULL if extent == "full" else QUICK
        for fault in (fault for fault in faults if fault.kind not in writer.without):
            print(json.dumps(loop(writer, fault, old, new)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
