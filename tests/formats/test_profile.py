"""Well-formed safetensors files, sums included, that are not .nf4 files: each refused for its own reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from bad_inputs.profiles import X, altered, floats

from nf4format.codebook import NF4_LEVELS
from nf4format.container import Nf4File
from nf4format.errors import FormatError
from nf4format.header import Header, TensorEntry, read_header
from nf4format.sums import SUMS_NAME, encode_sums

MakeDraft = Callable[[], Any]


def test_unchanged_draft_is_accepted(pack: Callable[..., Path], draft: MakeDraft, tmp_path: Path) -> None:
    """The table above proves nothing if a rewritten file were refused anyway."""
    legal = draft()
    legal.write(tmp_path / "same.nf4")
    assert (tmp_path / "same.nf4").read_bytes() == pack().read_bytes()
    legal.tensors[X + ".nested_absmax"] = floats(0.0)  # a zero scale is legal
    legal.state(nested_offset=-0.5)  # so are negative ones
    legal.write(tmp_path / "legal.nf4")
    with Nf4File.open(tmp_path / "legal.nf4") as file:
        assert file.packed(X).nested_offset == -0.5


def test_other_maps_only_when_allowed(draft: MakeDraft, tmp_path: Path) -> None:
    other = draft()
    other.tensors[X + ".quant_map"] = altered(NF4_LEVELS, 3, -0.4)
    other.write(tmp_path / "map.nf4")
    with Nf4File.open(tmp_path / "map.nf4", allow_maps=True) as file:
        assert file.packed(X).quant_map[3] == np.float32(-0.4)
    other.tensors[X + ".quant_map"] = altered(NF4_LEVELS, 3, np.inf)
    other.write(tmp_path / "map.nf4")
    with pytest.raises(FormatError, match="quant_map': not the quant_map of NF4"):
        Nf4File.open(tmp_path / "map.nf4", allow_maps=True)


def test_other_levels_when_the_metadata_declare_them(draft: MakeDraft, tmp_path: Path) -> None:
    other = draft()
    keys = ["format", "nf4.version", *sorted({*other.metadata, "nf4.levels"} - {"format", "nf4.version"})]
    other.metadata = {key: other.metadata.get(key, "custom") for key in keys}
    other.write(tmp_path / "map.nf4")
    with Nf4File.open(tmp_path / "map.nf4") as file:
        assert not file.other_levels
    other.tensors[X + ".quant_map"] = altered(NF4_LEVELS, 3, -0.4)
    other.write(tmp_path / "map.nf4")
    with Nf4File.open(tmp_path / "map.nf4") as file:
        assert file.other_levels == {X}
    for value, message in ((np.nan, "finite"), (-0.6, "ascending")):
        other.tensors[X + ".quant_map"] = altered(NF4_LEVELS, 3, value)
        other.write(tmp_path / "map.nf4")
        with pytest.raises(FormatError, match=f"quant_map': not a table of levels: .*{message}"):
            Nf4File.open(tmp_path / "map.nf4")


def test_table_of_another_layout(pack: Callable[..., Path]) -> None:
    """A table that is sound in itself, but counts other chunks."""
    path = pack()
    header = read_header(path, strict=True)
    table = bytearray(path.read_bytes()[header.entries[SUMS_NAME].begin :])
    other = Header(
        {"x": TensorEntry("x", "U8", (5,), 0, 5), SUMS_NAME: TensorEntry(SUMS_NAME, "U8", (0,), 5, 5)},
        {},
        0,
        5,
    )
    foreign = encode_sums(other, b"", [0])
    with path.open("r+b") as file:
        file.seek(header.entries[SUMS_NAME].begin)
        assert len(foreign) < len(table)
        file.write(foreign)
    with pytest.raises(FormatError, match="the table of sums"):
        Nf4File.open(path)


def mutate(draft: Any, rng: random.Random) -> None:
    """One change of a name, the content, the shape, the order or the metadata."""
    name = rng.choice(list(draft.tensors))
    dtype, shape, data = draft.tensors[name]
    change = rng.randrange(6)
    if change == 0:
        new = rng.choice([name + ".absmax", X + "2", "__pad__.9", "__file__/merges.txt"])
        draft.rename(name, new)
    elif change == 1:
        del draft.tensors[name]
    elif change == 2 and data:
        at = rng.randrange(len(data))
        draft.tensors[name] = (dtype, shape, data[:at] + rng.randbytes(1) + data[at + 1 :])
    elif change == 3:
        draft.tensors[name] = (dtype, [*shape, 1], data)
    elif change == 4:
        draft.move(name, before=rng.choice([other for other in draft.tensors if other != name]))
    else:
        key = rng.choice(list(draft.metadata))
        draft.metadata[key] = rng.choice(["", "1", "{}", "64", draft.metadata[key] + " "])


def test_random_edits_are_refused_or_harmless(draft: MakeDraft, tmp_path: Path) -> None:
    """Structure-aware mutations with fresh sums: a typed error, or a file whose every weight can be read."""
    rng = random.Random(5)
    path = tmp_path / "mutant.nf4"
    accepted = 0
    for _ in range(400):
        mutant = draft()
        for _ in range(rng.choice([1, 1, 2])):
            mutate(mutant, rng)
        mutant.write(path)
        try:
            file = Nf4File.open(path)
        except FormatError:
            continue
        accepted += 1
        with file, safetensors.safe_open(path, "np") as other:
            assert set(other.keys()) == set(file.header.entries)
            for name in file.packed_names:
                assert file.packed(name).codes.size == (file.packed(name).size + 1) // 2
            assert file.verify() == []
    assert 50 < accepted < 350
