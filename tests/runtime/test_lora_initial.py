"""Initial values out of the weight (PiSSA, OLoRA) beside PEFT's: products, training, what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import IDS, moved, same_in_ours, transformers_model
from torch import nn

from nf4.adapters import load_adapter, save_adapter
from nf4.lora import LoraConfig, add_lora, lora_layers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_40"])
@pytest.mark.parametrize("dora", [False, True])
def test_values_out_of_the_weight_train_as_in_peft_and_are_saved_as_plain_lora(
    init: str, dora: bool, biased_config: dict[str, Any], tmp_path: Path
) -> None:
    import peft

    plain = transformers_model(biased_config)
    base = transformers_model(biased_config)
    ours = same_in_ours(biased_config, plain)
    before = ours(IDS)
    add_lora(ours, LoraConfig(rank=4, alpha=6, init=init, dora=dora), seed=3)
    torch.testing.assert_close(ours(IDS), before, rtol=1e-4, atol=1e-5)
    torch.manual_seed(3)
    exact = init if "niter" not in init else "pissa"
    theirs = peft.get_peft_model(
        base,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules="all-linear",
            r=4,
            lora_alpha=6,
            init_lora_weights=exact,
            use_dora=dora,
        ),
    ).eval()
    coarse = 50 if "niter" in init else 1
    for name, layer in lora_layers(ours):
        other = theirs.base_model.model.get_submodule(name)
        product = other.lora_B["default"].weight @ other.lora_A["default"].weight
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, product, rtol=1e-3, atol=coarse * 1e-5)
    # A step of plain gradient descent is the same for every choice of signs of singular vectors.
    for _ in range(3):
        results = []
        for model, logits in ((ours, ours(IDS)), (theirs, theirs(IDS).logits)):
            model.zero_grad()
            (logits * torch.linspace(-1, 1, 320)).square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.add_(parameter.grad, alpha=-2.0)
            results.append(logits)
        torch.testing.assert_close(*results, rtol=1e-3, atol=coarse * 1e-4)
    logits = ours(IDS)
    assert (logits - before).abs().max() > 1e-2
    save_adapter(ours, tmp_path / "a")
    converted = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    torch.testing.assert_close(converted(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    again = same_in_ours(biased_config, transformers_model(biased_config))
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(IDS), logits, rtol=1e-4, atol=1e-5)
    assert {layer.rank for _, layer in lora_layers(again)} == {8}


def test_rank_stabilized_values_out_of_the_weight_keep_their_scaling(
    biased_config: dict[str, Any], tmp_path: Path
) -> None:
    ours, again = (same_in_ours(biased_config, transformers_model(biased_config)) for _ in range(2))
    config = LoraConfig(
        rank=4,
        alpha=6,
        rslora=True,
        init="olora",
        lora_bias=True,
        ranks={"q_proj": 2, "layers.1.mlp.*": 5},
        alphas={"v_proj": 3.5},
    )
    add_lora(ours, config)
    moved(ours)
    save_adapter(ours, tmp_path / "a")
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(IDS), ours(IDS), rtol=1e-4, atol=1e-5)


def test_exact_and_iterated_singular_vectors_span_the_same_space() -> None:
    torch.manual_seed(0)
    base = nn.Linear(60, 90, bias=False)
    with torch.no_grad():
        u, s, v = torch.linalg.svd(base.weight, full_matrices=False)
        base.weight.copy_(u @ torch.diag(s * torch.logspace(0, -2, 60)) @ v)
    products = []
    for init in ("pissa", "pissa_niter_12"):
        model = nn.ModuleDict({"q_proj": base})
        add_lora(model, LoraConfig(rank=6, alpha=3, init=init))
        ((_, layer),) = lora_layers(model)
        products.append(layer.scaling * layer.lora_B @ layer.lora_A)
    best = u[:, :6] @ torch.diag((s * torch.logspace(0, -2, 60))[:6]) @ v[:6]
    for product in products:
        torch.testing.assert_close(product, best, rtol=1e-3, atol=1e-5)
