"""Modules that train in full beside adapters: heads and embeddings, tied and not, beside PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import IDS, gradients, moved, same_in_ours, transformers_model

from nf4.adapters import load_adapter, save_adapter
from nf4.lora import LoraConfig, add_lora
from nf4.lora.attach import saved_modules
from nf4.training.loss import backward_loss, labelled_positions

pytestmark = pytest.mark.usefixtures("one_thread")


def test_tied_embeddings_train_as_the_one_matrix_that_they_are(
    biased_config: dict[str, Any], tmp_path: Path
) -> None:
    """Against transformers' own tied weight; PEFT reads two copies, and we one again."""
    from peft import PeftModel

    config = biased_config | {"tie_word_embeddings": True}
    base = transformers_model(config)
    for saved in (("embed_tokens",), ("lm_head",)):
        ours = same_in_ours(config, base)
        add_lora(ours, LoraConfig(rank=2, modules_to_save=saved))
        (_, embedding), (_, head) = saved_modules(ours)
        assert embedding.weight is head.weight
        base.requires_grad_(False)
        base.model.embed_tokens.weight.requires_grad_(True).grad = None
        for logits in (ours(IDS), base(IDS).logits):
            logits.square().sum().backward()
        expected = base.model.embed_tokens.weight.grad
        torch.testing.assert_close(embedding.weight.grad, expected, rtol=1e-3, atol=1e-4)
    moved(ours)
    logits = ours(IDS)
    save_adapter(ours, tmp_path / "a")
    again = same_in_ours(config, base)
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again(IDS), logits)
    (_, embedding), (_, head) = saved_modules(again)
    assert embedding.weight is head.weight
    theirs = PeftModel.from_pretrained(base, tmp_path / "a").eval()
    torch.testing.assert_close(theirs(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_an_embedding_that_peft_untied_stays_so(biased_config: dict[str, Any], tmp_path: Path) -> None:
    import peft

    config = biased_config | {"tie_word_embeddings": True}
    base = transformers_model(config)
    ours = same_in_ours(config, base)
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    moved(theirs)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ("lm_head", "q_proj"), "dora": True},
        {"targets": ("lm_head", "q_proj"), "lora_bias": True, "init": "olora"},
        {"modules_to_save": ("lm_head", "embed_tokens", "model.norm")},
    ],
    ids=str,
)
def test_the_chunked_loss_trains_every_kind_of_head(
    settings: dict[str, Any], biased_config: dict[str, Any]
) -> None:
    """It puts gradients in the place of logits: no backward of a head may need these."""
    model = same_in_ours(biased_config, transformers_model(biased_config))
    add_lora(model, LoraConfig(rank=4, **settings))
    moved(model)
    loss = torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    states, targets = labelled_positions(model.hidden_states(IDS), IDS)
    total = backward_loss(model.head, states, targets, 320, scale=1 / len(targets))
    torch.testing.assert_close(total.item() / len(targets), loss.item(), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_embeddings_saved_beside_lora_replace_the_bases_as_in_peft(
    biased_config: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT writes them where it takes the vocabulary for changed, without a word in the config."""
    import peft

    base = transformers_model(biased_config)
    ours = same_in_ours(biased_config, base)
    settings = {"target_modules": ["q_proj"], "init_lora_weights": False}
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.weight.add_(0.1)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-5)
