"""The order in which a model's forward pass uses its tensors.

A runtime that streams a model reads the file from front to back in this order. It is a function of
names alone, never of the checkpoint's files, so that one file and many shards give the same bytes.
"""

from __future__ import annotations

import re

from .roles import Role, TensorPath, parse_name

# Modules of one layer as the forward pass meets them. A name that no entry matches comes after all of them.
_ATTENTION = (
    r"qkv(_proj)?|query_key_value|c_attn|w_pack|wqkv|in_proj(_\w+)?",
    r"q_a_proj|wq_a",
    r"q_a_layernorm",
    r"q_b_proj|wq_b",
    r"q_proj|query|wq|q|q_lin",
    r"kv_a_proj(_with_mqa)?|wkv_a",
    r"kv_a_layernorm",
    r"kv_b_proj|wkv_b",
    r"k_proj|key|wk|k|k_lin",
    r"v_proj|value|wv|v|v_lin",
    r"q_norm|q_layernorm",
    r"k_norm|k_layernorm",
    r"o_proj|out_proj|dense|wo|o|out_lin|c_proj|proj",
)
_FEED_FORWARD = (
    r"router|gate|gating|switch",
    r"gate_up_proj|dense_h_to_4h|wi",
    r"gate_proj|w1|wi_0",
    r"up_proj|w3|wi_1|fc1|fc_in|c_fc|lin1|input_linear",
    r"down_proj|w2|wo|fc2|fc_out|c_proj|lin2|dense_4h_to_h|dense|output_linear",
)
_IN_ATTENTION = re.compile(r"attn|attention|(^|\.)(mixer|mamba|temporal_block)(\.|$)")
_IN_FEED_FORWARD = re.compile(
    r"(^|\.)(mlp|ffn|feed_forward|block_sparse_moe|moe|experts?|\w+_experts?|fc1|fc2)(\.|$)"
)
_NORM_BEFORE = re.compile(
    r"(^|\.)(input_layernorm|ln_1|ln_attn|attention_norm|layernorm_before|layer_norm1|norm1)$"
)
_NORM_BETWEEN = re.compile(
    r"(^|\.)(post_attention_layernorm|pre_feedforward_layernorm|ln_2|ln_mlp|ffn_norm)$"
    r"|(^|\.)(layernorm_after|layer_norm2|norm2)$"
)
# Stacks that run before others: the towers whose output the language model reads, and the encoder.
_EARLY_STACK = re.compile(r"(^|[._])(vision|visual|image|audio|encoder)")
_LATE_STACK = re.compile(r"(^|[._])(decoder|mtp)")

SortKey = tuple[int, int, str, int, int, int, int, tuple[tuple[int, int, str], ...]]


def execution_key(name: str, role: Role) -> SortKey:
    """A sort key: embeddings, then layer by layer attention and feed-forward, the rest, the head."""
    path = parse_name(name)
    phase = 1 if path.layer is not None else {Role.EMBEDDING: 0, Role.HEAD: 3}.get(role, 2)
    section = _section(path)
    return (
        phase,
        _stack_rank(path.stack),
        path.stack,
        path.layer if path.layer is not None else -1,
        section,
        path.expert if path.expert is not None else -1,
        _rank(path, section),
        _natural(name),
    )


def _stack_rank(stack: str) -> int:
    if _LATE_STACK.search(stack):
        return 2
    return 0 if _EARLY_STACK.search(stack) else 1


def _section(path: TensorPath) -> int:
    if _NORM_BEFORE.search(path.module):
        return 0
    if _NORM_BETWEEN.search(path.module):
        return 2
    within = path.module[len(path.stack) :]  # "attention" in the stack's own name says nothing
    if _IN_ATTENTION.search(within):
        return 1
    return 3 if _IN_FEED_FORWARD.search(within) else 4


def _rank(path: TensorPath, section: int) -> int:
    table = {1: _ATTENTION, 3: _FEED_FORWARD}.get(section, ())
    leaf = path.module.rsplit(".", 1)[-1]
    for candidate in (leaf, path.attribute):  # fused experts: the projection is the attribute
        for rank, pattern in enumerate(table):
            if re.fullmatch(pattern, candidate):
                return rank
    return len(table)


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which "h.2" comes before "h.10"."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts)
