"""Values that an encoder must get right: ordinary ones, ragged sizes, and those at the ends of each type; and
what encodes them in chunks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nf4format import reference
from nf4format.blocks import Dtype
from nf4format.encode import Constants, Encoder, Room
from nf4format.levels import LEVELS

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
LEVEL_TABLES = {
    **LEVELS,
    "custom": np.array(
        [-0.6, -0.55, -0.5, -0.3, -0.29, -0.28, -0.01, 0, 0.01, 0.02, 0.03, 0.1, 0.2, 0.4, 0.9, 0.95],
        np.float32,
    ),
}
GROUP = 64 * 256


class Source:
    """A tensor in memory; its chunks share one buffer, which ends as zeros. `uses_room`: or go into room."""

    def __init__(
        self, values: np.ndarray, dtype: Dtype, chunk_bytes: int, *, uses_room: bool = False
    ) -> None:
        self.uses_room = uses_room
        self.values, self.dtype, self.num_values = values, dtype, values.size
        self._chunk = chunk_bytes // values.itemsize

    def chunks(self, room: Room | None = None) -> Iterator[tuple[int, np.ndarray]]:
        buffer = np.empty(self._chunk, self.values.dtype)
        for start in range(0, self.num_values, self._chunk):
            part = self.values[start : start + self._chunk]
            place = np.frombuffer(room(), self.values.dtype) if room and self.uses_room else buffer
            place[: part.size] = part
            yield start, place[: part.size]
        buffer[:] = 0


def encoded(
    encoder: Encoder, source: Source, levels: np.ndarray, threads: int = 1
) -> tuple[bytes, Constants]:
    """Codes and constants."""
    codes = np.zeros(-(-source.num_values // 2), np.uint8)

    def write_codes(start: int, chunk: np.ndarray) -> None:
        codes[start // 2 : start // 2 + chunk.size] = chunk

    scales = np.empty(-(-source.num_values // 64), np.float32)
    constants = encoder(source, write_codes, lambda: threads, scales, levels=levels)
    return codes.tobytes(), constants


def same(one: tuple[bytes, Constants], other: tuple[bytes, Constants]) -> bool:
    return one[0] == other[0] and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(vars(one[1]).values(), vars(other[1]).values(), strict=True)
    )


def cases(dtype: Dtype) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values), flat and finite."""
    rng = np.random.default_rng(5)

    def normal(size: int, scale: float = 0.02) -> np.ndarray:
        return rng.standard_normal(size, dtype=np.float32) * np.float32(scale)

    def as_given(values: np.ndarray) -> np.ndarray:
        return reference.from_float32(values, dtype)

    for size in (1, 2, 63, 64, 65, 129, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP + 1000):
        yield f"normal, {size} values", as_given(normal(size))
    yield "heavy tails", as_given(rng.standard_t(3, GROUP).astype(np.float32))
    yield "zeros", as_given(np.zeros(GROUP + 100, np.float32))
    yield "minus zeros", as_given(np.full(200, -0.0, np.float32))
    sparse = normal(2 * GROUP)
    sparse.reshape(-1, 64)[::3] = 0
    sparse[GROUP:] = 0
    yield "blocks and groups of zeros", as_given(sparse)
    # Scales of one group that the map cannot hold together: the small ones become zero.
    uneven = normal(2 * GROUP).reshape(-1, 64)
    uneven *= 10.0 ** rng.uniform(-12 if dtype != "float16" else -4, 0, (uneven.shape[0], 1))
    yield "blocks of all magnitudes", as_given(uneven.reshape(-1).astype(np.float32))
    one_large = normal(GROUP)
    one_large[777] = 1000
    yield "one large value", as_given(one_large)
    yield "equal values", as_given(np.full(GROUP, -0.37, np.float32))
    yield "ties", as_given((rng.integers(-8, 9, GROUP) / 8).astype(np.float32))
    # Every bit pattern that is a finite number: subnormal to the largest.
    bits = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}[dtype]
    info = np.iinfo(bits)
    patterns = rng.integers(0, info.max, 2 * GROUP, bits, endpoint=True)
    if bits is np.uint16:
        patterns = np.concatenate([np.arange(1 << 16, dtype=np.uint16), patterns])
    numbers = patterns if dtype == "bfloat16" else patterns.view(np.dtype(dtype))
    wide = reference.to_float32(numbers, dtype)
    yield "any bits", np.where(np.isfinite(wide), numbers, numbers.dtype.type(0))
    tiny = np.finfo(np.float16).tiny if dtype == "float16" else np.finfo(np.float32).tiny
    yield "subnormal", as_given((rng.uniform(-1, 1, GROUP) * float(tiny)).astype(np.float32))
    largest = np.float32(65504) if dtype == "float16" else np.float32(3.3895e38)
    yield "the largest", as_given(rng.choice(np.array([-1, 0.5, 1], np.float32), GROUP) * largest)
