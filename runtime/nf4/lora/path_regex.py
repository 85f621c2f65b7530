r"""The regular expressions of PEFT's rank_pattern and alpha_pattern, matched in bounded time.

PEFT takes the first key of such a table for which `re.match(rf"(.*\.)?({key})$", path)` finds something.
Python's `re` can take exponential time on a key from an untrusted file; here all ways through an expression
are followed together (a Thompson automaton), so time grows with its size times the length of the path, and
its size is limited. What Python's syntax has beyond characters, classes, groups, `|`, repetition and anchors
(flags, lookaround, references back) is refused.
"""

from __future__ import annotations

import string
from typing import Any, Final, NamedTuple

MOST_STATES: Final = 1000
MOST_DEPTH: Final = 50

_LITERAL = frozenset(string.ascii_letters + string.digits + "_")
_CLASSES: dict[str, tuple[frozenset[str], bool]] = {
    "d": (frozenset(string.digits), False),
    "D": (frozenset(string.digits), True),
    "w": (_LITERAL, False),
    "W": (_LITERAL, True),
    "s": (frozenset(string.whitespace), False),
    "S": (frozenset(string.whitespace), True),
}


class _Chars(NamedTuple):
    """A set of characters, or all others; sets of class escapes inside [...] are kept apart."""

    members: frozenset[str]
    ranges: tuple[tuple[str, str], ...] = ()
    classes: tuple[tuple[frozenset[str], bool], ...] = ()
    negated: bool = False

    def has(self, char: str) -> bool:
        inside = (
            char in self.members
            or any(low <= char <= high for low, high in self.ranges)
            or any((char in members) != negated for members, negated in self.classes)
        )
        return inside != self.negated


_ANY = _Chars(frozenset("\n"), negated=True)

# Parsed expressions are tuples: ("chars", _Chars), ("start",), ("end",), ("sequence", [...]),
# ("either", [...]), ("repeat", expression, least, most or None).
_Expression = tuple[Any, ...]


class PathRegex:
    r"""A key of PEFT's patterns.

    Raises:
        ValueError: with what is wrong with it, or not supported.
    """

    def __init__(self, key: str) -> None:
        self._states: list[tuple[Any, ...]] = [("found",)]
        prefix = ("sequence", [("repeat", ("chars", _ANY), 0, None), ("chars", _Chars(frozenset(".")))])
        whole = ("sequence", [("repeat", prefix, 0, 1), _Parser(key).parse(), ("end",)])
        self._first = self._emit(whole, 0)

    @property
    def size(self) -> int:
        """States of the automaton; matching takes at most this many steps for each character of a path."""
        return len(self._states)

    def matches(self, path: str) -> bool:
        """Whether PEFT would take this key for a module's path."""
        here = self._closure({self._first}, 0, len(path))
        for at, char in enumerate(path, 1):
            states = [self._states[state] for state in here]
            nexts = {state[2] for state in states if state[0] == "char" and state[1].has(char)}
            if not nexts:
                return False
            here = self._closure(nexts, at, len(path))
        return 0 in here

    def _closure(self, states: set[int], at: int, length: int) -> set[int]:
        """These states and all that follow without a character."""
        seen, waiting = set(states), list(states)
        while waiting:
            kind, *rest = self._states[waiting.pop()]
            if kind == "split":
                follow = rest[0]
            elif (kind == "start" and at == 0) or (kind == "end" and at == length):
                follow = rest
            else:
                continue
            waiting += [state for state in follow if state not in seen]
            seen.update(follow)
        return seen

    def _add(self, *state: Any) -> int:
        if len(self._states) >= MOST_STATES:
            raise ValueError("too large an expression")
        self._states.append(state)
        return len(self._states) - 1

    def _emit(self, expression: _Expression, then: int) -> int:
        """The first state of an expression that leads to `then`."""
        kind = expression[0]
        if kind == "chars":
            return self._add("char", expression[1], then)
        if kind in ("start", "end"):
            return self._add(kind, then)
        if kind == "sequence":
            for part in reversed(expression[1]):
                then = self._emit(part, then)
            return then
        if kind == "either":
            return self._add("split", [self._emit(part, then) for part in expression[1]])
        _, inner, least, most = expression
        if most is None:
            loop = self._add("split", [])
            self._states[loop] = ("split", [self._emit(inner, loop), then])
            then = loop
        else:
            end = then
            for _ in range(most - least):
                then = self._add("split", [self._emit(inner, then), end])
        for _ in range(least):
            then = self._emit(inner, then)
        return then


