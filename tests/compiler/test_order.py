"""The order in the file is the order of the forward pass."""

import random

from qcompile.order import execution_key
from qcompile.roles import role_of


def _in_order(names: list[str]) -> list[str]:
    shuffled = random.Random(0).sample(names, len(names))
    return sorted(shuffled, key=lambda name: execution_key(name, role_of(name, (4096, 4096))))


def test_llama_in_forward_order_whatever_the_checkpoint_order() -> None:
    layer = [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.q_norm",
        "self_attn.k_norm",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{index}.{part}.weight" for index in (0, 1, 2, 10, 11) for part in layer]
    names += ["model.norm.weight", "lm_head.weight"]
    assert _in_order(names) == names


def test_gpt2_projections_of_the_same_name_stay_in_their_halves() -> None:
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    names = ["transformer.wpe.weight", "transformer.wte.weight"]
    names += [f"transformer.h.{index}.{part}.weight" for index in (2, 10) for part in parts]
    names += ["transformer.ln_f.weight"]
    assert _in_order(names) == names


def test_experts_follow_their_router_one_after_the_other() -> None:
    prefix = "model.layers.0.block_sparse_moe."
    names = [prefix + "gate.weight"]
    names += [
        f"{prefix}experts.{expert}.{part}.weight" for expert in (0, 1, 9, 10) for part in ("w1", "w3", "w2")
    ]
    assert _in_order(names) == names


def test_towers_and_encoders_come_before_what_reads_them() -> None:
    names = [
        "vision_tower.layers.0.self_attn.q_proj.weight",
        "vision_tower.layers.0.mlp.fc1.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "lm_head.weight",
    ]
    assert _in_order(names) == names
    names = ["shared.weight", "encoder.block.1.layer.0.SelfAttention.q.weight"]
    names += ["decoder.block.0.layer.0.SelfAttention.q.weight"]
    assert _in_order(names) == names
