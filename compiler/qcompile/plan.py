"""The plan of a compilation: what every tensor becomes, in which order, at which offset.

All sizes are known here, before the first weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import nf4format
from nf4format.checkpoint import Checkpoint
from nf4format.container import config_sha256
from nf4format.dtypes import DTYPE_OF_SAFETENSORS
from nf4format.embedded import CONFIG_FILE
from nf4format.errors import FormatError
from nf4format.layout import OTHER_LEVELS, KeptSpec, Layout, PackedSpec, plan_layout

from .errors import CompileError
from .options import CompileOptions
from .order import execution_key
from .policy import Decision, Policy, refuse_quantized
from .tied import find_aliases

SOURCE_HASH_KEY = "nf4.source_sha256"


@dataclass(frozen=True)
class Plan:
    """What will be written.

    Attributes:
        decisions: one for each stored tensor, in execution order.
        aliases: tensor of the checkpoint that is not stored -> the equal one that is.
        layout: places and sizes; its metadata lacks only the hash of the source (zeros).
    """

    decisions: tuple[Decision, ...]
    aliases: dict[str, str]
    layout: Layout


def make_plan(checkpoint: Checkpoint, options: CompileOptions) -> Plan:
    """Plan the compilation of a checkpoint. Reads headers, and weights only to compare tied ones.

    Raises:
        CompileError: already quantized; a weight of a dtype that cannot be packed; tied weights that differ;
            a pattern that matches nothing.
    """
    model = str(checkpoint.path)
    refuse_quantized(model, checkpoint.config, list(checkpoint.tensors))
    _refuse_idle_patterns(model, options, checkpoint.tensors)
    aliases = find_aliases(checkpoint)
    policy = Policy(model, checkpoint.config, options)
    decisions = [
        policy.decide(tensor.name, tensor.dtype, tensor.shape, tensor.end - tensor.begin)
        for tensor in checkpoint.tensors.values()
        if tensor.name not in aliases
    ]
    decisions.sort(key=lambda decision: execution_key(decision.name, decision.role))
    try:
        layout = plan_layout(
            [
                PackedSpec(decision.name, decision.shape, DTYPE_OF_SAFETENSORS[decision.dtype])
                for decision in decisions
                if decision.quantize
            ],
            [
                KeptSpec(decision.name, decision.dtype, decision.shape)
                for decision in decisions
                if not decision.quantize
            ],
            {name: len(content) for name, content in checkpoint.files.items()},
            _metadata(checkpoint, options, aliases),
        )
    except FormatError as error:  # a name that the format reserves, for one
        told = str(error).removesuffix(f"; {error.remedy}")
        raise CompileError(model, f"does not fit the format: {told}", remedy=error.remedy) from error
    return Plan(tuple(decisions), aliases, layout)


def _metadata(checkpoint: Checkpoint, options: CompileOptions, aliases: dict[str, str]) -> dict[str, str]:
    """What the layout does not fix already."""
    other_levels = {} if options.levels_name == "nf4" else {OTHER_LEVELS: options.levels_name}
    return {
        **other_levels,
        "nf4.aliases": json.dumps(aliases, sort_keys=True, separators=(",", ":")),
        "nf4.config_sha256": config_sha256(checkpoint.files[CONFIG_FILE]),
        "nf4.options": options.recorded(),
        "nf4.producer": f"nf4 {nf4format.__version__}",
        SOURCE_HASH_KEY: "0" * 64,
    }


def _refuse_idle_patterns(model: str, options: CompileOptions, names: Iterable[str]) -> None:
    names = list(names)
    for option, patterns in (("--include", options.include), ("--exclude", options.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise CompileError(
                    model,
                    f"{option} {pattern} matches no tensor",
                    got=f"names such as '{min(names)}'" if names else "no tensors",
                    remedy="patterns match whole names, as in the output of --dry-run; "
                    "put '*' where anything may stand",
                )
