"""The GPU kernels: equal bits with the CPU's decoder, products against float64, AdamW against torch's.

Outputs are poisoned and lie between guards; sizes are ragged, ranges and pointers misaligned.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from nf4.paging.fused_adamw import ChunkTables, Setting
from nf4.paging.layout import Piece, StateLayout
from nf4format import blocks
from nf4format.blocks import Dtype, PackedTensor
from nf4format.codebook import NESTED_MAP, NF4_LEVELS

_cuda = pytest.importorskip("nf4._cuda", reason="built without GPU kernels")

DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
ROWS = (1, 16, 17, 33, 48, 64, 65, 100, 128, 161, 256, 300)  # through Hopper's tensor cores
GUARD = 8  # elements before and after an output
# Relative error allowed: the rounding of 16-bit outputs is 1.7e-3 and 2.1e-4; sums are in fp32.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2.6e-3, "float16": 6e-4}


def random_packed(n: int, k: int, seed: int = 0) -> PackedTensor:
    """Any bytes are a valid tensor: random codes and scales, of both signs."""
    rng = np.random.default_rng(seed)
    num_blocks = -(-n * k // 64)
    return PackedTensor(
        (n, k),
        "bfloat16",
        rng.integers(0, 256, -(-n * k // 2), np.uint8),
        rng.integers(0, 256, num_blocks, np.uint8),
        NF4_LEVELS,
        rng.random(-(-num_blocks // 256), dtype=np.float32) * np.float32(0.02) + np.float32(0.005),
        NESTED_MAP,
        float(np.float32(0.0457)),
    )


class OnGpu:
    """A packed weight's tensors on the GPU; `shift` puts the codes at an odd address."""

    def __init__(self, packed: PackedTensor, shift: int = 0) -> None:
        room = torch.zeros(packed.codes.size + shift, dtype=torch.uint8)
        room[shift:] = torch.from_numpy(packed.codes)
        self.tensors = [
            room.cuda()[shift:],
            torch.from_numpy(packed.absmax).cuda(),
            torch.from_numpy(packed.quant_map.copy()).cuda(),
            torch.from_numpy(packed.nested_absmax).cuda(),
            torch.from_numpy(packed.nested_quant_map.copy()).cuda(),
        ]
        self.arguments = (*(tensor.data_ptr() for tensor in self.tensors), packed.nested_offset)
        torch.cuda.synchronize()


class Guarded:
    """A poisoned output of `size` elements between guards that must stay as they are."""

    def __init__(self, size: int, dtype: torch.dtype, shift: int = 0) -> None:
        self.memory = torch.full((size + 2 * GUARD + shift,), float("nan"), dtype=dtype, device="cuda")
        self.output = self.memory[GUARD + shift : GUARD + shift + size]
        self.address = self.output.data_ptr()

    def check(self) -> torch.Tensor:
        first = self.memory.numel() - GUARD - self.output.numel()
        assert self.memory[:first].isnan().all(), "wrote before the output"
        assert self.memory[first + self.output.numel() :].isnan().all(), "wrote past the output"
        return self.output.cpu()


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = torch.int32 if a.element_size() == 4 else torch.int16
    return torch.equal(a.view(kind), b.view(kind))


def decoded(packed: PackedTensor, dtype: Dtype) -> torch.Tensor:
    """By the CPU's kernel."""
    return torch.from_numpy(blocks.dequantize(packed, dtype)).view(DTYPES[dtype]).flatten()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (3, 21), (33, 129), (100, 4160), (1, 2049), (512, 1024), (9000, 4096)]
)
def test_dequantize_has_the_bits_of_the_cpu(n: int, k: int, dtype: Dtype) -> None:
    packed = random_packed(n, k, n)
    weight, expected, size = OnGpu(packed), decoded(packed, dtype), n * k
    cuts = np.random.default_rng(k).integers(0, size + 1, (8, 2))
    ranges = {(0, size), *((int(min(cut)), int(max(cut))) for cut in cuts)}
    ranges |= {(start // 64 * 64, stop) for start, stop in ranges}
    for (start, stop), shift, overlap in itertools.product(sorted(ranges), (0, 1), (False, True)):
        out = Guarded(stop - start, DTYPES[dtype], shift)
        _cuda.dequantize(*weight.arguments, start, stop, out.address, CODES[dtype], overlap, stream())
        assert same_bits(out.check(), expected[start:stop]), (start, stop, shift)


@pytest.mark.cuda
def test_dequantize_of_codes_at_an_odd_address() -> None:
    packed = random_packed(64, 512)
    weight, out = OnGpu(packed, shift=1), Guarded(64 * 512, torch.bfloat16)
    _cuda.dequantize(*weight.arguments, 0, 64 * 512, out.address, 1, False, stream())
    assert same_bits(out.check(), decoded(packed, "bfloat16"))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (20, 7), (300, 384)])
