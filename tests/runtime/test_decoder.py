"""The decoder against transformers: the same random weights, logits compared in fp32."""

from __future__ import annotations

import pytest
import torch

from nf4.model.attention import attention_bias
from nf4.model.cache import KVCache
from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM

CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama3-scaling": ("llama3", {}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 5, "head_dim": 16}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-bias": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 16}),
}
LENGTHS = (3, 17, 11)


@pytest.fixture(scope="module", params=CASES)
def pair(request, family_config):
    """(transformers model, ours) with equal random fp32 weights, norms and biases included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, overrides = CASES[request.param]
    values = family_config(family, **overrides)
    torch.manual_seed(1)
    arguments = {k: v for k, v in values.items() if k not in ("model_type", "architectures", "dtype")}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(values["model_type"], **arguments)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            # large enough that logits spread over several units and a wrong angle or mask shows
            parameter.mul_(3.0) if parameter.ndim == 2 else parameter.add_(0.2 * torch.randn_like(parameter))
    ours = CausalLM(ModelConfig.from_dict(values)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 320, (1, length), generator=generator) for length in LENGTHS]


def padded(prompts, side):
    """The prompts in one batch, [B, T] ids and mask, with token 0 as padding."""
    width = max(p.shape[1] for p in prompts)
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        length = prompt.shape[1]
        part = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, part], mask[row, part] = prompt[0], 1
    return ids, mask


@torch.no_grad()
def test_logits_equal_transformers(pair, prompts):
    theirs, ours = pair
    for prompt in prompts:
        expected = theirs(prompt).logits
        assert expected.std() > 0.1
        assert (ours(prompt) - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_transformers_on_single_prompts(pair, prompts, side):
    theirs, ours = pair
    ids, mask = padded(prompts, side)
    logits = ours(ids, attention_mask=mask)
    assert logits.isfinite().all()
    for row, prompt in enumerate(prompts):
        real = logits[row][mask[row].bool()]
        assert (real - theirs(prompt).logits[0]).abs().max() < 1e-4


@torch.no_grad()
def test_cached_steps_equal_transformers(pair, prompts):
    """A left-padded prefill, then several tokens at once, then one by one; the cache grows on the way."""
    theirs, ours = pair
    ids, mask = padded(prompts, "left")
    cache = KVCache(ours.config, batch=len(prompts), capacity=4)
    parts = [ours(ids[:, a:b], attention_mask=mask[:, :b], cache=cache) for a, b in ((0, 9), (9, 13))]
    parts += [ours(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache) for t in range(13, 17)]
    logits = torch.cat(parts, dim=1)
    assert cache.length == ids.shape[1]
    for row, prompt in enumerate(prompts):
        real = logits[row][mask[row].bool()]
        assert (real - theirs(prompt).logits[0]).abs().max() < 1e-4


@torch.no_grad()
def test_cached_steps_without_mask(pair, prompts):
    theirs, ours = pair
    prompt = prompts[1]
    cache = KVCache(ours.config, batch=1)
    logits = torch.cat([ours(part, cache=cache) for part in prompt.split([6, 1, 4, 1, 5], dim=1)], dim=1)
    assert (logits - theirs(prompt).logits).abs().max() < 1e-4


def test_gradient_checkpointing_gives_the_same_gradients(pair, prompts):
    _, ours = pair
    ids, mask = padded(prompts, "right")
    gradients = []
    for recompute in (False, True):
        ours.passes.gradient_checkpointing = recompute
        ours.zero_grad()
        ours(ids, attention_mask=mask)[mask.bool()].logsumexp(-1).sum().backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    ours.passes.gradient_checkpointing = False
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_mask_is_built_only_where_needed():
    device = torch.device("cpu")
    right, left = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    assert attention_bias(None, 0, 3, None, device) is None
    assert attention_bias(None, 7, 1, 8, device) is None
    assert attention_bias(right, 0, 3, None, device) is None
    expected = [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]]
    assert attention_bias(left, 0, 3, None, device)[:, 0].long().tolist() == expected
    assert attention_bias(None, 2, 2, None, device)[0, 0].long().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert attention_bias(None, 2, 2, 2, device)[0, 0].long().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_wrong_shapes_are_refused(family_config):
    model = CausalLM(ModelConfig.from_dict(family_config("llama")))
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"expected shape \[2, 3\].*got \[2, 2\]"):
        model(ids, attention_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="expected 3 positions"):
        model(ids, position_ids=torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="made for 1 sequences, got input_ids of 2"):
        model(ids, cache=KVCache(model.config, batch=1))
