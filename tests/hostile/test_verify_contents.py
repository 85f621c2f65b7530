"""`nf4 verify --deep` and `--against`: quiet about every honest file, and sharp about forged ones."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs.draft import Draft
from bad_inputs.kit import CONFIG, Q, edited, embed, good, weights, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from nf4format.against import compare
from nf4format.audit import audit
from nf4format.checkpoint import Checkpoint
from nf4format.container import Nf4File
from nf4format.encode import ENCODERS
from nf4format.errors import FormatError
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

LEVELS = sorted(ENCODERS)
NORM = "model.norm.weight"


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., Path]:
    """A function that compiles tensors and returns the .nf4 file; the checkpoint is `model` beside it."""

    def build(tensors: dict[str, np.ndarray], level: int, config: dict[str, Any] = CONFIG) -> Path:
        write_checkpoint(tmp_path / "model", tensors, config)
        compile_checkpoint(tmp_path / "model", tmp_path / "out.nf4", CompileOptions(level=level, jobs=1))
        return tmp_path / "out.nf4"

    return build


def findings(path: Path) -> list[str]:
    with Nf4File.open(path) as file:
        assert file.verify() == []
        seen: list[int] = []
        found = [str(finding) for finding in audit(file, seen.append)]
        assert sum(seen) > 0
        return found


def differences(path: Path, model: Path) -> list[str]:
    with Nf4File.open(path) as file, Checkpoint.open(model) as checkpoint:
        seen: list[int] = []
        found = [str(finding) for finding in compare(file, checkpoint, threads=2, progress=seen.append)]
        assert sum(seen) > 0
        return found


def odd_tensors() -> dict[str, np.ndarray]:
    """Weights of every kind that gave the encoder trouble somewhere."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal((96, 100)).astype(np.float32)
    sparse = normal * (rng.random(normal.shape) < 0.01)
    made = {
        "normal": normal,
        "half": normal.astype(np.float16),
        "odd": normal[:95, :99],
        "zeros": np.zeros((64, 64), np.float32),
        "constant": np.full((64, 64), 0.5, np.float32),
        "sparse": sparse,
        "tiny": normal * np.float32(1e-39),
        "denormal": np.full((64, 64), 1e-44, np.float32),
        "huge": normal / np.abs(normal).max() * np.float32(3.3e38),
        "wide": normal * np.exp(8 * rng.standard_normal(normal.shape)).astype(np.float32),
        "half, small": (normal * 1e-6).astype(np.float16),
        "one": np.pad(np.ones((1, 1), np.float32), ((0, 63), (0, 63))),
        "many blocks": rng.standard_normal((300, 300)).astype(np.float32),
    }
    return {
        f"model.layers.{i}.{name.replace(' ', '_').replace(',', '')}.weight": w
        for i, (name, w) in enumerate(made.items())
    }


@pytest.mark.parametrize("level", LEVELS)
def test_honest_files(compiled: Callable[..., Path], level: int) -> None:
    path = compiled(odd_tensors(), level)
    with Nf4File.open(path) as file:
        assert len(file.packed_names) > 8
    assert findings(path) == []
    assert differences(path, path.with_name("model")) == []


