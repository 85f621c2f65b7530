"""Opening and reading .nf4 files, damage of every kind, and safetensors as the other reader."""

from __future__ import annotations

import json
import os
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from nf4format.atomic import AtomicFile
from nf4format.codebook import NESTED_MAP, NF4_LEVELS
from nf4format.container import Nf4File
from nf4format.errors import FormatError
from nf4format.layout import QUANT_STATE, KeptSpec, PackedSpec, plan_layout, quant_state_json
from nf4format.sums import CHUNK_BYTES, encode_sums

Pack = Callable[..., Path]
RAGGED = "model.layers.0.ragged.weight"


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1 << bit]))


@pytest.mark.parametrize("mmap", [True, False])
def test_contents(pack: Pack, mmap: bool) -> None:
    with Nf4File.open(pack(), mmap=mmap) as file, safe_open(pack("same.nf4"), "np") as other:
        assert file.packed_names == (
            "model.layers.0.q_proj.weight",
            RAGGED,
            "model.layers.0.experts.weight",
        )
        assert set(file.kept_names) == {
            "model.embed_tokens.weight",
            "model.norm.weight",
            "steps",
            "scalar",
            "flags",
        }
        assert file.file_names == ("config.json", "tokenizer.json")
        assert file.config == {"model_type": "llama", "hidden_size": 64}
        assert file.file("tokenizer.json") == b'{"model": {"type": "BPE"}}'
        assert file.source_fingerprint == "ab" * 32
        for name in file.packed_names:
            weight = file.packed(name)
            assert weight.codes.tobytes() == other.get_tensor(name).tobytes()
            assert weight.absmax.tobytes() == other.get_tensor(name + ".absmax").tobytes()
            np.testing.assert_array_equal(weight.nested_absmax, other.get_tensor(name + ".nested_absmax"))
            np.testing.assert_array_equal(weight.quant_map, NF4_LEVELS)
            np.testing.assert_array_equal(weight.nested_quant_map, NESTED_MAP)
            state = json.loads(other.get_tensor(name + QUANT_STATE).tobytes())
            assert state["nested_offset"] == weight.nested_offset
            assert (tuple(state["shape"]), state["dtype"]) == (weight.shape, weight.dtype)
        for name in ("model.norm.weight", "steps", "scalar", "flags"):
            data, dtype, shape = file.kept(name)
            theirs = other.get_tensor(name)
            assert (data.tobytes(), shape) == (theirs.tobytes(), theirs.shape)
            assert dtype == other.get_slice(name).get_dtype()
        assert file.verify() == []


def test_every_tensor_opens_in_safetensors(pack: Pack) -> None:
    path = pack()
    with Nf4File.open(path) as file, safe_open(path, "np") as other:
        assert set(other.keys()) == set(file.header.entries)
        assert other.metadata() == file.metadata
        content = path.read_bytes()
        for name, entry in file.header.entries.items():
            if entry.dtype != "BF16":  # numpy has none
                assert other.get_tensor(name).tobytes() == content[entry.begin : entry.end]


def test_alias_gives_the_stored_tensor(pack: Pack) -> None:
    with Nf4File.open(pack(aliases={"a": "model.norm.weight", "b": RAGGED})) as file:
        assert file.kept("a")[0].tobytes() == file.kept("model.norm.weight")[0].tobytes()
        assert file.packed("b").shape == (7, 19)


def test_views_are_private_writable_and_outlive_the_file(pack: Pack) -> None:
    path = pack()
    before = path.read_bytes()
    with Nf4File.open(path) as file:
        codes = file.packed(RAGGED).codes
        begin = file.header.entries[RAGGED].begin
    assert codes.tobytes() == before[begin : begin + codes.size]
    codes[:] = 0
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="is closed"):
        file.packed(RAGGED)


def test_unknown_names(pack: Pack) -> None:
    with Nf4File.open(pack()) as file:
        for read in (file.packed, file.kept, file.file):
            with pytest.raises(KeyError):
                read("nothing")
        with pytest.raises(KeyError):
            file.kept(RAGGED)
        with pytest.raises(KeyError):
            file.kept(RAGGED + ".absmax")


