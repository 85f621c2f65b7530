"""Which tensors become NF4, and why: a pure function of names, shapes, dtypes, configuration and options."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from nf4format.codebook import BLOCK, NESTED_BLOCK
from nf4format.dtypes import DTYPE_OF_SAFETENSORS

from .errors import CompileError
from .options import CompileOptions
from .roles import Role, count_experts, role_of

# Kept as they are without a question: indices, masks, and double precision, which no weight matrix has.
_EXACT_DTYPES = frozenset({"F64", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64"})
# What a packed tensor has besides codes and scales: 16 levels, the 256-entry map, the JSON state.
_FIXED_BYTES = 16 * 4 + 256 * 4 + 192
# Endings that only the output of other quantizers has: bitsandbytes, GPTQ, AWQ, compressed-tensors, MX-FP4.
_QUANTIZED_ENDINGS = (
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
    ".scb",
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale_inv",
    "_proj_blocks",
)


@dataclass(frozen=True)
class Decision:
    """What happens to one tensor.

    Attributes:
        name: of the tensor.
        role: what it is for.
        dtype: safetensors dtype in the checkpoint.
        shape: its shape.
        source_bytes: its size in the checkpoint.
        quantize: it becomes NF4; otherwise its bytes are copied.
        reason: why, for `--dry-run`.
    """

    name: str
    role: Role
    dtype: str
    shape: tuple[int, ...]
    source_bytes: int
    quantize: bool
    reason: str


def refuse_quantized(model: str, config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise if the checkpoint is the output of a quantizer.

    Raises:
        CompileError: its configuration or its tensor names say so.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        found = part.get("quantization_config", part.get("compression_config"))
        if found:
            method = found.get("quant_method") if isinstance(found, Mapping) else None
            raise CompileError(
                model,
                "the checkpoint is already quantized",
                expected="16-bit or 32-bit weights",
                got=f"quantization_config with quant_method {method!r}",
                remedy="compile the original checkpoint it was made from",
            )
    for name in names:
        if name.lower().endswith(_QUANTIZED_ENDINGS):
            raise CompileError(
                model,
                "the checkpoint is already quantized",
                tensor=name,
                expected="16-bit or 32-bit weights",
                got="a part of a quantized weight",
                remedy="compile the original checkpoint it was made from",
            )


class Policy:
    """The default policy and the options that change it.

    Two-dimensional weights of linear layers and fused experts (three dimensions) become NF4. Embeddings,
    output heads, routers, norms, biases, convolutions and whatever is not a weight matrix keep their dtype.
    `--exclude` wins over everything; with `--include`, only tensors it names are candidates.
    """

    def __init__(self, model: str, config: Mapping[str, Any], options: CompileOptions) -> None:
        self._model = model
        self._num_experts = count_experts(config)
        self._options = options

    def decide(self, name: str, dtype: str, shape: Sequence[int], source_bytes: int) -> Decision:
        """Decide about one tensor.

        Raises:
            CompileError: it should become NF4, but its dtype is neither F32, BF16 nor F16.
        """
        role = role_of(name, shape, self._num_experts)
        kept_because = next(self._reasons_to_keep(name, role, dtype, tuple(shape), source_bytes), None)
        if kept_because is None and dtype not in DTYPE_OF_SAFETENSORS:
            raise CompileError(
                self._model,
                "cannot quantize this dtype",
                tensor=name,
                expected="F32, BF16 or F16",
                got=dtype,
                remedy=f"convert the checkpoint to bfloat16, or keep the tensor: --exclude '{name}'",
            )
        return Decision(
            name, role, dtype, tuple(shape), source_bytes, kept_because is None, kept_because or role.value
        )

    def _reasons_to_keep(
        self, name: str, role: Role, dtype: str, shape: tuple[int, ...], source_bytes: int
    ) -> Iterator[str]:
        """Every reason, the one to show first."""
        options = self._options
        if dtype in _EXACT_DTYPES:
            yield f"{dtype} data"
        yield from (f"--exclude {pattern}" for pattern in options.exclude if fnmatchcase(name, pattern))
        candidates = {Role.LINEAR, Role.EXPERTS}
        if options.quantize_head:
            candidates.add(Role.HEAD)
        if options.quantize_embeddings:
            candidates.add(Role.EMBEDDING)
        if role not in candidates:
            yield role.value
        if role is not Role.EXPERTS and len(shape) != 2:
            yield f"{role.value}, {len(shape)}-D"
        if options.include and not any(fnmatchcase(name, pattern) for pattern in options.include):
            yield "not in --include"
        # A block of 64 shared by two experts would make one unusable without the other.
        if role is Role.EXPERTS and shape[1] * shape[2] % BLOCK:
            yield f"one expert has {shape[1] * shape[2]:,} values, not a multiple of {BLOCK}"
        if packed_bytes(shape) >= source_bytes:
            yield "too small to gain"


def packed_bytes(shape: Sequence[int]) -> int:
    """Bytes that a weight of this shape takes as NF4, the JSON state and both maps included."""
    num_values = math.prod(shape)
    num_blocks = -(-num_values // BLOCK)
    return -(-num_values // 2) + num_blocks + 4 * -(-num_blocks // NESTED_BLOCK) + _FIXED_BYTES
