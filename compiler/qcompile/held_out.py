"""`--held-out`: what a file does at the outputs of layers, by statistics that its encoder did not have."""

from __future__ import annotations

import numpy as np

from nf4format.blocks import dequantize, quantize
from nf4format.checkpoint import Checkpoint
from nf4format.container import Nf4File
from nf4format.stats import Stats
from nf4format.tensor_reader import TensorReader

from .feedback import output_error
from .plan import Plan
from .quality import to_float32
from .summary import OutputError


def held_out_errors(
    checkpoint: Checkpoint, plan: Plan, packed_file: Nf4File, stats: Stats
) -> dict[str, OutputError]:
    """Errors of the packed weights whose moments are known, one weight in memory at a time.

    Raises:
        FormatError: the statistics or a shard cannot be read.
    """
    errors = {}
    for decision in plan.decisions:
        known = stats.weights.get(decision.name)
        if not decision.quantize or known is None or not known.has_moment:
            continue
        if known.features != decision.shape[-1]:
            continue
        reader = TensorReader(checkpoint, decision.name)
        values = reader.read_values(0, reader.num_values)
        weight = to_float32(values, reader.dtype).reshape(decision.shape)
        moment = known.moment()
        total = output_error(weight, moment) or 1.0
        before, after = (
            to_float32(dequantize(packed), reader.dtype).reshape(decision.shape) - weight
            for packed in (quantize(values, reader.dtype), packed_file.packed(decision.name))
        )
        errors[decision.name] = OutputError(
            output_error(before, moment) / total, output_error(np.ascontiguousarray(after), moment) / total
        )
    return errors
