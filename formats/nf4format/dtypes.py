"""Element types by their safetensors names: sizes in bits, and the names used for decoded weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .blocks import Dtype

# Every dtype safetensors 0.8 knows. F4 and F6 are MX formats, not NF4: NF4 codes are stored as U8.
DTYPE_BITS: Final[dict[str, int]] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

# The dtypes a weight may have before packing and after decoding, and their safetensors names.
SAFETENSORS_NAME: Final[dict[Dtype, str]] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPE_OF_SAFETENSORS: Final[dict[str, Dtype]] = {name: dtype for dtype, name in SAFETENSORS_NAME.items()}


def element_bytes(dtype: str) -> int:
    """Bytes an element of the safetensors dtype occupies; 1 for sub-byte types, which need no alignment."""
    return max(DTYPE_BITS[dtype] // 8, 1)
