"""Patterns of module names, as users write them."""

from __future__ import annotations

import fnmatch


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern (`*` and `?` as in a shell) is a module's path, or the last parts of it."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")
