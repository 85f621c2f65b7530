"""What a user may choose about one compilation."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import numpy as np

from nf4format.levels import LEVELS, read_levels
from nf4format.stats import Stats


@dataclass(frozen=True)
class CompileOptions:
    """Options of one compilation.

    The first group decides bytes of the output and is recorded in it; the second does not and is not.

    Attributes:
        level: optimisation level of the encoder; the decoder is the same for all.
        stats: files of statistics, for levels 2 and 3.
        adapter: directory for an adapter that takes up what rounding leaves over; None = none.
        rank: of that adapter.
        levels: table of levels: a name of `nf4format.levels.LEVELS`, or a file (`read_levels`).
        include: patterns (`fnmatch`, on full tensor names); if any is given, only tensors that match one
            of them are candidates for quantization.
        exclude: patterns; a tensor that matches one keeps its dtype, whatever `include` says.
        quantize_head: the output head becomes NF4 too.
        quantize_embeddings: embeddings become NF4 too.
        device: where to encode: "cpu", "cuda", or "auto", a GPU if there is one that serves.
        held_out: files of statistics of other text, by which errors at outputs are reported.
        eval_texts: files of text on which the output and the level below are compared with the checkpoint.
        eval_windows: the most windows of each text.
        against_file: a .nf4 file that stands for the level below; None = it is compiled.
        force_level: accept a level whose KL is worse than that of the level below.
        jobs: the most threads to use; 0 = one for each core this process may run on.
        force: replace an existing output.
        verify: read the written file back and compare it with the checkpoint.
        resume: go on with what an interrupted run left, and leave it when interrupted.
    """

    level: int = 1
    stats: tuple[str, ...] = ()
    adapter: str | None = None
    rank: int = 16
    levels: str = "nf4"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    quantize_head: bool = False
    quantize_embeddings: bool = False

    device: str = "cpu"
    held_out: tuple[str, ...] = ()
    eval_texts: tuple[str, ...] = ()
    eval_windows: int = 64
    against_file: str | None = None
    force_level: bool = False
    jobs: int = 0
    force: bool = False
    verify: bool = False
    resume: bool = False

    @property
    def adapter_rank(self) -> int:
        """Rank of the adapter; 0 without one."""
        return self.rank if self.adapter else 0

    @property
    def levels_name(self) -> str:
        """Name of the table of levels; "custom" if it is a file's, which the output holds anyway."""
        return self.levels if self.levels in LEVELS else "custom"

    def num_jobs(self) -> int:
        """The most threads to use."""
        return self.jobs or len(os.sched_getaffinity(0))

    def level_table(self) -> np.ndarray:
        """The levels, float32 [16]. Raises FormatError as `read_levels`."""
        return LEVELS[self.levels] if self.levels in LEVELS else read_levels(self.levels)

    def recorded(self) -> str:
        """The options that decide bytes, as JSON with sorted keys: metadata `nf4.options`.

        Raises:
            FormatError: a file of statistics cannot be read.
        """
        with Stats(self.stats) as stats:
            known: dict[str, object] = {"stats": stats.metadata()} if self.stats else {}
        if self.adapter:
            known["adapter_rank"] = self.rank
        return json.dumps(
            {
                **known,
                "exclude": sorted(set(self.exclude)),
                "include": sorted(set(self.include)),
                "level": self.level,
                "levels": self.levels_name,
                "quantize_embeddings": self.quantize_embeddings,
                "quantize_head": self.quantize_head,
            },
            sort_keys=True,
            separators=(",", ":"),
        )
