"""`nf4 eval --against` as a process: the compiler asks the runtime without importing it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nf4format.atomic import surely
from nf4format.errors import printable
from nf4format.strictjson import parse_object

from .errors import EvaluationError

COMMAND = (sys.executable, "-m", "nf4", "eval")

COLUMNS = ("window_kl", "window_nll", "window_original_nll")
"""Keys of what is found for each window."""

Watch = Callable[[int, int], None]
"""Takes (windows done, windows in all) of the text at hand."""

_MOST_RESULT_BYTES = 64 << 20
_MOST_LINE_BYTES = 4096
_REMEDY = "see what `nf4 eval FILE TEXT --against MODEL_DIR` says, or leave out --eval-text"


def evaluate(
    file: Path, text: str, model_dir: Path, arguments: Sequence[str], watch: Watch | None
) -> dict[str, Any]:
    """Compare a packed file with its checkpoint on a text. The process ends with this one, whatever ends it.

    Args:
        arguments: further ones of the command.

    Returns:
        The numbers of `COLUMNS`, a list each; and `tokens`, `same_choice`.

    Raises:
        EvaluationError: the runtime cannot be started, fails, or finds no finite numbers.
    """
    paths = [str(file.absolute()), str(Path(text).absolute()), "--against", str(model_dir.absolute())]
    asked = ["--per-window", "--json", "-", "--progress-lines"]
    status, said, result = _run([*COMMAND, *paths, *arguments, *asked], watch)
    if status:
        reason = printable(said) or f"it ended with status {status}"
        raise EvaluationError(text, f"nf4 eval failed: {reason}", remedy=_REMEDY)
    return _checked(result, text)


def _run(command: Sequence[str], watch: Watch | None) -> tuple[int, str, bytes]:
    """Exit status, the last line of stderr that is not progress, stdout."""
    # What lies in the working directory is not the runtime.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    folder = None if sys.version_info >= (3, 11) else sys.prefix  # which knows no such variable
    # Started by another thread: Ctrl-C, which arrives in the main one, cannot come between the start and the
    # knowledge of it.
    with ThreadPoolExecutor(1) as starter, tempfile.TemporaryFile() as result:
        starting = starter.submit(
            subprocess.Popen,
            command,
            stdin=subprocess.DEVNULL,
            stdout=result,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=folder,
        )
        try:
            process = starting.result()
            said = _listen(process, watch)
            status = process.wait()
        except OSError as error:
            raise EvaluationError(
                command[0],
                f"nf4 eval cannot be started: {error.strerror}",
                remedy="install the runtime in this Python's environment",
            ) from error
        finally:
            surely(lambda: _end(starting))
        result.seek(0)
        return status, said, result.read(_MOST_RESULT_BYTES)


def _listen(process: subprocess.Popen[bytes], watch: Watch | None) -> str:
    """Pass on its progress until it closes stderr; the last line that was something else."""
    said = ""
    assert process.stderr is not None
    for raw in process.stderr:
        line = raw[-_MOST_LINE_BYTES:].decode("utf-8", "replace").strip()
        done, slash, total = line.partition("/")
        if slash and done.isdecimal() and total.isdecimal():
            if watch is not None:
                watch(int(done), int(total))
        elif line:
            said = line
    return said


def _end(starting: Future[subprocess.Popen[bytes]]) -> None:
    if starting.exception() is None:
        process = starting.result()
        process.kill()  # nothing, where it has ended
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def _checked(result: bytes, text: str) -> dict[str, Any]:
    """The program is ours, but one of another version may say something else."""
    try:
        facts = parse_object(result)
        columns = [facts[key] for key in COLUMNS]
        numbers = [*(value for column in columns for value in column), facts["tokens"], facts["same_choice"]]
        is_good = (
            len({len(column) for column in columns}) == 1 and len(columns[0]) > 0 and facts["tokens"] > 0
        )
        is_good = is_good and all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
    except (ValueError, KeyError, TypeError):
        is_good = False
    if not is_good:
        raise EvaluationError(
            text,
            "nf4 eval gave no finite KL",
            expected="numbers for each window",
            got=ascii(result[:40]),
            remedy=_REMEDY,
        )
    return facts
