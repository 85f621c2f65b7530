"""What a user may choose about data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import TrainError

NO_CACHE = "none"


@dataclass(frozen=True)
class DataOptions:
    """How files become examples.

    Attributes:
        seq_len: the most tokens of an example, BOS and end token included. What is longer loses its end (rows
            of plain text are cut into several examples instead); the report counts it.
        loss: "completion" learns completions and the assistant's turns, "all" every token.
        columns: field -> name of the column that holds it, such as {"prompt": "frage"}; see
            `nf4.data.schema` for the fields. Empty: columns are recognised by their names.
        as_chat: whether instruction and question rows go through the chat template; None: where there is one.
        template: chat template: a path, a built-in name (`nf4.data.template.BUILT_IN`), or the name of one of
            the model's own; None takes the model's usual one.
        system: system prompt of conversations that have none of their own.
        date: what a template is told when it asks for today's date, as YYYY-MM-DD: a fixed one, so that the
            same data are the same tokens tomorrow.
        cache: directory for tokenized data; None takes $XDG_CACHE_HOME/nf4 or ~/.cache/nf4, "none" a
            temporary file.
        cache_bytes: the most that this directory keeps; what was used longest ago goes first.
        workers: threads that tokenize; None takes all cores. Decided by the first use in a process.
    """

    seq_len: int = 512
    loss: Literal["completion", "all"] = "completion"
    columns: Mapping[str, str] = field(default_factory=dict)
    as_chat: bool | None = None
    template: str | None = None
    system: str | None = None
    date: str = "2024-07-26"
    cache: str | Path | None = None
    cache_bytes: int = 16 << 30
    workers: int | None = None

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            TrainError: a sequence length below 2, an unknown kind of loss or field, a bad date, no worker,
                a cache of no size.
        """
        from datetime import date

        from .schema import FIELDS

        if self.seq_len < 2:
            raise TrainError("", "sequence length", expected="at least 2 tokens", got=self.seq_len)
        if self.loss not in ("completion", "all"):
            raise TrainError("", "loss", expected="completion or all", got=ascii(self.loss))
        for name in self.columns:
            if name not in FIELDS:
                expected = f"one of {', '.join(sorted(FIELDS))}"
                raise TrainError("", "unknown field to map a column to", expected=expected, got=ascii(name))
        try:
            date.fromisoformat(self.date)
        except ValueError:
            raise TrainError("", "date for templates", expected="YYYY-MM-DD", got=ascii(self.date)) from None
        if self.cache_bytes < 1:
            raise TrainError("", "size of the cache", expected="at least 1 byte", got=self.cache_bytes)
        if self.workers is not None and self.workers < 1:
            raise TrainError("", "workers", expected="at least 1", got=self.workers)
