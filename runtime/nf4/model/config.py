"""A decoder's shape and constants, from a Hugging Face config.json, checked before anything is allocated.

The families are Llama 2/3, Mistral, Qwen2 and Qwen3. Both spellings of the fields that transformers renamed
are read: `rope_theta` + `rope_scaling` or `rope_parameters`, `torch_dtype` or `dtype`. A field that is absent
has transformers' default for the family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LoadError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Far above any real model; they keep a hostile config.json from asking for billions of modules or positions.
MAX_LAYERS = 1024
MAX_HEADS = 1 << 12
MAX_WIDTH = 1 << 20  # hidden, intermediate and head sizes
MAX_VOCAB = 1 << 24
MAX_POSITIONS = 1 << 31

_REMEDY = "it is not the config.json of a model that this version runs; compile a checkpoint with its own"


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of rotary frequencies (`rope_type` "llama3"); see `rotary.rotary_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """What decides a decoder's tensors and arithmetic.

    Attributes:
        layer_windows: for each layer, how many positions a token attends to (itself included); None = all.
        attention_bias, attention_output_bias, mlp_bias: biases of q/k/v, of o, and of gate/up/down.
        qk_norm: an RMSNorm over head_dim on every query and key head (Qwen3).
        dtype: the checkpoint's dtype by name, "float32", "bfloat16" or "float16".
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    layer_windows: tuple[int | None, ...]
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: str

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], file: str = "config.json") -> ModelConfig:
        """Read and check the parsed config.json of `file` (its name, for messages).

        Raises:
            LoadError: an unsupported family, rope type or activation; a value that is missing, of the wrong
                type or out of bounds. The text names the field and the value.
        """
        fields = _Fields(config, file)
        family = fields.choice("model_type", FAMILIES, "model families")
        fields.choice("hidden_act", ("silu",), "activations", default="silu")
        layers = fields.integer("num_hidden_layers", MAX_LAYERS)
        heads = fields.integer("num_attention_heads", MAX_HEADS)
        kv_heads = fields.integer("num_key_value_heads", MAX_HEADS, default=heads)
        hidden = fields.integer("hidden_size", MAX_WIDTH)
        if heads % kv_heads:
            fields.fail("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads)
        head_default = 128 if family == "qwen3" else hidden // heads
        head_dim = fields.integer("head_dim", MAX_WIDTH, default=head_default)
        if head_dim % 2:
            fields.fail("head_dim", "an even number, which rotary embeddings need", head_dim)
        positions = fields.integer("max_position_embeddings", MAX_POSITIONS, default=2048)
        theta, scaling = _rope(fields, positions)
        for name in ("bos_token_id", "eos_token_id"):
            fields.check_token_ids(name)  # the tokenizer's to use, which takes what it knows
        # Llama and Qwen3 let the config decide, Mistral has no biases, Qwen2 always has them on q, k and v.
        optional_bias = family in ("llama", "qwen3") and fields.flag("attention_bias")
        return cls(
            vocab_size=fields.integer("vocab_size", MAX_VOCAB),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size", MAX_WIDTH),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=fields.positive("rms_norm_eps", default=1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            layer_windows=_layer_windows(fields, family, layers),
            attention_bias=family == "qwen2" or optional_bias,
            attention_output_bias=optional_bias,
            mlp_bias=family == "llama" and fields.flag("mlp_bias"),
            qk_norm=family == "qwen3",
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            dtype=_dtype(fields),
        )


class _Fields:
    """Typed access to config.json: null counts as absent; every refusal names the field and its value."""

    def __init__(self, values: Mapping[str, Any], file: str, prefix: str = "") -> None:
        self.values, self.file, self.prefix = values, file, prefix

    def fail(self, name: str, expected: str, got: object, remedy: str | None = None) -> None:
        problem = f"'{self.prefix}{name}'"
        raise LoadError(self.file, problem, expected=expected, got=_shown(got), remedy=remedy or _REMEDY)

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def choice(self, name: str, allowed: tuple[str, ...], kind: str, default: str | None = None) -> str:
        value = self.get(name, default)
        if value not in allowed:
            remedy = f"this version runs no other {kind}"
            self.fail(name, f"one of {', '.join(allowed)}", value, remedy)
        return value

    def integer(self, name: str, limit: int, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            self.fail(name, f"an integer from 1 to {limit}", value)
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            self.fail(name, "a positive, finite number", value)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            self.fail(name, "true or false", value)
        return value

    def check_token_ids(self, name: str) -> None:
        value = self.get(name, [])
        ids = value if isinstance(value, list) else [value]
        if any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < MAX_VOCAB for i in ids):
            self.fail(name, "a token id or a list of them", value)


def _rope(fields: _Fields, positions: int) -> tuple[float, RopeScaling | None]:
    """theta and the scaling, from `rope_parameters` or from `rope_theta` beside `rope_scaling`."""
    is_new = fields.get("rope_parameters") is not None
    name = "rope_parameters" if is_new else "rope_scaling"
    values = fields.get(name, {})
    if not isinstance(values, Mapping):
        fields.fail(name, "an object", values)
    rope = _Fields(values, fields.file, f"{name}.")
    theta = rope.positive("rope_theta", default=fields.get("rope_theta", 10000.0))
    for partial in (fields, rope):
        if partial.get("partial_rotary_factor", 1.0) != 1.0:
            partial.fail("partial_rotary_factor", "1.0, the whole head", partial.get("partial_rotary_factor"))
    kind = _Fields({"rope_type": rope.get("rope_type", rope.get("type"))}, fields.file, f"{name}.").choice(
        "rope_type", ("default", "llama3"), "rope types", default="default"
    )
    if kind == "default":
        return theta, None
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if low >= high:
        rope.fail("high_freq_factor", f"more than low_freq_factor = {low}", high)
    original = rope.integer("original_max_position_embeddings", MAX_POSITIONS, default=positions)
    return theta, RopeScaling(rope.positive("factor"), low, high, original)


def _layer_windows(fields: _Fields, family: str, layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window. Mistral: all layers; Qwen: those layer_types names, or the last ones."""
    if family == "llama":
        return (None,) * layers
    # Only an explicit null turns Mistral's window off; absent means the family's default, as in transformers.
    is_off = fields.values.get("sliding_window", 4096) is None
    if family != "mistral":
        is_off = is_off or not fields.flag("use_sliding_window")
    window = None if is_off else fields.integer("sliding_window", MAX_POSITIONS, default=4096)
    if family == "mistral":
        return (window,) * layers
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            fields.fail("max_window_layers", "an integer of at least 0", first)
        return tuple(window if layer >= first else None for layer in range(layers))
    allowed = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in allowed for kind in kinds):
        fields.fail("layer_types", f"{layers} of {' or '.join(allowed)}", kinds)
    if window is None and "sliding_attention" in kinds:
        got = fields.values.get("sliding_window")
        fields.fail("sliding_window", "a window, which layer_types asks for", got)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _dtype(fields: _Fields) -> str:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name, "float32")
    allowed = ("float32", "bfloat16", "float16")
    short = value.removeprefix("torch.") if isinstance(value, str) else value
    if short not in allowed:
        fields.fail(name, f"one of {', '.join(allowed)}", value)
    return short


def _shown(value: object) -> str:
    """An untrusted value for a message: its repr, cut at 80 characters."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