def test_embedding_has_the_bits_of_the_cpu(n: int, k: int, dtype: Dtype) -> None:
    packed = random_packed(n, k)
    weight, expected = OnGpu(packed), decoded(packed, dtype).view(n, k)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, n, 37))
    on_gpu, out = ids.cuda(), Guarded(37 * k, DTYPES[dtype])
    _cuda.embedding(*weight.arguments, on_gpu.data_ptr(), 37, n, k, out.address, CODES[dtype], True, stream())
    assert same_bits(out.check().view(37, k), expected[ids])
    for bad in (-1, n):
        on_gpu[5] = bad
        _cuda.embedding(
            *weight.arguments, on_gpu.data_ptr(), 37, n, k, out.address, CODES[dtype], True, stream()
        )
        rows = out.check().view(37, k)
        assert rows[5].isnan().all()
        assert same_bits(rows[6:], expected[ids[6:]])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "shift"),
    [
        (1, 64, 0),
        (17, 64, 0),
        (16, 128, 0),
        (515, 5120, 0),
        (130, 6144, 0),
        (1000, 4096, 0),
        (256, 14336, 0),
        (36, 1536, 0),
        (50, 100, 0),
        (33, 4100, 0),
        (7, 63, 0),
        (40, 1024, 1),
    ],
)
def test_linear_against_float64(n: int, k: int, shift: int, dtype: Dtype) -> None:
    packed = random_packed(n, k, n + k)
    weight = OnGpu(packed, shift)
    exact = decoded(packed, "float32").double().view(n, k).cuda()
    generator = torch.Generator("cuda").manual_seed(k)
    for m in (1, 2, 3, 4, 7, 8, 9, 16, 17, 48):
        x = torch.randn(m, k, device="cuda", generator=generator).to(DTYPES[dtype])
        if m > 1:
            x[1] *= 1e-3
        bias = torch.randn(n, device="cuda", generator=generator).to(DTYPES[dtype]) if m % 2 else None
        expected = x.double() @ exact.T
        size = (x.double().abs() @ exact.abs().T).norm() * 0.03  # a handful of sums may all cancel
        if bias is not None:
            expected += bias.double()
        out = Guarded(m * n, DTYPES[dtype])
        address = 0 if bias is None else bias.data_ptr()
        _cuda.linear(
            x.data_ptr(), CODES[dtype], m, *weight.arguments, n, k, address, out.address, True, stream()
        )
        error = (out.check().view(m, n).double().cuda() - expected).norm() / max(size, expected.norm())
        assert error < TOLERANCE[dtype] * (2 if n < 64 else 1), m


