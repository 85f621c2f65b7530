"""Exported directories in transformers, bitsandbytes, PEFT and safetensors."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from nf4.errors import LoadError
from nf4.export import export_bnb, skip_modules
from nf4format import reference
from nf4format.container import Nf4File
from nf4format.errors import Nf4Error

IDS = torch.arange(3, 43).view(2, 20)

CASES = {
    "llama": ("llama", {}, {}),
    "llama-excluded": ("llama", {}, {"exclude": ("*layers.1.mlp*", "*k_proj*")}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}, {}),
    "qwen2-tied-excluded": ("qwen2", {"tie_word_embeddings": True}, {"exclude": ("*o_proj*",)}),
    "qwen3-head": ("qwen3", {}, {"quantize_head": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_logits_equal_those_of_our_decoded_weights(make_packed, tmp_path, case):
    from transformers import AutoModelForCausalLM

    family, fields, options = CASES[case]
    path = make_packed(family, options=options, **fields)
    with Nf4File.open(path) as file:
        assert export_bnb(file, tmp_path / "out")
        decoded = {
            name: torch.from_numpy(reference.dequantize(file.packed(name)))
            .view(torch.bfloat16)
            .view(file.packed(name).shape)
            for name in file.packed_names
        }
    # In training mode bitsandbytes decodes and multiplies, the same on every CPU. In evaluation mode, CPUs
    # with bfloat16 instructions get another kernel, with a rounding of its own, that refuses many shapes.
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "out").train()
    quantized.enable_input_require_grads()
    linears = {
        f"{name}.weight": type(module).__name__
        for name, module in quantized.named_modules()
        if hasattr(module, "in_features")
    }
    assert {name for name, kind in linears.items() if kind == "Linear4bit"} == set(decoded)

    folder = tmp_path / path.stem
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.load_state_dict(decoded, strict=False)
    ids = IDS.to(quantized.device)  # transformers puts 4-bit models on a GPU where there is one
    expected = plain.to(ids.device)(ids).logits
    assert expected.dtype == torch.bfloat16
    assert torch.equal(quantized(ids).logits, expected)


def test_the_directory(make_packed, tmp_path):
    from safetensors import safe_open

    path = make_packed("llama")
    with Nf4File.open(path) as file:
        export_bnb(file, tmp_path / "out")
        names = set(file.header.entries)
        tokenizer = file.file("tokenizer.json")
    weights = tmp_path / "out" / "model.safetensors"
    assert weights.samefile(path)
    with safe_open(weights, "pt") as opened:
        assert set(opened.keys()) == names
        assert opened.get_tensor("model.norm.weight").dtype == torch.bfloat16
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"] == {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def test_peft_trains_on_it(make_packed, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with Nf4File.open(make_packed("llama")) as file:
        export_bnb(file, tmp_path / "out")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    ids = IDS.to(model.device)
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_our_adapter_gives_the_same_logits_in_peft_on_it(make_packed, tmp_path):
    import bitsandbytes
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import nf4
    from nf4.lora import LoraConfig, add_lora, lora_layers

    path = make_packed("llama")
    with Nf4File.open(path) as file:
        export_bnb(file, tmp_path / "out")
    ours = nf4.load(path, dtype="float32")
    add_lora(ours, LoraConfig(rank=4, alpha=8.0))
    torch.manual_seed(0)
    for _, layer in lora_layers(ours):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    nf4.save_adapter(ours, tmp_path / "adapter")

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for module in base.modules():  # all in float32, as ours, to tell rounding from mistakes
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    ids = IDS.to(base.device)
    without = base.train()(ids).logits
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").train()
    with torch.no_grad():
        expected = ours(IDS).to(ids.device)
        assert (theirs(input_ids=ids).logits - expected).abs().max() < 1e-4
    assert (without - expected).abs().max() > 0.1  # the adapter matters


def test_modules_left_in_16_bits_are_listed_where_they_are_not_the_default(make_packed):
    def listed(family="llama", options=None, **fields):
        with Nf4File.open(make_packed(family, options=options, **fields)) as file:
            return skip_modules(file)

    assert listed() is None
    assert listed(tie_word_embeddings=True) is None
    assert listed(options={"quantize_head": True}) == ["model.embed_tokens"]
    up = "model.layers.1.mlp.up_proj"
    assert listed(options={"exclude": (f"{up}*",)}) == ["lm_head", "model.embed_tokens", up]
    tied = listed(options={"exclude": (f"{up}*",)}, tie_word_embeddings=True)
    assert tied == ["lm_head", "model.embed_tokens", up]


def test_nothing_packed_is_an_ordinary_checkpoint(make_packed, tmp_path):
    with Nf4File.open(make_packed("llama", options={"exclude": ("*",)})) as file:
        export_bnb(file, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == file.config


def test_packed_experts_are_refused(tmp_path):
    """transformers fuses experts of a checkpoint into one tensor; with packed ones its load fails."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from qcompile.options import CompileOptions
    from qcompile.pipeline import compile_checkpoint

    shape = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "mixtral", num_key_value_heads=2, vocab_size=300, num_local_experts=2, **shape
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    compile_checkpoint(tmp_path / "moe", tmp_path / "all.nf4")
    with Nf4File.open(tmp_path / "all.nf4") as file, pytest.raises(LoadError, match=r"'\*\.experts\.\*'"):
        export_bnb(file, tmp_path / "out")
    compile_checkpoint(tmp_path / "moe", tmp_path / "some.nf4", CompileOptions(exclude=("*.experts.*",)))
    with Nf4File.open(tmp_path / "some.nf4") as file:
        export_bnb(file, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").train()
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert model(IDS.to(model.device)).logits.isfinite().all()


def test_other_levels_run_here_and_are_not_exported(make_packed, tmp_path):
    """The runtime decodes by the file's own table; bitsandbytes would take NF4's."""
    import nf4

    path = make_packed("llama", options={"levels": "int4"})
    with Nf4File.open(path) as file:
        with pytest.raises(LoadError, match="bitsandbytes decodes NF4's levels alone"):
            export_bnb(file, tmp_path / "out")
        name = "model.layers.0.mlp.up_proj.weight"
        packed = file.packed(name)
        x = torch.randn(5, packed.shape[1], generator=torch.Generator().manual_seed(0))
        expected = reference.linear(x.double().numpy(), packed)
    assert not (tmp_path / "out").exists()
    layer = nf4.load(path, dtype="float32").get_submodule(name.removesuffix(".weight"))
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_transposed_weights_are_refused(make_packed, tmp_path):
    with Nf4File.open(make_packed("llama")) as file:
        file.config["model_type"] = "gpt2"
        with pytest.raises(LoadError, match=r"gpt2 are stored transposed.*--exclude"):
            export_bnb(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals_leave_nothing(make_packed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    message = r"embed_tokens.weight': an NF4 embedding.*--quantize-embeddings"
    packed = make_packed("llama", options={"quantize_embeddings": True})
    with Nf4File.open(packed) as file, pytest.raises(LoadError, match=message):
        export_bnb(file, out)
    assert not out.exists()
    with Nf4File.open(make_packed("llama")) as file:
        with pytest.raises(Nf4Error, match="there is no directory"):
            export_bnb(file, tmp_path / "missing" / "out")
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        with pytest.raises(Nf4Error, match="not empty"):
            export_bnb(file, out)
        assert [child.name for child in out.iterdir()] == ["mine.txt"]

        def refuse(*_):
            raise OSError("links are not supported here")

        monkeypatch.setattr(os, "link", refuse)
        assert not export_bnb(file, tmp_path / "copied")
        assert (tmp_path / "copied" / "model.safetensors").read_bytes() == file.path.read_bytes()
