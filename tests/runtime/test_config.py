"""config.json: both spellings, defaults of the families, and values that must be refused."""

from __future__ import annotations

import pytest

from nf4.errors import LoadError
from nf4.model.config import ModelConfig, RopeScaling

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_old_and_new_spellings_mean_the_same(family_config):
    new = family_config("llama", rope_parameters={**LLAMA3, "rope_theta": 5e5})
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 5e5, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16"}
    older = old | {"rope_scaling": {**LLAMA3, "type": "llama3"}}
    del older["rope_scaling"]["rope_type"]
    expected = ModelConfig.from_dict(new)
    assert expected.rope_theta == 5e5
    assert expected.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    assert expected.dtype == "bfloat16"
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(older) == expected


def test_absent_fields_have_transformers_defaults(family_config):
    minimal = {
        k: v
        for k, v in family_config("llama").items()
        if k.startswith(("num_hidden", "num_attention", "hidden_size", "intermediate", "vocab", "model_type"))
    }
    config = ModelConfig.from_dict(minimal)
    assert (config.num_key_value_heads, config.head_dim) == (4, 32)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)
    assert not (config.attention_bias or config.mlp_bias or config.qk_norm or config.tie_word_embeddings)
    assert ModelConfig.from_dict(minimal | {"model_type": "qwen3"}).head_dim == 128


@pytest.mark.parametrize(
    ("family", "fields", "windows"),
    [
        ("mistral", {"sliding_window": None}, (None, None, None)),
        ("mistral", {"sliding_window": 7}, (7, 7, 7)),
        ("qwen2", {"sliding_window": 7}, (None, None, None)),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2}, (None, None, 7)),
        (
            "qwen3",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (7, None, 7),
        ),
    ],
)
def test_windows(family_config, family, fields, windows):
    assert ModelConfig.from_dict(family_config(family, **fields)).layer_windows == windows


def test_absent_window_is_the_family_default(family_config):
    config = family_config("mistral")
    del config["sliding_window"]
    assert ModelConfig.from_dict(config).layer_windows == (4096,) * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "'model_type', expected one of llama, mistral, qwen2, qwen3, got 'gpt2'"),
        ({"model_type": None}, "'model_type', expected one of llama"),
        ({"hidden_act": "gelu"}, "'hidden_act', expected one of silu, got 'gelu'"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers', expected an integer from 1 to 1024"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers'"),
        ({"num_hidden_layers": 3.0}, "'num_hidden_layers'"),
        ({"hidden_size": None}, "'hidden_size', expected an integer from 1 to 1048576, got None"),
        ({"num_attention_heads": True}, "'num_attention_heads'"),
        ({"num_key_value_heads": 3}, "'num_key_value_heads', expected a divisor of num_attention_heads = 4"),
        ({"head_dim": 31}, "'head_dim', expected an even number"),
        ({"vocab_size": -1}, "'vocab_size'"),
        ({"rms_norm_eps": 0}, "'rms_norm_eps', expected a positive, finite number"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps'"),
        ({"rms_norm_eps": "1e-6"}, "'rms_norm_eps'"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "'rope_parameters.rope_theta'"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_type', expected one of default, llama3, got 'yarn'",
        ),
        ({"rope_parameters": [1]}, "'rope_parameters', expected an object"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "more than low_freq_factor = 4.0, got 4.0"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor', expected 1.0, the whole head, got 0.5"),
        ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings', expected true or false"),
        ({"dtype": "float8_e4m3fn"}, "'dtype', expected one of float32, bfloat16, float16"),
        ({"eos_token_id": ["</s>"]}, "'eos_token_id'"),
        ({"model_type": "x" * 500}, r"got 'x{76}\.\.\."),
    ],
)
def test_bad_values_are_refused(family_config, fields, message):
    with pytest.raises(LoadError, match=f"^config.json: .*{message}"):
        ModelConfig.from_dict(family_config("llama", **fields))


def test_layer_types_must_fit(family_config):
    fields = {"use_sliding_window": True, "layer_types": ["full_attention"]}
    with pytest.raises(LoadError, match="'layer_types', expected 3 of full_attention or sliding_attention"):
        ModelConfig.from_dict(family_config("qwen2", **fields))
    fields = {"layer_types": ["sliding_attention"] * 3}
    with pytest.raises(LoadError, match="'sliding_window', expected a window"):
        ModelConfig.from_dict(family_config("qwen2", **fields))
