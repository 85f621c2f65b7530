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

from .blocks import Dtype, NonFinite, quantize_absmax, quantize_codes
from .codebook import BLOCK


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


class TensorSource(Protocol):
    """The tensor to encode, in the array type of `dtype` (bfloat16: uint16 bit patterns)."""

    num_values: int
    dtype: Dtype

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the first value, values [<= chunk]): consecutive, multiples of 64 values but the last.

        The array is overwritten by the next step.
        """
        ...


WriteCodes = Callable[[int, np.ndarray], None]
"""Takes the index of the first value (a multiple of 64) and codes, uint8 [ceil(values / 2)]; copies them."""


class Encoder(Protocol):
    """One optimisation level."""

    def __call__(
        self, source: TensorSource, write_codes: WriteCodes, threads: Callable[[], int], scales: np.ndarray
    ) -> Constants:
        """Encode a tensor.

        Args:
            source: its values.
            write_codes: receives every code once.
            threads: how many threads may be used right now; asked again for each chunk.
            scales: room for the tensor's scales, float32 [ceil(n / 64)].

        Raises:
            NonFinite: with the flat index of the first NaN or infinity.
        """
        ...


def encode_absmax(
    source: TensorSource, write_codes: WriteCodes, threads: Callable[[], int], scales: np.ndarray
) -> Constants:
    """Level 0: a block's scale is its largest magnitude, as in QLoRA (arXiv 2305.14314, section 3)."""
    codes: np.ndarray | None = None
    for start, values in source.chunks():
        if codes is None:
            codes = np.empty(-(-values.size // 2), np.uint8)  # the first chunk is the largest
        chunk_codes = codes[: -(-values.size // 2)]
        chunk_scales = scales[start // BLOCK : -(-(start + values.size) // BLOCK)]
        try:
            quantize_codes(values, source.dtype, codes=chunk_codes, absmax=chunk_scales, threads=threads())
        except NonFinite as error:
            raise NonFinite(start + error.index) from None
        write_codes(start, chunk_codes)
    return Constants(*quantize_absmax(scales))


ENCODERS: dict[int, Encoder] = {0: encode_absmax}
