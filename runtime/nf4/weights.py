"""The tensors of an open .nf4 file by checkpoint name, as torch tensors over the mapping, none copied."""

from __future__ import annotations

import torch
from torch import Tensor

from nf4format.blocks import PackedTensor
from nf4format.container import Nf4File

from .errors import LoadError

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Weights:
    """Looks weights up by name, holds them to the shape the model needs, and knows which were not asked for.

    A method that takes a name also finds it under an alias (tied weights).

    Raises:
        LoadError: the tensor is missing, packed where it cannot be, or of another shape or dtype; the text
            names it with what was expected and what is there.
    """

    def __init__(self, file: Nf4File) -> None:
        self.file = file
        self._packed = frozenset(file.packed_names)
        self._kept = frozenset(file.kept_names)
        self._unused = dict.fromkeys((*file.packed_names, *file.kept_names))

    def has(self, name: str) -> bool:
        """Whether the file holds it, packed or kept."""
        stored = self.stored_name(name)
        return stored in self._packed or stored in self._kept

    def is_packed(self, name: str) -> bool:
        """Whether the file holds it in NF4."""
        return self.stored_name(name) in self._packed

    def packed(self, name: str, shape: tuple[int, ...]) -> PackedTensor:
        """A weight in NF4."""
        self._use(name)
        packed = self.file.packed(name)
        self._check_shape(name, shape, packed.shape)
        return packed

    def kept(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor in the dtype in which the file keeps it, over the mapping."""
        self._use(name)
        if self.is_packed(name):
            remedy = f"compile it again with --exclude {name!r}"
            raise LoadError(
                self.file.path, tensor=name, expected="kept in its dtype", got="NF4", remedy=remedy
            )
        data, dtype, stored_shape = self.file.kept(name)
        self._check_shape(name, shape, stored_shape)
        if dtype not in TORCH_DTYPES:
            expected = " or ".join(TORCH_DTYPES)
            remedy = "convert the checkpoint to one of these and compile it again"
            raise LoadError(self.file.path, tensor=name, expected=expected, got=dtype, remedy=remedy)
        return torch.from_numpy(data).view(TORCH_DTYPES[dtype]).view(stored_shape)

    def unused(self) -> list[str]:
        """Names of stored tensors that were never asked for, in file order."""
        return list(self._unused)

    def stored_name(self, name: str) -> str:
        """The name under which the file has it: itself, or what it is an alias of."""
        return self.file.aliases.get(name, name)

    def _use(self, name: str) -> None:
        if not self.has(name):
            remedy = "the checkpoint it was compiled from lacks it, or config.json is another model's"
            raise LoadError(self.file.path, "missing", tensor=name, remedy=remedy)
        self._unused.pop(self.stored_name(name), None)

    def _check_shape(self, name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
        if tuple(got) != tuple(expected):
            raise LoadError(
                self.file.path,
                "shape does not fit config.json",
                tensor=name,
                expected=list(expected),
                got=list(got),
                remedy="compile a checkpoint whose config.json is its own",
            )
