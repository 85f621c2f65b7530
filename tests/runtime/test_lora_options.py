"""Every kind of adapter beside PEFT's on the same weights: files in both directions, gradients, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import IDS, gradients, moved, same_in_ours, transformers_model
from torch import Tensor, nn

import nf4
from nf4.adapters import load_adapter, save_adapter
from nf4.errors import TrainError
from nf4.lora import LoraConfig, add_lora, lora_layers
from nf4.lora.attach import has_adapter
from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM
from nf4.model.linear import NF4Embedding, NF4Linear
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

PATTERNS = {"ranks": {"q_proj": 2, "layers.1.mlp.*": 5}, "alphas": {"v_proj": 3.5}}

# Ours, and PEFT's settings of the same name; targets are all linear layers of both.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patterns": (
        PATTERNS | {"rslora": True},
        {
            "rank_pattern": {"q_proj": 2, r"layers\.[1-9]\.mlp\.(up|gate|down)_proj": 5},
            "alpha_pattern": {".*v_pro[j]": 3.5},
            "use_rslora": True,
        },
    ),
    "bias of adapted layers": ({"bias": "lora_only", "targets": ("q_proj", "mlp.*")}, {"bias": "lora_only"}),
    "all biases": ({"bias": "all", "targets": ("q_proj", "mlp.*")}, {"bias": "all"}),
    "bias of B": ({"lora_bias": True}, {"lora_bias": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "dora with all else": (
        {"dora": True, "bias": "all", "rslora": True, **PATTERNS},
        {"use_dora": True, "bias": "all", "use_rslora": True, "rank_pattern": {"v_proj": 3}},
    ),
    "head and embedding": (
        {"modules_to_save": ("lm_head", "embed_tokens")},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "norms": (
        {"modules_to_save": ("model.norm", "layers.0.input_layernorm")},
        {"modules_to_save": ["norm"]},
    ),
    "a linear layer with its bias": (
        {"modules_to_save": ("layers.1.self_attn.q_proj",), "dora": True},
        {"modules_to_save": ["layers.1.self_attn.q_proj"], "use_dora": True},
    ),
    "gaussian": ({"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_our_file_in_peft_and_again_in_ours(
    option: str, biased_config: dict[str, Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    base = transformers_model(biased_config)
    ours, again = same_in_ours(biased_config, base), same_in_ours(biased_config, base)
    before = ours(IDS)
    add_lora(ours, LoraConfig(rank=4, alpha=8, **OPTIONS[option][0]))
    torch.testing.assert_close(ours(IDS), before, rtol=1e-5, atol=1e-5)
    moved(ours)
    logits = ours(IDS)
    assert (logits - before).abs().max() > 1e-2
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(IDS).logits, logits, rtol=1e-4, atol=1e-5)

    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(IDS), logits)
    save_adapter(again, tmp_path / "copy")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@pytest.mark.parametrize("option", OPTIONS)
def test_peft_file_in_ours_and_its_gradients(
    option: str, biased_config: dict[str, Any], tmp_path: Path
) -> None:
    import peft

    base = transformers_model(biased_config)
    ours = same_in_ours(biased_config, base)
    settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6} | OPTIONS[option][1]
    if "targets" in OPTIONS[option][0]:
        settings["target_modules"] = ["q_proj", "up_proj", "gate_proj", "down_proj"]
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    moved(theirs)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    weights = torch.linspace(-1, 1, 320)
    expected = theirs.eval()(IDS).logits
    logits = ours(IDS)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)

    for values in (expected, logits):
        (values * weights).square().sum().backward()
    found = gradients(ours)
    wanted = {
        name.replace(".default", "").replace("base_model.model.", "", 1): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert len(found) == len(wanted)
    for name, gradient in found.items():
        reference = wanted[peft_name(name, ours)]
        assert reference is not None
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item())


def peft_name(name: str, ours: nn.Module) -> str:
    """Of a parameter, as PEFT's modules have it without the adapter's name."""
    path, _, leaf = name.rpartition(".")
    kind = type(ours.get_submodule(path)).__name__
    if kind == "LoRALinear":
        leaf = {
            "lora_A": "lora_A.weight",
            "lora_B": "lora_B.weight",
            "lora_bias": "lora_B.bias",
            "bias": "base_layer.bias",
            "lora_magnitude": "lora_magnitude_vector.weight",
        }[leaf]
    elif kind != "BiasedLinear":
        leaf = f"modules_to_save.{leaf}"
    return f"{path}.{leaf}"


def test_dropout_with_dora_is_pefts(biased_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same mask in both: every second element is dropped."""
    import peft

    base = transformers_model(biased_config)
    ours = same_in_ours(biased_config, base)
    settings = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 6, "lora_dropout": 0.5}
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, init_lora_weights="olora", **settings)
    )
    add_lora(
        ours,
        LoraConfig(rank=4, alpha=6, dropout=0.5, dora=True, init="olora", targets=("q_proj", "down_proj")),
    )

    def half(*shape: Any, **_: Any) -> Tensor:
        return torch.arange(torch.Size(*shape).numel()).view(*shape) % 2 * 1.0

    monkeypatch.setattr(torch, "rand", half)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x * (half(x.shape) >= 0.5) * 2)
    torch.testing.assert_close(ours.train()(IDS), theirs.train()(IDS).logits, rtol=1e-4, atol=1e-5)


