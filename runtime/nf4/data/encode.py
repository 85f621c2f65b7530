"""Texts, completions and conversations as token ids with labels."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Protocol

import numpy as np

from ..errors import TrainError
from ..text.tokenizer import Span, SpanTokens
from .dataset import Example
from .documents import MAX_WHOLE, Piece, pieces
from .options import DataOptions
from .renderer import Renderer
from .sandbox import Rendered
from .schema import Chat, Completion, Sample, Text
from .template import Template

# Examples made of one row, and whether the row lost its end.
Encoded = tuple[list[Example], bool]


class TextEncoder(Protocol):
    """What data needs of a tokenizer: `nf4.text.tokenizer.Tokenizer`, which tells of the attributes.

    What stands in for it has to define bos_id, eos_ids and encode, and for conversations encode_with_spans.
    """

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> Sequence[int]: ...
    def encode(self, text: str, special: bool = True) -> list[int]: ...
    def encode_with_spans(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[SpanTokens]: ...

    @property
    def max_id(self) -> int:
        """The largest id, or more."""
        return (1 << 31) - 1

    @property
    def end_ids(self) -> Collection[int]:
        """Ids that may close a turn of a chat."""
        return self.eos_ids

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """bos_token and so on -> their text."""
        return {}

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """Name -> source."""
        return {}

    @property
    def fingerprint(self) -> str | None:
        """Of all that decides ids; None: not known, so that nothing is found in the cache."""
        return None

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """`encode` of each."""
        return [self.encode(text, special) for text in texts]


class RowEncoder:
    """Rows -> examples; to be closed, as it may hold a process that renders templates.

    Attributes:
        notes: what a user should know about the rows seen so far, a line each.
    """

    def __init__(self, tokenizer: TextEncoder, options: DataOptions, template: Template | None) -> None:
        self._tokenizer, self._options, self._template = tokenizer, options, template
        self._renderer: Renderer | None = None
        self._turns = self._ended = self._silent = self._foreign_ends = 0

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()

    def encode(self, places: Sequence[str], samples: Sequence[Sample]) -> Iterator[Encoded]:
        """Examples of each sample, in order; all samples are of one kind.

        What takes all cores is done when this returns, so that the next call may run in another thread
        while examples are taken from the iterator.

        Raises:
            TrainError: the model has no end token for completions; no chat template, or one that refuses a
                conversation, does not show the turns, or does not close them.
        """
        texts = [sample for sample in samples if isinstance(sample, Text)]
        completions = [sample for sample in samples if isinstance(sample, Completion)]
        chats = [sample for sample in samples if isinstance(sample, Chat)]
        if texts:
            return self._texts(texts)
        if completions:
            return self._completions(places, completions)
        return self._chats(places, chats)

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self._turns and self._template is not None:
            notes.append(f"conversations in the form of chat template {self._template.name}")
        if self._silent:
            notes.append(f"{self._silent:,} empty completions or assistant messages")
        if self._turns > self._ended:
            notes.append(f"{self._turns - self._ended:,} of {self._turns:,} turns end without an end token")
        if self._foreign_ends:
            notes.append(
                "turns end with a token that is none of the model's end tokens: generation may not stop there"
            )
        return tuple(notes)

    def _texts(self, samples: Sequence[Text]) -> Iterator[Encoded]:
        """Rows of text: closed by the end token, cut into examples where they are too long."""
        found = list(self._whole([sample.text for sample in samples]))
        return self._closed(samples, found)

    def _closed(self, samples: Sequence[Text], found: list[list[int]]) -> Iterator[Encoded]:
        head, ends = begin_of_windows(self._tokenizer), self._tokenizer.eos_ids
        stride = self._options.seq_len - len(head)
        for sample, ids in zip(samples, found, strict=True):
            if not sample.text.strip():
                yield [], False
                continue
            closed = [*_open_end(ids, ends), *ends[:1]]
            first, rest = closed[: self._options.seq_len], closed[self._options.seq_len :]
            parts = [first, *(head + rest[at : at + stride] for at in range(0, len(rest), stride))]
            yield [all_labelled(np.array(part, np.int32)) for part in parts if len(part) > 1], False

    def _whole(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Ids of texts of any length."""
        if all(len(text) <= MAX_WHOLE for text in texts):
            yield from self._tokenizer.encode_batch(texts)
            return
        for text in texts:
            yield list(chain.from_iterable(encode_pieces(self._tokenizer, list(pieces(text, MAX_WHOLE)))))

    def _completions(self, places: Sequence[str], samples: Sequence[Completion]) -> Iterator[Encoded]:
        """Prompt, completion, end token. The completion's tokens are those that follow the prompt's in the
        encoding of both together; where the border falls inside a token, the two are encoded apart, as
        generation will see the prompt alone."""
        tokenizer = self._tokenizer
        if not tokenizer.eos_ids:
            problem = "the model names no end token, so completions cannot be closed"
            raise TrainError(places[0], problem, remedy="train on plain text")
        ends = tokenizer.eos_ids
        prompts, wholes = (
            [_open_end(ids, ends) for ids in tokenizer.encode_batch(texts)]
            for texts in (
                [sample.prompt for sample in samples],
                [sample.prompt + sample.completion for sample in samples],
            )
        )
        pairs = enumerate(zip(prompts, wholes, strict=True))
        apart = [index for index, (prompt, whole) in pairs if whole[: len(prompt)] != prompt]
        found = tokenizer.encode_batch([samples[index].completion for index in apart], special=False)
        for index, completion in zip(apart, found, strict=True):
            wholes[index] = prompts[index] + completion
        return self._completed(samples, prompts, wholes)

    def _completed(
        self, samples: Sequence[Completion], prompts: list[list[int]], wholes: list[list[int]]
    ) -> Iterator[Encoded]:
        end = self._tokenizer.eos_ids[0]
        for prompt, whole, sample in zip(prompts, wholes, samples, strict=True):
            self._silent += not sample.completion.strip()
            ids = np.array([*whole, end], dtype=np.int32)
            labelled = np.arange(len(ids)) >= len(prompt)
            yield self._cut(ids, labelled)

    def _chats(self, places: Sequence[str], samples: Sequence[Chat]) -> Iterator[Encoded]:
        conversations = [(place, sample.messages) for place, sample in zip(places, samples, strict=True)]
        rendered = list(self._rendering(places[0]).render(conversations))
        texts = [one.text for one in rendered]
        encoded = self._tokenizer.encode_with_spans(texts, [one.spans for one in rendered])
        return self._answered(places[0], samples, rendered, encoded)

    def _answered(
        self, place: str, samples: Sequence[Chat], rendered: list[Rendered], encoded: list[SpanTokens]
    ) -> Iterator[Encoded]:
        for sample, one, tokens in zip(samples, rendered, encoded, strict=True):
            for message in sample.messages:
                self._silent += message["role"] == "assistant" and not message["content"].strip()
            ids = np.array(tokens.ids, dtype=np.int32)
            labelled = np.zeros(len(ids), dtype=bool)
            for first, last in self._turn_tokens(one, tokens):
                labelled[first:last] = True
            yield self._cut(ids, labelled)
        if self._turns and not self._ended:
            raise TrainError(
                place,
                f"chat template {self._template.name if self._template else ''} drops the end token: no turn"
                " of the assistant ends with a special token, so the model would never learn to stop",
                expected="such as " + (self._tokenizer.special_tokens.get("eos_token") or "an end token"),
                remedy="let the template write it behind assistant messages (inside {% generation %} where it"
                " has that), or choose another with --chat-template, such as plain",
            )

    def _turn_tokens(self, rendered: Rendered, tokens: SpanTokens) -> Iterator[Span]:
        """The tokens [first, last) of each turn, up to its end token where the template leaves that to us."""
        text, ids, ends = rendered.text, tokens.ids, self._tokenizer.end_ids
        for (_, end), (first, last) in zip(rendered.spans, tokens.spans, strict=True):
            self._turns += 1
            close = next((at for at in range(last - 1, first - 1, -1) if ids[at] in ends), None)
            if close is not None and text[tokens.characters(close)[1] : end].strip():
                close = None
            if close is None and not rendered.marked and last < len(ids) and ids[last] in ends:
                # The span is the content alone; the end token must follow at once.
                close = None if text[end : tokens.characters(last)[0]].strip() else last
            if close is not None:
                self._ended += 1
                self._foreign_ends += ids[close] not in self._tokenizer.eos_ids
            yield first, last if rendered.marked or close is None else close + 1

    def _cut(self, ids: np.ndarray, labelled: np.ndarray) -> Encoded:
        """The example of at most seq_len tokens; none where nothing with a label remains."""
        seq_len = self._options.seq_len
        truncated = len(ids) > seq_len
        ids, labelled = ids[:seq_len], labelled[:seq_len].copy()
        if self._options.loss == "all":
            labelled[:] = True
        labelled[:1] = False
        return ([Example(ids, labelled)] if labelled.any() else []), truncated

    def _rendering(self, place: str) -> Renderer:
        if self._renderer is None:
            template = self._template
            if template is None:
                raise TrainError(
                    place,
                    "conversations need a chat template, and the model has none",
                    remedy="choose one with --chat-template: a path, or a built-in name such as plain",
                )
            variables = {"bos_token": "", "eos_token": "", **self._tokenizer.special_tokens}
            self._renderer = Renderer(template.source, template.name, variables, self._options.date)
        return self._renderer


