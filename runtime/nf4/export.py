"""A packed file as a directory that transformers, PEFT and bitsandbytes load.

The tensors of a .nf4 file have bitsandbytes' names and layout already, so the file itself, hard-linked, is
`model.safetensors`. What is written new is config.json with a `quantization_config`; the tokenizer and
generation files are the embedded ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from nf4format.atomic import AtomicDirectory
from nf4format.container import Nf4File

from .errors import LoadError

WEIGHTS_NAME = "model.safetensors"

# What transformers leaves in 16 bits when `llm_int8_skip_modules` is null: the head and what is tied to it.
_DEFAULT_KEPT = frozenset({"lm_head", "model.embed_tokens"})
# Families whose projections are transformers' Conv1D, stored [in, out]: its 4-bit loader expects [out, in].
_TRANSPOSED_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
_EMBEDDING = re.compile(r"(^|\.)([^.]*embed[^.]*|wte|wpe|shared)\.weight$")


def export_bnb(file: Nf4File, out: str | os.PathLike[str], *, replace: bool = False) -> bool:
    """Write the directory; it appears whole or not at all.

    Args:
        file: the open packed file.
        out: the directory; its parent must exist.
        replace: put the files into a directory that holds some already.

    Returns:
        Whether model.safetensors is a hard link; else it is a copy, as across file systems.

    Raises:
        LoadError: the file packs something that transformers loads only in 16 bits, or has other levels.
        WriteError: the directory cannot be written.
    """
    if file.other_levels:
        raise LoadError(
            file.path,
            "bitsandbytes decodes NF4's levels alone",
            tensor=min(file.other_levels),
            got="a weight with other levels",
            remedy="compile it with --levels nf4",
        )
    config = _exported_config(file)
    with AtomicDirectory(out, replace=replace) as folder:
        is_linked = _link_or_copy(file.path, folder / WEIGHTS_NAME)
        for name in file.file_names:
            (folder / name).write_bytes(file.file(name))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return is_linked


def quantization_config(skip_modules: list[str] | None) -> dict[str, Any]:
    """transformers' BitsAndBytesConfig for NF4 with double quantization, as it writes it itself.

    The compute dtype is bfloat16, as users cannot override it on a checkpoint that is quantized already.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip_modules,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def skip_modules(file: Nf4File) -> list[str] | None:
    """Paths of linear layers that stay in 16 bits, or None where those are transformers' default.

    The list may name embeddings too: transformers looks at linear layers only.
    """
    matrices = [name for name in file.kept_names if len(file.header.entries[name].shape) > 1]
    shared = [alias for alias, name in file.aliases.items() if name in matrices]
    kept = {name.removesuffix(".weight") for name in (*matrices, *shared)}
    head_is_packed = file.aliases.get("lm_head.weight", "lm_head.weight") in file.packed_names
    if kept <= _DEFAULT_KEPT and not head_is_packed:
        return None
    if file.config.get("tie_word_embeddings") and not head_is_packed:
        kept.add("lm_head")  # a checkpoint with tied weights may not name it
    return sorted(kept)


def _exported_config(file: Nf4File) -> dict[str, Any]:
    family = file.config.get("model_type")
    if family in _TRANSPOSED_FAMILIES and file.packed_names:
        raise LoadError(
            file.path,
            f"the weights of {family} are stored transposed, and transformers does not load them from 4 bits",
            remedy="compile with --exclude '*'",
        )
    for name in file.packed_names:
        shape = file.packed(name).shape
        problem, remedy = "", ""
        if len(shape) != 2:
            problem = f"NF4 of {len(shape)} dimensions (fused experts), which transformers does not load"
            remedy = f"compile with --exclude {name!r}"
        elif _EXPERT.search(name):
            problem = "an NF4 expert: transformers fuses experts when it loads, which it cannot in 4 bits"
            remedy = "compile with --exclude '*.experts.*'"
        elif _EMBEDDING.search(name):
            problem = "an NF4 embedding, which transformers does not load"
            remedy = "compile without --quantize-embeddings"
        if problem:
            raise LoadError(file.path, problem, tensor=name, remedy=remedy)
    if not file.packed_names:
        return dict(file.config)
    return {**file.config, "quantization_config": quantization_config(skip_modules(file))}


def _link_or_copy(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True
