"""The NF4 encoder for NVIDIA GPUs (csrc/cuda/encoder.h). Addresses are plain integers: the caller holds
arrays to sizes and types. Every method releases the interpreter lock.

Type codes: 0 float32, 1 bfloat16, 2 float16. Raises CudaError where CUDA refuses, ValueError for a number out
of range, MemoryError where the host has no memory left.
"""

class CudaError(RuntimeError):
    """A call of the CUDA runtime failed; the message holds the call and the reason."""

    code: int  # cudaError_t

class ChunkEncoder:
    """Room for `slots` chunks, in pinned memory and on the device, and what encodes them.

    A slot belongs to one thread at a time.
    """

    def __init__(
        self, device: int, levels: int, thresholds: int, searched: bool, chunk_bytes: int, slots: int
    ) -> None:
        """levels float32 [16] and thresholds float32 [15], as nf4format.levels checks them. searched: with
        quantize_search's scales, otherwise with quantize_codes'. chunk_bytes: a multiple of 65536."""

    def start(self, slot: int, values: int, dtype: int, n: int) -> None:
        """Copy n values into the slot, unless they are in its memory already, and start their way through the
        device. What it held is lost."""

    def memory(self, slot: int) -> memoryview:
        """Pinned memory of the slot, room for a chunk; not to be touched between start and finish."""

    def finish(self, slot: int) -> tuple[int, memoryview, memoryview, memoryview]:
        """Wait for the chunk.

        Returns -1, or the index of the first non-finite value, and then the rest is of no use; and bytes that
        are valid until the slot's next start: codes; scales (searched: uint8 [ceil(n / 64)], otherwise
        float32); nested_absmax float32 [ceil(n / 16384)] if searched.
        """

class Feedback:
    """Steps of rounding by what layers read, for one table of levels, on float32 matrices in device memory,
    on a stream (csrc/cuda/feedback.cuh, search_weighted.cuh).
    """

    def __init__(self, device: int, levels: int, thresholds: int) -> None:
        """levels float32 [16] and thresholds float32 [15], in host memory."""

    def search(
        self,
        values: int,
        n: int,
        weights: int,
        period: int,
        absmax: int,
        nested_absmax: int,
        stream: int,
    ) -> None:
        """As nf4format.blocks.scale_search; values: zeros from n up to the last block's end."""

    def carry(
        self,
        weight: int,
        rest: int,
        factor: int,
        order: int,
        scales: int,
        codes: int,
        residual: int,
        errors: int,
        n: int,
        factor_stride: int,
        width: int,
        scale_shift: int,
        stream: int,
    ) -> None:
        """Round up to 128 columns, each one's error carried to those behind it. order: int64 [width]. Scales
        of column c: row c >> scale_shift."""

    def descend(
        self,
        weight: int,
        slope: int,
        moment: int,
        nested: int,
        entries: int,
        scales: int,
        codes: int,
        residual: int,
        change: int,
        n: int,
        moment_stride: int,
        width: int,
        stream: int,
    ) -> None:
        """Coordinate descent over up to 64 columns. nested 0: scales [width, n] stay."""

def devices() -> list[int]:
    """Compute capability of each GPU, 10 * major + minor."""