def test_same_content_same_bytes_and_fingerprint(pack: Pack) -> None:
    first, second, other = pack("a.nf4"), pack("b.nf4"), pack("c.nf4", seed=1)
    assert first.read_bytes() == second.read_bytes()
    prints = []
    for path in (first, second, other):
        with Nf4File.open(path) as file:
            prints.append(file.fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_file_with_nothing_packed(pack: Pack) -> None:
    with Nf4File.open(pack(packed=[])) as file:
        assert file.packed_names == ()
        assert file.verify() == []


def test_damage_is_named(pack: Pack) -> None:
    path = pack(kept=[KeptSpec("big", "U8", (9 << 20,)), KeptSpec("norm", "F32", (5,))], aliases={})
    with Nf4File.open(path) as file:
        entries = dict(file.header.entries)
        start = file.header.data_start
    flip(path, entries["big"].begin + (6 << 20))
    flip(path, entries["__file__/tokenizer.json"].begin + 3)
    seen: list[int] = []
    with Nf4File.open(path) as file:
        damage = file.verify(threads=2, progress=seen.append)
        assert sum(seen) == entries["__nf4__.sums"].begin - start
    chunk, last_chunk, tokenizer = damage
    assert (chunk.kind, chunk.names, chunk.begin, chunk.end) == (
        "data",
        ("big",),
        start + (4 << 20),
        start + (8 << 20),
    )
    assert last_chunk.kind == "data"
    assert {"big", "norm", "__file__/tokenizer.json"} <= set(last_chunk.names)
    assert "__file__/config.json" not in last_chunk.names  # its own sum is good
    entry = entries["__file__/tokenizer.json"]
    assert (tokenizer.kind, tokenizer.names) == ("file", ("tokenizer.json",))
    assert (tokenizer.begin, tokenizer.end) == (entry.begin, entry.end)
    assert str(chunk) == f"data is damaged (bytes {chunk.begin} to {chunk.end}), which hold big"


def detected(path: Path) -> bool:
    try:
        with Nf4File.open(path) as file:
            return bool(file.verify(threads=1))
    except FormatError as error:
        assert str(path) in str(error)
        return True


def test_flipped_bits_are_detected_everywhere(pack: Pack) -> None:
    path = pack()
    size = path.stat().st_size
    with Nf4File.open(path) as file:
        entries, start = file.header.entries, file.header.data_start
    rng = random.Random(11)
    offsets = [rng.randrange(size) for _ in range(250)]
    offsets += [rng.randrange(start) for _ in range(50)]
    offsets += range(8)
    offsets += range(entries["__nf4__.sums"].begin, size)  # the table: every byte
    offsets += range(entries["__file__/config.json"].begin, entries["__file__/config.json"].end, 5)
    for offset in offsets:
        bit = rng.randrange(8)
        flip(path, offset, bit)
        assert detected(path), (offset, bit)
        flip(path, offset, bit)
    assert not detected(path)


def test_lost_and_moved_pages_are_detected(pack: Pack) -> None:
    path = pack()
    good = path.read_bytes()
    pages = [good[at : at + 4096] for at in range(0, len(good), 4096)]
    for index in range(1, len(pages) - 1):
        zeroed = [*pages[:index], bytes(4096), *pages[index + 1 :]]
        swapped = [*pages[:index], pages[index + 1], pages[index], *pages[index + 2 :]]
        cut = [*pages[:index]]
        extended = [*pages[:index], bytes(len(good) - 4096 * index)]
        for variant in (zeroed, swapped, cut, extended):
            content = b"".join(variant)
            if content != good:
                path.write_bytes(content)
                assert detected(path), index


def test_header_damage_is_told_as_such(pack: Pack) -> None:
    path = pack()
    flip(path, path.read_bytes().index(b'"nf4.options":"{}"') + 15, 1)
    with pytest.raises(FormatError, match=r"the header is damaged \(bytes 0 to 4096\)"):
        Nf4File.open(path)


def test_cut_short(pack: Pack) -> None:
    path = pack()
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FormatError, match=r"the file is cut short, expected \d+ bytes, got \d+"):
        Nf4File.open(path)


def test_cut_short_while_open_is_an_exception_without_mmap(pack: Pack) -> None:
    path = pack()
    with Nf4File.open(path, mmap=False) as file:
        os.truncate(path, 8192)
        with pytest.raises(FormatError, match="cut short while in use"):
            file.packed(RAGGED)
        with pytest.raises(FormatError, match="cut short while in use"):
            file.verify()


