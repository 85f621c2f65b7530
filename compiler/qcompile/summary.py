"""What a compilation did, in numbers and in text; and the plan, for --dry-run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from nf4format.layout import COMPANIONS

from .evaluation import Evaluation
from .plan import Plan
from .quality import GroupError


@dataclass(frozen=True)
class OutputError:
    """What rounding does at the output of a layer, relative to the output: squares over squares.

    Attributes:
        before: of -O0. after: of what was written. Both by the statistics that the encoder had.
    """

    before: float
    after: float


@dataclass(frozen=True)
class TensorSummary:
    """What became of one packed tensor.

    Attributes:
        name, group, dtype, shape: of the tensor; dtype as in the checkpoint.
        parameters, measured: its elements, and those whose error was measured.
        before, after: squared error over squared weight, of -O0 and of the file.
        negative_scales: share of its blocks whose scale is below zero.
        seconds: from the first byte read to the last written.
        output: error at the layer's output, where the encoder knew what the layer reads.
        held_out: the same by statistics that it did not have.
    """

    name: str
    group: str
    dtype: str
    shape: tuple[int, ...]
    parameters: int
    measured: int
    before: float
    after: float
    negative_scales: float
    seconds: float
    output: OutputError | None = None
    held_out: OutputError | None = None

    @property
    def ratio(self) -> float:
        """after over before; 1 where there was no error."""
        return self.after / self.before if self.before else 1.0


@dataclass(frozen=True)
class CompileSummary:
    """The result of a compilation.

    Attributes:
        out: path of the file written.
        num_packed, num_kept, num_aliases: tensors that became NF4, were copied, were tied to another one.
        num_parameters, packed_parameters: elements of all stored tensors, and of those that became NF4.
        source_bytes: tensor bytes of the checkpoint.
        resumed_bytes: how many of these an earlier, interrupted run had done.
        file_bytes: size of the output.
        packed_bytes: bytes of the output that are codes and constants of packed tensors.
        measured_parameters: packed parameters whose error was measured.
        level: optimisation level.
        levels: name of the table of levels, "custom" for one from a file.
        tensors: each packed tensor, in execution order.
        groups: error by layer group, in execution order.
        plain_ratio: squared error of all packed tensors over that of -O0.
        negative_scales: share of their blocks whose scale is below zero.
        source_sha256: hash of the checkpoint's weights.
        seconds: wall time, fsync included, verification not.
        verified: whether the file was read back and compared.
        evaluation: on texts; None without any.
    """

    out: str
    num_packed: int
    num_kept: int
    num_aliases: int
    num_parameters: int
    packed_parameters: int
    source_bytes: int
    resumed_bytes: int
    file_bytes: int
    packed_bytes: int
    measured_parameters: int
    level: int
    levels: str
    tensors: tuple[TensorSummary, ...]
    groups: tuple[GroupError, ...]
    plain_ratio: float
    negative_scales: float
    source_sha256: str
    seconds: float
    verified: bool
    evaluation: Evaluation | None = None

    @property
    def output_ratio(self) -> float | None:
        """Error at the outputs over -O0's, mean over the layers where it is known; None without any."""
        return _mean_ratio(tensor.output for tensor in self.tensors)

    @property
    def held_out_ratio(self) -> float | None:
        """The same by held-out statistics."""
        return _mean_ratio(tensor.held_out for tensor in self.tensors)

    @property
    def bits_per_parameter(self) -> float:
        """Bits of the output for each parameter stored."""
        return 8 * self.file_bytes / max(1, self.num_parameters)

    @property
    def gb_per_second(self) -> float:
        """10^9 bytes of the checkpoint a second, without those of an earlier run."""
        return (self.source_bytes - self.resumed_bytes) / max(1e-9, self.seconds) / 1e9

    def as_json(self) -> dict[str, Any]:
        """Plain values without the single tensors, for --json."""
        derived = {
            "bits_per_parameter": self.bits_per_parameter,
            "gb_per_second": self.gb_per_second,
            "output_ratio": self.output_ratio,
            "held_out_ratio": self.held_out_ratio,
        }
        values = {**asdict(replace(self, tensors=())), **derived}
        del values["tensors"]
        return values

    def text(self) -> str:
        """The closing lines of the command."""
        tied = f", {self.num_aliases} tied" if self.num_aliases else ""
        lines = [
            f"{self.out}: {'written and verified' if self.verified else 'written'}",
            f"  tensors  {self.num_packed} packed, {self.num_kept} kept{tied}",
            f"  bytes    {_bytes(self.source_bytes)} -> {_bytes(self.file_bytes)}, "
            f"{self.source_bytes / self.file_bytes:.2f} times smaller",
            f"  bits     {_bits(self.file_bytes, self.num_parameters)} a parameter"
            + (
                f", {_bits(self.packed_bytes, self.packed_parameters)} where packed"
                if self.packed_parameters
                else ""
            ),
        ]
        if self.groups:
            share = self.measured_parameters / self.packed_parameters
            lines.append(
                "  error    root mean square, relative to the weights', "
                + ("measured on all of them" if share == 1 else f"measured on a sample of {share:.0%}")
            )
            cells = [f"{group.group} {group.relative_rms:.4f}" for group in self.groups]
            width = max(map(len, cells)) + 2
            per_line = max(1, 88 // width)
            lines += [
                "           " + "".join(cell.ljust(width) for cell in cells[i : i + per_line]).rstrip()
                for i in range(0, len(cells), per_line)
            ]
            if self.level or self.levels != "nf4":
                lines.append(
                    f"           squared error {self.plain_ratio:.3f} of -O0's "
                    f"({self.plain_ratio - 1:+.1%}); {self.negative_scales:.0%} of the scales are negative"
                )
        for ratio, by in ((self.output_ratio, "given"), (self.held_out_ratio, "held out")):
            if ratio is not None:
                lines.append(
                    f"  outputs  squared error of the layers' outputs {ratio:.3f} of -O0's, "
                    f"by the statistics {by}"
                )
        if self.evaluation:
            lines += evaluation_lines(self.evaluation)
        if self.resumed_bytes:
            lines.append(f"  resumed  {_bytes(self.resumed_bytes)} of the source were done already")
        lines.append(f"  time     {self.seconds:.2f} s, {self.gb_per_second:.2f} GB/s")
        return "\n".join(lines)


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """KL and perplexity of the file, of the level below, and what the difference is worth."""
    rows = [("file", evaluation.file)]
    if evaluation.below:
        rows.append((evaluation.below_name, evaluation.below))
    lines = [
        f"  texts    {evaluation.tokens:,} tokens in {evaluation.windows} windows; perplexity of the "
        f"checkpoint {evaluation.original_perplexity:.4f}"
    ]
    for name, figures in rows:
        noise = "" if figures.kl_error is None else f" +- {figures.kl_error:.5f}"
        lines.append(f"           {name}: KL {figures.kl:.5f}{noise}, perplexity {figures.perplexity:.4f}")
    if evaluation.difference is not None:
        noise = "" if evaluation.difference_error is None else f" +- {evaluation.difference_error:.5f}"
        verdict = "; WORSE, and forced" if evaluation.forced else ""
        lines.append(f"           difference in KL {evaluation.difference:+.5f}{noise}{verdict}")
    return lines


def _mean_ratio(errors: Iterable[OutputError | None]) -> float | None:
    known = [error.after / error.before for error in errors if error and error.before]
    return sum(known) / len(known) if known else None


def plan_text(plan: Plan) -> str:
    """The plan as a table: one line for each tensor, then totals."""
    rows = [("becomes", "tensor", "shape", "from", "bytes", "to bytes", "because")]
    for decision in plan.decisions:
        rows.append(
            (
                "nf4" if decision.quantize else "kept",
                decision.name,
                "x".join(map(str, decision.shape)) or "scalar",
                decision.dtype,
                f"{decision.source_bytes:,}",
                f"{stored_bytes(plan, [decision.name]):,}",
                decision.reason,
            )
        )
    rows += [("tied", alias, "", "", "", "0", f"equal to {stored}") for alias, stored in plan.aliases.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in (4, 5) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, "", *_totals(plan)])


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, for --dry-run --json."""
    return {
        "tensors": [
            {
                "name": decision.name,
                "action": "nf4" if decision.quantize else "kept",
                "reason": decision.reason,
                "dtype": decision.dtype,
                "shape": list(decision.shape),
                "source_bytes": decision.source_bytes,
                "stored_bytes": stored_bytes(plan, [decision.name]),
            }
            for decision in plan.decisions
        ],
        "aliases": plan.aliases,
        "file_bytes": plan.layout.file_bytes,
        "num_parameters": sum(math.prod(decision.shape) for decision in plan.decisions),
    }


def stored_bytes(plan: Plan, names: Iterable[str]) -> int:
    """Bytes that tensors take in the output, companions of packed ones included."""
    entries, packed = plan.layout.entries, {spec.name for spec in plan.layout.packed}
    total = 0
    for name in names:
        parts = [name, *(name + suffix for suffix in COMPANIONS)] if name in packed else [name]
        total += sum(entries[part].end - entries[part].begin for part in parts)
    return total


def _totals(plan: Plan) -> list[str]:
    source = sum(decision.source_bytes for decision in plan.decisions)
    parameters = sum(math.prod(decision.shape) for decision in plan.decisions)
    file_bytes = plan.layout.file_bytes
    kept = Counter(decision.reason for decision in plan.decisions if not decision.quantize)
    packed = [decision for decision in plan.decisions if decision.quantize]
    packed_parameters = sum(math.prod(decision.shape) for decision in packed)
    lines = [
        f"packed  {len(packed)} tensors, {packed_parameters:,} of {parameters:,} parameters",
        f"kept    {sum(kept.values())} tensors: "
        + (", ".join(f"{count} {reason}" for reason, count in kept.most_common()) or "none"),
    ]
    if plan.aliases:
        lines.append(f"tied    {len(plan.aliases)} tensors, stored once")
    saved = source - file_bytes
    lines.append(
        f"bytes   {_bytes(source)} -> {_bytes(file_bytes)}: "
        + (
            f"{_bytes(saved)} saved, {source / file_bytes:.2f} times smaller"
            if saved > 0
            else "nothing saved"
        )
    )
    lines.append(f"bits    {_bits(file_bytes, parameters)} a parameter")
    return lines


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _bits(num_bytes: int, parameters: int) -> str:
    return f"{8 * num_bytes / max(1, parameters):.3f}"
