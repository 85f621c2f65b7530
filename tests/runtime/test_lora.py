"""LoRA layers against the plain formula under autograd, and against PEFT's layer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nf4.errors import TrainError
from nf4.lora import LoraConfig, LoRALinear, add_lora, linear_names, lora_layers, target_names


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 8)
        self.v_proj = nn.Linear(6, 4, bias=False)
        self.norm = nn.LayerNorm(6)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(6, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            assert isinstance(layer, Block)
            h = layer.norm(h + layer.q_proj(h)[..., :6] + F.pad(layer.v_proj(h), (0, 2)))
        return self.lm_head(h)


def random_layer(dtype: torch.dtype, dropout: float = 0.0) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 8, dtype=dtype).requires_grad_(False), rank=3, alpha=2.1, dropout=dropout)
    nn.init.normal_(layer.lora_B)
    return layer


def plain(layer: LoRALinear, x: Tensor) -> Tensor:
    low = F.linear(F.linear(x, layer.lora_A.to(x.dtype)), layer.lora_B.to(x.dtype))
    return layer.base(x) + layer.scaling * low


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)])
def test_forward_and_gradients_match_the_formula(shape: tuple[int, ...]) -> None:
    layer = random_layer(torch.float32)
    results = []
    for function in (layer, lambda x: plain(layer, x)):
        layer.zero_grad()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = function(x)
        (y * torch.arange(8.0)).sum().backward()
        results.append((y, x.grad, layer.lora_A.grad, layer.lora_B.grad))
    for ours, expected in zip(*results, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, expected)


def test_gradients_in_double_precision() -> None:
    layer = random_layer(torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    layer.lora_A.data = layer.lora_A.data.double()
    layer.lora_B.data = layer.lora_B.data.double()
    # Parameters' gradients pass through fp32, too coarse for gradcheck: compared with their formula.
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    dA = layer.scaling * (g @ layer.lora_B).T @ x
    torch.testing.assert_close(layer.lora_A.grad, dA.detach(), rtol=1e-6, atol=1e-6)
    torch.autograd.gradcheck(layer, (x,))


def test_adapters_stay_fp32_and_arithmetic_follows_the_input() -> None:
    layer = random_layer(torch.bfloat16)
    x = torch.randn(5, 6, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32  # type: ignore[union-attr]
    torch.testing.assert_close(y.float(), plain(layer.float(), x.float()), rtol=2e-2, atol=2e-2)


def test_dropout_is_seeded_unbiased_and_only_in_training() -> None:
    layer = random_layer(torch.float32, dropout=0.5)
    x = torch.randn(4, 6, requires_grad=True)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    # The same mask by hand, through autograd: values and gradients.
    torch.manual_seed(3)
    keep = torch.rand(4, 6) >= 0.5
    expected = layer.base(x) + 0.7 * (x * keep * 2) @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(
        torch.autograd.grad(first.sum(), [x, layer.lora_A, layer.lora_B]),
        torch.autograd.grad(expected.sum(), [x, layer.lora_A, layer.lora_B]),
    )
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, plain(layer, x), rtol=0.1, atol=0.1)
    torch.testing.assert_close(layer.eval()(x), plain(layer, x))


def test_backward_keeps_the_input_and_thin_products_only() -> None:
    layer = random_layer(torch.float32)
    x = torch.randn(100, 6)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in (x.data_ptr(), layer.lora_A.data_ptr(), layer.lora_B.data_ptr()):
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sizes == [100 * 3]


def test_all_linear_layers_but_the_head_and_nothing_else_trains() -> None:
    model = Model()
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids)
    names = add_lora(model, LoraConfig(rank=2, alpha=4), seed=1)
    assert names == [f"layers.{i}.{leaf}" for i in (0, 1) for leaf in ("q_proj", "v_proj")]
    assert torch.equal(model(ids), before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.lora_{side}" for name in names for side in "AB"}
    assert linear_names(model) == [*names, "lm_head"]
    for _, layer in lora_layers(model):
        assert layer.scaling == 2
        assert layer.lora_A.abs().max() <= 1 / math.sqrt(6)  # kaiming_uniform(a=sqrt(5)) is U(+-1/sqrt(in))
        assert layer.lora_A.abs().max() > 0.5 / math.sqrt(6)
        assert not layer.lora_B.any()
    with pytest.raises(TrainError, match="has an adapter already"):
        add_lora(model, LoraConfig())


def test_initial_values_come_from_the_seed_alone() -> None:
    values = []
    for seed, global_seed in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(0)
        model = Model()
        torch.manual_seed(global_seed)
        add_lora(model, LoraConfig(rank=2), seed=seed)
        values.append(torch.cat([layer.lora_A.flatten() for _, layer in lora_layers(model)]))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), ["layers.0.q_proj", "layers.1.q_proj"]),
        (("layers.1.*",), ["layers.1.q_proj", "layers.1.v_proj"]),
        (("lm_head", "0.v_proj"), ["layers.0.v_proj", "lm_head"]),
        ("?_proj", [f"layers.{i}.{leaf}" for i in (0, 1) for leaf in ("q_proj", "v_proj")]),
    ],
)
def test_target_patterns(targets: str | tuple[str, ...], expected: list[str]) -> None:
    assert target_names(Model(), targets) == expected


def test_bad_settings_are_told() -> None:
    with pytest.raises(
        TrainError, match="target 'k_proj' matches no linear layer, expected one of lm_head, q_proj"
    ):
        target_names(Model(), ("q_proj", "k_proj"))
    for settings in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"ranks": {"a": 0}}):
        with pytest.raises(TrainError, match="bad LoRA"):
            LoraConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(TrainError, match="no linear layer"):
        target_names(nn.Embedding(3, 3), "all-linear")
