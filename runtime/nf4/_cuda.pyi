"""NF4 kernels for NVIDIA GPUs (csrc/cuda). Addresses of device memory and the stream are plain integers: the
caller holds tensors to sizes, types and device, keeps them alive, and makes their device the current one.
Every function only starts its work.

Type codes: 0 float32, 1 bfloat16, 2 float16. `overlap` promises that no kernel right before this one in the
stream writes the weight, its tables included; on compute capability 9.0 it may then start reading while that
kernel ends.

Raises CudaError where CUDA refuses, ValueError for a number out of range.
"""

from collections.abc import Sequence
from typing import TypedDict

class CudaError(RuntimeError):
    """A call of the CUDA runtime failed; the message holds all three."""

    code: int  # cudaError_t
    name: str
    text: str

class BuildInfo(TypedDict):
    version: str
    archs: list[str]  # as CMake writes them: "90", "80-real", "90-virtual"
    nvcc: str
    runtime: int  # 1000 * major + 10 * minor of the CUDA runtime inside

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
    overlap: bool,
    stream: int,
) -> None:
    """Elements [start, stop) of the flat tensor to out[0 .. stop - start)."""

def dequantize_rows(
    codes: int,
    absmax: int,
    quant_map: int,
    nested_absmax: int,
    nested_quant_map: int,
    nested_offset: float,
    rows: int,
    columns: int,
    out: int,
    stride: int,
    out_dtype: int,
    overlap: bool,
    stream: int,
) -> None:
    """The weight as a matrix [rows, columns]; row r to out + r * stride, in elements."""

def embedding(
    codes: int,
    absmax: int,
    quant_map: int,
    nested_absmax: int,
    nested_quant_map: int,
    nested_offset: float,
    ids: int,
    num_ids: int,
    rows: int,
    width: int,
    out: int,
    out_dtype: int,
    overlap: bool,
    stream: int,
) -> None:
    """out [num_ids, width] = rows `ids` (int64) of the table [rows, width]; NaN for an id outside of it."""

def linear(
    x: int,
    dtype: int,
    m: int,
    codes: int,
    absmax: int,
    quant_map: int,
    nested_absmax: int,
    nested_quant_map: int,
    nested_offset: float,
    n: int,
    k: int,
    bias: int,
    out: int,
    overlap: bool,
    stream: int,
) -> None:
    """out [m, n] = x [m, k] times the transpose of the packed weight [n, k], plus bias [n] unless 0.

    All row-major and of one type; fp32 sums. The fast kernel takes 16-bit types with k a multiple of 64 and x
    and codes at multiples of 16 bytes; the rest goes through a slow one.
    """

def linear_wgmma_workspace(m: int, n: int, k: int) -> int:
    """Bytes that linear_wgmma needs besides its output; 0 where the device or the sizes do not allow it: it
    takes compute capability 9.0 and k a multiple of 64.
    """

def linear_wgmma(
    x: int,
    dtype: int,
    m: int,
    codes: int,
    absmax: int,
    quant_map: int,
    nested_absmax: int,
    nested_quant_map: int,
    nested_offset: float,
    n: int,
    k: int,
    bias: int,
    out: int,
    workspace: int,
    workspace_bytes: int,
    overlap: bool,
    stream: int,
) -> None:
    """As `linear`, for more rows, on Hopper's tensor cores; bfloat16 or float16, x, codes and workspace at
    multiples of 16 bytes.
    """

Weight = tuple[int, int, int, int, int, float, int, int]  # codes ... nested_offset of linear, n, out

def linear_group(
    x: int, dtype: int, m: int, k: int, weights: list[Weight], overlap: bool, stream: int
) -> bool:
    """`linear` of one x with up to 4 weights in one launch of the fast kernel; False where it cannot run."""

def copy_rows(
    source: int,
    source_stride: int,
    target: int,
    target_stride: int,
    rows: int,
    size: int,
    dtype: int,
    stream: int,
) -> None:
    """target [rows, size] = source, strides in elements."""

def rms_norm(
    x: int,
    x_stride: int,
    residual: int,
    residual_stride: int,
    sum: int,
    sum_stride: int,
    weight: int,
    y: int,
    y_stride: int,
    rows: int,
    size: int,
    eps: float,
    dtype: int,
    stream: int,
) -> None:
    """y = x / rms(x) * weight over rows [rows, size], strides in elements. Unless residual is 0,
    sum = x + residual, and it is sum that is normalized. Outputs may lie where inputs do.
    """

def rms_norm_backward(
    grad_y: int,
    grad_y_stride: int,
    x: int,
    x_stride: int,
    weight: int,
    passed: int,
    passed_stride: int,
    grad_x: int,
    grad_x_stride: int,
    rows: int,
    size: int,
    eps: float,
    dtype: int,
    stream: int,
) -> None:
    """grad_x = passed + the gradient of x, from grad_y, the gradient of rms_norm's output."""

def rotary(
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    rows: int,
    heads: int,
    head_size: int,
    cosines: int,
    sines: int,
    table_rows: int,
    table_stride: int,
    backward: bool,
    dtype: int,
    stream: int,
) -> None:
    """y = heads [rows, heads * head_size] of x, rotated by the angles in row r % table_rows of the tables, of
    which the first head_size / 2 columns are read; backward: by their negatives.
    Pairs are (d, d + head_size / 2).
    """

