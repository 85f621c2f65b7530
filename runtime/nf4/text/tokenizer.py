"""Text to token ids and back, by the tokenizer.json that a packed file carries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from nf4format.container import Nf4File

from ..errors import LoadError

_REPLACEMENT = "\ufffd"  # what decoders print for bytes that are not (yet) valid UTF-8


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        bos_id: the id that begins a text, or None. What tokenizer_config.json says counts, null included;
            without the key, generation_config.json and config.json.
        eos_ids: every id that ends a text: generation_config.json's, or config.json's, or the tokenizer's.
    """

    def __init__(
        self,
        data: bytes,
        *,
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        tokenizer_config: Mapping[str, Any] | None = None,
        name: str = "tokenizer.json",
    ) -> None:
        """Read a tokenizer.json; the other files, parsed, say which tokens begin and end a text.

        Raises:
            LoadError: the tokenizers library does not accept it. The text begins with `name`.
        """
        try:
            self._backend = Backend.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise LoadError(name, f"not a usable tokenizer: {error}") from error
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
        return cls(file.file("tokenizer.json"), name=f"{file.path}: tokenizer.json", **others)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds the tokens that the tokenizer puts around one, such as BOS."""
        return self._backend.encode(text, add_special_tokens=special).ids

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
        text = token.get("content") if isinstance(token, Mapping) else token
        found = self._backend.token_to_id(text) if isinstance(text, str) else None
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


def _parse(file: Nf4File, name: str) -> Mapping[str, Any]:
    """An embedded JSON file; an empty mapping where there is none."""
    if name not in file.file_names:
        return {}
    try:
        value = json.loads(file.file(name))
    except ValueError as error:
        raise LoadError(file.path, f"embedded file {name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise LoadError(file.path, f"embedded file {name}", expected="an object", got=type(value).__name__)
    return value
