"""The hand-made layer step against autograd through the same modules: outputs and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nf4
from nf4.lora import LoraConfig, add_lora
from nf4.model import checkpoints, layer_passes, layer_step
from nf4.model.attention import Segments
from nf4.model.decoder import CausalLM
from nf4.model.layer import DecoderLayer

pytestmark = pytest.mark.usefixtures("one_thread")

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "kept": ("llama", {}, {"options": {"exclude": ("*",)}}),
    "biases": ("qwen2", {"attention_bias": True}, {}),
    "head-norms": ("qwen3", {}, {}),
    "window": ("mistral", {"sliding_window": 5}, {}),
    "ragged": ("mistral", {"intermediate_size": 172, "hidden_size": 100, "head_dim": 26}, {}),
}
TARGETS = ["all-linear", ("q_proj", "v_proj", "down_proj"), ("layers.1.mlp.up_proj",)]
LENGTHS = [5, 1, 7, 20]


@pytest.fixture(params=CASES)
def packed(request: pytest.FixtureRequest, make_packed: Callable[..., Path]) -> Path:
    family, overrides, arguments = CASES[request.param]
    return make_packed(family, **overrides, **arguments)


def prepared(
    path: Path, device: str, dtype: str, targets: Any = "all-linear", settings: dict[str, Any] | None = None
) -> CausalLM:
    """With an adapter whose B is not what it was at first."""
    model = nf4.load(path, device=device, dtype=dtype)
    add_lora(model, LoraConfig(rank=3, alpha=5, targets=targets, **(settings or {})))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            changes = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data += changes.to(device, parameter.dtype)
    model.passes.gradient_checkpointing = True
    return model.train()


def by_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_passes, "can_step", lambda layer: False)


def by_hand(monkeypatch: pytest.MonkeyPatch, keep: bool = False) -> None:
    """Also on the CPU, where a model takes torch's checkpointing; keep: without checkpointing."""

    def step(layer: nn.Module, x: Tensor, *context: Any, **_: Any) -> Tensor:
        assert isinstance(layer, DecoderLayer)
        assert layer_step.can_step(layer)
        made = layer_step.LayerStep(layer)
        kept = None if keep else checkpoints.Checkpoints()
        return layer_step.stepped(x, made, layer_step.Context(*context), kept)

    monkeypatch.setattr(layer_passes, "checkpoint", step)


def gradients(model: CausalLM, **inputs: Any) -> dict[str, Tensor]:
    """Of a loss that every logit enters, by parameter; and the logits."""
    model.zero_grad()
    return kept_gradients(model, **inputs)


def kept_gradients(model: CausalLM, input_ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """The same, added to gradients that are there."""
    logits = model(input_ids, **inputs)
    weights = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
    (logits.float() * weights).square().sum().backward()  # a sum: means are small, and lost in fp16
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.any() for gradient in found.values())
    return {"logits": logits.detach(), **{name: g.clone() for name, g in found.items() if g is not None}}


def largest_difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert ours.keys() == expected.keys()
    return max(
        ((ours[name] - expected[name]).float().norm() / expected[name].float().norm()).item()
        for name in expected
    )