class _Parser:
    """Recursive descent over one expression."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0

    def parse(self) -> _Expression:
        expression = self._either()
        if self._at < len(self._text):
            raise ValueError("unbalanced ')'")
        return expression

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._peek()
        if not char:
            raise ValueError("ends too early")
        self._at += 1
        return char

    def _takes(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _either(self) -> _Expression:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise ValueError("too deep an expression")
        ways = [self._sequence()]
        while self._takes("|"):
            ways.append(self._sequence())
        self._depth -= 1
        return ways[0] if len(ways) == 1 else ("either", ways)

    def _sequence(self) -> _Expression:
        parts = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return ("sequence", parts)

    def _repeated(self, atom: _Expression) -> _Expression:
        times = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        char = self._peek()
        if char in times and char:
            self._at += 1
            least, most = times[char]
        elif self._takes("{"):
            least, most = self._counts()
        else:
            return atom
        self._takes("?")  # lazy: finds the same paths
        if self._peek() in ("*", "+", "{", "?") and self._peek():
            raise ValueError("repetition of a repetition")
        return ("repeat", atom, least, most)

    def _counts(self) -> tuple[int, int | None]:
        end = self._text.find("}", self._at)
        low, comma, high = self._text[self._at : max(end, self._at)].partition(",")
        numbers = [number for number in (low, high) if number]
        if end < 0 or not numbers or not all(n.isascii() and n.isdigit() and len(n) <= 3 for n in numbers):
            raise ValueError("bad '{...}'")
        self._at = end + 1
        least = int(low or 0)
        most = int(high) if high else (None if comma else least)
        if most is not None and most < least:
            raise ValueError("bad '{...}'")
        return least, most

    def _atom(self) -> _Expression:
        char = self._take()
        if char == "(":
            if self._takes("?") and not self._takes(":"):
                raise ValueError("'(?' is not supported")
            inner = self._either()
            if not self._takes(")"):
                raise ValueError("missing ')'")
            return inner
        if char == "[":
            return ("chars", self._set())
        if char in ("*", "+", "?", "{"):
            raise ValueError("nothing to repeat")
        if char in ("^", "$"):
            return ("start",) if char == "^" else ("end",)
        if char == ".":
            return ("chars", _ANY)
        return ("chars", self._escape() if char == "\\" else _Chars(frozenset(char)))

    def _escape(self) -> _Chars:
        char = self._take()
        if char in _CLASSES:
            return _Chars(frozenset(), classes=(_CLASSES[char],))
        if char.isalnum():
            raise ValueError(f"'\\{char}' is not supported")
        return _Chars(frozenset(char))

    def _set(self) -> _Chars:
        negated = self._takes("^")
        members: set[str] = set()
        ranges: list[tuple[str, str]] = []
        classes: list[tuple[frozenset[str], bool]] = []
        is_first = True
        while is_first or self._peek() != "]":
            is_first = False
            char = self._take()
            if char == "\\":
                escaped = self._escape()
                classes += escaped.classes
                if escaped.classes:
                    continue
                (char,) = escaped.members
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._take()
                if last == "\\":
                    (last,) = self._escape().members or ("",)
                if last < char:
                    raise ValueError("bad range")
                ranges.append((char, last))
            else:
                members.add(char)
        self._at += 1
        return _Chars(frozenset(members), tuple(ranges), tuple(classes), negated)