@pytest.mark.parametrize("level", LEVELS)
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    shape=st.tuples(st.integers(33, 100), st.integers(33, 100)),
    dtype=st.sampled_from([np.float16, np.float32]),
    scale=st.integers(-45, 38),
    kind=st.sampled_from(["bits", "normal", "few", "one value"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_is_finite_encodes_to_what_makes_sense(
    *, level: int, shape: tuple[int, int], dtype: type, scale: int, kind: str, seed: int
) -> None:
    """Any bit patterns that are numbers: the file opens, decodes to finite numbers, and passes both looks."""
    rng = np.random.default_rng(seed)
    if kind == "bits":
        values = np.frombuffer(rng.bytes(shape[0] * shape[1] * np.dtype(dtype).itemsize), dtype).reshape(
            shape
        )
        limit = np.finfo(dtype).max / 2  # the 8-bit scale of a larger one may decode to infinity
        values = np.where(np.isfinite(values) & (np.abs(values) < limit), values, dtype(1))
    else:
        with np.errstate(over="ignore", under="ignore"):
            values = (rng.standard_normal(shape) * 10.0**scale).astype(dtype)
        if kind == "few":
            values = np.where(rng.random(shape) < 0.01, values, dtype(0))
        if kind == "one value":
            values = np.full(shape, values.flat[0])
        values = np.clip(np.nan_to_num(values), -np.finfo(dtype).max / 2, np.finfo(dtype).max / 2).astype(
            dtype
        )
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(Path(place, "model"), {"model.layers.0.x.weight": values})
        compile_checkpoint(Path(place, "model"), Path(place, "x.nf4"), CompileOptions(level=level, jobs=1))
        assert findings(Path(place, "x.nf4")) == []
        assert differences(Path(place, "x.nf4"), Path(place, "model")) == []


@pytest.mark.parametrize("level", LEVELS)
def test_a_whole_model_with_tied_weights(compiled: Callable[..., Path], level: int) -> None:
    tensors = weights()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    path = compiled(tensors, level, {**CONFIG, "tie_word_embeddings": True})
    with Nf4File.open(path) as file:
        assert file.aliases
    assert findings(path) == []
    assert differences(path, path.with_name("model")) == []


@pytest.mark.parametrize("level", LEVELS)
def test_one_code_in_a_tensor_of_many_chunks(compiled: Callable[..., Path], level: int) -> None:
    """Forged in the middle of what is read in several chunks: the block is named."""
    name = "model.layers.0.large.weight"
    path = compiled({name: np.random.default_rng(0).standard_normal((1200, 1024)).astype(np.float32)}, level)
    draft = Draft(path, name)
    dtype, shape, data = draft.tensors[name]
    at = 400_000
    draft.tensors[name] = (dtype, shape, data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
    draft.write(path)
    (found,) = differences(path, path.with_name("model"))
    where = f"codes of 1 blocks of 19200, the first is {at // 32}"
    assert found == f"tensor '{name}': not what the checkpoint encodes to: {where}"


def replace(name: str, change: Callable[[bytes], bytes]) -> Callable[[Draft], None]:
    def edit(draft: Draft) -> None:
        dtype, shape, data = draft.tensors[name]
        changed = change(data)
        assert len(changed) == len(data) and changed != data
        draft.tensors[name] = (dtype, shape, changed)

    return edit


def at_level_0(edit: Callable[[Draft], None]) -> Callable[[Draft], None]:
    """The good file's weight, encoded at level 0 and then changed."""
    from nf4format.blocks import quantize

    def whole(draft: Draft) -> None:
        options = json.loads(draft.metadata["nf4.options"]) | {"level": 0}
        draft.metadata["nf4.options"] = json.dumps(options, separators=(",", ":"))
        for name, weight in weights().items():
            if f"{name}.absmax" not in draft.tensors:
                continue
            packed = quantize(weight, "float16")
            parts = {"": packed.codes, ".absmax": packed.absmax, ".nested_absmax": packed.nested_absmax}
            for suffix, array in parts.items():
                dtype, shape, _ = draft.tensors[name + suffix]
                draft.tensors[name + suffix] = (dtype, shape, array.tobytes())
            draft.state_of(name, nested_offset=packed.nested_offset)
        edit(draft)

    return whole


def not_at_an_end(data: bytes) -> bytes:
    """The first block's codes in the middle of the range only."""
    return b"\x68" * 32 + data[32:]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (at_level_0(replace(Q, not_at_an_end)), f"'{Q}': no code of block 0 reaches the end of the range"),
        (at_level_0(replace(Q, lambda data: b"\x77" * 32 + data[32:])), f"'{Q}': no code of block 0 reaches"),
        (
            at_level_0(replace(f"{Q}.absmax", lambda data: b"\x80" * len(data))),
            f"'{Q}': no absmax of group 0",
        ),
        (
            at_level_0(replace(f"{Q}.nested_absmax", lambda data: bytes(4))),
            f"'{Q}': nested_absmax\\[0\\] is 0",
        ),
        (
            at_level_0(replace(f"{Q}.absmax", lambda data: b"\xff" * len(data))),
            f"'{Q}': nested_offset is .*, and the mean of the scales",
        ),
        (
            at_level_0(lambda draft: draft.state(nested_offset=0.0)),
            f"'{Q}': the scale of block .* magnitudes are not negative",
        ),
        (
            replace(f"{Q}.nested_absmax", lambda _: np.float32(1e5).tobytes()),
            f"'{Q}': the scale of block .* decodes to infinite float16",
        ),
        (replace(NORM, lambda data: b"\x00\x7e" + data[2:]), f"'{NORM}': NaN at index 0"),
        (embed("generation_config.json", b"{"), "embedded file generation_config.json: not JSON"),
    ],
)
def test_forged_contents(edit: Callable[[Draft], None], message: str, tmp_path: Path) -> None:
    edited(tmp_path / "x.nf4", edit)
    found = findings(tmp_path / "x.nf4")
    assert any(re.search(message, line) for line in found), found


def test_spare_bits_and_booleans(tmp_path: Path) -> None:
    from bad_inputs.draft import PACKED, pack

    path = pack(tmp_path / "x.nf4", overrides={"flags": b"\0\1\2\1\0"})
    found = findings(path)
    ragged = PACKED[1].name  # an odd number of random codes
    assert "tensor 'flags': a boolean of 2" in found
    assert any(line.startswith(f"tensor '{ragged}': the spare half of the last byte") for line in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('{"level":2}', "cannot be repeated by this version, expected 0 or 1, got 2; upgrade"),
        ("{}", "cannot be repeated by this version"),
        ('{"level":"1"}', "level, expected an integer, got '1'"),
        ("{", "metadata nf4.options: not JSON"),
    ],
)
def test_levels_that_cannot_be_repeated(options: str, message: str, tmp_path: Path) -> None:
    edited(tmp_path / "x.nf4", lambda draft: draft.metadata.update({"nf4.options": options}))
    write_checkpoint(tmp_path / "model", weights())
    with pytest.raises(FormatError, match=message):
        differences(tmp_path / "x.nf4", tmp_path / "model")


def test_another_source_hash(tmp_path: Path) -> None:
    path = tmp_path / "x.nf4"
    edited(path, lambda draft: draft.metadata.update({"nf4.source_sha256": "0" * 64}))
    write_checkpoint(tmp_path / "model", weights())
    (found,) = differences(path, tmp_path / "model")
    assert found.startswith("nf4.source_sha256 is 0000")
    path.write_bytes(good())
    assert differences(path, tmp_path / "model") == []
