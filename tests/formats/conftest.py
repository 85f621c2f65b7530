"""Small .nf4 files and tensor files made on the spot."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import draft as small


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small .nf4 file of random content and returns its path; see `draft.pack`."""
    return lambda name="model.nf4", **content: small.pack(tmp_path / name, **content)


@pytest.fixture
def draft(pack: Callable[..., Path]) -> Callable[[], small.Draft]:
    """A function that takes a good small file apart; `state` edits its ragged weight."""
    path = pack()
    return lambda: small.Draft(path, small.PACKED[1].name)


@pytest.fixture
def tensor_file(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a safetensors file from raw pieces: a header (object or text) and data."""

    def build(header: Any, data: bytes = b"", name: str = "model.safetensors", length: int = -1) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(struct.pack("<Q", len(text) if length < 0 else length) + text + data)
        return path

    return build
