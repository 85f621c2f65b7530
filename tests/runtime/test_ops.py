"""The NF4 operators and layers against float64 products with the reference decoder's weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nf4.model.linear import KeptEmbedding, KeptLinear, NF4Embedding, NF4Linear
from nf4.ops import cpu as ops_cpu
from nf4format import reference
from nf4format.blocks import PackedTensor, quantize

# Largest error relative to the norm: of fp32 arithmetic, of rounding weights and outputs to 16 bits.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
SHAPES = [(96, 128), (50, 37), (1, 64), (7, 1), (33, 200)]  # rows that are and are not multiples of 64
DTYPES = list(TOLERANCE)


def packed_weight(rows: int, columns: int, seed: int = 0) -> PackedTensor:
    values = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)
    return quantize(values, "float32")


def exact(weight: PackedTensor) -> torch.Tensor:
    """The decoded weight in float64, by the plain numpy reference."""
    decoded = reference.dequantize(weight, "float32").reshape(weight.shape)
    return torch.from_numpy(decoded).double()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.fixture
def small_panels(monkeypatch):
    """Panels of a few rows, so that small weights have several, the last one ragged."""
    monkeypatch.setattr(ops_cpu, "PANEL_ELEMENTS", 640)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 13, 70])
def test_product_and_gradient(small_panels, shape, rows, dtype):
    weight = packed_weight(*shape)
    layer = NF4Linear(weight)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(rows, shape[0], generator=generator).to(dtype)
    y = layer(x)
    y.backward(grad)
    assert y.dtype == x.grad.dtype == dtype
    assert relative_error(y.detach(), x.detach().double() @ exact(weight).T) < TOLERANCE[dtype]
    assert relative_error(x.grad, grad.double() @ exact(weight)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_and_embedding_have_the_reference_bits(shape, dtype):
    weight = packed_weight(*shape)
    name = str(dtype).removeprefix("torch.")
    expected = torch.from_numpy(reference.dequantize(weight, name)).view(dtype).view(shape)
    assert torch.equal(NF4Linear(weight).dequantize(dtype), expected)
    ids = torch.randint(0, shape[0], (2, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(NF4Embedding(weight, dtype)(ids), expected[ids])


def test_leading_dimensions_strides_and_empty_batches():
    weight = packed_weight(50, 37)
    layer = NF4Linear(weight, torch.arange(50.0))
    x = torch.randn(37, 3, 5, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)
    expected = x.double() @ exact(weight).T + torch.arange(50.0)
    assert layer(x).shape == (5, 3, 50)
    assert relative_error(layer(x), expected) < 1e-6
    assert relative_error(layer(x[0, 0]), expected[0, 0]) < 1e-6
    empty = torch.empty(2, 0, 37, requires_grad=True)
    layer(empty).sum().backward()
    assert layer(empty).shape == (2, 0, 50)
    assert empty.grad.shape == (2, 0, 37)


def test_torch_library_checks():
    layer, table = NF4Linear(packed_weight(50, 37)), NF4Embedding(packed_weight(20, 8), torch.bfloat16)
    for rows in (2, 70):
        x = torch.randn(rows, 37, requires_grad=True)
        torch.library.opcheck(torch.ops.nf4.linear.default, (x, *layer.packed(), 50))
        grad = torch.randn(rows, 50)
        torch.library.opcheck(torch.ops.nf4.linear_input_grad.default, (grad, *layer.packed(), 37))
    group = ([*layer.packed()[:-1]] * 2, [layer.nested_offset] * 2, [50, 50])
    torch.library.opcheck(torch.ops.nf4.linear_group.default, (torch.randn(3, 37), *group))
    torch.library.opcheck(torch.ops.nf4.dequantize.default, (*layer.packed(), (50, 37), torch.float16))
    ids = torch.tensor([[3, 3, 19]])
    torch.library.opcheck(torch.ops.nf4.embedding.default, (ids, *table.packed(), 20, 8, torch.bfloat16))


def test_operators_refuse_what_the_kernels_could_not_bear():
    layer = NF4Linear(packed_weight(96, 128))
    codes, *rest = layer.packed()
    x = torch.randn(2, 128)
    with pytest.raises(ValueError, match=r"codes: expected contiguous torch\.uint8 of 6144 elements.*6143"):
        torch.ops.nf4.linear(x, codes[1:], *rest, 96)
    with pytest.raises(ValueError, match=r"codes: expected .* with strides \[2\]"):
        torch.ops.nf4.linear(x, codes.repeat_interleave(2)[::2], *rest, 96)
    with pytest.raises(ValueError, match="of 6096 elements"):
        layer(torch.randn(2, 127))
    with pytest.raises(ValueError, match="x: expected float32, bfloat16 or float16"):
        layer(x.double())
    with pytest.raises(IndexError, match="ids: expected 0 to 95, got 2 to 96"):
        NF4Embedding(packed_weight(96, 128), torch.float32)(torch.tensor([2, 96]))


def test_packed_weights_survive_a_change_of_dtype():
    weight = packed_weight(96, 128)
    layer = NF4Linear(weight, torch.ones(96))
    before = layer.dequantize()
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), before)
    assert layer.codes.data_ptr() == weight.codes.ctypes.data


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_kept_linear(monkeypatch, stored, dtype, rows):
    monkeypatch.setattr("nf4.model.linear.CONVERTED_ELEMENTS", 370)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(50, 37, generator=generator).to(stored)
    x = torch.randn(2, rows, 37, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(2, rows, 50, generator=generator).to(dtype)
    layer = KeptLinear(weight, torch.full((50,), 0.5)).to(dtype)
    y = layer(x)
    y.backward(grad)
    assert layer.weight is weight
    assert y.dtype == x.grad.dtype == dtype
    assert relative_error(y.detach(), x.detach().double() @ weight.double().T + 0.5) < TOLERANCE[dtype]
    assert relative_error(x.grad, grad.double() @ weight.double()) < TOLERANCE[dtype]


def test_kept_embedding_stays_as_it_is():
    weight = torch.randn(9, 4).to(torch.float16)
    table = KeptEmbedding(weight).to(torch.float32)
    assert table(torch.tensor([8, 0])).equal(weight[[8, 0]])
    assert table.weight is weight
    assert not list(table.parameters())


def test_a_large_decoded_weight_owns_its_memory():
    """Its memory is numpy's, on huge pages; it must be an ordinary tensor all the same."""
    weight = packed_weight(1040, 2048)
    decoded = NF4Linear(weight).dequantize(torch.bfloat16)
    again = NF4Linear(weight).dequantize(torch.bfloat16)
    assert decoded.untyped_storage().nbytes() == 1040 * 2048 * 2
    assert decoded.add_(1).ne(again).all()
    assert torch.equal(again, exact(weight).to(torch.bfloat16))
