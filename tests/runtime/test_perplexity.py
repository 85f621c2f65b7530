"""Perplexity: the protocol on small models, and the known figure of a real one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import nf4
from nf4.errors import LoadError
from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM
from nf4.text.perplexity import Perplexity, encode_documents, perplexity
from nf4.text.tokenizer import Tokenizer
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint


@pytest.fixture(scope="module")
def model(family_config):
    torch.manual_seed(0)
    return CausalLM(ModelConfig.from_dict(family_config("llama", hidden_size=32, num_hidden_layers=1))).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 320, (103,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def expected(model, windows):
    """Sum and count over windows given as lists, one forward each, in float64."""
    nll = 0.0
    for window in windows:
        logits = model(torch.tensor([window]))[0, :-1].double()
        nll += F.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum").item()
    return nll, sum(len(window) - 1 for window in windows)


def test_windows_with_and_without_bos(monkeypatch, model, ids):
    monkeypatch.setattr("nf4.text.perplexity.BATCH_TOKENS", 40)
    monkeypatch.setattr("nf4.training.loss.LOGIT_BYTES", 320 * 4 * 7)
    with_bos = [[1, *ids[at : at + 19]] for at in range(0, 95, 19)]
    without = [ids[at : at + 20] for at in range(0, 100, 20)]
    for bos_id, windows in ((1, with_bos), (None, without)):
        seen: list[tuple[int, int]] = []

        def note(done, total, seen=seen):
            seen.append((done, total))

        result = perplexity(model, ids, 20, bos_id=bos_id, progress=note)
        nll, tokens = expected(model, windows)
        assert result.tokens == tokens == 95
        assert result.nll == pytest.approx(nll, rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-6)
        assert [done for done, _ in seen] == [38, 76, 95]
        assert {total for _, total in seen} == {95}


def test_short_texts_and_limits(model, ids):
    assert perplexity(model, ids[:5], 20, bos_id=1).tokens == 5
    assert perplexity(model, ids[:5], 20).tokens == 4
    limited = perplexity(model, ids, 20, bos_id=1, max_tokens=40)
    assert limited.tokens == 38
    assert limited.nll == pytest.approx(expected(model, [[1, *ids[:19]], [1, *ids[19:38]]])[0], rel=1e-6)
    assert perplexity(model, ids, 20, bos_id=1, max_tokens=1).tokens == 19


def test_bad_requests(model, ids):
    for tokens, window, message in (
        (ids, 1, "window, expected at least 2 tokens, got 1"),
        (ids[:1], 20, "too short"),
        ([3, 4, 320], 20, "expected 0 to 319, got 3 to 320"),
    ):
        with pytest.raises(LoadError, match=message):
            perplexity(model, tokens, window)
    assert Perplexity(1e6, 1).perplexity == math.inf


def test_documents(tokenizer_json):
    tokenizer = Tokenizer(tokenizer_json)
    text = "the cat\n<|doc|>\n\n<|doc|>\nthe dog"
    assert encode_documents(tokenizer, text) == tokenizer.encode("the cat") + tokenizer.encode("the dog")
    assert encode_documents(tokenizer, text, "") == tokenizer.encode(text)
    assert encode_documents(tokenizer, "a;b", ";") == tokenizer.encode("a") + tokenizer.encode("b")


@pytest.mark.slow
def test_wiki_llama_on_a_part_of_its_validation_text(shared, tmp_path):
    """16-bit and packed perplexity of the real model over the first 8 windows of the full protocol.

    Over all 124,684 tokens, `nf4 eval` gives 25.25 for the 16-bit weights.
    """
    text = (shared / "data" / "wiki_en_valid.txt").read_text(encoding="utf-8")
    results = {}
    for kind, options in (("kept", CompileOptions(exclude=("*",))), ("packed", CompileOptions())):
        path = tmp_path / f"{kind}.nf4"
        compile_checkpoint(shared / "models" / "wiki-llama-16m", path, options)
        model = nf4.load(path)
        tokenizer = Tokenizer.from_file(model.source)
        ids = encode_documents(tokenizer, text)
        assert len(ids) // 511 * 511 == 124_684
        results[kind] = perplexity(model, ids, 512, bos_id=tokenizer.bos_id, max_tokens=4_088)
    assert results["kept"].tokens == results["packed"].tokens == 4_088
    assert results["kept"].perplexity < results["packed"].perplexity < 1.06 * results["kept"].perplexity
