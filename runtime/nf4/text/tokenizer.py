"""Text to token ids and back, by the tokenizer.json that a packed file carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import tokenizers
import xxhash
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from nf4format.container import Nf4File
from nf4format.strictjson import parse_object

from ..errors import LoadError

Span = tuple[int, int]

_MAX_VALUES = 4_000_000  # in a tokenizer_config.json, where tokens that were added stand one by one
_REPLACEMENT = "\ufffd"  # what decoders print for bytes that are not (yet) valid UTF-8


class SpanTokens(NamedTuple):
    """A text's ids. spans: for each span of characters the tokens [first, last) that share a character with
    it; where none does, first = last is the first token behind the span. characters: of a token, the
    characters [begin, end)."""

    ids: list[int]
    spans: list[Span]
    characters: Callable[[int], Span]


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        bos_id: the id that begins a text, or None. What tokenizer_config.json says counts, null included;
            without the key, generation_config.json and config.json.
        eos_ids: every id that ends a text: generation_config.json's, or config.json's, or the tokenizer's.
        end_ids: what may close a turn of a chat: these, and the special tokens of the vocabulary but those
            that begin a text or stand for unknown ones.
        special_tokens: "bos_token", "eos_token" and so on -> their text, as tokenizer_config.json has them.
        chat_templates: name -> Jinja source of the chat templates that came with the model; the usual one is
            "default".
        fingerprint: of everything that decides token ids; equal fingerprints encode alike.
    """

    def __init__(
        self,
        data: bytes,
        *,
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        tokenizer_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        name: str = "tokenizer.json",
    ) -> None:
        """Read a tokenizer.json; the other files, parsed, say which tokens begin and end a text.

        `chat_template` is the text of chat_template.jinja, which wins over tokenizer_config.json's.

        Raises:
            LoadError: the tokenizers library does not accept it. The text begins with `name`.
        """
        try:
            self._backend = Backend.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            remedy = "put the tokenizer.json of the model beside the checkpoint and compile it again"
            raise LoadError(name, f"not a usable tokenizer: {error}", remedy=remedy) from error
        self._backend.no_truncation()
        self._backend.no_padding()
        own, generation, model = tokenizer_config or {}, generation_config or {}, config or {}
        ends = _ids(generation.get("eos_token_id")) or _ids(model.get("eos_token_id"))
        self.eos_ids: tuple[int, ...] = ends or self._named(own.get("eos_token"))
        if "bos_token" in own:
            begins = self._named(own["bos_token"])
        else:
            begins = _ids(generation.get("bos_token_id")) or _ids(model.get("bos_token_id"))
        self.bos_id: int | None = begins[0] if begins else None
        added = self._backend.get_added_tokens_decoder()
        unknown = own.get("unk_token") or getattr(self._backend.model, "unk_token", None)
        special = {number for number, token in added.items() if token.special}
        self.end_ids = frozenset(self.eos_ids) | special.difference(self._named(unknown), begins)
        texts = {key: _text(value) for key, value in own.items() if key.endswith("_token")}
        self.special_tokens = {key: text for key, text in texts.items() if text is not None}
        self.chat_templates = _chat_templates(own.get("chat_template"), chat_template)
        for key, ids in (("bos_token", begins), ("eos_token", self.eos_ids)):
            if key not in own and ids and (text := self._backend.id_to_token(ids[0])) is not None:
                self.special_tokens[key] = text
        content = xxhash.xxh3_128_hexdigest(data)
        self.fingerprint = f"{content} {tokenizers.__version__} {self.bos_id} {self.eos_ids}"

    @classmethod
    def from_file(cls, file: Nf4File) -> Tokenizer:
        """The tokenizer embedded in a packed file.

        Raises:
            LoadError: there is none, or it cannot be read.
        """
        if "tokenizer.json" not in file.file_names:
            remedy = "put a tokenizer.json beside the checkpoint and compile it again"
            raise LoadError(file.path, "the file holds no tokenizer.json", remedy=remedy)
        others = {
            name: _parse(file, f"{name}.json") for name in ("config", "generation_config", "tokenizer_config")
        }
        name = f"{file.path}: tokenizer.json"
        return cls(file.file("tokenizer.json"), name=name, chat_template=_embedded_template(file), **others)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def max_id(self) -> int:
        """The largest id; vocabularies may have gaps."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=0)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds the tokens that the tokenizer puts around one, such as BOS."""
        return self._backend.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """`encode` of each of the texts, by all cores."""
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=special)]

    def encode_with_spans(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[SpanTokens]:
        """Ids of each text, no special tokens put around it, and the tokens of spans of its characters."""
        found = self._backend.encode_batch(texts, add_special_tokens=False)
        return [
            SpanTokens(one.ids, [_tokens_of(one, span) for span in wanted], partial(_characters, one))
            for one, wanted in zip(found, spans, strict=True)
        ]

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids, with or without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=not special)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text, special ones too. A token that completes no character stands as
        the vocabulary writes it."""
        stream = TextStream(self, special=True)
        return [stream.push(token) or self._backend.id_to_token(token) or "" for token in ids]

    def stream(self, prompt_ids: Sequence[int] = ()) -> TextStream:
        """A decoder for tokens that arrive one at a time after `prompt_ids`."""
        return TextStream(self, prompt_ids)

    def _named(self, token: Any) -> tuple[int, ...]:
        """The id of a token as tokenizer_config.json writes it: its text, or an object with the text."""
        text = _text(token)
        found = None if text is None else self._backend.token_to_id(text)
        return () if found is None else (found,)


class TextStream:
    """Decodes ids as they come, giving out text only when later ids can no longer change it.

    A token may be part of a character (byte-level and byte-fallback vocabularies), and the space before a
    word depends on the token before it. So the text is the difference between two decodings that begin at
    the same earlier token, and bytes that are not yet a character are held back.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, special: bool = False
    ) -> None:
        """special: with the text of special tokens."""
        self._tokenizer, self._special = tokenizer, special
        self._ids = list(prompt_ids)[-_CONTEXT:]
        self._shown = len(self._ids)  # ids whose text has been given out
        self._begin = 0  # where both decodings begin

    def push(self, token_id: int) -> str:
        """The text that this id completes; "" while a character is incomplete."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """What was held back at the end of the tokens: an incomplete character, as replacement characters."""
        text = self._new_text()
        self._begin = self._shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._begin : self._shown], self._special)
        return self._tokenizer.decode(self._ids[self._begin :], self._special)[len(before) :]


_CONTEXT = 8  # ids of the prompt that are enough to know whether the first word begins with a space


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(i for i in values if isinstance(i, int) and not isinstance(i, bool))


def _text(token: Any) -> str | None:
    """The text of a token as tokenizer_config.json writes it: a string, or an object that holds one."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _tokens_of(encoding: Encoding, span: Span) -> Span:
    """The tokens [first, last) that share a character with the characters [begin, end)."""
    begin, end = span
    first, last = encoding.char_to_token(begin), encoding.char_to_token(max(end - 1, 0))
    if begin == end or first is None or last is None:  # None: of characters that the tokenizer leaves out
        return tokens_by_offsets(encoding.offsets, span)
    count = len(encoding)
    while last < count and _characters(encoding, last)[0] < end:  # a character may be several tokens
        last += 1
    return first, last


