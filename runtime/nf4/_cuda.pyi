"""NF4 kernels for NVIDIA GPUs (csrc/cuda). Addresses of device memory and the stream are plain integers: the
caller holds tensors to sizes, types and device, keeps them alive, and makes their device the current one.
Every function only starts its work.

Type codes: 0 float32, 1 bfloat16, 2 float16. The levels are NF4's own: there is no quant_map. `overlap`
promises that no kernel right before this one in the stream writes the weight; on compute capability 9.0 it
may then start reading while that kernel ends.

Raises CudaError where CUDA refuses, ValueError for a number out of range.
"""

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

def embedding(
    codes: int,
    absmax: int,
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

def adamw(
    parameter: int,
    parameter_dtype: int,
    gradient: int,
    gradient_dtype: int,
    exp_avg: int,
    exp_avg_sq: int,
    count: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    gradient_factor: int,
    stream: int,
) -> None:
    """One AdamW step over `count` elements; float32 or bfloat16 parameters and gradients, float32 moments.

    `step` counts from 1. The gradient is first multiplied by the float32 at gradient_factor, unless 0.
    """

def driver_version() -> int:
    """The newest CUDA version that the driver knows, as BuildInfo.runtime; 0 without a driver."""

def build_info() -> BuildInfo: ...