def ids(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randint(3, 320, shape, generator=torch.Generator().manual_seed(2)).to(device)


@pytest.mark.parametrize("rows", [2048, 7])
def test_step_equals_autograd(packed: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_step, "ROWS", rows)
    for targets in TARGETS:
        model = prepared(packed, "cpu", "float32", targets)
        expected = gradients(model, input_ids=ids(3, 11))
        for keep in (False, True):
            with monkeypatch.context() as patch:
                by_hand(patch, keep)
                ours = gradients(model, input_ids=ids(3, 11))
            assert largest_difference(ours, expected) < 2e-5


def test_step_with_padding_and_accumulation(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(packed, "cpu", "float32")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    expected = gradients(model, input_ids=ids(2, 9), attention_mask=mask)
    by_hand(monkeypatch)
    assert largest_difference(gradients(model, input_ids=ids(2, 9), attention_mask=mask), expected) < 2e-5
    name, parameter = next((name, p) for name, p in model.named_parameters() if p.requires_grad)
    assert parameter.grad is not None
    before = parameter.grad.clone()
    model(ids(2, 9)).square().mean().backward()
    both = parameter.grad.clone()
    parameter.grad = None
    model(ids(2, 9)).square().mean().backward()
    torch.testing.assert_close(both, before + parameter.grad, msg=name)


def test_layers_that_train_otherwise_are_left_to_autograd(packed: Path) -> None:
    model = nf4.load(packed, device="cpu", dtype="float32")
    layer = model.model.layers[0]
    assert isinstance(layer, DecoderLayer)
    assert layer_step.can_step(layer)
    layer.input_layernorm.weight.requires_grad_(True)
    assert not layer_step.can_step(layer)
    layer.input_layernorm.weight.requires_grad_(False)
    add_lora(model, LoraConfig(rank=2, alpha=2, dropout=0.1))
    assert layer_step.can_step(layer.eval())
    assert not layer_step.can_step(layer.train())


@pytest.mark.parametrize(
    "settings",
    [
        {"dora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"bias": "all", "targets": ("down_proj",)},
        {"modules_to_save": ("layers.0.input_layernorm",)},
        {"modules_to_save": ("layers.0.self_attn.k_proj",)},
    ],
    ids=str,
)
def test_adapters_that_train_more_than_a_pair_are_left_to_autograd(
    settings: dict[str, Any], make_packed: Callable[..., Path]
) -> None:
    model = nf4.load(make_packed("qwen2"), device="cpu", dtype="float32")
    add_lora(model, LoraConfig(rank=2, **settings))
    layer = model.model.layers[0]
    assert isinstance(layer, DecoderLayer)
    assert not layer_step.can_step(layer)


# Values out of the weight leave a fixed pair beside the one that trains: both go by hand.
FAST = [
    ({"init": "olora"}, 2e-5),
    ({"dtype": "bfloat16"}, 2e-2),
    ({"init": "pissa", "dtype": "bfloat16"}, 2e-2),
]


@pytest.mark.parametrize(("settings", "tolerance"), FAST)
def test_fixed_pairs_and_bf16_adapters_go_by_hand(
    settings: dict[str, Any],
    tolerance: float,
    make_packed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_step, "ROWS", 7)
    model = prepared(make_packed("qwen2"), "cpu", "float32", settings=settings)
    expected = gradients(model, input_ids=ids(3, 11))
    by_hand(monkeypatch)
    ours = gradients(model, input_ids=ids(3, 11))
    assert {name: g.dtype for name, g in ours.items()} == {name: g.dtype for name, g in expected.items()}
    assert largest_difference(ours, expected) < tolerance


@pytest.mark.cuda
@pytest.mark.parametrize(("settings", "tolerance"), FAST)
def test_fixed_pairs_and_bf16_adapters_on_a_gpu(
    settings: dict[str, Any],
    tolerance: float,
    make_packed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_step, "ROWS", 64)
    model = prepared(make_packed("qwen2"), "cuda", "float32", settings=settings)
    tokens = ids(3, 50, device="cuda")
    with monkeypatch.context() as patch:
        by_modules(patch)
        expected = gradients(model, input_ids=tokens)
    assert largest_difference(gradients(model, input_ids=tokens), expected) < tolerance
    model.passes.capture_graphs = True
    for _ in range(4):
        model.zero_grad(set_to_none=False)
        assert largest_difference(kept_gradients(model, tokens), expected) < tolerance
    assert model.passes.graphs._recorded


@pytest.mark.cuda
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"dora": True, "init": "olora"},
        {"dora": True, "dropout": 0.5},
        {"lora_bias": True, "bias": "all"},
        {"modules_to_save": ("embed_tokens", "lm_head", "*norm", "layers.0.self_attn.k_proj")},
    ],
    ids=str,
)
def test_other_adapters_on_a_gpu_equal_the_cpu(
    settings: dict[str, Any], checkpointing: bool, make_packed: Callable[..., Path]
) -> None:
    path = make_packed("qwen2")
    results = []
    for device in ("cpu", "cuda"):
        model = prepared(path, device, "float32", settings=settings)
        model.passes.gradient_checkpointing = checkpointing
        if settings.get("dropout"):
            model.eval()
        results.append(gradients(model, input_ids=ids(3, 50, device=device)))
    assert largest_difference({name: g.cpu() for name, g in results[1].items()}, results[0]) < 1e-3


def check_packing(model: CausalLM, device: str, tolerance: float) -> None:
    tokens = ids(1, sum(LENGTHS), device=device)
    segments = Segments.of(LENGTHS, device)
    packed_logits = gradients(model, input_ids=tokens, segments=segments)["logits"][0].float()
    begin = 0
    for length in LENGTHS:
        alone = model(tokens[:, begin : begin + length])[0].detach().float()
        torch.testing.assert_close(
            packed_logits[begin : begin + length], alone, rtol=tolerance, atol=tolerance
        )
        begin += length
    changed = tokens.clone()
    changed[0, 6:13] = (changed[0, 6:13] + 1) % 300
    after = gradients(model, input_ids=changed, segments=segments)["logits"][0].float()
    is_other = torch.ones(sum(LENGTHS), dtype=torch.bool)
    is_other[6:13] = False
    assert torch.equal(after[is_other], packed_logits[is_other])
    assert not torch.equal(after[~is_other], packed_logits[~is_other])


