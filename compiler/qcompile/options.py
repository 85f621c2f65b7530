"""What a user may choose about one compilation."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class CompileOptions:
    """Options of one compilation.

    The first group decides bytes of the output and is recorded in it; the second does not and is not.

    Attributes:
        level: optimisation level of the encoder; the decoder is the same for all.
        include: patterns (`fnmatch`, on full tensor names); if any is given, only tensors that match one
            of them are candidates for quantization.
        exclude: patterns; a tensor that matches one keeps its dtype, whatever `include` says.
        quantize_head: the output head becomes NF4 too.
        quantize_embeddings: embeddings become NF4 too.
        jobs: the most threads to use; 0 = one for each core this process may run on.
        force: replace an existing output.
        verify: read the written file back and compare it with the checkpoint.
    """

    level: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    quantize_head: bool = False
    quantize_embeddings: bool = False

    jobs: int = 0
    force: bool = False
    verify: bool = False

    def recorded(self) -> str:
        """The options that decide bytes, as JSON with sorted keys: metadata `nf4.options`."""
        return json.dumps(
            {
                "exclude": sorted(set(self.exclude)),
                "include": sorted(set(self.include)),
                "level": self.level,
                "quantize_embeddings": self.quantize_embeddings,
                "quantize_head": self.quantize_head,
            },
            sort_keys=True,
            separators=(",", ":"),
        )
