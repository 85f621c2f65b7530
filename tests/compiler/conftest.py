"""Small checkpoints of any content, for the compiler's tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes tensors as a checkpoint and returns its directory.

    Arguments: name -> tensor; config.json's content; number of shards; directory name.
    """

    def write(
        tensors: dict[str, torch.Tensor],
        config: dict[str, Any] | None = None,
        *,
        shards: int = 1,
        name: str = "model",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {key: tensors[key] for key in list(tensors)[shard::shards]}
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.fixture
def random_tensors() -> Callable[..., dict[str, torch.Tensor]]:
    """A function name -> shape, ...: Gaussian tensors, the same ones for the same arguments."""

    def make(
        dtype: torch.dtype = torch.bfloat16, seed: int = 0, **shapes: tuple[int, ...]
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name.replace("__", "."): (0.05 * torch.randn(shape, generator=generator)).to(dtype)
            for name, shape in shapes.items()
        }

    return make
