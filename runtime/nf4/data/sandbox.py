"""Chat templates rendered the way transformers renders them, and where in the text the assistant speaks.

Templates are Jinja programs from strangers. The sandbox keeps them from Python; what it cannot keep them from
is running forever or filling memory, so `nf4.data.renderer` lets this module work in a process of its own
with limits. Nothing here imports more than jinja2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from itertools import pairwise
from typing import Any, NamedTuple

from jinja2 import Environment, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_OUTPUT = 8 << 20  # characters of a rendered conversation

Message = Mapping[str, str]


class Rendered(NamedTuple):
    """A conversation as text.

    spans: the characters [begin, end) that the assistant writes, a span a turn, in order.
    marked: whether the template marks them itself, by {% generation %}. If not, a span may have white space
    behind the turn's end token, or lack the token, which then follows it.
    """

    text: str
    spans: list[tuple[int, int]]
    marked: bool


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja.
        variables: names the template may use, such as bos_token.
        today: the date that strftime_now tells.

    Raises:
        TemplateError: not Jinja, or something the sandbox forbids.
    """

    def __init__(self, source: str, variables: Mapping[str, str], today: date) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise,
            strftime_now=datetime.combine(today, time()).strftime,
            dict=_dict,
            namespace=_Namespace,
        )
        environment.globals.pop("lipsum", None)
        self._environment = environment
        self._template = environment.from_string(source)
        self._variables = dict(variables)
        tags = environment.parse(source).find_all(nodes.CallBlock)
        self.is_marked = any(isinstance(tag.call, nodes.Call) and _is_generation(tag.call) for tag in tags)

    def render(
        self, messages: Sequence[Message], *, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of messages, and its {% generation %} spans.

        Args:
            prompt: end with what comes before an answer (add_generation_prompt).

        Raises:
            TemplateError: the template refuses the messages, or its text is longer than MAX_OUTPUT.
        """
        tracker: _GenerationTag = self._environment.extensions[_GenerationTag.identifier]  # type: ignore[assignment]
        parts: list[str] = []
        tracker.begin()
        values = {"messages": messages, "add_generation_prompt": prompt, "tools": None, "documents": None}
        for part in self._template.generate(**{**self._variables, **values}):
            tracker.length += len(part)
            if tracker.length > MAX_OUTPUT:
                raise TemplateError(f"the template writes more than {MAX_OUTPUT:,} characters")
            parts.append(part)
        text = "".join(parts)
        if any(text[at : at + len(noted)] != noted for at, noted in tracker.noted):
            raise TemplateError("{% generation %} stands inside a macro, a filter or a {% set %} block")
        return text, [(at, at + len(noted)) for at, noted in tracker.noted]

    def conversation(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation, and what of it the assistant writes.

        Where the template has {% generation %}, that says so. Else a turn is what a text gains from the
        prompt for the turn to the end of the turn; and where templates write earlier turns
        differently from the last (no thoughts, no system prompt), what changes with the turn's content.

        Raises:
            TemplateError: as `render`; or neither way finds the turns.
        """
        text, spans = self.render(messages)
        if self.is_marked:
            return Rendered(text, spans, True)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        found = self._by_prefix(text, messages, turns)
        if found is None:
            found = [self._by_content(text, messages, turn) for turn in turns]
            if any(one[1] > other[0] for one, other in pairwise(found)):
                raise TemplateError(_NOT_FOUND)
        return Rendered(text, found, False)

    def _by_prefix(
        self, text: str, messages: Sequence[Message], turns: Sequence[int]
    ) -> list[tuple[int, int]] | None:
        """Spans from renderings of the first messages; None where one is no beginning of the text."""
        spans = []
        for turn in turns:
            try:
                before = self.render(messages[:turn], prompt=True)[0]
                until = text if turn == len(messages) - 1 else self.render(messages[: turn + 1])[0]
            except TemplateError:  # some templates refuse a conversation without messages, or its half
                return None
            if not (until.startswith(before) and text.startswith(until)):
                return None
            spans.append((len(before), len(until)))
        return spans

    def _by_content(self, text: str, messages: Sequence[Message], turn: int) -> tuple[int, int]:
        """The part of the text that changes when the content of one message does."""
        content = messages[turn]["content"]
        # Begins and ends with characters that the content has not there, so that equal parts end at it.
        bare = content.strip()
        first = next(character for character in "xyz" if not bare.startswith(character))
        last = next(character for character in "xyz" if not bare.endswith(character))
        other = [dict(message) for message in messages]
        other[turn]["content"] = f"{first}q{last}"
        changed = self.render(other)[0]
        begin = _common(text, changed)
        end = len(text) - min(_common(text[::-1], changed[::-1]), len(text) - begin)
        if text[begin:end] not in content:
            raise TemplateError(_NOT_FOUND)
        return begin, end


_NOT_FOUND = (
    "the template does not show where the assistant's turns are; put {% generation %} and {% endgeneration %}"
    " around them in a copy of it, end token included"
)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox; products that could fill memory in one go are computed by a function that looks first."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (_is_small(left) and _is_small(right)):
            raise SecurityError("a power that large has no place in a chat template")
        for many, times in ((left, right), (right, left)):
            if isinstance(many, str | bytes | list | tuple) and len(many) * max(int(times), 0) > MAX_OUTPUT:
                raise SecurityError("a text or list repeated that often has no place in a chat template")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: notes which characters of the output lie between."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.begin()

    def begin(self) -> None:
        """Forget the last rendering. The caller counts in `length` the characters written so far."""
        self.length = 0
        self.noted: list[tuple[int, str]] = []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_noted"), [], [], body).set_lineno(line)

    def _noted(self, caller: Macro) -> str:
        text: str = caller()
        self.noted.append((self.length, text))
        return text


class _Namespace(Namespace):
    """namespace(), without names that begin with an underscore: those lead into Python."""

    def __init__(self, *args: Any, **values: Any) -> None:
        given = dict(*args, **values)
        for name in given:
            _check_name(name)
        super().__init__(given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("names in a namespace cannot begin with an underscore")


def _dict(*args: Any, **values: Any) -> dict[Any, Any]:
    """dict() as a function: the type itself has attributes that templates have no business with."""
    return dict(*args, **values)


def _raise(message: Any) -> str:
    raise TemplateError(str(message)[:1000])


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _is_generation(call: nodes.Call) -> bool:
    return isinstance(call.node, nodes.ExtensionAttribute) and call.node.name == "_noted"


def _is_small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= 1000


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common from the front: by halves, as comparing slices is fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
