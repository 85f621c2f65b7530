"""Cases of embedded config.json and tokenizer files when a model is run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from .cases import EVAL, GENERATE, TRAIN, Case
from .draft import Draft
from .kit import CONFIG, VOCAB, WORDS, edited, embed, tokenizer, write_good

_HUGE = 2**31


def cases() -> Iterator[Case]:
    yield from _configs()
    yield from _tokenizers()
    yield from _templates()
    yield from _adapters()


def _file(name: str, data: bytes, folder: Path) -> None:
    (folder / "text.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9\n" * 20)
    edited(folder / "model.nf4", embed(name, data))


def _configs() -> Iterator[Case]:
    absurd: dict[str, Any] = {
        "layers 10^9": {"num_hidden_layers": 10**9},
        "layers -1": {"num_hidden_layers": -1},
        "layers of text": {"num_hidden_layers": "32"},
        "layers 1e9": {"num_hidden_layers": 1e9},
        "layers true": {"num_hidden_layers": True},
        "hidden 0": {"hidden_size": 0},
        "heads that do not divide": {"num_key_value_heads": 3},
        "odd head": {"head_dim": 33},
        "vocabulary 2^31": {"vocab_size": _HUGE},
        "positions 2^63": {"max_position_embeddings": 2**63},
        "rope theta 0": {"rope_theta": 0},
        "rope theta of text": {"rope_theta": "10000"},
        "rope_scaling a list": {"rope_scaling": [1]},
        "rope type unknown": {"rope_scaling": {"rope_type": "\x1b[31mevil"}},
        "rope factors reversed": {
            "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}
        },
        "norm eps negative": {"rms_norm_eps": -1e-6},
        "another family": {"model_type": "mamba"},
        "family a list": {"model_type": ["llama"]},
        "another activation": {"hidden_act": "evil"},
        "dtype odd": {"torch_dtype": "int8"},
        "tied of text": {"tie_word_embeddings": "yes"},
        "eos 10^12": {"eos_token_id": 10**12},
        "eos nested": {"eos_token_id": [[1]]},
    }
    for name, changes in absurd.items():
        prepare = partial(_file, "config.json", json.dumps({**CONFIG, **changes}).encode())
        yield Case("configuration, run", name, prepare, (GENERATE, EVAL, TRAIN), "config.json: '")
    prepare = partial(_file, "config.json", b"{}")
    yield Case("configuration, run", "empty", prepare, (GENERATE, EVAL), "config.json: 'model_type'")
    for name, changes, says in [
        ("layers 2", {"num_hidden_layers": 2}, "missing"),
        ("layers 1024", {"num_hidden_layers": 1024}, "missing|layers"),
        ("vocabulary 2^24", {"vocab_size": 1 << 24}, "shape does not fit config.json"),
        ("hidden 2^20", {"hidden_size": 1 << 20, "head_dim": 32}, "shape does not fit config.json"),
        ("feed-forward 96", {"intermediate_size": 96}, "shape does not fit config.json"),
        (
            "heads 4096",
            {"num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 2**20},
            "does not fit",
        ),
        ("biases", {"attention_bias": True}, "missing"),
        ("another family's norms", {"model_type": "qwen3", "head_dim": 32}, "missing"),
    ]:
        prepare = partial(_file, "config.json", json.dumps({**CONFIG, **changes}).encode())
        yield Case("configuration, other model", name, prepare, (GENERATE, EVAL), says)


def _tokenizers() -> Iterator[Case]:
    commands = (GENERATE, EVAL)
    for name, data, says in [
        ("not JSON", b"{", "tokenizer.json: not a usable tokenizer"),
        ("a list", b"[]", "tokenizer.json: not a usable tokenizer"),
        ("nested deeply", b"[" * 10**5 + b"]" * 10**5, "tokenizer.json: not a usable tokenizer"),
        ("nested deeply inside", b'{"model":' * 10**4 + b"1" + b"}" * 10**4, "tokenizer.json: not a usable"),
        ("not UTF-8", b"\xff\xfe{}", "tokenizer.json: not a usable tokenizer"),
        (
            "unknown model",
            b'{"version":"1.0","model":{"type":"Evil\\u001b"}}',
            "tokenizer.json: not a usable",
        ),
        (
            "ids above the vocabulary",
            tokenizer({word: i + VOCAB for word, i in WORDS.items()}),
            "the tokenizer is not",
        ),
        (
            "ids near 2^32",
            tokenizer({word: i + 2**32 - 99 for word, i in WORDS.items()}),
            "the tokenizer is not|usable",
        ),
        ("ids negative", tokenizer({word: -i for word, i in WORDS.items()}), "tokenizer.json: not a usable"),
        ("a bad regular expression", _pattern("(("), "tokenizer.json: not a usable tokenizer"),
    ]:
        yield Case("tokenizer, run", name, partial(_file, "tokenizer.json", data), commands, says)
    for name, data, says in [
        ("config nested deeply", b"[" * 10**5 + b"]" * 10**5, "nested deeper"),
        ("config with NaN", b'{"x": NaN}', "NaN is not JSON"),
        ("config with duplicate keys", b'{"bos_token": "a", "bos_token": "b"}', "appears twice"),
        ("config of 10 million lists", b'{"a":[' + b"[]," * 10**7 + b"[]]}", "more than 4000000 commas"),
        ("config a list", b"[]", "expected a JSON object, got list"),
        ("config of long digits", b'{"x": ' + b"9" * 10**6 + b"}", "1000 digits"),
    ]:
        yield Case("tokenizer, run", name, partial(_file, "tokenizer_config.json", data), commands, says)

    def without(folder: Path) -> None:
        (folder / "text.txt").write_text("w1 w2\n")

        def edit(draft: Draft) -> None:
            del draft.tensors["__file__/tokenizer.json"]

        edited(folder / "model.nf4", edit)

    yield Case("tokenizer, run", "none", without, commands, "the file holds no tokenizer.json; put a")


def _templates() -> Iterator[Case]:
    """Embedded chat templates; what else they may not do, and how long: tests/runtime/test_sandbox.py."""
    command = tuple("rows.jsonl" if part == "text.txt" else part for part in TRAIN)

    def prepare(template: bytes, folder: Path) -> None:
        messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
        (folder / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        edited(folder / "model.nf4", embed("chat_template.jinja", template))

    for name, template, says in [
        ("malformed", b"{% for %}", "Expected an expression"),
        ("not UTF-8", b"\xff\xfe", "UTF-8"),
        ("reaching for classes", b"{{ ''.__class__.__mro__ }}", "unsafe"),
        ("reaching for globals", b"{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("including a file", b"{% include '/etc/passwd' %}", "no loader"),
        ("recursive", b"{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "nested too deeply"),
        ("writing 100 MB", b"{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than"),
        ("taking 10 GB", b"{{ 'a' | center(10000000000) }}", "too much memory"),
        ("speaking in control characters", b"{{ raise_exception('\x1b[2J\x07') }}", "chat template"),
    ]:
        yield Case("chat template, run", name, partial(prepare, template), (command,), says)


def _adapters() -> Iterator[Case]:
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    config: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    good = {
        f"{module}.lora_A.weight": np.ones((4, 64), np.float32),
        f"{module}.lora_B.weight": np.ones((64, 4), np.float32),
    }

    def prepare(change: Callable[[Path], object], folder: Path) -> None:
        write_good(folder / "model.nf4")
        adapter = folder / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        save_file(good, adapter / "adapter_model.safetensors")
        change(adapter)

    def settings(**changes: Any) -> Callable[[Path], object]:
        text = json.dumps({**config, **changes})
        return lambda adapter: (adapter / "adapter_config.json").write_text(text)

    def text(data: bytes) -> Callable[[Path], object]:
        return lambda adapter: (adapter / "adapter_config.json").write_bytes(data)

    def tensors(**changes: np.ndarray | None) -> Callable[[Path], object]:
        """`A` and `B` are the factors of the one module; None removes."""
        names = {"A": f"{module}.lora_A.weight", "B": f"{module}.lora_B.weight"}
        changed = {**good, **{names.get(key, key): array for key, array in changes.items()}}
        kept = {name: array for name, array in changed.items() if array is not None}
        return lambda adapter: save_file(kept, adapter / "adapter_model.safetensors")

    def only_pickle(adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")

    command = (*GENERATE, "--adapter", "adapter")
    for name, change in [
        ("a good one", lambda adapter: None),
        ("modules that are not there", settings(target_modules=["evil\x1b"])),  # the tensors tell which are
        ("modules by an endless pattern", settings(target_modules="((a|a)*)*!")),
        ("ranks by an endless pattern", settings(rank_pattern={"((a|a)*)*!": 8})),
    ]:
        yield Case("adapters", name, partial(prepare, change), (command,), None)
    for name, change, says in [
        ("only a pickle", only_pickle, "pickled weights are never loaded"),
        (
            "no weights",
            lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
            "adapter_model.safetensors",
        ),
        ("no config", lambda adapter: (adapter / "adapter_config.json").unlink(), "the file is missing"),
        (
            "weights cut short",
            lambda adapter: os.truncate(adapter / "adapter_model.safetensors", 900),
            "cut short",
        ),
        (
            "weights of zeros",
            lambda a: (a / "adapter_model.safetensors").write_bytes(bytes(4096)),
            "never completed",
        ),
        ("config not JSON", text(b"{"), "not JSON"),
        ("config nested deeply", text(b'{"a":' * 10**5), "nested deeper"),
        ("config a list", text(b"[]"), "expected a JSON object"),
        ("another kind", settings(peft_type="PREFIX_TUNING\x1b"), "peft_type"),
        ("rank 10^9", settings(r=10**9), "adapter_config.json: r"),
        ("rank of text", settings(r="4"), "adapter_config.json: r"),
        ("alpha of text", settings(lora_alpha="8"), "lora_alpha"),
        ("a factor missing", tensors(B=None), "."),
        ("another rank", tensors(A=np.ones((5, 64), np.float32)), "."),
        ("another width", tensors(A=np.ones((4, 63), np.float32)), "."),
        ("integers", tensors(A=np.ones((4, 64), np.int32)), "."),
        ("a tensor too many", tensors(x=np.ones(3, np.float32)), "'x'|x"),
    ]:
        yield Case("adapters", name, partial(prepare, change), (command,), says)


def _pattern(pattern: str) -> bytes:
    value = json.loads(tokenizer(WORDS))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": False}
    value["pre_tokenizer"] = split
    return json.dumps(value).encode()
