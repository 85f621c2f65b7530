"""NF4 kernels for the CPU (csrc/cpu). Addresses are plain integers: the caller holds arrays to sizes and
types, keeps them alive, and sees that outputs do not overlap inputs. Every function releases the interpreter
lock.

Type codes: 0 float32, 1 bfloat16, 2 float16. `threads` >= 1 is the most threads to use; no result depends on
it. Raises ValueError for a number out of range, or an NF4_CPU_ISA that cannot run here.
"""

from collections.abc import Callable, Sequence
from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    isa: str  # what runs: "portable", "avx2" or "avx512"; NF4_CPU_ISA overrides (for tests)
    isas: list[str]  # those compiled in

def quantize_codes(src: int, dtype: int, n: int, codes: int, absmax_f32: int, threads: int) -> int:
    """Codes uint8 [ceil(n / 2)] and scales float32 [ceil(n / 64)] of n values.

    Returns -1, or the index of the first non-finite value, and then the outputs are of no use.
    """

def quantize_codes_onto(
    levels: int, thresholds: int, src: int, dtype: int, n: int, codes: int, absmax_f32: int, threads: int
) -> int:
    """quantize_codes for other levels: float32 [16] and float32 [15], as nf4format.levels checks them."""

def quantize_search(
    levels: int,
    thresholds: int,
    src: int,
    dtype: int,
    n: int,
    codes: int,
    absmax_u8: int,
    nested_absmax: int,
    threads: int,
) -> int:
    """Codes uint8 [ceil(n / 2)] and searched scales for an offset of 0: uint8 [nb = ceil(n / 64)] and float32
    [ceil(nb / 256)]. Returns as quantize_codes does.
    """

def scale_search(
    levels: int,
    thresholds: int,
    values: int,
    n: int,
    weights: int,
    period: int,
    absmax_u8: int,
    nested_absmax: int,
    threads: int,
) -> None:
    """Scales as quantize_search, of n finite float32 values, when errors of value i matter by
    weights[i % period], float32 [period].
    """

def quantize_absmax(absmax_f32: int, n: int, absmax_u8: int, nested_absmax: int) -> float:
    """Scales uint8 [n] and float32 [ceil(n / 256)] of n float32 scales; returns nested_offset."""

def first_nonfinite(src: int, dtype: int, n: int, nan_only: bool, threads: int) -> int:
    """Index of the first NaN or infinity (NaN only, if so asked) among n values, or -1."""

def dequantize(
    codes: int,
    absmax: int,
    quant_map: int,
    nested_absmax: int,
    nested_quant_map: int,
    nested_offset: float,
    start: int,
    stop: int,
    out: int,
    out_dtype: int,
    threads: int,
) -> None:
    """Elements [start, stop) of the flat tensor to out[0 .. stop - start)."""

def linear(
    x: int,
    x_dtype: int,
    m: int,
    codes: int,
    absmax: int,
    quant_map: int,
    nested_absmax: int,
    nested_quant_map: int,
    nested_offset: float,
    n: int,
    k: int,
    out: int,
    out_dtype: int,
    threads: int,
) -> None:
    """out [m, n] = x [m, k] times the transpose of the packed weight [n, k]; m is 1 to 8, all row-major.

    float32 x: float32 arithmetic. bfloat16 and float16 x: 16-bit integer products, an error of the order of
    1e-4 of the result's norm, below the rounding of a 16-bit output.
    """

def build_info() -> BuildInfo: ...
def hash_ranges(
    fd: int,
    ranges: Sequence[tuple[int, int]],
    threads: int,
    progress: Callable[[int], object] | None = None,
) -> tuple[list[int], tuple[str, int, int] | None]:
    """XXH3-64 of each range [begin, end) of the file, and what went wrong first, if anything did.

    What went wrong: ("ended", index of the range, bytes of the file) or ("system", index or -1, errno); the
    sums are then of no use. Signal handlers run while it waits; what they or `progress` raise ends it.
    """

def read_chunks(
    fd: int, begin: int, end: int, chunk_bytes: int, sums: bytes, memory: int, threads: int
) -> tuple[str, int, int] | None:
    """The bytes [begin, end) of the file into memory, in chunks, each compared with its XXH3-64 in `sums`
    (u64, little endian); not compared where `sums` is empty.

    Returns None, or what went wrong first: ("damaged", index of the chunk, 0), or as `hash_ranges`. Signal
    handlers run while it waits.
    """

def xxh3(data: bytes | bytearray | memoryview, piece_bytes: int) -> int:
    """XXH3-64 with seed 0 of contiguous bytes, taken in pieces of that size: a multiple of 1024."""