def test_packed_documents_do_not_see_each_other(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(packed, "cpu", "float32")
    check_packing(model, "cpu", 1e-4)
    by_hand(monkeypatch)
    check_packing(model, "cpu", 1e-4)
    with pytest.raises(ValueError, match="expected 33 tokens, got 5"):
        model(ids(1, 33), segments=Segments.of([2, 3]))
    with pytest.raises(ValueError, match="expected one row"):
        model(ids(2, 5), segments=Segments.of([2, 3]))


# Both round to 16 bits at other places; fp32 shows that it is only rounding.
@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 4e-2), ("float16", 6e-3)])
def test_step_equals_autograd_on_a_gpu(
    packed: Path, dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_step, "ROWS", 64)
    monkeypatch.setattr(checkpoints, "OFFLOAD_BYTES", 1)
    for targets in TARGETS:
        model = prepared(packed, "cuda", dtype, targets)
        with monkeypatch.context() as patch:
            by_modules(patch)
            expected = gradients(model, input_ids=ids(3, 50, device="cuda"))
        model.passes.gradient_checkpointing = False
        assert largest_difference(gradients(model, input_ids=ids(3, 50, device="cuda")), expected) < tolerance
        model.passes.gradient_checkpointing = True
        ours = gradients(model, input_ids=ids(3, 50, device="cuda"))
        assert largest_difference(ours, expected) < tolerance
        model.passes.offload_checkpoints = True
        for _ in range(2):
            offloaded = gradients(model, input_ids=ids(3, 50, device="cuda"))
            assert all(torch.equal(offloaded[name], ours[name]) for name in ours)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 6e-2)])
def test_packed_documents_on_a_gpu(packed: Path, dtype: str, tolerance: float) -> None:
    check_packing(prepared(packed, "cuda", dtype), "cuda", tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("keep", [False, True])
def test_replayed_passes_equal_the_layers_one_by_one(packed: Path, keep: bool) -> None:
    model = prepared(packed, "cuda", "bfloat16")
    model.passes.gradient_checkpointing = not keep
    model(ids(1, 8, device="cuda")).sum().backward()  # gradients exist
    if model.config.layer_windows != (None,) * len(model.config.layer_windows):
        return  # masks are not recorded
    shapes = [(2, 40), (1, 24)]
    batches = [torch.randint(3, 320, shape).cuda() for shape in shapes for _ in range(2)]
    expected = [gradients(model, input_ids=batch) for batch in batches]
    model.passes.capture_graphs = True
    for _ in range(3):
        for batch, wanted in zip(batches, expected, strict=True):
            model.zero_grad(set_to_none=False)
            assert largest_difference(kept_gradients(model, batch), wanted) < 2e-2
    assert len(model.passes.graphs._recorded) == len(shapes)

    # Accumulation, a second pass before the first goes backward, a pass that never does, gradients elsewhere.
    model.zero_grad(set_to_none=False)
    first, second = model(batches[0]).float().square().sum(), model(batches[1]).float().square().sum()
    abandoned = model(batches[2])
    del abandoned
    second.backward()
    first.backward()
    with pytest.raises(RuntimeError, match=r"backward|a second time"):
        first.backward()
    both = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.passes.capture_graphs = False
    model.zero_grad()
    for batch in batches[:2]:
        model(batch).float().square().sum().backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert largest_difference(both, alone) < 2e-2
    model.passes.capture_graphs = True
    assert largest_difference(gradients(model, input_ids=batches[0]), expected[0]) < 2e-2


def test_what_holds_addresses_goes_when_layers_move_or_change(make_packed: Callable[..., Path]) -> None:
    """Steps and graphs know weights by address."""
    inner = prepared(make_packed("llama"), "cpu", "float32").model
    layer, passes = inner.layers[0], inner.passes
    graphs = passes.graphs
    step = passes._step(0, layer)
    assert passes._step(0, layer) is step
    assert passes.graphs is graphs
    inner.to("cpu")
    assert passes._step(0, layer) is not step
    assert passes.graphs is not graphs
    step, graphs = passes._step(0, layer), passes.graphs
    assert isinstance(layer, DecoderLayer)
    layer.self_attn.q_proj = copy.deepcopy(layer.self_attn.q_proj)
    assert passes._step(0, layer) is not step
    assert passes.graphs is not graphs
