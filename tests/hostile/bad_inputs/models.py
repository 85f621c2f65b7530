"""Cases of embedded config.json and tokenizer files when a model is run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .cases import EVAL, GENERATE, TRAIN, Case
from .draft import Draft
from .kit import CONFIG, VOCAB, WORDS, edited, embed, tokenizer

_HUGE = 2**31


def cases() -> Iterator[Case]:
    yield from _configs()
    yield from _tokenizers()


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


def _pattern(pattern: str) -> bytes:
    value = json.loads(tokenizer(WORDS))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": False}
    value["pre_tokenizer"] = split
    return json.dumps(value).encode()
