"""A tokenizer that needs no training."""

from __future__ import annotations

from nf4.data.encode import TextEncoder


class ByteTokenizer(TextEncoder):
    """One id a byte, BOS in front."""

    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [1] * special + [3 + byte for byte in text.encode()]
