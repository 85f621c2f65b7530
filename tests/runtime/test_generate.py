"""Greedy generation against transformers; random choice; batches; streams."""

from __future__ import annotations

import pytest
import torch

import nf4
from nf4.errors import LoadError
from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM
from nf4.text.generate import generate, stream_text
from nf4.text.sampling import Sampler, Sampling
from nf4.text.tokenizer import Tokenizer

PROMPTS = [[5, 9, 60], [11] * 9 + [40, 41], [200]]


@pytest.fixture(scope="module")
def pair(family_config):
    """(transformers model, ours), fp32, with weights so large that every prompt leads somewhere else."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = family_config("mistral", sliding_window=8)
    torch.manual_seed(0)
    fields = {k: v for k, v in values.items() if k not in ("model_type", "architectures", "dtype")}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **fields)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(6.0) if parameter.ndim == 2 else None
    ours = CausalLM(ModelConfig.from_dict(values)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_greedy_batch_equals_transformers(pair):
    theirs, ours = pair
    results = generate(ours, PROMPTS, max_new_tokens=24)
    assert len({tuple(result) for result in results}) == len(PROMPTS)
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=None
        )
        assert result == expected[0, len(prompt) :].tolist()


def test_each_text_ends_at_its_own_end_token(pair):
    _, ours = pair
    free = generate(ours, PROMPTS, max_new_tokens=12)
    end = free[0][4]
    steps = []
    results = generate(ours, PROMPTS, max_new_tokens=12, eos_ids={end}, on_step=steps.append)
    expected = [text[: text.index(end)] if end in text else text for text in free]
    assert results == expected
    assert len(results[0]) == free[0].index(end)
    assert [step[0] for step in steps][: len(results[0]) + 1] == [*results[0], None]


def test_sampling_repeats_by_seed_alone(pair):
    _, ours = pair

    def draw(seed):
        sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=seed)
        return generate(ours, PROMPTS, max_new_tokens=10, sampling=sampling)

    torch.manual_seed(1)
    first = draw(7)
    torch.manual_seed(2)
    assert draw(7) == first
    assert draw(8) != first


def test_frequencies_follow_the_probabilities():
    logits = torch.log(torch.tensor([0.05, 0.5, 0.15, 0.3]))
    rows = logits.expand(20000, 4)

    def shares(**settings):
        return Sampler(Sampling(**settings))(rows).bincount(minlength=4) / len(rows)

    def close(got, expected):
        return (got - torch.tensor(expected)).abs().max() < 0.015

    assert close(shares(temperature=1.0), [0.05, 0.5, 0.15, 0.3])
    assert close(shares(temperature=0.5), [0.0068, 0.6849, 0.0616, 0.2466])
    assert close(shares(temperature=1.0, top_k=2), [0, 0.625, 0, 0.375])
    assert close(shares(temperature=1.0, top_p=0.79), [0, 0.625, 0, 0.375])
    assert close(shares(temperature=1.0, top_p=0.81), [0, 0.5263, 0.1579, 0.3158])
    assert close(shares(temperature=1.0, top_p=0.01), [0, 1, 0, 0])
    assert close(shares(temperature=0.0), [0, 1, 0, 0])


def test_stream_is_the_decoded_text(make_packed):
    model = nf4.load(make_packed("llama"), dtype="float32")
    tokenizer = Tokenizer.from_file(model.source)
    sampling = Sampling(temperature=2.0, seed=3)
    pieces = list(stream_text(model, tokenizer, "the cat", max_new_tokens=30, sampling=sampling))
    ids = tokenizer.encode("the cat")
    new = generate(model, [ids], max_new_tokens=30, sampling=sampling, eos_ids=tokenizer.eos_ids)[0]
    assert len(pieces) > 5
    assert "".join(pieces) == tokenizer.decode(ids + new)[len("the cat") :]


def test_bad_requests(pair):
    _, ours = pair
    for prompts, message in (
        ([], "no prompt"),
        ([[3], []], "the prompt has no tokens"),
        ([[3, 320]], "expected 0 to 319, got 3 to 320"),
    ):
        with pytest.raises(LoadError, match=message):
            generate(ours, prompts)
    for settings in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}):
        with pytest.raises(LoadError, match=next(iter(settings)).replace("_", "-")):
            Sampling(**settings)