def swiglu(
    gate_up: int,
    gate_up_stride: int,
    y: int,
    y_stride: int,
    rows: int,
    size: int,
    backward: bool,
    dtype: int,
    stream: int,
) -> None:
    """y [rows, size] = silu(gate) * up, of rows [gate | up]. backward: y is the gradient of that, and the
    gradients of gate and up take their place.
    """

def cross_entropy(
    logits: int,
    stride: int,
    targets: int,
    losses: int,
    rows: int,
    size: int,
    gradient: bool,
    scale: float,
    dtype: int,
    stream: int,
) -> None:
    """losses (float32) = negative log-likelihoods of targets (int64) under logits [rows, size]. With
    gradient, the gradient of scale times their sum takes the logits' place. A target outside of
    the row gives NaN.
    """

Adapter = tuple[int, int, int, int, int, int, float]  # a, b, first row, rows, first rank, rank, scaling

def lora_pack(
    adapters: list[Adapter],
    matrix: int,
    stride: int,
    n: int,
    k: int,
    r: int,
    dtype: int,
    stream: int,
) -> None:
    """Writes B of the adapters, scaled, into columns [k, k + r) and A into rows [n, n + r) of the matrix,
    zeros where there is no adapter; a and b are float32 [rank, k] and [rows, rank]. At most 4 adapters.
    """

def lora_unpack(
    adapters: list[Adapter],
    gradients: list[tuple[int, int]],
    grad_a: int,
    grad_b: int,
    n: int,
    k: int,
    add: bool,
    dtype: int,
    stream: int,
) -> None:
    """Gradients of each a and b, float32, from those of the packed A, grad_a [r, k], and of B transposed,
    grad_b [r, n], which is scaled; written, or added to what is there.
    """

ADAMW_PAGES: int  # the most pages of one call of adamw

def adamw(
    chunks: int,
    num_chunks: int,
    first_page: int,
    pages: Sequence[int],
    page_elements: int,
    settings: Sequence[Sequence[float]],
    gradient_factor: int,
    stream: int,
) -> None:
    """One AdamW step over chunks; float32 or bfloat16 parameters and gradients, float32 moments.

    chunks: num_chunks of struct Nf4AdamwChunk (launchers.h) on the device, within pages first_page and on,
        which begin at the addresses `pages`.
    page_elements: where the second moments begin in a page.
    settings: lr, beta1, beta2, eps, weight_decay and step, from 1, for each number that chunks name.
    gradient_factor: address of a float32 that gradients are multiplied by first, unless 0; where it is not
        finite, nothing is changed.
    """

def adamw_8bit(
    chunks: int,
    num_chunks: int,
    first_page: int,
    pages: Sequence[int],
    page_elements: int,
    settings: Sequence[Sequence[float]],
    gradient_factor: int,
    tables: int,
    stream: int,
) -> None:
    """The same over 8-bit moments in blocks of 256; chunks begin a block, pages are aligned to 8 bytes.

    page_elements: a multiple of 256.
    tables: float32 [4, 256] on the device: levels for the first moments, for the second; search trees alike.
    """

def gradient_norm(chunks: int, num_chunks: int, sums_of_squares: int, norm: int, stream: int) -> None:
    """The Euclidean norm of num_chunks of struct Nf4GradientChunk on the device, to the float32 at `norm`.

    sums_of_squares is room for num_chunks float32.
    """

def driver_version() -> int:
    """The newest CUDA version that the driver knows, as BuildInfo.runtime; 0 without a driver."""

def build_info() -> BuildInfo: ...

class Upload:
    """A part of a file on its way into device memory, read by threads of its own from construction on.

    Args:
        fd: may be closed once this returns.
        begin, end: of the part, bytes of the file.
        chunk_bytes: of each chunk that has a sum; the last may be shorter.
        sums: XXH3-64 of the chunks, u64 in the machine's order; empty: nothing is compared.
        memory, bytes: where byte `begin` of the file goes, and how much; the rest is only checked. It stays
            allocated until `wait` or `cancel` has returned.
        device: its number; it is the current one.
        after: a stream of the device whose work until now may use the memory.
        readers: threads, at least 1.
        piece_bytes: bytes of one read and copy, a multiple of 1024.
        slots: pinned pieces of each reader.
    """

    def __init__(
        self,
        fd: int,
        begin: int,
        end: int,
        chunk_bytes: int,
        sums: bytes,
        memory: int,
        bytes: int,
        device: int,
        after: int,
        readers: int,
        piece_bytes: int,
        slots: int,
    ) -> None: ...
    def wait(self) -> tuple[str, int, int] | None:
        """Until all is there; signal handlers run meanwhile. What went wrong first, if anything did:

        ("damaged", index of the chunk, 0), ("ended", index, bytes of the file),
        ("system", index or -1, errno) or ("destination", index or -1, cudaError_t).
        """

    def cancel(self) -> None:
        """Stop, and return when nothing uses file or memory any more."""

def error_text(code: int) -> str:
    """Name and description of a cudaError_t."""