def test_weights_read_at_once(pack: Pack) -> None:
    """The same bytes as mapped ones, in memory that the file no longer matters for."""
    path = pack(kept=[KeptSpec("big", "U8", (9 << 20,)), KeptSpec("norm", "F32", (5,))], aliases={})
    with Nf4File.open(path) as mapped, Nf4File.open(path, mmap=False) as file:
        expected = {name: mapped.packed(name).codes.tobytes() for name in mapped.packed_names}
        expected |= {name: mapped.kept(name)[0].tobytes() for name in mapped.kept_names}
    for threads in (1, 3):
        with Nf4File.open(path, mmap=False) as file:
            file.read_weights(threads=threads)
            arrays = {name: file.packed(name).codes for name in file.packed_names}
            arrays |= {name: file.kept(name)[0] for name in file.kept_names}
            for name, array in arrays.items():
                assert array.ctypes.data % 64 == file.header.entries[name].begin % 64, (
                    "as aligned as in a file"
                )
                assert file.packed(name).quant_map[15] == 1 if name in file.packed_names else True
    os.truncate(path, 100)
    for name, array in arrays.items():
        assert array.tobytes() == expected[name]


def test_weights_that_are_damaged_are_not_read(pack: Pack) -> None:
    path = pack(kept=[KeptSpec("big", "U8", (9 << 20,)), KeptSpec("norm", "F32", (5,))], aliases={})
    with Nf4File.open(path) as file:
        begin = file.header.entries["big"].begin
    flip(path, begin + (6 << 20))
    with Nf4File.open(path, mmap=False) as file:
        with pytest.raises(FormatError, match=r"data is damaged \(bytes \d+ to \d+\), which hold big; fetch"):
            file.read_weights()
        file.read_weights(check=False)
        assert file.kept("big")[0].size == 9 << 20
        os.truncate(path, 2 << 20)
        with pytest.raises(FormatError, match="cut short while in use"):
            file.read_weights(check=False)


def test_replaced_while_open_keeps_the_old_content(pack: Pack) -> None:
    path = pack()
    with Nf4File.open(path) as file:
        codes = file.packed(RAGGED).codes.copy()
        pack(seed=5)
        np.testing.assert_array_equal(file.packed(RAGGED).codes, codes)
        assert file.verify() == []


def test_open_costs_the_same_whatever_the_size(tmp_path: Path) -> None:
    """A sparse file of 8 GiB: opening reads constants, not codes, absmax or kept tensors."""
    specs = [PackedSpec(f"layers.{i}.weight", (65536, 4096), "bfloat16") for i in range(60)]
    config = b"{}"
    metadata = {
        "nf4.config_sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "nf4.source_sha256": "0" * 64,
    }
    layout = plan_layout(specs, [KeptSpec("embed", "BF16", (1 << 28,))], {"config.json": 2}, metadata)
    assert layout.file_bytes > 8 << 30
    path = tmp_path / "large.nf4"

    with AtomicFile(path) as file:
        os.ftruncate(file.fd, layout.file_bytes)
        for spec in specs:
            state = layout.entries[spec.name + QUANT_STATE]
            file.pwrite(NF4_LEVELS.tobytes(), layout.entries[spec.name + ".quant_map"].begin)
            file.pwrite(NESTED_MAP.tobytes(), layout.entries[spec.name + ".nested_quant_map"].begin)
            file.pwrite(quant_state_json(spec, 0.5, state.end - state.begin), state.begin)
        file.pwrite(config, layout.entries["__file__/config.json"].begin)
        # Any sums will do: opening does not compare those of the data, and hashing 8 GiB would take seconds.
        header = layout.header_bytes()
        num_chunks = -(-(layout.sums_begin - layout.data_start) // CHUNK_BYTES)
        file.pwrite(encode_sums(layout, header, [0] * (num_chunks + 1)), layout.sums_begin)
        file.pwrite(header, 0)
    tracemalloc.start()
    started = time.perf_counter()
    with Nf4File.open(path) as opened:
        weight = opened.packed("layers.55.weight")
        assert weight.codes[-1] == 0
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert seconds < 1


def test_open_from_a_descriptor(pack: Pack, tmp_path: Path) -> None:
    """As a writer checks its file before the rename; the descriptor stays the caller's."""
    path = pack()
    fd = os.open(path, os.O_RDONLY)
    path.rename(tmp_path / "elsewhere")
    try:
        with Nf4File.from_descriptor(fd, "named.nf4") as file:
            assert file.verify() == []
        os.truncate(tmp_path / "elsewhere", 5000)
        with pytest.raises(FormatError, match=r"named\.nf4: the file is cut short"):
            Nf4File.from_descriptor(fd, "named.nf4")
        assert os.fstat(fd).st_size == 5000
    finally:
        os.close(fd)
