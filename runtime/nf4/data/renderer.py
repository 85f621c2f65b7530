"""Chat templates at work in a process of their own: a hostile one ends there, in bounded time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from ..errors import TrainError
from .sandbox import Message, Rendered

PROCESSOR_SECONDS: Final = 10  # for one conversation; a usual one takes less than a millisecond
_WALL_SECONDS: Final = 120.0  # for one conversation, on a machine busy with other things
_MEMORY: Final = 2 << 30  # address space of the process
_MAX_ANSWER: Final = 256 << 20
_MAX_SOURCE: Final = 4 << 20
_CODE: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from nf4.data.render_process import main; main()"
)


class Renderer:
    """A chat template, ready to render conversations; to be closed.

    Args:
        source: the template. name: what messages call it.
        variables: names it may use, such as bos_token.
        today: YYYY-MM-DD, the date it is told.
        seconds: processor time for one conversation.

    Raises:
        TrainError: the template is malformed, or takes too long to compile.
    """

    def __init__(
        self,
        source: str,
        name: str,
        variables: Mapping[str, str],
        today: str,
        *,
        seconds: int = PROCESSOR_SECONDS,
    ) -> None:
        self._name, self._seconds = name, seconds
        if len(source) > _MAX_SOURCE:
            raise self._refused("it is too long")
        paths = [path for path in sys.path if path]
        # Isolated: neither the working directory nor the environment decides what is imported.
        command = [sys.executable, "-I", "-c", _CODE, json.dumps(paths)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._buffer = bytearray()
        settings = {
            "template": source,
            "variables": dict(variables),
            "date": today,
            "seconds": seconds,
            "memory": _MEMORY,
        }
        try:
            self._send([settings])
            answer = self._answer()
            if "error" in answer:
                raise self._refused(answer["error"])
        except BaseException:
            self.close()
            raise

    def render(self, conversations: Sequence[tuple[str, Sequence[Message]]]) -> Iterator[Rendered]:
        """Render conversations, given as (place, messages), in order.

        Raises:
            TrainError: the template refuses a conversation (told with its place), does not show the
                assistant's turns, or takes too much time or memory.
        """
        sending = threading.Thread(
            target=self._send, args=([messages for _, messages in conversations],), daemon=True
        )
        sending.start()
        try:
            for place, _ in conversations:
                answer = self._answer(place)
                if "error" in answer:
                    raise self._refused(answer["error"], place)
                spans = [(begin, end) for begin, end in answer["spans"]]
                yield Rendered(answer["text"], spans, answer["marked"])
        except BaseException:  # also when the caller stops early: answers are left over
            self.close()
            raise
        finally:
            sending.join()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]  # a pipe
        self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]

    def __enter__(self) -> Renderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, values: Sequence[Any]) -> None:
        # The process may be gone; then reading its answer tells why.
        with contextlib.suppress(OSError, ValueError):
            for value in values:
                self._process.stdin.write(json.dumps(value).encode() + b"\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]

    def _answer(self, place: str = "") -> dict[str, Any]:
        descriptor = self._process.stdout.fileno()  # type: ignore[union-attr]
        deadline = time.monotonic() + _WALL_SECONDS
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            ready = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready or searched > _MAX_ANSWER:
                raise self._refused("it does not end", place)
            data = os.read(descriptor, 1 << 20)
            if not data:
                raise self._refused(self._cause_of_death(), place)
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _cause_of_death(self) -> str:
        status = self._process.wait()
        if status == -signal.SIGXCPU:
            return f"it takes more than {self._seconds} s of processor time for one conversation"
        return f"its process ended with status {status}"

    def _refused(self, problem: str, place: str = "") -> TrainError:
        return TrainError(
            place,
            f"chat template {self._name}: {problem}",
            remedy="mend the conversation, or choose another template with --chat-template",
        )
