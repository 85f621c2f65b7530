"""Which files of a checkpoint travel inside a .nf4 file. The names are keys from this list, never paths."""

from __future__ import annotations

from typing import Final

_MIB: Final = 1 << 20

# name -> the most bytes it may have. The order is the order in the packed file.
FILE_LIMITS: Final[dict[str, int]] = {
    "config.json": 16 * _MIB,
    "generation_config.json": 16 * _MIB,
    "tokenizer.json": 256 * _MIB,
    "tokenizer_config.json": 64 * _MIB,
    "special_tokens_map.json": 16 * _MIB,
    "added_tokens.json": 16 * _MIB,
    "tokenizer.model": 64 * _MIB,
    "vocab.json": 64 * _MIB,
    "vocab.txt": 64 * _MIB,
    "merges.txt": 64 * _MIB,
    "chat_template.jinja": 4 * _MIB,
    "chat_template.json": 4 * _MIB,
}
EMBEDDED_FILES: Final[tuple[str, ...]] = tuple(FILE_LIMITS)
CONFIG_FILE: Final = "config.json"
FILE_PREFIX: Final = "__file__/"  # of the tensor that holds a file's bytes
