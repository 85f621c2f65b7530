"""Fixtures used across the suite: the optional data folder, and small checkpoints made on the spot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "llama3": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` skip, with a message, where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenized data of tests goes to a directory of theirs, also from commands that they start."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts; tests that need it skip where it is absent.

    Found beside the repository, or through NF4_SHARED.
    """
    folder = Path(os.environ.get("NF4_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no models and texts at {folder}; set NF4_SHARED to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def family_config() -> Callable[..., dict[str, Any]]:
    """A function family -> config.json of a tiny model of that family; keyword arguments override."""

    def build(family: str, **overrides: Any) -> dict[str, Any]:
        config: dict[str, Any] = {
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }
        config.update(FAMILIES[family])
        config.update(overrides)
        return config

    return build


@pytest.fixture
def make_checkpoint(tmp_path: Path, family_config: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """A function that writes a tiny random checkpoint, as transformers saves it, and returns its directory.

    Arguments: family; shards (1 = one file without an index); dtype name; seed; config overrides.
    Norms and biases are random too, so that a forgotten one shows.
    """

    def build(
        family: str = "llama",
        *,
        shards: int = 1,
        dtype: str = "bfloat16",
        seed: int = 0,
        name: str = "",
        **overrides: Any,
    ) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = family_config(family, dtype=dtype, **overrides)
        folder = tmp_path / (name or f"{family}-{dtype}-{shards}-{seed}")
        torch.manual_seed(seed)
        values = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "dtype")}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    offset = 1.0 if "norm" in parameter_name else 0.0
                    parameter.copy_(offset + 0.1 * torch.randn_like(parameter))
        model = model.to(getattr(torch, dtype))
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(folder, max_shard_size=size // shards + 4096 if shards > 1 else "50GB")
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        return folder

    return build


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    """A byte-level BPE of at most 320 ids: <unk>, <s> (put in front of every text), </s>, bytes, merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    text = "the cat sat on the mat; the dog and the frog were there too"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str().encode()
