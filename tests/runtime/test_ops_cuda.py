"""The NF4 operators and layers on a GPU: the CPU's bits for decoding, float64 for products and gradients."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from nf4.model.linear import KeptLinear, NF4Embedding, NF4Linear, project
from nf4.ops import product_way
from nf4format import reference
from nf4format.blocks import PackedTensor, quantize

pytestmark = pytest.mark.cuda

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
SHAPES = [
    (96, 128),
    (50, 37),
    (1, 64),
    (7, 1),
    (33, 200),
    (300, 320),
]  # rows that are and are not multiples of 64
DTYPES = list(TOLERANCE)


def packed_weight(rows: int, columns: int, seed: int = 0) -> PackedTensor:
    values = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)
    return quantize(values, "float32")


def exact(weight: PackedTensor) -> torch.Tensor:
    decoded = reference.dequantize(weight, "float32").reshape(weight.shape)
    return torch.from_numpy(decoded).double().cuda()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.fixture
def small_panels(monkeypatch):
    """Panels of a few rows, so that small weights have several, the last one ragged."""
    monkeypatch.setattr(product_way, "WORKSPACE_BYTES", 1280)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 13, 70, 300])
def test_product_and_gradient(small_panels, shape, rows, dtype):
    weight = packed_weight(*shape)
    layer = NF4Linear(weight).cuda()
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, shape[1], generator=generator).cuda().to(dtype).requires_grad_()
    grad = torch.randn(rows, shape[0], generator=generator).cuda().to(dtype)
    y = layer(x)
    y.backward(grad)
    assert y.dtype == x.grad.dtype == dtype
    assert relative_error(y.detach(), x.detach().double() @ exact(weight).T) < TOLERANCE[dtype]
    assert relative_error(x.grad, grad.double() @ exact(weight)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_and_embedding_have_the_reference_bits(shape, dtype):
    weight = packed_weight(*shape)
    expected = torch.from_numpy(reference.dequantize(weight, str(dtype)[6:])).view(dtype).view(shape)
    assert torch.equal(NF4Linear(weight).cuda().dequantize(dtype).cpu(), expected)
    ids = torch.randint(0, shape[0], (2, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(NF4Embedding(weight, dtype).cuda()(ids.cuda()).cpu(), expected[ids])


def test_leading_dimensions_strides_and_empty_batches():
    weight = packed_weight(50, 37)
    layer = NF4Linear(weight, torch.arange(50.0)).cuda()
    x = torch.randn(37, 3, 5, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0).cuda()
    expected = x.double() @ exact(weight).T + torch.arange(50.0).cuda()
    assert layer(x).shape == (5, 3, 50)
    assert relative_error(layer(x), expected) < 1e-6
    assert relative_error(layer(x[0, 0]), expected[0, 0]) < 1e-6
    empty = torch.empty(2, 0, 37, device="cuda", requires_grad=True)
    layer(empty).sum().backward()
    assert layer(empty).shape == (2, 0, 50)
    assert empty.grad.shape == (2, 0, 37)


def test_torch_library_checks():
    layer = NF4Linear(packed_weight(50, 37)).cuda()
    table = NF4Embedding(packed_weight(20, 8), torch.bfloat16).cuda()
    for rows in (2, 40):
        x = torch.randn(rows, 37, device="cuda", requires_grad=True)
        torch.library.opcheck(torch.ops.nf4.linear.default, (x, *layer.packed(), 50))
        grad = torch.randn(rows, 50, device="cuda")
        torch.library.opcheck(torch.ops.nf4.linear_input_grad.default, (grad, *layer.packed(), 37))
    torch.library.opcheck(torch.ops.nf4.dequantize.default, (*layer.packed(), (50, 37), torch.float16))
    ids = torch.tensor([[3, 3, 19]], device="cuda")
    torch.library.opcheck(torch.ops.nf4.embedding.default, (ids, *table.packed(), 20, 8, torch.bfloat16))


def test_operators_refuse_what_the_kernels_could_not_bear():
    layer = NF4Linear(packed_weight(96, 128)).cuda()
    codes, *rest = layer.packed()
    x = torch.randn(2, 128, device="cuda")
    with pytest.raises(ValueError, match=r"codes: expected contiguous torch\.uint8 of 6144 elements.*6143"):
        torch.ops.nf4.linear(x, codes[1:], *rest, 96)
    with pytest.raises(ValueError, match=r"codes: expected .* on cuda:0, got .* on cpu"):
        torch.ops.nf4.linear(x, codes.cpu(), *rest, 96)
    with pytest.raises(ValueError, match=r"codes: expected .* on cpu, got .* on cuda:0"):
        layer(x.cpu())
    with pytest.raises(ValueError, match="x: expected float32, bfloat16 or float16"):
        layer(x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streams_and_threads_do_not_share_a_workspace_at_once(dtype):
    """Large products of two weights from two threads in one stream, and in a stream each."""
    weights = [packed_weight(256, 512, seed) for seed in (0, 1)]
    layers = [NF4Linear(weight).cuda() for weight in weights]
    x = torch.randn(200, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    expected = [x.double() @ exact(weight).T for weight in weights]
    torch.cuda.synchronize()
    errors: list[float] = []

    def work(index: int, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            results = [layers[index](x) for _ in range(50)]
            stream.synchronize()
            errors.extend(relative_error(result, expected[index]) for result in results)

    shared = torch.cuda.Stream()
    for streams in ([shared, shared], [torch.cuda.Stream(), torch.cuda.Stream()]):
        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(errors) == 200
    assert max(errors) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [2, 100, 1000])
def test_a_graph_replays_with_new_inputs(rows):
    weight = packed_weight(256, 512)
    layer = NF4Linear(weight).cuda()
    x = torch.zeros(rows, 512, device="cuda", dtype=torch.bfloat16)
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn(rows, 512))
    graph.replay()
    assert relative_error(y, x.double() @ exact(weight).T) < 1e-2


def test_kept_linear_of_another_dtype():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(50, 37, generator=generator).to(torch.bfloat16)
    x = torch.randn(20, 37, generator=generator).cuda().requires_grad_()
    y = KeptLinear(weight).cuda()(x)
    y.sum().backward()
    assert relative_error(y.detach(), x.detach().double() @ weight.double().cuda().T) < 1e-6
    assert relative_error(x.grad, weight.double().cuda().sum(0).expand(20, 37)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 40, 70])
def test_several_weights_of_one_input_give_the_bits_of_each_alone(rows, dtype):
    for width in (128, 100):
        layers = [NF4Linear(packed_weight(height, width, height)).cuda() for height in (96, 33, 17)]
        x = torch.randn(rows, width, device="cuda").to(dtype)
        alone = [layer(x) for layer in layers]
        assert all(map(torch.equal, project(layers, x), alone))
        tensors = [tensor for layer in layers for tensor in layer.packed()[:-1]]
        arguments = (x, tensors, [layer.nested_offset for layer in layers], [96, 33, 17])
        torch.library.opcheck(torch.ops.nf4.linear_group.default, arguments)
        wants = [y.requires_grad for y in project(layers, x.requires_grad_())]
        assert wants == [True] * 3