class Windows:
    """Tokens laid end to end and cut into windows of seq_len, BOS in front where the model has one."""

    def __init__(self, tokenizer: TextEncoder, seq_len: int) -> None:
        self._head = begin_of_windows(tokenizer)
        self._stride = seq_len - len(self._head)
        self._rest = np.empty(0, np.int32)
        self._count = 0

    def add(self, tokens: Sequence[Sequence[int]]) -> Iterator[Example]:
        """The windows that these tokens, behind those of before, complete."""
        arrays = [self._rest, *(np.array(part, np.int32) for part in tokens)]
        ids = np.concatenate(arrays)
        count = len(ids) // self._stride
        self._rest = ids[count * self._stride :].copy()
        for window in ids[: count * self._stride].reshape(count, self._stride):
            self._count += 1
            yield self._example(window)

    def finish(self) -> Iterator[Example]:
        """What is left, if there was no whole window; else nothing."""
        if self._count == 0 and len(self._rest) + len(self._head) > 1:
            yield self._example(self._rest)

    def _example(self, window: np.ndarray) -> Example:
        return all_labelled(np.concatenate((np.array(self._head, np.int32), window)))


def encode_pieces(tokenizer: TextEncoder, parts: Sequence[Piece]) -> list[list[int]]:
    """Ids of pieces of documents, with the special tokens that begin a text in front of first pieces only."""
    found: list[list[int]] = [[]] * len(parts)
    for begins in (True, False):
        chosen = [index for index, part in enumerate(parts) if part.begins == begins]
        ids = tokenizer.encode_batch([parts[index].text for index in chosen], special=begins)
        for index, one in zip(chosen, ids, strict=True):
            found[index] = one
    return found


def begin_of_windows(tokenizer: TextEncoder) -> list[int]:
    """What stands before tokens that were cut out of a longer text."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def all_labelled(ids: np.ndarray) -> Example:
    """An example of which every token but the first, which nothing predicts, carries loss."""
    return Example(ids, np.arange(len(ids)) > 0)


def _open_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids without an end token behind them: some tokenizers close every text."""
    stop = len(ids)
    while stop and ends and ids[stop - 1] == ends[0]:
        stop -= 1
    return ids[:stop]
