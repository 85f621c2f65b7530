"""The GPU codec against bitsandbytes' on the same GPU: codes, constants, decoded values, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nf4format import blocks
from nf4format.blocks import Dtype, PackedTensor

pytestmark = pytest.mark.cuda

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
SHAPES = ((64, 64), (3, 33), (129, 192), (7, 100), (1024, 4096))


@pytest.fixture(scope="module")
def functional():
    return pytest.importorskip("bitsandbytes").functional


def on_gpu(packed: PackedTensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    arrays = (
        packed.codes,
        packed.absmax,
        packed.quant_map,
        packed.nested_absmax,
        packed.nested_quant_map,
    )
    tensors = (torch.from_numpy(np.array(array)).cuda() for array in arrays)
    return torch.ops.nf4.dequantize(*tensors, packed.nested_offset, shape, dtype)


def state_of(functional, packed: PackedTensor, shape: tuple[int, int], dtype: torch.dtype):
    """The packed tensor as bitsandbytes describes one."""

    def gpu(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).cuda()

    nested = functional.QuantState(
        absmax=gpu(packed.nested_absmax),
        code=gpu(packed.nested_quant_map),
        blocksize=256,
        dtype=torch.float32,
    )
    return functional.QuantState(
        absmax=gpu(packed.absmax),
        shape=torch.Size(shape),
        code=gpu(packed.quant_map),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.tensor(packed.nested_offset, device="cuda"),
        state2=nested,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_values(functional, shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    bits = values.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else values.numpy()
    packed = blocks.quantize(bits, dtype)
    for target in (torch.float32, torch.bfloat16, torch.float16):
        state = state_of(functional, packed, shape, target)
        theirs = functional.dequantize_4bit(torch.from_numpy(packed.codes.copy()).cuda().view(-1, 1), state)
        assert torch.equal(on_gpu(packed, shape, target), theirs), target


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_its_own_encoder(functional, dtype):
    shape = (512, 1024)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    bits = values.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else values.numpy()
    packed = blocks.quantize(bits, dtype)
    codes, state = functional.quantize_4bit(values.cuda(), quant_type="nf4", compress_statistics=True)
    assert np.array_equal(codes.cpu().numpy().reshape(-1), packed.codes)
    # The mean of the scales is a sum over a GPU's threads: its last bits are its own.
    assert float(state.offset) == pytest.approx(packed.nested_offset, rel=1e-6)


def test_signed_scales(functional):
    """Scales of both signs with offset 0: what an encoder may write, bitsandbytes decodes alike."""
    rng = np.random.default_rng(2)
    shape = (256, 512)
    num_blocks = shape[0] * shape[1] // 64
    packed = PackedTensor(
        shape=shape,
        dtype="float32",
        codes=rng.integers(0, 256, shape[0] * shape[1] // 2, dtype=np.uint8),
        absmax=rng.integers(0, 256, num_blocks, dtype=np.uint8),
        quant_map=blocks.quantize(np.ones(64, np.float32), "float32").quant_map,
        nested_absmax=rng.random(num_blocks // 256, dtype=np.float32),
        nested_quant_map=blocks.quantize(np.ones(64, np.float32), "float32").nested_quant_map,
        nested_offset=0.0,
    )
    for target in (torch.float32, torch.bfloat16, torch.float16):
        ours = on_gpu(packed, shape, target)
        codes = torch.from_numpy(packed.codes.copy()).cuda().view(-1, 1)
        assert (ours < 0).any()
        assert torch.equal(
            ours, functional.dequantize_4bit(codes, state_of(functional, packed, shape, target))
        )
