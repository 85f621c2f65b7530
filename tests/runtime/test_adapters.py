"""Adapter directories against PEFT, in both directions, and every refusal."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import same_in_ours, transformers_model
from safetensors.torch import load_file, save_file

import nf4
from nf4.adapters import load_adapter, save_adapter
from nf4.errors import LoadError, TrainError
from nf4.lora import LoraConfig, add_lora, lora_layers
from nf4.lora.attach import has_adapter
from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM
from nf4.model.linear import NF4Linear
from nf4format.adapter import read_adapter
from nf4format.container import Nf4File
from nf4format.errors import FormatError, Nf4Error
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[1, 17, 33, 250, 4, 9, 77]])


@pytest.fixture(scope="module")
def small_config(family_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return family_config("llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, dtype="float32")


@pytest.fixture
def peft_base(small_config: dict[str, Any]) -> Any:
    return transformers_model(small_config)


@pytest.fixture
def ours(small_config: dict[str, Any], peft_base: Any) -> CausalLM:
    """Our model with the same weights."""
    return same_in_ours(small_config, peft_base)


def trained(model: CausalLM, config: LoraConfig) -> CausalLM:
    """An adapter whose B is not zero, as after training."""
    add_lora(model, config, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4, alpha=8),
        LoraConfig(rank=3, alpha=8, rslora=True, targets=("q_proj", "mlp.*")),
        LoraConfig(rank=2, alpha=5.5, targets=("layers.1.*", "lm_head")),
        LoraConfig(
            rank=4,
            alpha=8,
            ranks={"model.layers.0.self_attn.q_proj": 7},
            alphas={"model.layers.1.mlp.up_proj": 3.0},
        ),
    ],
    ids=["all-linear", "rslora", "some layers", "patterns"],
)
def test_our_adapter_computes_the_same_in_peft_and_again_in_ours(
    config: LoraConfig, ours: CausalLM, peft_base: Any, small_config: dict[str, Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    before = ours(IDS)
    again = CausalLM(ModelConfig.from_dict(small_config))
    again.load_state_dict(ours.state_dict())
    logits = trained(ours, config)(IDS)
    assert (logits - before).abs().max() > 1e-2
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(peft_base, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(IDS).logits, logits, rtol=1e-4, atol=1e-5)

    load_adapter(again.eval(), tmp_path / "adapter")
    assert torch.equal(again(IDS), logits)
    save_adapter(again, tmp_path / "copy")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "r": 4, "lora_alpha": 6},
        {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 6, "use_rslora": True},
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "k_proj": 3},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 20},
        },
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
        {"target_modules": r".*\.[qv]_proj"},
    ],
    ids=["all-linear", "rslora", "patterns", "one layer", "regex"],
)
def test_peft_adapter_computes_the_same_in_ours(
    settings: dict[str, Any], ours: CausalLM, peft_base: Any, tmp_path: Path
) -> None:
    import peft

    torch.manual_seed(3)
    theirs = peft.get_peft_model(peft_base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-5)


def test_config_holds_only_keys_in_use(ours: CausalLM, tmp_path: Path) -> None:
    save_adapter(trained(ours, LoraConfig(rank=4, alpha=8)), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "bias": "none",
        "inference_mode": True,
    }


def test_nothing_or_numbers_gone_wrong_are_not_saved(ours: CausalLM, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="has no adapter to save"):
        save_adapter(ours, tmp_path / "a")
    trained(ours, LoraConfig(rank=4))
    next(lora_layers(ours))[1].lora_A.data[0, 0] = torch.nan
    with pytest.raises(
        TrainError,
        match=r"a: tensor '.*layers.0.self_attn.q_proj.lora_A.weight': the adapter is not finite",
    ):
        save_adapter(ours, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.fixture
def adapter_path(ours: CausalLM, small_config: dict[str, Any], tmp_path: Path) -> Path:
    """An adapter on q_proj; `ours` is left without it."""
    model = CausalLM(ModelConfig.from_dict(small_config))
    save_adapter(trained(model, LoraConfig(rank=4, alpha=8, targets=("q_proj",))), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_qalora": True}, r'"use_qalora" is not supported, got true; only LoRA and DoRA on linear'),
        ({"use_dora": True}, r"q_proj.lora_magnitude_vector': missing"),
        ({"use_dora": 1}, r"bad use_dora, got 1"),
        ({"use_dora": True, "lora_bias": True}, r"DoRA has no bias of B"),
        ({"lora_bias": True}, r"q_proj.lora_B.bias': missing"),
        ({"modules_to_save": ["lm_head"]}, r"model.lm_head.weight': missing"),
        ({"modules_to_save": ["score"]}, r'modules_to_save "score": the model has no such module'),
        (
            {"modules_to_save": ["mlp"]},
            r'modules_to_save "model.layers.0.mlp" is not supported, expected',
        ),
        ({"modules_to_save": "lm_head"}, r'modules_to_save, expected a list of names, got "lm_head"'),
        ({"modules_to_save": [""]}, r"modules_to_save, expected a list of names"),
        ({"modules_to_save": ["x"] * 20000}, r"modules_to_save: too many entries"),
        ({"modules_to_save": ["q_proj"]}, r"q_proj': a module with LoRA that is also trained in full"),
        ({"a_new_idea": 3}, r'"a_new_idea" is not supported, got 3'),
        ({"fan_in_fan_out": True}, r'"fan_in_fan_out" is not supported'),
        ({"bias": "some"}, r'bias, expected one of none, all, lora_only, got "some"'),
        ({"bias": ["all"]}, r'bias, expected one of none, all, lora_only, got \["all"\]'),
        (
            {"init_lora_weights": "pissa"},
            r'initial values that change the base are not supported, got .*"pissa"; conv',
        ),
        (
            {"rank_pattern": {"(?=a)": 3}},
            r"""rank_pattern "\(\?=a\)": '\(\?' is not supported""",
        ),
        ({"rank_pattern": {"(a{900}){900}": 3}}, r"too large an expression"),
        ({"rank_pattern": {f"[q]_{i}+": 3 for i in range(200)}}, r"too many, or too large, regular expr"),
        ({"rank_pattern": {"[qk]_pro(j|k)": 3}}, r"expected \[3, 32\], got \[4, 32\]"),
        ({"lora_alpha": 10**400}, r"bad LoRA alpha"),
        ({"rank_pattern": {"q_proj": "3"}}, r'rank_pattern "q_proj", expected a number, got "3"'),
        ({"rank_pattern": {"q_proj": 0}}, r"bad LoRA rank, expected at least 1, got 0"),
        ({"alpha_pattern": [3]}, r"alpha_pattern, expected an object, got \[3\]"),
        ({"lora_dropout": "0"}, r'bad lora_dropout, got "0"'),
        ({"lora_dropout": 2}, r"bad LoRA dropout"),
        ({"r": 5}, r"q_proj.lora_A.weight': shape does not fit the model, expected \[5, 32\], got \[4, 32\]"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"v_proj.lora_A.weight': missing; save the adapter again"),
    ],
)
def test_settings_that_would_compute_something_else_are_refused(
    changes: dict[str, Any], message: str, ours: CausalLM, adapter_path: Path
) -> None:
    file = adapter_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(LoadError, match=message):
        load_adapter(ours, adapter_path)
    assert list(lora_layers(ours)) == []


def test_other_kinds_of_adapter_are_refused(ours: CausalLM, adapter_path: Path) -> None:
    file = adapter_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "IA3"}))
    with pytest.raises(FormatError, match="peft_type, expected 'LORA', got 'IA3'"):
        load_adapter(ours, adapter_path)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(Q0), r"layers.0.self_attn.q_proj.lora_A.weight': missing"),
        (
            lambda t: t.update({Q0.replace("q_proj", "x_proj"): t[Q0].clone()}),
            r"x_proj.*has no such linear layer; use the base",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": t[Q0].clone()}),
            r"lm_head.weight': shape does not fit the model, expected \[320, 32\], got \[4, 32\]",
        ),
        (lambda t: t.update({Q0: t[Q0][:, :-1].contiguous()}), r"expected \[4, 32\], got \[4, 31\]"),
        (lambda t: t.update({Q0: t[Q0].to(torch.int32)}), r"dtype, expected F32 or F16 or BF16, got I32"),
        (lambda t: t.update({Q0: t[Q0] * torch.inf}), r"not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    edit: Callable[[dict[str, torch.Tensor]], Any], message: str, ours: CausalLM, adapter_path: Path
) -> None:
    file = adapter_path / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(LoadError, match=message):
        load_adapter(ours, adapter_path)
    assert list(lora_layers(ours)) == []


def test_any_junk_in_a_directory_is_told_and_changes_nothing(
    ours: CausalLM, small_config: dict[str, Any], tmp_path: Path
) -> None:
    """Settings and names of tensors of an adapter that uses every option, each replaced by what it is not."""
    every = LoraConfig(
        rank=4, dora=True, bias="all", ranks={"q_proj": 2}, modules_to_save=("lm_head",), rslora=True
    )
    save_adapter(trained(CausalLM(ModelConfig.from_dict(small_config)), every), tmp_path / "a")
    file, weights = tmp_path / "a" / "adapter_config.json", tmp_path / "a" / "adapter_model.safetensors"
    config, tensors = json.loads(file.read_text()), load_file(weights)
    junk = [
        None,
        True,
        -1,
        10**400,
        1e308,
        "",
        "x" * 10**5,
        ["q_proj", 3],
        [[]],
        {"": 3},
        {"(": 2},
        {"q": []},
    ]
    draw = random.Random(0)
    refused = 0
    for key in [*config, "lora_bias", "alpha_pattern", "init_lora_weights", "exclude_modules", "x"]:
        for value in junk:
            file.write_text(json.dumps({**config, key: value}))
            refused += is_refused(ours, tmp_path / "a")
    assert refused > 100
    file.write_text(json.dumps(config))
    for _ in range(40):
        name = draw.choice(list(tensors))
        changed = {key: value for key, value in tensors.items() if key != name}
        cut = draw.randrange(len(name))
        other = draw.choice([name[:cut], name[cut:], name + ".weight", name.replace("A", "B")])
        changed[other or "x"] = tensors[name]
        save_file(changed, weights)
        is_refused(ours, tmp_path / "a")


def is_refused(model: CausalLM, path: Path) -> bool:
    """Loads an adapter into a copy of the model; only errors of ours may come out."""
    copied = copy.deepcopy(model)
    try:
        load_adapter(copied, path)
    except Nf4Error as error:
        assert len(str(error)) < 2000
        assert not has_adapter(copied)
        return True
    return False


def test_sixteen_bit_weights_become_fp32_and_a_second_adapter_is_refused(
    ours: CausalLM, adapter_path: Path
) -> None:
    file = adapter_path / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    load_adapter(ours, adapter_path)
    assert {p.dtype for _, layer in lora_layers(ours) for p in layer.parameters()} == {torch.float32}
    with pytest.raises(LoadError, match="has an adapter already"):
        load_adapter(ours, adapter_path)


def packed(folder: Path, out: Path, model: CausalLM, **options: Any) -> CausalLM:
    """A dense stand-in for the checkpoint, standing on the file compiled from it."""
    compile_checkpoint(folder, out, CompileOptions(**options))
    base = copy.deepcopy(model)
    base.source = Nf4File.open(out)
    return base


def test_adapter_stays_with_its_base(
    ours: CausalLM, make_checkpoint: Callable[..., Path], small_config: dict[str, Any], tmp_path: Path
) -> None:
    sizes = {key: small_config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    checkpoint, other = make_checkpoint("llama", seed=0, **sizes), make_checkpoint("llama", seed=1, **sizes)
    base = packed(checkpoint, tmp_path / "a.nf4", ours)
    same = packed(checkpoint, tmp_path / "b.nf4", ours)
    recompiled = packed(checkpoint, tmp_path / "c.nf4", ours, exclude=("*",))
    foreign = packed(other, tmp_path / "d.nf4", ours)
    save_adapter(trained(base, LoraConfig(rank=4)), tmp_path / "adapter")

    load_adapter(same, tmp_path / "adapter")
    with pytest.raises(
        LoadError, match=r"same checkpoint compiled with other options, expected base .*c\.nf4 = "
    ):
        load_adapter(recompiled, tmp_path / "adapter")
    with pytest.raises(
        LoadError, match=r"trained on another base, .*; use the file it was trained on, or force"
    ):
        load_adapter(foreign, tmp_path / "adapter")
    load_adapter(foreign, tmp_path / "adapter", force=True)
    load_adapter(ours, tmp_path / "adapter")  # a dense model names no base to compare with
    for model in (base, same, recompiled, foreign):
        assert model.source is not None
        model.source.close()


def test_adapter_without_a_base_is_not_asked_for_one(
    ours: CausalLM, adapter_path: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    assert read_adapter(adapter_path).metadata == {"format": "pt"}
    base = packed(make_checkpoint("llama"), tmp_path / "a.nf4", ours)
    load_adapter(base, adapter_path)
    assert base.source is not None
    base.source.close()


def test_adapter_on_a_packed_base_computes_the_same_in_peft(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT on a transformers model that holds our decoded weights, in fp32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    compile_checkpoint(folder, tmp_path / "a.nf4", CompileOptions())
    model = trained(nf4.load(tmp_path / "a.nf4", dtype="float32"), LoraConfig(rank=4, alpha=8))
    save_adapter(model, tmp_path / "adapter")
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    packed_layers = 0
    for name, layer in lora_layers(model):
        assert isinstance(layer.base, NF4Linear)
        dense.get_submodule(name).weight.data.copy_(layer.base.dequantize())
        packed_layers += 1
    assert packed_layers == 14
    theirs = PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)
    loaded = nf4.load(tmp_path / "a.nf4", dtype="float32", adapter=tmp_path / "adapter")
    assert torch.equal(loaded(IDS), model(IDS))
