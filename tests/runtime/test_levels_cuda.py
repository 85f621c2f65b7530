"""Weights with other levels than NF4's on a GPU: every operator, and models of files that hold them.

Decoding has the reference's bits and the CPU's; products and gradients are held to float64 and to the CPU's.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import nf4
from nf4.lora import LoraConfig
from nf4.model.linear import NF4Embedding, NF4Linear, project
from nf4.ops import cuda as ops_cuda
from nf4.text.generate import generate
from nf4.text.sampling import Sampling
from nf4.text.tokenizer import Tokenizer
from nf4.training.options import TrainOptions
from nf4.training.train import train
from nf4format import reference
from nf4format.blocks import PackedTensor, quantize
from nf4format.levels import LEVELS, check_levels

pytestmark = pytest.mark.cuda


def drawn_levels() -> np.ndarray:
    """Uneven, one of them twice, one far below the smallest normal number of fp16, zero not among them."""
    levels = np.random.default_rng(5).uniform(-1, 1, 16).astype(np.float32)
    levels[:4] = (-0.75, 0.9375, 1e-6, levels[4])
    levels.sort()
    check_levels(levels)
    return levels


TABLES = {name: LEVELS[name] for name in ("fp4", "fp4-e3m0", "int4")} | {"drawn": drawn_levels()}
# Outputs are rounded, and levels or weights in 16-bit products; sums are in fp32.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 3.5e-3, torch.float16: 8e-4}
DTYPES = list(TOLERANCE)
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(params=TABLES)
def levels(request: pytest.FixtureRequest) -> np.ndarray:
    return TABLES[request.param]


def packed_weight(rows: int, columns: int, levels: np.ndarray, seed: int = 0) -> PackedTensor:
    """Random codes of these levels, with scales of both signs."""
    rng = np.random.default_rng(seed)
    packed = quantize(rng.standard_normal((rows, columns), dtype=np.float32), "float32")
    codes = rng.integers(0, 256, packed.codes.size, np.uint8)
    return replace(packed, codes=codes, quant_map=levels, nested_offset=float(np.float32(0.25)))


def exact(weight: PackedTensor) -> torch.Tensor:
    return torch.from_numpy(reference.dequantize(weight, "float32").reshape(weight.shape)).double().cuda()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 128), (50, 37), (300, 1024)], ids=str)
def test_decoding_has_the_bits_of_the_reference_and_the_cpu(levels, shape, dtype):
    weight = packed_weight(*shape, levels)
    expected = torch.from_numpy(reference.dequantize(weight, str(dtype)[6:])).view(dtype).view(shape)
    layer = NF4Linear(weight)
    assert torch.equal(layer.dequantize(dtype), expected)
    layer.cuda()
    assert torch.equal(layer.dequantize(dtype).cpu(), expected)
    ids = torch.randint(0, shape[0], (2, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(NF4Embedding(weight, dtype).cuda()(ids.cuda()).cpu(), expected[ids])
    with_room = torch.zeros(shape[0], shape[1] + 24, device="cuda", dtype=dtype)
    ops_cuda.RowDecoder(layer.packed(), *shape).decode(with_room[:, : shape[1]])
    assert torch.equal(with_room[:, : shape[1]].cpu(), expected)
    assert not with_room[:, shape[1] :].any()


def test_decoding_of_a_large_weight(levels):
    """Its kernel is another."""
    layer = NF4Linear(packed_weight(8192, 4096, levels))
    expected = layer.dequantize(torch.bfloat16)
    assert torch.equal(layer.cuda().dequantize(torch.bfloat16).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(515, 1024), (130, 320), (50, 37)], ids=str)
def test_product_and_gradient_at_every_number_of_rows(levels, shape, dtype):
    """The kernels for few rows and for any shape, those on Hopper's tensor cores, and cuBLAS."""
    weight = packed_weight(*shape, levels)
    here, there, matrix = NF4Linear(weight), NF4Linear(weight).cuda(), exact(weight)
    for rows in (1, 2, 4, 8, 16, 40, 130, 300, 600):
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, shape[1], generator=generator).to(dtype).cuda().requires_grad_()
        grad = torch.randn(rows, shape[0], generator=generator).to(dtype).cuda()
        y = there(x)
        y.backward(grad)
        assert relative_error(y.detach(), x.detach().double() @ matrix.T) < TOLERANCE[dtype], rows
        assert relative_error(x.grad, grad.double() @ matrix) < TOLERANCE[dtype], rows
        if rows in (1, 40):
            cpus = here(x.detach().cpu()).cuda().double()
            assert relative_error(y.detach(), cpus) < 2 * TOLERANCE[dtype], rows


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_weights_of_one_launch_keep_their_own_levels(rows):
    weights = [packed_weight(96, 128, table, seed) for seed, table in enumerate(TABLES.values())]
    layers = [NF4Linear(weight).cuda() for weight in weights]
    x = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16)
    for y, layer, weight in zip(project(layers, x), layers, weights, strict=True):
        assert torch.equal(y, layer(x))
        assert relative_error(y, x.double() @ exact(weight).T) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("rows", [2, 100, 1000])