PACKED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "untied": ("qwen2", {}, {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}, {}),
    "all packed": ("llama", {}, {"quantize_head": True, "quantize_embeddings": True}),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_base_computes_and_trains_as_peft_on_its_decoded_weights(
    case: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    family, overrides, options = PACKED[case]
    folder = make_checkpoint(family, hidden_size=64, intermediate_size=96, num_hidden_layers=2, **overrides)
    compile_checkpoint(folder, tmp_path / "a.nf4", CompileOptions(**options))
    model = nf4.load(tmp_path / "a.nf4", dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            dense.get_submodule(name).weight.data.copy_(module.dequantize())
        elif isinstance(module, NF4Embedding):
            dense.get_submodule(name).weight.data.copy_(module(torch.arange(320)))
    before = model(IDS)
    config = LoraConfig(
        rank=4, alpha=8, dora=True, bias="all", init="pissa", modules_to_save=("embed_tokens", "model.norm")
    )
    add_lora(model, config)
    torch.testing.assert_close(model(IDS), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense(IDS).logits, before, rtol=1e-4, atol=1e-4)
    moved(model)
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(dense, tmp_path / "adapter", is_trainable=True).eval()
    logits = model(IDS)
    torch.testing.assert_close(theirs(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    loaded = nf4.load(tmp_path / "a.nf4", dtype="float32", adapter=tmp_path / "adapter")
    torch.testing.assert_close(loaded(IDS), logits, rtol=1e-4, atol=1e-4)
    for model_logits in (loaded(IDS), theirs(IDS).logits):
        model_logits.square().sum().backward()
    for name, layer in lora_layers(loaded):
        other = theirs.base_model.model.get_submodule(name)
        pairs = [
            (layer.lora_A, other.lora_A["default"].weight),
            (layer.lora_magnitude, other.lora_magnitude_vector["default"].weight),
        ]
        for mine, reference in pairs:
            assert mine is not None
            scale = reference.grad.abs().max().item()
            torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-3, atol=1e-4 * scale)


def test_bf16_adapters_of_every_part(biased_config: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = transformers_model(biased_config)
    ours, again = same_in_ours(biased_config, base), same_in_ours(biased_config, base)
    add_lora(
        ours,
        LoraConfig(
            rank=4, dtype="bfloat16", bias="all", dora=True, init="olora", modules_to_save=("lm_head",)
        ),
    )
    moved(ours)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.bfloat16}
    ours(IDS).square().mean().backward()
    assert {g.dtype for g in gradients(ours).values()} == {torch.bfloat16}
    save_adapter(ours, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(IDS), ours(IDS), rtol=1e-4, atol=1e-5)


def test_norms_of_dora_are_kept_in_evaluation_only(biased_config: dict[str, Any]) -> None:
    model = same_in_ours(biased_config, transformers_model(biased_config))
    add_lora(model, LoraConfig(rank=4, dora=True))
    moved(model)
    with torch.no_grad():
        first = model(IDS)
        assert torch.equal(model(IDS), first)
        moved(model)
        changed = model(IDS)
    assert (changed - first).abs().max() > 1e-2
    torch.testing.assert_close(changed, model(IDS))
    torch.testing.assert_close(changed, model.train()(IDS))


def test_a_row_of_zeros_has_no_direction_and_does_no_harm() -> None:
    base = nn.Linear(6, 8)
    base.weight.data[3] = 0
    model = nn.ModuleDict({"q_proj": base})
    add_lora(model, LoraConfig(rank=2, dora=True))
    x = torch.randn(4, 6)
    y = model["q_proj"](x)
    torch.testing.assert_close(y, base(x))
    y.sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "some"}, "bad LoRA bias, expected one of none, all, lora_only, got some"),
        ({"dtype": "float16"}, "bad LoRA dtype, expected one of float32, bfloat16"),
        ({"init": "pissa_niter_"}, "unknown LoRA initial values"),
        ({"dora": True, "lora_bias": True}, "DoRA has no bias of B"),
        ({"modules_to_save": ("score",)}, "target 'score' matches no module that can train in full"),
        ({"ranks": {"x_proj": 3}}, "rank pattern 'x_proj' matches no adapted layer"),
        ({"alphas": {"lm_head": 3}}, "alpha pattern 'lm_head' matches no adapted layer"),
        ({"targets": ("lm_head",), "modules_to_save": ("lm_head",)}, "no layer is left for LoRA"),
        ({"init": "pissa", "rank": 33}, "rank for 'pissa' initial values, expected at most 32"),
        ({"init": "olora", "ranks": {"1.mlp.down_proj": 33}}, "1.mlp.down_proj': rank for 'olora' initial"),
    ],
)
def test_options_that_cannot_be_are_refused(
    settings: dict[str, Any], message: str, biased_config: dict[str, Any]
) -> None:
    model = CausalLM(ModelConfig.from_dict(biased_config))
    with pytest.raises(TrainError, match=message):
        add_lora(model, LoraConfig(**settings))
    assert not has_adapter(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
