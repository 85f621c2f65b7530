"""What a row means: text, a prompt with its completion, or a conversation; recognised by its keys.

| fields | becomes |
|--|--|
| text | a text to learn as it stands |
| prompt, completion | both as they stand, one behind the other |
| input, output | the same |
| instruction, output; input and system if there | a conversation; without a chat template Alpaca's form |
| question, answer; system if there | a conversation; without a chat template "Question: ... Answer: ..." |
| messages; system if there | a conversation: [{"role": "user", "content": "..."}, ...] |
| conversations; system if there | the same, or ShareGPT's [{"from": "human", "value": "..."}, ...] |

Other keys of a row are left alone. Columns with other names are mapped: {"prompt": "frage"}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from nf4format.strictjson import parse_json

from ..errors import TrainError

MAX_ROW_CHARS: Final = 4 << 20  # of a row that is encoded at once: some 100 bytes a character while it is
_MAX_MESSAGES: Final = 10_000
MAPPING_OPTION: Final = "--map"


class Text(NamedTuple):
    """A document."""

    text: str


class Completion(NamedTuple):
    """A prompt and what is to follow it."""

    prompt: str
    completion: str


class Chat(NamedTuple):
    """Messages {"role": ..., "content": ...}; roles are system, user, assistant and tool."""

    messages: list[dict[str, str]]


Sample = Text | Completion | Chat


@dataclass(frozen=True)
class _Form:
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        return self.required + self.optional


_FORMS: Final = (
    _Form(("text",)),
    _Form(("prompt", "completion")),
    _Form(("input", "output")),
    _Form(("instruction", "output"), ("input", "system")),
    _Form(("question", "answer"), ("system",)),
    _Form(("messages",), ("system",)),
    _Form(("conversations",), ("system",)),
)
FIELDS: Final = frozenset(name for form in _FORMS for name in form.fields)

_ROLES: Final = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class Schema:
    """How the rows of one file are read: decided by its first row, then expected of every other.

    Attributes:
        fields: field -> the column that holds it, of those that every row must have.
        is_chat: whether rows become conversations.
    """

    def __init__(self, form: _Form, columns: Mapping[str, str], as_chat: bool, system: str | None) -> None:
        self._columns = {name: columns.get(name, name) for name in form.fields}
        self.fields = {name: self._columns[name] for name in form.required}
        self._system = system
        turns = form.required[0] in ("messages", "conversations")
        self.is_chat = turns or (as_chat and form.required[0] in ("instruction", "question"))
        self._read: Callable[[dict[str, Any], str], Sample] = {
            "text": self._text,
            "prompt": self._completion,
            "input": self._completion,
            "instruction": self._instruction,
            "question": self._question,
            "messages": self._turns,
            "conversations": self._turns,
        }[form.required[0]]
        self._first = form.required[0]
        self._second = form.required[-1]

    @classmethod
    def recognise(
        cls,
        row: Mapping[str, Any],
        place: str,
        columns: Mapping[str, str],
        *,
        as_chat: bool,
        system: str | None = None,
    ) -> Schema:
        """The schema that the first row of a file fits.

        Args:
            place: of the row, for messages.
            columns: field -> column, where the user named them; only schemas that have all these fields
                are thought of.
            as_chat: whether instructions and questions become conversations.
            system: system prompt of conversations without one.

        Raises:
            TrainError: no schema fits, or several do.
        """
        named = set(columns)
        forms = [form for form in _FORMS if named <= set(form.fields)]
        if not forms:
            remedy = f"{MAPPING_OPTION} takes fields of one schema: {_shown_forms(_FORMS)}"
            raise TrainError(
                "", f"no schema has the fields {', '.join(sorted(named))} together", remedy=remedy
            )
        fitting = [form for form in forms if all(columns.get(name, name) in row for name in form.required)]
        present = {form: {columns.get(name, name) for name in form.fields} & row.keys() for form in fitting}
        # input and output with an instruction: the larger one is meant.
        best = [
            form
            for form in fitting
            if not any(
                {columns.get(name, name) for name in form.required} < present[other]
                for other in fitting
                if other is not form
            )
        ]
        if not best:
            raise TrainError(
                place,
                "bad row: no known schema",
                expected=f"the keys {_shown_forms(forms, columns)}",
                got=_shown_keys(row),
                remedy=f"rename the keys, or say which column is what, such as {MAPPING_OPTION} prompt=COLUMN"
                f" {MAPPING_OPTION} completion=COLUMN",
            )
        if len(best) > 1:
            example = " ".join(f"{MAPPING_OPTION} {name}={name}" for name in best[0].required)
            raise TrainError(
                place,
                "the row fits several schemas",
                expected="one of them",
                got=_shown_forms(best, columns),
                remedy=f"choose one, such as {example}",
            )
        return cls(best[0], columns, as_chat, system)

    def read(self, row: Mapping[str, Any], place: str) -> Sample:
        """What a row means.

        Raises:
            TrainError: a key is missing, a value is of another type, a conversation is malformed or empty, a
                row is too long to encode at once.
        """
        for column in self.fields.values():
            if column not in row:
                raise TrainError(
                    place,
                    "bad row",
                    expected=f"the keys {', '.join(self.fields.values())}, as in the first row",
                    got=_shown_keys(row),
                    remedy=f"make all rows of a file alike, or name the columns with {MAPPING_OPTION}",
                )
        sample = self._read(dict(row), place)
        if not isinstance(sample, Text):
            parts = (
                [message["content"] for message in sample.messages] if isinstance(sample, Chat) else sample
            )
            if sum(map(len, parts)) > MAX_ROW_CHARS:
                expected = f"at most {MAX_ROW_CHARS:,} characters"
                raise TrainError(place, "a row is too long", expected=expected, remedy="split it")
        return sample

    def _text(self, row: dict[str, Any], place: str) -> Sample:
        return Text(self._string(row, self._first, place))

    def _completion(self, row: dict[str, Any], place: str) -> Sample:
        return Completion(self._string(row, self._first, place), self._string(row, self._second, place))

    def _instruction(self, row: dict[str, Any], place: str) -> Sample:
        instruction = self._string(row, "instruction", place)
        context = self._optional(row, "input", place)
        output = self._string(row, "output", place)
        system = self._optional(row, "system", place) or self._system
        if self.is_chat:
            return self._chat(system, f"{instruction}\n\n{context}" if context else instruction, output)
        if not system:
            paired = ", paired with an input that provides further context" if context else ""
            system = (
                f"Below is an instruction that describes a task{paired}."
                " Write a response that appropriately completes the request."
            )
        middle = f"### Input:\n{context}\n\n" if context else ""
        return Completion(f"{system}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n", output)

    def _question(self, row: dict[str, Any], place: str) -> Sample:
        question, answer = self._string(row, "question", place), self._string(row, "answer", place)
        system = self._optional(row, "system", place) or self._system
        if self.is_chat:
            return self._chat(system, question, answer)
        head = f"{system}\n\n" if system else ""
        return Completion(f"{head}Question: {question}\nAnswer:", f" {answer}")

    def _turns(self, row: dict[str, Any], place: str) -> Sample:
        column = self.fields[self._first]
        value = row[column]
        if isinstance(value, str):  # in a table, a cell that holds JSON
            try:
                value = parse_json(value.encode())
            except ValueError as error:
                raise TrainError(place, f"bad {column}: {error}", expected="a list of messages") from None
        if not isinstance(value, list):
            raise TrainError(place, f"bad {column}", expected="a list of messages", got=_type_name(value))
        if not value:
            raise TrainError(place, f"bad {column}: an empty conversation", remedy="remove the row")
        if len(value) > _MAX_MESSAGES:
            expected = f"at most {_MAX_MESSAGES:,} messages"
            raise TrainError(place, f"bad {column}", expected=expected, got=f"{len(value):,}")
        messages = [_message(one, f"{column}[{index}]", place) for index, one in enumerate(value)]
        system = self._optional(row, "system", place) or self._system
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return Chat(messages)

    def _chat(self, system: str | None, user: str, assistant: str) -> Chat:
        head = [{"role": "system", "content": system}] if system else []
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return Chat(head + turns)

    def _string(self, row: dict[str, Any], name: str, place: str) -> str:
        value = row[self._columns[name]]
        if not isinstance(value, str):
            raise TrainError(place, f"bad {self._columns[name]}", expected="text", got=_type_name(value))
        return _valid(value, self._columns[name], place)

    def _optional(self, row: dict[str, Any], name: str, place: str) -> str:
        return "" if row.get(self._columns[name]) is None else self._string(row, name, place)


def _message(value: Any, name: str, place: str) -> dict[str, str]:
    """A message in either notation as {"role", "content"}."""
    if isinstance(value, dict) and "role" in value and "content" in value:
        role, content = value["role"], value["content"]
        roles: Mapping[str, str] = {role: role for role in _ROLES}
    elif isinstance(value, dict) and "from" in value and "value" in value:
        role, content, roles = value["from"], value["value"], _SHAREGPT_ROLES
    else:
        expected = "an object with the keys role and content, or from and value"
        got = _shown_keys(value) if isinstance(value, dict) else _type_name(value)
        raise TrainError(place, f"bad {name}", expected=expected, got=got)
    if not isinstance(role, str) or role not in roles:
        got = ascii(role)[:120] if isinstance(role, str) else _type_name(role)
        raise TrainError(place, f"bad {name}: unknown role", expected=f"one of {', '.join(roles)}", got=got)
    if isinstance(content, list):  # [{"type": "text", "text": "..."}]
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise TrainError(place, f"bad {name}", expected="text", got="parts that are not text")
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise TrainError(place, f"bad {name}", expected="text", got=_type_name(content))
    return {"role": roles[role], "content": _valid(content, name, place)}


def _valid(text: str, name: str, place: str) -> str:
    """The text; refuses half of a surrogate pair, which has no UTF-8."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise TrainError(place, f"bad {name}", expected="valid Unicode", got="half of a surrogate pair")
    return text


def _type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _shown_keys(row: Mapping[str, Any]) -> str:
    shown = ", ".join(sorted(ascii(key) for key in row)) or "no keys"
    return shown if len(shown) <= 200 else f"{shown[:197]}..."


def _shown_forms(forms: Any, columns: Mapping[str, str] | None = None) -> str:
    names = columns or {}
    return " or ".join("/".join(names.get(name, name) for name in form.required) for form in forms)