def test_a_graph_reads_the_levels_that_are_there(rows):
    layer = NF4Linear(packed_weight(256, 512, TABLES["int4"])).cuda()
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for table in TABLES.values():
        layer.quant_map.copy_(torch.from_numpy(table.copy()))
        torch.cuda.synchronize()
        graph.replay()
        expected = x.double() @ exact(packed_weight(256, 512, table)).T
        assert relative_error(y, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_a_chain_of_overlapping_kernels_has_the_same_bits(rows):
    """Weights in constant memory are read while the kernel ahead still runs."""
    layers = []
    for seed, table in enumerate(TABLES.values()):
        weight = packed_weight(512, 512, table, seed)
        smaller = (weight.nested_absmax / np.float32(16), weight.nested_offset / 16)  # keeps the chain finite
        layers.append(NF4Linear(replace(weight, nested_absmax=smaller[0], nested_offset=smaller[1])).cuda())
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)

    def chain() -> torch.Tensor:
        results = [x]
        for _ in range(10):
            for layer in layers:
                results.append(layer(results[-1]))
        return torch.stack(results)

    alone = chain()
    assert alone.isfinite().all()
    assert alone[-1].any()
    for layer in layers:
        for buffer in layer.buffers():
            ops_cuda.mark_constant(buffer)
    assert torch.equal(chain(), alone)


@pytest.fixture(params=["int4", "drawn"])
def packed_file(request, make_packed, tmp_path):
    """A file with other levels in all of its matrices."""
    table = request.param
    if table == "drawn":
        path = tmp_path / "levels.txt"
        path.write_text(" ".join(str(value) for value in TABLES[table].tolist()))
        table = str(path)
    return make_packed("qwen3", options={"levels": table, "quantize_embeddings": True, "quantize_head": True})


@torch.no_grad()
def test_a_model_has_the_cpus_logits_and_texts(packed_file):
    models = [nf4.load(packed_file, device=device, dtype="float32") for device in ("cpu", "cuda")]
    assert models[1].source.other_levels == set(models[1].source.packed_names)
    expected, logits = (model(IDS.to(model.device)).cpu() for model in models)
    assert (logits - expected).abs().max() < 1e-4
    low = nf4.load(packed_file, device="cuda", dtype="bfloat16")(IDS.cuda())
    assert (low.float().cpu() - expected).norm() < 0.03 * expected.norm()
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]
    for sampling in (Sampling(), Sampling(temperature=0.9, top_k=20, seed=3)):
        texts = [generate(model, prompts, max_new_tokens=16, sampling=sampling) for model in models]
        assert texts[0] == texts[1]


def test_training_follows_the_cpus(packed_file, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat; the dog and the frog were there too. " * 60)
    losses = {}
    for device in ("cpu", "cuda"):
        options = TrainOptions(
            data=(tmp_path / "text.txt",),
            out=tmp_path / device,
            lora=LoraConfig(rank=4, alpha=8),
            lr=1e-2,
            steps=3,
            warmup=1,
            batch=2,
            seq_len=32,
            eval_fraction=0.2,
        )
        model = nf4.load(packed_file, device=device, dtype="float32")
        train(model, Tokenizer.from_file(model.source), options)
        records = [json.loads(line) for line in options.log_path.read_text().splitlines()]
        losses[device] = [(r["loss"], r["grad_norm"]) for r in records if "loss" in r]
    assert len(losses["cuda"]) == 3
    assert np.allclose(losses["cuda"], losses["cpu"], rtol=1e-3)
