"""Which tensors become NF4, with every option that has a say."""

import math

import pytest

from nf4format.layout import PackedSpec, plan_layout
from qcompile.errors import CompileError
from qcompile.options import CompileOptions
from qcompile.policy import Decision, Policy, packed_bytes, refuse_quantized

Q = "model.layers.0.self_attn.q_proj.weight"
ELEMENT_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "F8_E4M3": 1, "I32": 4, "U8": 1}


def _decide(
    name: str,
    shape: tuple[int, ...] = (512, 256),
    dtype: str = "BF16",
    config: dict | None = None,
    **options: object,
) -> Decision:
    policy = Policy("model", config or {}, CompileOptions(**options))  # type: ignore[arg-type]
    return policy.decide(name, dtype, shape, math.prod(shape) * ELEMENT_BYTES[dtype])


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_linear_weights_of_every_float_dtype_are_packed(dtype: str) -> None:
    assert _decide(Q, dtype=dtype).quantize


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "reason"),
    [
        ("model.embed_tokens.weight", (1000, 256), "BF16", "embedding"),
        ("lm_head.weight", (1000, 256), "BF16", "output head"),
        ("model.layers.0.mlp.gate.weight", (64, 256), "BF16", "router"),
        ("model.norm.weight", (256,), "BF16", "norm"),
        ("model.layers.0.conv.weight", (256, 256, 4), "BF16", "other"),
        ("model.layers.0.linear.weight", (), "BF16", "other"),
        (Q, (512, 256), "F64", "F64 data"),
        (Q, (512, 256), "I32", "I32 data"),
        (Q, (16, 16), "BF16", "too small to gain"),
        (Q, (0, 256), "BF16", "too small to gain"),
    ],
)
def test_what_is_kept_and_why(name: str, shape: tuple[int, ...], dtype: str, reason: str) -> None:
    decision = _decide(name, shape, dtype)
    assert (decision.quantize, decision.reason) == (False, reason)


def test_head_and_embeddings_on_demand() -> None:
    assert _decide("lm_head.weight", quantize_head=True).quantize
    assert not _decide("lm_head.weight", quantize_embeddings=True).quantize
    assert _decide("model.embed_tokens.weight", quantize_embeddings=True).quantize
    patches = _decide("vision.embeddings.patch_embedding.weight", (64, 3, 14, 14), quantize_embeddings=True)
    assert (patches.quantize, patches.reason) == (False, "embedding, 4-D")


def test_include_narrows_and_exclude_wins() -> None:
    assert _decide(Q, include=("*.q_proj.*",)).quantize
    assert _decide(Q, include=("*.k_proj.*",)).reason == "not in --include"
    assert _decide(Q, include=("*",), exclude=("*.q_*",)).reason == "--exclude *.q_*"
    assert _decide("lm_head.weight", include=("*",)).reason == "output head"
    assert _decide("lm_head.weight", include=("lm_head.*",), quantize_head=True).quantize


def test_experts_whose_blocks_would_straddle_are_kept() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert _decide(name, (4, 64, 96)).quantize
    assert _decide(name, (4, 33, 33)).reason == "one expert has 1,089 values, not a multiple of 64"


def test_eight_bit_linear_weight_is_an_error_unless_excluded() -> None:
    with pytest.raises(CompileError, match=r"expected F32, BF16 or F16, got F8_E4M3; .*--exclude"):
        _decide(Q, dtype="F8_E4M3")
    assert not _decide(Q, dtype="F8_E4M3", exclude=(Q,)).quantize


@pytest.mark.parametrize("shape", [(512, 256), (3, 1001), (1, 1), (8, 64, 64)])
def test_packed_bytes_bound_what_the_layout_takes(shape: tuple[int, ...]) -> None:
    layout = plan_layout([PackedSpec("x", shape, "bfloat16")], [], {"config.json": 2}, {})
    taken = sum(entry.end - entry.begin for entry in layout.entries.values() if entry.name.startswith("x"))
    assert taken - 64 <= packed_bytes(shape) <= taken + 64


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, []),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, []),
        ({"compression_config": {"format": "pack-quantized"}}, []),
        ({}, [Q + ".quant_state.bitsandbytes__nf4"]),
        ({}, ["model.layers.0.self_attn.q_proj.qweight"]),
        ({}, ["model.layers.0.mlp.experts.gate_up_proj_blocks"]),
    ],
)
def test_quantized_checkpoints_are_refused(config: dict, names: list[str]) -> None:
    with pytest.raises(CompileError, match=r"already quantized.*compile the original"):
        refuse_quantized("model", config, names)
    refuse_quantized("model", {"quantization_config": None}, [Q])
