"""Optimisation levels: how a weight's values become codes and scales. Every level has the same decoder.

A level is a function from the values of one tensor, read chunk by chunk, to its constants; codes leave
through a callback as soon as they are known, so that no more of a tensor than a chunk is in memory. The
compiler writes with it; whoever repeats it on the same weights gets the same bytes, which is how a file is
compared with its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .blocks import Dtype, NonFinite, quantize_absmax, quantize_codes, quantize_search
from .codebook import BLOCK, NESTED_BLOCK, NESTED_MAP, NF4_LEVELS

_GROUPS_AT_ONCE = 256  # little memory; one by one, threads would wait for the interpreter


@dataclass(frozen=True)
class Constants:
    """What an encoded tensor has besides its codes.

    Attributes:
        absmax: uint8 [ceil(n / 64)].
        nested_absmax: float32 [ceil(absmax.size / 256)].
        nested_offset: a float32 value.
    """

    absmax: np.ndarray
    nested_absmax: np.ndarray
    nested_offset: float

    def negative_scales(self) -> float:
        """Share of the blocks whose scale is below zero."""
        negative = 0
        for first in range(0, self.nested_absmax.size, _GROUPS_AT_ONCE):
            factors = np.repeat(self.nested_absmax[first : first + _GROUPS_AT_ONCE], NESTED_BLOCK)
            entries = self.absmax[first * NESTED_BLOCK :][: factors.size]
            scales = NESTED_MAP[entries] * factors[: entries.size] + np.float32(self.nested_offset)
            negative += int(np.count_nonzero(scales < 0))
        return negative / max(1, self.absmax.size)


Room = Callable[[], memoryview]
"""Gives writable bytes, enough for a chunk of a source."""


class TensorSource(Protocol):
    """The tensor to encode, in the array type of `dtype` (bfloat16: uint16 bit patterns)."""

    num_values: int
    dtype: Dtype

    def chunks(self, room: Room | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the first value, values [<= chunk]): consecutive, multiples of 64 * 256 but the last.

        Args:
            room: where the next chunk may be put, so that an encoder need not copy it. By default the array
                is overwritten by the next step.
        """
        ...


WriteCodes = Callable[[int, np.ndarray], None]
"""Takes the index of the first value (a multiple of 64) and codes, uint8 [ceil(values / 2)]; copies them."""


class Encoder(Protocol):
    """One optimisation level."""

    def __call__(
        self,
        source: TensorSource,
        write_codes: WriteCodes,
        threads: Callable[[], int],
        scales: np.ndarray,
        *,
        levels: np.ndarray = NF4_LEVELS,
    ) -> Constants:
        """Encode a tensor.

        Args:
            source: its values.
            write_codes: receives every code once.
            threads: how many threads may be used right now; asked again for each chunk.
            scales: room for the tensor's scales, float32 [ceil(n / 64)].
            levels: what codes stand for, float32 [16]; see `nf4format.levels`.

        Raises:
            NonFinite: with the flat index of the first NaN or infinity.
        """
        ...


EncodeChunk = Callable[[int, np.ndarray, np.ndarray], None]
"""Takes the index of a chunk's first value, its values, and where its codes go."""


def _encode_chunks(source: TensorSource, write_codes: WriteCodes, encode: EncodeChunk) -> None:
    """Each chunk through `encode`, its codes on to `write_codes`; NonFinite then has the tensor's index."""
    codes: np.ndarray | None = None
    for start, values in source.chunks():
        if codes is None:
            codes = np.empty(-(-values.size // 2), np.uint8)  # the first chunk is the largest
        chunk_codes = codes[: -(-values.size // 2)]
        try:
            encode(start, values, chunk_codes)
        except NonFinite as error:
            raise NonFinite(start + error.index) from None
        write_codes(start, chunk_codes)


def encode_absmax(
    source: TensorSource,
    write_codes: WriteCodes,
    threads: Callable[[], int],
    scales: np.ndarray,
    *,
    levels: np.ndarray = NF4_LEVELS,
) -> Constants:
    """Level 0: a block's scale is its largest magnitude, as in QLoRA (arXiv 2305.14314, section 3)."""

    def encode(start: int, values: np.ndarray, codes: np.ndarray) -> None:
        of_chunk = scales[start // BLOCK : -(-(start + values.size) // BLOCK)]
        quantize_codes(values, source.dtype, levels=levels, codes=codes, absmax=of_chunk, threads=threads())

    _encode_chunks(source, write_codes, encode)
    return Constants(*quantize_absmax(scales))


def encode_search(
    source: TensorSource,
    write_codes: WriteCodes,
    threads: Callable[[], int],
    scales: np.ndarray,
    *,
    levels: np.ndarray = NF4_LEVELS,
) -> Constants:
    """Level 1: scales of either sign that lose least, see `nf4format.blocks.quantize_search`."""
    absmax = np.empty(-(-source.num_values // BLOCK), np.uint8)
    nested_absmax = np.empty(-(-absmax.size // NESTED_BLOCK), np.float32)

    def encode(start: int, values: np.ndarray, codes: np.ndarray) -> None:
        _, of_chunk, nested = quantize_search(
            values, source.dtype, levels=levels, codes=codes, threads=threads()
        )
        first = start // BLOCK
        absmax[first : first + of_chunk.size] = of_chunk
        nested_absmax[first // NESTED_BLOCK :][: nested.size] = nested

    _encode_chunks(source, write_codes, encode)
    return Constants(absmax, nested_absmax, 0.0)


ENCODERS: dict[int, Encoder] = {0: encode_absmax, 1: encode_search}
