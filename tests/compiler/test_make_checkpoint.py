"""The synthetic checkpoints that speed is measured with."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nf4format.checkpoint import Checkpoint
from qcompile.pipeline import plan_checkpoint


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shards_are_a_checkpoint_of_the_size_asked_for(tool: ModuleType, tmp_path: Path) -> None:
    total = tool.make_checkpoint(tmp_path / "m", 4 << 20, shape="tiny", shard_bytes=1 << 20)
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert sum(tensor.num_bytes for tensor in checkpoint.tensors.values()) == total >= 4 << 20
        assert len(checkpoint.shards) >= 4
        assert checkpoint.config["num_hidden_layers"] == 3
    plan = plan_checkpoint(tmp_path / "m")
    assert sum(decision.quantize for decision in plan.decisions) == 21


def test_same_arguments_same_bytes_and_seeds_differ(tool: ModuleType, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tool.make_checkpoint(tmp_path / name, 1 << 20, shape="tiny", seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_rounding_to_bfloat16_is_to_nearest_even(tool: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(10000).astype(np.float32)
    values[:3] = [1.00390625, 1.01171875, -1.00390625]  # halfway between two bfloat16 values
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert (np.frombuffer(tool.to_bfloat16(values), np.uint16) == expected).all()