@pytest.mark.cuda
def test_linear_keeps_tokens_apart_and_repeats_its_bits() -> None:
    packed = random_packed(256, 4096, 5)
    weight = OnGpu(packed)
    exact = decoded(packed, "float32").double().view(256, 4096).cuda()
    x = torch.randn(8, 4096, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    x[0] *= 2.0**100
    x[1] *= 2.0**-100
    x[2, 5], x[3, 7], x[4] = float("inf"), float("nan"), 0
    results = []
    for _ in range(5):
        out = Guarded(8 * 256, torch.bfloat16)
        _cuda.linear(x.data_ptr(), 1, 8, *weight.arguments, 256, 4096, 0, out.address, True, stream())
        results.append(out.check().view(8, 256))
    y, expected = results[0], (x.double() @ exact.T).cpu()
    for token in (0, 1, 5, 6, 7):
        assert (y[token].double() - expected[token]).norm() / expected[token].norm() < 2.6e-3
    assert not y[2].isfinite().any()
    assert y[3].isnan().all()
    assert not y[4].any()
    assert all(same_bits(result, y) for result in results)


def wgmma(
    x: torch.Tensor, weight: OnGpu, n: int, *, bias: torch.Tensor | None = None, overlap: bool = True
) -> torch.Tensor:
    """The product on Hopper's tensor cores into a poisoned output, with a poisoned workspace, all guarded."""
    m, k = x.shape
    size = _cuda.linear_wgmma_workspace(m, n, k)
    if size == 0:
        pytest.skip("needs a GPU of compute capability 9.0 and kernels built for it")
    out, workspace = Guarded(m * n, x.dtype), Guarded(size // 4, torch.float32)
    address = 0 if bias is None else bias.data_ptr()
    arguments = (n, k, address, out.address, workspace.address, size, overlap, stream())
    _cuda.linear_wgmma(x.data_ptr(), CODES[str(x.dtype)[6:]], m, *weight.arguments, *arguments)
    workspace.check()
    return out.check().view(m, n)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("n", "k", "rows"),
    [
        *((n, k, ROWS) for n, k in ((1, 64), (64, 256), (65, 192), (130, 320), (1000, 4160), (9000, 512))),
        *((n, k, ROWS) for n, k in ((515, 5120), (300, 14336))),
        # Larger ones have configurations of their own.
        (4100, 4160, (17, 40, 64, 96, 128)),
        (9400, 14336, (100,)),
    ],
)
def test_linear_wgmma_against_float64(n: int, k: int, rows: tuple[int, ...], dtype: Dtype) -> None:
    packed = random_packed(n, k, n + k)
    weight = OnGpu(packed)
    exact = decoded(packed, "float32").double().view(n, k).cuda()
    generator = torch.Generator("cuda").manual_seed(k)
    for m in rows:
        x = torch.randn(m, k, device="cuda", generator=generator).to(DTYPES[dtype])
        x[m // 2] *= 1e-3
        bias = torch.randn(n, device="cuda", generator=generator).to(DTYPES[dtype]) if m % 2 else None
        expected = x.double() @ exact.T
        size = (x.double().abs() @ exact.abs().T).norm() * 0.03  # a handful of sums may all cancel
        if bias is not None:
            expected += bias.double()
        first = wgmma(x, weight, n, bias=bias, overlap=False)
        error = (first.double().cuda() - expected).norm() / max(size, expected.norm())
        assert error < TOLERANCE[dtype] * (2 if n < 64 else 1), m
        assert same_bits(wgmma(x, weight, n, bias=bias, overlap=True), first), m


@pytest.mark.cuda
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e12])
def test_linear_wgmma_beside_the_kernel_for_any_shape(scale: float) -> None:
    """Scales of any size, tokens far apart, infinities and NaN. Codes at an odd address force the other."""
    m, n, k = 40, 200, 1024
    packed = random_packed(n, k, 3)
    packed = dataclasses.replace(
        packed,
        nested_absmax=packed.nested_absmax * np.float32(scale),
        nested_offset=float(np.float32(packed.nested_offset * scale)),
    )
    packed.nested_absmax[3] *= np.float32(1e-4)
    x = torch.randn(m, k, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    x[0] *= 2.0**60
    x[1] *= 2.0**-60
    x[2, 5], x[3, 7], x[4] = float("inf"), float("nan"), 0
    y = wgmma(x, OnGpu(packed), n).double()
    plain, shifted, wide = Guarded(m * n, torch.float32), OnGpu(packed, shift=1), x.float()
    arguments = (n, k, 0, plain.address, True, stream())
    _cuda.linear(wide.data_ptr(), 0, m, *shifted.arguments, *arguments)
    expected = plain.check().view(m, n).double()
    for token in (0, 1, *range(5, m)):
        if not expected[token].isfinite().all() or expected[token].abs().max() < 1e-35:
            continue
        assert (y[token] - expected[token]).norm() / expected[token].norm() < 4e-3, token
    assert not y[2].isfinite().any()
    assert y[3].isnan().all()
    assert not y[4].any()


@pytest.mark.cuda
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5, 4096, 100_003])
def test_adamw_against_torch(count: int, parameter: torch.dtype, gradient: torch.dtype) -> None:
    torch.manual_seed(0)
    for shift in (0, 1):
        ours = torch.randn(count + shift, device="cuda").to(parameter)[shift:]
        reference = ours.float().clone().requires_grad_()
        optimizer = torch.optim.AdamW([reference], lr=1e-2, weight_decay=0.1, foreach=False)
        page = torch.zeros(8 * (count + shift), dtype=torch.uint8, device="cuda")
        m, v = (row[shift:] for row in page.view(torch.float32).view(2, -1))
        tables = ChunkTables([ours], StateLayout(8 * (count + shift), [[Piece(0, 0, count, shift)]]))
        factor = torch.tensor([0.37], device="cuda")
        for step in range(1, 6):
            g = (torch.randn(count + shift, device="cuda") * 3).to(gradient)[shift:]
            reference.grad = g.float() * factor
            optimizer.step()
            reference.data.copy_(reference.data.to(parameter).float())
            tables.follow([g])
            tables.assign([0])
            tables.update([(0, page)], [Setting(1e-2, 0.9, 0.999, 1e-8, 0.1, step)], factor)
            assert abs(tables.gradient_norm() / g.double().norm() - 1) < 1e-6
        error = (ours.double() - reference.detach().double()).norm() / reference.detach().double().norm()
        assert error < (1e-6 if parameter == torch.float32 else 1e-3)
        assert (m - optimizer.state[reference]["exp_avg"]).abs().max() < 1e-5
        assert (v - optimizer.state[reference]["exp_avg_sq"]).abs().max() < 1e-5
        before = [ours.clone(), page.clone()]
        for bad in (math.nan, math.inf):
            tables.update(
                [(0, page)], [Setting(1e-2, 0.9, 0.999, 1e-8, 0.1, 6)], torch.full_like(factor, bad)
            )
        assert torch.equal(ours, before[0])
        assert torch.equal(page, before[1])


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"out_dtype: expected 0 .* got 3"):
        _cuda.dequantize(0, 0, 0, 0, 0, 0.0, 0, 64, 0, 3, False, 0)
    with pytest.raises(ValueError, match="start: expected at least 0, got -1"):
        _cuda.dequantize(0, 0, 0, 0, 0, 0.0, -1, 64, 0, 0, False, 0)
    with pytest.raises(ValueError, match="m: expected 1 to 65535, got 0"):
        _cuda.linear(0, 0, 0, 0, 0, 0, 0, 0, 0.0, 1, 1, 0, 0, False, 0)
    with pytest.raises(ValueError, match="step: expected at least 1, got 0"):
        _cuda.adamw(0, 0, 0, [], 0, [(0.0, 0.0, 0.0, 0.0, 0.0, 0)], 0, 0)
    with pytest.raises(ValueError, match="pages: expected at most 256, got 257"):
        _cuda.adamw(0, 0, 0, [0] * 257, 0, [(0.0, 0.0, 0.0, 0.0, 0.0, 1)], 0, 0)
    for elements, page, message in (
        (255, 0, "page_elements: expected a multiple of 256, got 255"),
        (256, 12, "page: expected an address that 8 divides, got 12"),
    ):
        with pytest.raises(ValueError, match=message):
            _cuda.adamw_8bit(0, 0, 0, [page], elements, [(0.0, 0.0, 0.0, 0.0, 0.0, 1)], 0, 0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here CUDA has nothing to refuse")
def test_a_refusal_of_cuda_has_its_code_name_and_text() -> None:
    with pytest.raises(_cuda.CudaError, match=r"^dequantize: CUDA error \d+, cudaError\w+: \w+") as caught:
        _cuda.dequantize(0, 0, 0, 0, 0, 0.0, 0, 64, 0, 0, False, 0)
    assert caught.value.code > 0
    assert caught.value.name.startswith("cudaError")
    assert caught.value.text in str(caught.value)


def test_build_info() -> None:
    info = _cuda.build_info()
    assert info["archs"]
    assert info["runtime"] >= 11000
    assert _cuda.driver_version() >= 0
