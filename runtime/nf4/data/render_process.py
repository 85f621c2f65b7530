"""The process that renders chat templates for `nf4.data.renderer`, under limits that the kernel enforces.

It reads lines of JSON and answers each with one: first the template and its settings, answered by {}; then
a conversation a line, answered by {"text", "spans", "marked"} or {"error"}. Processor time is limited anew
for each line: past it the kernel ends the process.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable
from datetime import date
from typing import Any, BinaryIO

from jinja2.exceptions import TemplateError

from .sandbox import ChatTemplate


def main() -> None:
    """Serve standard input to standard output until it ends."""
    source, out = sys.stdin.buffer, sys.stdout.buffer
    settings = json.loads(source.readline())
    seconds = int(settings["seconds"])
    _limit(resource.RLIMIT_AS, int(settings["memory"]))
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit_time(seconds)
    made: list[ChatTemplate] = []

    def compile_template() -> dict[str, Any]:
        today = date.fromisoformat(settings["date"])
        made.append(ChatTemplate(settings["template"], settings["variables"], today))
        return {}

    _answer(out, compile_template)
    if not made:
        return
    while line := source.readline():
        _limit_time(seconds)
        messages = json.loads(line)
        _answer(out, lambda messages=messages: made[0].conversation(messages)._asdict())  # type: ignore[misc]


def _answer(out: BinaryIO, work: Callable[[], dict[str, Any]]) -> None:
    try:
        answer = work()
    except TemplateError as error:
        answer = {"error": error.message or type(error).__name__}
    except MemoryError:
        answer = {"error": "the template takes too much memory"}
    except RecursionError:
        answer = {"error": "the template is nested too deeply"}
    except Exception as error:  # what Python raises on a template's behalf: any kind
        answer = {"error": f"{type(error).__name__}: {error}"}
    if "error" in answer:
        answer["error"] = " ".join(answer["error"].split())[:1000]
    out.write(json.dumps(answer).encode() + b"\n")
    out.flush()


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _limit_time(seconds: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime) + seconds
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
