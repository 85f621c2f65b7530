"""The plan of a file: order, alignment, sizes, and quant_state texts that bitsandbytes reads."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nf4format.dtypes import element_bytes
from nf4format.errors import FormatError
from nf4format.header import read_header, tensor_bytes
from nf4format.layout import (
    COMPANIONS,
    PAGE,
    QUANT_STATE,
    KeptSpec,
    PackedSpec,
    plan_layout,
    quant_state_json,
    quant_state_size,
)

FILES = {"config.json": 100, "tokenizer.json": 1001}
METADATA = {"nf4.source_sha256": "0" * 64, "nf4.config_sha256": "1" * 64, "nf4.aliases": "{}"}
LLAMA = [
    PackedSpec(f"model.layers.{layer}.{part}.weight", shape, "bfloat16")
    for layer in range(2)
    for part, shape in {"self_attn.q_proj": (4096, 4096), "mlp.down_proj": (4096, 11008)}.items()
]


def test_order_and_shapes() -> None:
    kept = [KeptSpec("model.norm.weight", "BF16", (4096,)), KeptSpec("lm_head.weight", "BF16", (32000, 4096))]
    layout = plan_layout(LLAMA, kept, FILES, METADATA)
    entries = list(layout.entries.values())
    assert [entry.name for entry in entries[:4]] == [spec.name for spec in LLAMA]
    assert [entry.name for entry in entries[-3:]] == [
        "__file__/config.json",
        "__file__/tokenizer.json",
        "__nf4__.sums",
    ]
    position = layout.data_start
    for entry in entries:
        assert entry.begin == position
        position = entry.end
    assert position == layout.file_bytes
    assert layout.sums_begin == entries[-1].begin
    assert layout.data_start % PAGE == 0
    # Whole pages of codes leave every code tensor on a page, without pads.
    assert all(entry.begin % PAGE == 0 for entry in entries[:4])
    assert not any(name.startswith("__pad__") for name in layout.entries)
    n = 4096 * 11008
    down = {suffix: layout.entries[LLAMA[1].name + suffix] for suffix in ("", *COMPANIONS)}
    assert {suffix: (entry.dtype, entry.shape) for suffix, entry in down.items()} == {
        "": ("U8", (n // 2, 1)),
        ".absmax": ("U8", (n // 64,)),
        ".nested_absmax": ("F32", (n // 64 // 256,)),
        ".quant_map": ("F32", (16,)),
        ".nested_quant_map": ("F32", (256,)),
        QUANT_STATE: ("U8", (192,)),
    }


def test_every_tensor_is_aligned_whatever_the_sizes() -> None:
    rng = random.Random(3)
    names = iter(range(10**6))
    for _ in range(100):
        packed = [
            PackedSpec(f"p{next(names)}", (rng.randrange(1, 90), rng.randrange(1, 90)), "float16")
            for _ in range(rng.randrange(6))
        ]
        kept = [
            KeptSpec(
                f"k{next(names)}",
                rng.choice(["BF16", "F32", "F64", "U8", "I16", "C64"]),
                tuple(rng.randrange(0, 70) for _ in range(rng.randrange(3))),
            )
            for _ in range(rng.randrange(6))
        ]
        layout = plan_layout(packed, kept, FILES, METADATA)
        for entry in layout.entries.values():
            assert entry.begin % element_bytes(entry.dtype) == 0, entry
            assert entry.end - entry.begin == tensor_bytes(entry.dtype, entry.shape)
        # What is a multiple of 64 bytes lies on one: maps, and whatever kernels load in whole vectors.
        tail = [e for e in layout.entries.values() if e.name not in {spec.name for spec in packed}]
        assert all(e.begin % 64 == 0 for e in tail if e.dtype == "F32" and (e.end - e.begin) % 64 == 0)


def test_kept_tensors_stay_in_execution_order() -> None:
    kept = [KeptSpec(name, "BF16", (64,)) for name in "zebra"]
    layout = plan_layout([], kept, FILES, METADATA)
    assert [name for name in layout.entries if len(name) == 1] == list("zebra")


def test_header_says_what_the_file_is_in_its_first_bytes() -> None:
    layout = plan_layout(LLAMA, [], FILES, METADATA)
    header = layout.header_bytes()
    assert len(header) == layout.data_start
    assert header[8:].startswith(b'{"__metadata__":{"format":"pt","nf4.version":"1"')
    keys = list(json.loads(header[8:])["__metadata__"])
    assert keys[2:] == sorted(keys[2:])
    # Only lengths are planned: values may follow, the plan stays.
    later = layout.header_bytes({"nf4.source_sha256": "f" * 64})
    assert later == header.replace(b'"nf4.source_sha256":"' + b"0" * 64, b'"nf4.source_sha256":"' + b"f" * 64)
    with pytest.raises(ValueError, match="planned 64, got 63"):
        layout.header_bytes({"nf4.source_sha256": "f" * 63})
    with pytest.raises(ValueError, match="no such key"):
        layout.header_bytes({"nf4.host": ""})


def test_header_is_read_back(tmp_path: Path) -> None:
    layout = plan_layout(LLAMA, [KeptSpec("empty", "F32", (0, 5))], FILES, METADATA)
    path = tmp_path / "x.nf4"
    path.write_bytes(layout.header_bytes())
    with path.open("r+b") as file:
        file.truncate(layout.file_bytes)
    header = read_header(path, strict=True)
    assert header.entries == layout.entries
    assert header.metadata == layout.metadata


def test_more_than_2_to_the_31_elements() -> None:
    spec = PackedSpec("experts", (128, 8192, 14336), "bfloat16")
    n = 128 * 8192 * 14336
    assert n > 2**33
    layout = plan_layout([spec], [], FILES, METADATA)
    assert layout.entries["experts"].shape == (n // 2, 1)
    assert layout.entries["experts.nested_absmax"].shape == (n // 64 // 256,)


@pytest.mark.parametrize(
    ("packed", "kept", "files", "message"),
    [
        ([PackedSpec("x", (0, 5), "float32")], [], FILES, "tensor 'x': an empty tensor"),
        ([PackedSpec("x", (5,), "int8")], [], FILES, "tensor 'x': expected float32 or .*, got int8"),  # type: ignore[arg-type]
        ([PackedSpec("x", (1 << 41,), "float32")], [], FILES, "tensor 'x': expected dimensions"),
        (
            [PackedSpec("x", (5,), "float32")],
            [KeptSpec("x", "F32", (1,))],
            FILES,
            "'x': .* used twice",
        ),
        (
            [PackedSpec("x", (5,), "float32")],
            [KeptSpec("x.absmax", "F32", (1,))],
            FILES,
            "'x.absmax': the name is used twice",
        ),
        ([], [KeptSpec("x", "F7", (1,))], FILES, "tensor 'x': unknown dtype"),
        ([], [KeptSpec("__file__/config.json", "U8", (1,))], FILES, "the name is reserved"),
        ([], [KeptSpec("a b", "U8", (1,))], FILES, "'a b': not a tensor name"),
        ([PackedSpec("x" * 230, (5,), "float32")], [], FILES, "not a tensor name"),
        ([], [], {**FILES, "../config.json": 1}, "file '../config.json' cannot be embedded"),
        ([], [], {"tokenizer.json": 5}, "no config.json"),
    ],
)
def test_refused(packed: list[PackedSpec], kept: list[KeptSpec], files: dict[str, int], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        plan_layout(packed, kept, files, METADATA)


def test_fixed_metadata_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match=re.escape("metadata 'nf4.version': version 1 has '1', got '2'")):
        plan_layout([], [], FILES, {"nf4.version": "2"})


FLOATS = [0.0, -0.0, 1.0, 0.1, 1e-45, 3.4028234663852886e38, -1.1754943508222875e-38, 0.04571533203125]


@pytest.mark.parametrize("value", FLOATS)
def test_quant_state_is_exact_and_padded(value: float) -> None:
    offset = float(np.float32(value))
    spec = PackedSpec("x", (4096, 11008), "bfloat16")
    size = quant_state_size(spec)
    data = quant_state_json(spec, offset, size)
    assert len(data) == size
    assert size % 64 == 0
    assert data.rstrip(b" ").endswith(b"}")
    state = json.loads(data)
    assert list(state) == [
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]
    assert np.float32(state["nested_offset"]).tobytes() == np.float32(offset).tobytes()
    assert math.copysign(1, state["nested_offset"]) == math.copysign(1, offset)


def test_quant_state_fits_for_any_offset() -> None:
    rng = np.random.default_rng(0)
    spec = PackedSpec("x", (1 << 40, 1, 1, 1, 1, 1, 1, 1), "bfloat16")
    size = quant_state_size(spec)
    for value in rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32):
        if np.isfinite(value):
            assert len(quant_state_json(spec, float(value), size)) == size


@pytest.mark.parametrize("offset", [math.nan, math.inf, 0.1])
def test_quant_state_refuses_what_is_not_fp32(offset: float) -> None:
    with pytest.raises(ValueError, match="a finite fp32 value"):
        quant_state_json(PackedSpec("x", (5,), "float32"), offset, 192)


def test_bitsandbytes_reads_the_companions(pack: Callable[..., Path]) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    name = "model.layers.0.q_proj.weight"
    spec = PackedSpec(name, (128, 96), "bfloat16")
    tensors = load_file(pack(packed=[spec]))
    companions = {key.removeprefix(name + "."): tensors[key] for key in tensors if key.startswith(name + ".")}
    state = bnb.QuantState.from_dict(companions, device=torch.device("cpu"))
    assert (state.shape, state.dtype) == (torch.Size([128, 96]), torch.bfloat16)
    assert (state.blocksize, state.state2.blocksize, state.quant_type) == (64, 256, "nf4")
    stored = json.loads(bytes(tensors[name + QUANT_STATE].numpy()))["nested_offset"]
    assert state.offset.item() == stored
    weight = bnb.dequantize_4bit(tensors[name], state)
    assert weight.shape == (128, 96)