def tokens_by_offsets(offsets: Sequence[Span], span: Span) -> Span:
    """What `encode_with_spans` tells of a span, from the characters of every token."""
    begin, end = span
    shared = [index for index, (left, right) in enumerate(offsets) if left < end and right > begin]
    if shared and begin < end:
        return shared[0], shared[-1] + 1
    behind = next((index for index, (left, _) in enumerate(offsets) if left >= end), len(offsets))
    return behind, behind


def _characters(encoding: Encoding, token: int) -> Span:
    place: Span | None = encoding.token_to_chars(token)
    return (0, 0) if place is None else place


def _chat_templates(configured: Any, apart: str | None) -> dict[str, str]:
    """Name -> source, of a template in tokenizer_config.json (a text, or a list of named ones) and of one in
    a file of its own."""
    found: dict[str, str] = {}
    if isinstance(configured, str):
        found["default"] = configured
    elif isinstance(configured, list):
        for entry in configured:
            if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
                found[str(entry.get("name"))] = entry["template"]
    if apart is not None:
        found["default"] = apart
    return found


def _embedded_template(file: Nf4File) -> str | None:
    """The chat template that a packed file holds as a file of its own, as a text or wrapped in JSON."""
    if "chat_template.jinja" in file.file_names:
        try:
            return file.file("chat_template.jinja").decode("utf-8")
        except UnicodeDecodeError as error:
            remedy = "correct it in the checkpoint and compile that again"
            problem = f"embedded file chat_template.jinja is not UTF-8: {error}"
            raise LoadError(file.path, problem, remedy=remedy) from error
    wrapped = _parse(file, "chat_template.json").get("chat_template")
    return wrapped if isinstance(wrapped, str) else None


def _parse(file: Nf4File, name: str) -> Mapping[str, Any]:
    """An embedded JSON file; an empty mapping where there is none."""
    if name not in file.file_names:
        return {}
    try:
        return parse_object(file.file(name), allow_infinity=True, most_values=_MAX_VALUES)
    except ValueError as error:
        remedy = "correct it in the checkpoint and compile that again"
        raise LoadError(file.path, f"embedded file {name}: {error}", remedy=remedy) from error
