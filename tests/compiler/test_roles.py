"""Roles are judged from names alone: those of many architectures, spelled out."""

import pytest

from qcompile.roles import Role, count_experts, group_of, parse_name, role_of

NAMES = [
    # decoders
    ("model.embed_tokens.weight", (32000, 4096), Role.EMBEDDING),
    ("model.layers.0.self_attn.q_proj.weight", (4096, 4096), Role.LINEAR),
    ("model.layers.0.self_attn.q_proj.bias", (4096,), Role.BIAS),
    ("model.layers.0.mlp.gate_proj.weight", (11008, 4096), Role.LINEAR),
    ("model.layers.0.input_layernorm.weight", (4096,), Role.NORM),
    ("model.layers.0.self_attn.q_norm.weight", (128,), Role.NORM),
    ("model.norm.weight", (4096,), Role.NORM),
    ("lm_head.weight", (32000, 4096), Role.HEAD),
    ("transformer.wte.weight", (50257, 768), Role.EMBEDDING),
    ("transformer.wpe.weight", (1024, 768), Role.EMBEDDING),
    ("transformer.h.3.attn.c_attn.weight", (768, 2304), Role.LINEAR),
    ("transformer.h.3.ln_1.weight", (768,), Role.NORM),
    ("transformer.ln_f.weight", (768,), Role.NORM),
    ("gpt_neox.embed_in.weight", (50432, 512), Role.EMBEDDING),
    ("embed_out.weight", (50432, 512), Role.HEAD),
    ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", (2048, 512), Role.LINEAR),
    ("transformer.word_embeddings.weight", (65024, 4544), Role.EMBEDDING),
    ("transformer.word_embeddings_layernorm.weight", (1024,), Role.NORM),
    ("model.decoder.embed_positions.weight", (2050, 768), Role.EMBEDDING),
    ("model.decoder.project_in.weight", (1024, 512), Role.LINEAR),
    ("model.tok_embeddings.weight", (92544, 4096), Role.EMBEDDING),
    ("output.weight", (92544, 4096), Role.HEAD),
    ("transformer.output_layer.weight", (65024, 4096), Role.HEAD),
    ("bert.encoder.layer.0.attention.output.dense.weight", (768, 768), Role.LINEAR),
    ("bert.embeddings.LayerNorm.weight", (768,), Role.NORM),
    ("bert.embeddings.position_embeddings.weight", (512, 768), Role.EMBEDDING),
    ("cls.predictions.decoder.weight", (30522, 768), Role.HEAD),
    ("score.weight", (2, 4096), Role.HEAD),
    ("classifier.out_proj.weight", (2, 768), Role.HEAD),
    ("shared.weight", (32128, 512), Role.EMBEDDING),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), Role.EMBEDDING),
    ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", (1024, 512), Role.LINEAR),
    # mixtures of experts
    ("model.layers.1.mlp.gate.weight", (64, 2048), Role.ROUTER),
    ("model.layers.1.mlp.gate.weight", (8192, 2048), Role.LINEAR),
    ("model.layers.1.mlp.gate.e_score_correction_bias", (256,), Role.BIAS),
    ("model.layers.1.block_sparse_moe.gate.weight", (8, 4096), Role.ROUTER),
    ("model.layers.1.block_sparse_moe.experts.7.w1.weight", (14336, 4096), Role.LINEAR),
    ("model.layers.1.mlp.shared_expert_gate.weight", (1, 2048), Role.ROUTER),
    ("model.layers.1.mlp.shared_expert.gate_proj.weight", (5632, 2048), Role.LINEAR),
    ("model.layers.1.mlp.shared_experts.down_proj.weight", (2048, 5632), Role.LINEAR),
    ("model.layers.1.feed_forward.router.weight", (16, 5120), Role.ROUTER),
    ("model.layers.1.feed_forward.experts.gate_up_proj", (16, 5120, 16384), Role.EXPERTS),
    ("model.layers.1.mlp.experts.down_proj", (32, 2880, 2880), Role.EXPERTS),
    ("model.layers.1.mlp.experts.gate_up_proj_bias", (32, 5760), Role.BIAS),
    ("model.layers.1.block_sparse_moe.router.layer.weight", (32, 1024), Role.ROUTER),
    ("model.layers.1.block_sparse_moe.input_linear.weight", (40, 1024, 1536), Role.EXPERTS),
    ("transformer.blocks.0.ffn.experts.mlp.w1", (172032, 6144), Role.LINEAR),
    ("encoder.block.1.layer.1.mlp.router.classifier.weight", (8, 768), Role.ROUTER),
    # what is not a matrix of a linear layer
    ("vision_model.embeddings.patch_embedding.weight", (1024, 3, 14, 14), Role.EMBEDDING),
    ("vision_tower.encoder.layers.0.self_attn.k_proj.weight", (1152, 1152), Role.LINEAR),
    ("multi_modal_projector.linear_1.weight", (4096, 1024), Role.LINEAR),
    ("model.encoder.conv1.weight", (1280, 128, 3), Role.OTHER),
    ("backbone.layers.0.mixer.conv1d.weight", (1536, 1, 4), Role.OTHER),
    ("backbone.layers.0.mixer.A_log", (1536, 16), Role.OTHER),
    ("backbone.layers.0.mixer.in_proj.weight", (3072, 768), Role.LINEAR),
    ("model.rotary_emb.inv_freq", (64,), Role.OTHER),
    ("text_model.layers.0.attn.in_proj_weight", (2304, 768), Role.LINEAR),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "role"), NAMES, ids=[name for name, _, _ in NAMES])
def test_role_of_names_across_architectures(name: str, shape: tuple[int, ...], role: Role) -> None:
    assert role_of(name, shape, num_experts=40) is role


def test_three_axes_are_experts_only_by_name_or_declared_number() -> None:
    assert role_of("model.layers.0.moe.input_linear.weight", (12, 64, 64)) is Role.OTHER
    assert role_of("model.layers.0.moe.input_linear.weight", (12, 64, 64), num_experts=12) is Role.EXPERTS


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"num_local_experts": 8}, 8),
        ({"text_config": {"num_experts": 128}}, 128),
        ({"n_routed_experts": None, "num_experts": True}, None),
    ],
)
def test_number_of_experts_in_the_configuration(config: dict, expected: int | None) -> None:
    assert count_experts(config) == expected


def test_names_are_taken_apart() -> None:
    path = parse_name("model.layers.12.mlp.experts.3.up_proj.weight")
    assert (path.layer, path.expert, path.stack, path.attribute) == (12, 3, "model.layers", "weight")
    assert parse_name("lm_head.weight").layer is None


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "q_proj"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", "experts.up_proj"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts.gate_up_proj"),
        ("lm_head.weight", "lm_head"),
        ("weight", "weight"),
    ],
)
def test_layer_groups(name: str, group: str) -> None:
    assert group_of(name) == group
