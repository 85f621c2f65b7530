"""The model card of an adapter: README.md beside it, in the form that model hubs read.

Names of files and other strings of the user stand in code spans and fenced blocks that they cannot end, and
in the front matter as JSON strings, which YAML reads as such.
"""

from __future__ import annotations

import json
import re

from nf4format.errors import printable

from ..data.plan import Batches
from ..model.decoder import CausalLM
from .evaluation import best_step, perplexity_of
from .options import TrainOptions
from .progress import TrainSummary

CARD_NAME = "README.md"


def model_card(
    model: CausalLM, options: TrainOptions, plan: Batches, summary: TrainSummary, settings: str | None
) -> str:
    """The card of the adapter that a run saved.

    Args:
        settings: all options as a configuration file; None leaves them out.
    """
    name, source = options.out.name, model.source
    lines = [
        "---",
        "library_name: peft",
        "pipeline_tag: text-generation",
        'tags: ["lora", "nf4"]',
        f"model_name: {json.dumps(name)}",
        "---",
        "",
        f"# {code_span(name)}",
        "",
        "A LoRA adapter, trained on a base packed in 4-bit NormalFloat.",
        "",
        "## Base",
        "",
    ]
    if source is None:
        lines.append("A dense model in memory.")
    else:
        lines += [
            f"* file: {code_span(source.path.name)}",
            f"* fingerprint: {code_span(source.fingerprint)}",
            f"* fingerprint of its checkpoint: {code_span(source.source_fingerprint)}",
        ]
    lines += ["", "## Data", ""]
    for file in plan.dataset.report.files:
        counts = f"{file.examples:,} examples, {file.tokens:,} tokens, {file.labelled:,} of them learned"
        lines.append(f"* {code_span(file.path)}: {counts}")
    lines += ["", "## Results", "", f"* steps: {summary.steps:,}, {summary.tokens:,} tokens"]
    if summary.last_loss is not None:
        lines.append(f"* loss of the last step: {summary.last_loss:.4f}")
    if summary.weights is not None:
        norms = summary.weights
        lines.append(f"* norm of B: {norms.of_b:.4g}; change of the weights: {norms.change:.4g}")
    for step, loss in summary.evaluations.items():
        note = " (the best)" if step == best_step(summary.evaluations) else ""
        lines.append(
            f"* evaluation after step {step:,}: loss {loss:.4f}, perplexity {perplexity_of(loss):.2f}{note}"
        )
    lines += ["", "## Use", "", *_usage(name, "model.nf4" if source is None else source.path.name)]
    if settings is not None:
        lines += ["## Options", "", *fenced(settings, "toml")]
    return "\n".join(lines).rstrip() + "\n"


def _usage(name: str, base: str) -> list[str]:
    model, adapter = json.dumps(base), json.dumps(name)
    ours = f"import nf4\n\nmodel = nf4.load({model}, adapter={adapter})"
    peft = (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained("<the base in transformers\' format>")\n'
        f"model = PeftModel.from_pretrained(base, {adapter})"
    )
    return ["With nf4:", "", *fenced(ours, "python"), "With PEFT:", "", *fenced(peft, "python")]


def code_span(text: str) -> str:
    """Markdown that shows the text as it is, on one line, whatever it holds."""
    visible = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", visible)), default=0))
    edge = " " if not visible or visible[0] in "` " or visible[-1] in "` " else ""
    return f"{fence}{edge}{visible}{edge}{fence}"


def fenced(text: str, kind: str) -> list[str]:
    """The lines of a fenced block that the text cannot end, and an empty line."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}{kind}", *text.rstrip("\n").split("\n"), fence, ""]
