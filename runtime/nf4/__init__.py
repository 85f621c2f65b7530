"""The runtime: maps a .nf4 file, runs it, fine-tunes it with LoRA, generates text.

Public names are imported at first use, so `import nf4` and `nf4 --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import load_adapter, save_adapter
    from .loading import load

__all__ = ["load", "load_adapter", "save_adapter"]

# torch takes matrix products on a GPU for deterministic only where this stood in the environment before the
# first one (nf4.training.determinism); so importing nf4 sets it, unless somebody has.
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault(*CUBLAS_WORKSPACE)

_MODULES = {"load": "loading", "load_adapter": "adapters", "save_adapter": "adapters"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'nf4' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
