"""Packed files of tiny random models, with a small byte-level tokenizer inside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

# Family, fields of config.json, compile options: every kind of layer, packed and kept, tied and not.
MODEL_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama-all-kept": ("llama", {}, {"exclude": ("*",)}),
    "qwen2-tied-all-packed": (
        "qwen2",
        {"tie_word_embeddings": True},
        {"quantize_head": True, "quantize_embeddings": True},
    ),
    "qwen3-head-packed": ("qwen3", {"dtype": "float16"}, {"quantize_head": True}),
    "mistral-tied-ragged": (
        "mistral",
        {"tie_word_embeddings": True, "intermediate_size": 172, "hidden_size": 100, "head_dim": 26},
        {},
    ),
}


@pytest.fixture
def make_packed(
    make_checkpoint: Callable[..., Path], tokenizer_json: bytes, tmp_path: Path
) -> Callable[..., Path]:
    """A function that compiles a tiny checkpoint; arguments as `make_checkpoint`, and these.

    options: CompileOptions fields. edit: changes to config.json between checkpoint and compilation.
    """

    def build(
        family: str = "llama",
        *,
        options: dict[str, Any] | None = None,
        edit: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Path:
        folder = make_checkpoint(family, **arguments)
        (folder / "tokenizer.json").write_bytes(tokenizer_json)
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        if edit:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | edit))
        out = tmp_path / f"{folder.name}.nf4"
        compile_checkpoint(folder, out, CompileOptions(force=True, **(options or {})))
        return out

    return build


@pytest.fixture(params=MODEL_CASES)
def model_case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What `make_packed` takes for each of MODEL_CASES: family, config fields, compile options."""
    return MODEL_CASES[request.param]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small lose more to waiting threads than they gain, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_model(family_config: Callable[..., dict[str, Any]]) -> Callable[..., CausalLM]:
    """A function that gives the same small dense model at each call."""

    def build(device: str = "cpu", dtype: torch.dtype = torch.float32) -> CausalLM:
        torch.manual_seed(0)
        config = family_config("llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2)
        return CausalLM(ModelConfig.from_dict(config)).to(device, dtype)

    return build


@pytest.fixture(scope="module")
def biased_config(family_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Of a model whose query, key and value layers have biases."""
    return family_config("qwen2", hidden_size=32, intermediate_size=48, num_hidden_layers=2, dtype="float32")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """A function that writes a file of this name and content, and returns its path."""

    def put(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put
