"""Every option of `nf4 train`, in one table: the command line, its help, the keys of configuration files.

A row names the field of `TrainOptions` that the option sets, nested ones by their path; its default is the
field's. Rows without a field are about the command itself: the model, the device, the file to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from .parameters import Assignment, ByteSize, WeightedPath

if TYPE_CHECKING:
    from ..training.options import TrainOptions


class Option(NamedTuple):
    """One option.

    Attributes:
        name: without the dashes; with `-` as `_` it is the key of a configuration file.
        field: of TrainOptions, nested ones by their path; "" where there is none.
        kind: of its value; None for a switch.
        help: what it means; what stands in brackets at the end is told instead of the default.
        repeats: whether it may be given several times. places: how many values it takes at once.
        metavar: of the help.
    """

    name: str
    field: str
    kind: click.ParamType | None
    help: str
    repeats: bool = False
    places: int = 1
    metavar: str | None = None

    @property
    def key(self) -> str:
        """Of a configuration file, and of click."""
        return self.name.replace("-", "_")


_PATH = click.Path(path_type=Path)


def _choice(*names: str) -> click.Choice:
    return click.Choice(names)


SECTIONS: Final[dict[str, tuple[Option, ...]]] = {
    "Data": (
        Option("data", "data", WeightedPath(),
               "File or directory to train on, with =WEIGHT behind it to show it more or less often; JSONL, "
               "JSON, CSV, parquet or text.", repeats=True, metavar="PATH[=WEIGHT]"),
        Option("eval-data", "eval_data", _PATH, "File or directory to evaluate on.", repeats=True),
        Option("eval-fraction", "eval_fraction", click.FLOAT, "Share of the data kept apart for evaluation."),
        Option("loss", "data_options.loss", _choice("completion", "all"),
               "What is learned: completions and the assistant's turns, or every token."),
        Option("map", "data_options.columns", Assignment("field", click.STRING),
               "Column that holds a field, such as prompt=question.", repeats=True),
        Option("chat-template", "data_options.template", click.STRING,
               "Path or name of a chat template.  [default: the model's]"),
        Option("chat", "data_options.as_chat", None,
               "Put instructions and questions through the chat template.  [default: where there is one]"),
        Option("system", "data_options.system", click.STRING, "System prompt of conversations without one."),
        Option("date", "data_options.date", click.STRING, "Today's date, as templates are told it."),
        Option("cache", "data_options.cache", click.STRING,
               "Directory for tokenized data, or none.  [default: ~/.cache/nf4]"),
        Option("cache-size", "data_options.cache_bytes", ByteSize(),
               "The most that this directory keeps; what was used longest ago goes.  [default: 16G]"),
        Option("workers", "data_options.workers", click.INT, "Threads that tokenize.  [default: all cores]"),
        Option("seq-len", "seq_len", click.INT, "The most tokens in an example, or in a packed row."),
        Option("show-example", "", click.INT,
               "Print so many examples as tokens with their labels, and the table of the run, and stop.",
               metavar="N"),
    ),
    "Batches and length": (
        Option("batch", "batch", click.INT, "Rows computed at once."),
        Option("accumulate", "accumulate", click.INT, "Batches added up for a step."),
        Option("packing", "packing", _choice("none", "best-fit"),
               "Fill rows with several examples, none of which sees another, or pad one in each."),
        Option("group-by-length", "group_by_length", None, "Batches of similar lengths, for less padding."),
        Option("steps", "steps", click.INT, "Optimizer steps; overrides --epochs."),
        Option("epochs", "epochs", click.FLOAT, "Passes over the data."),
        Option("seed", "seed", click.INT, "Decides initial values, split, order and dropout."),
    ),
    "Adapter": (
        Option("rank", "lora.rank", click.INT, "Rank."),
        Option("alpha", "lora.alpha", click.FLOAT, "The adapter is scaled by alpha / rank."),
        Option("dropout", "lora.dropout", click.FLOAT, "Dropout before the adapter."),
        Option("target", "lora.targets", click.STRING,
               "Linear layers to adapt, by (the end of) their path, such as q_proj, 'mlp.*' or "
               "'model.layers.0.*'.  [default: all but the output head]", repeats=True, metavar="PATTERN"),
        Option("rank-of", "lora.ranks", Assignment("pattern", click.INT),
               "Rank of layers that a pattern matches, such as 'mlp.*=8'.", repeats=True),
        Option("alpha-of", "lora.alphas", Assignment("pattern", click.FLOAT),
               "Alpha of layers that a pattern matches.", repeats=True),
        Option("rslora", "lora.rslora", None, "Scale by alpha / sqrt(rank)."),
        Option("dora", "lora.dora", None, "Train the magnitude of each output too (DoRA)."),
        Option("bias", "lora.bias", _choice("none", "lora_only", "all"), "Biases to train."),
        Option("lora-bias", "lora.lora_bias", None, "A bias on the adapter's output."),
        Option("modules-to-save", "lora.modules_to_save", click.STRING,
               "Layers, embeddings or norms that train in full and are saved with the adapter.",
               repeats=True, metavar="PATTERN"),
        Option("init", "lora.init", click.STRING,
               "Initial values: default, gaussian, pissa, pissa_niter_N, olora."),
        Option("adapter-dtype", "lora.dtype", _choice("float32", "bfloat16"), "Of what trains."),
    ),
    "Optimizer": (
        Option("lr", "lr", click.FLOAT, "Peak learning rate."),
        Option("schedule", "schedule", _choice("cosine", "linear", "constant"), "What follows the peak."),
        Option("min-lr-ratio", "min_lr_ratio", click.FLOAT,
               "Share of the peak at which cosine and linear end."),
        Option("warmup", "warmup", click.INT, "Steps until the peak rate."),
        Option("warmup-ratio", "warmup_ratio", click.FLOAT, "The same as a share of all steps."),
        Option("lora-plus-ratio", "lora_plus_ratio", click.FLOAT,
               "Rate of B over that of A (LoRA+); 16 is usual."),
        Option("clip", "clip", click.FLOAT, "Limit of the gradient norm; 0: none."),
        Option("betas", "betas", click.FLOAT, "Of AdamW.", places=2),
        Option("eps", "eps", click.FLOAT, "Of AdamW."),
        Option("weight-decay", "weight_decay", click.FLOAT, "Of AdamW."),
        Option("state-bits", "state_bits", click.INT, "Bits of AdamW's moments: 32, or 8 in blocks."),
    ),
    "Evaluation": (
        Option("eval-every", "eval_every", click.INT,
               "Steps between evaluations, of which the best adapter is kept as OUT.best; 0: at start and "
               "end only."),
        Option("patience", "patience", click.INT,
               "Stop after so many evaluations without a better one; 0: never."),
        Option("min-delta", "min_delta", click.FLOAT, "How much lower a loss must be to count as better."),
    ),
    "Saving and going on": (
        Option("out", "out", _PATH, "Directory for the adapter."),
        Option("save-every", "save_every", click.INT, "Steps between checkpoints; 0: only when stopped."),
        Option("keep", "keep", click.INT, "How many checkpoints stay, the newest; 0: all."),
        Option("resume", "resume", click.STRING,
               "Go on from a checkpoint, or from the newest in OUT.checkpoints; begin where there is none.",
               metavar="[PATH]"),
        Option("force", "force", None, "Replace what an earlier run left."),
    ),
    "Memory": (
        Option("checkpointing", "checkpointing", None,
               "Compute layers again in backward: less memory, slower."),
        Option("offload-checkpoints", "offload_checkpoints", None,
               "The same, with what waits for backward in host memory: still less on a GPU."),
        Option("page-budget", "page_budget", ByteSize(),
               "The most optimizer state kept in memory, such as 64M; the rest is paged to a file. On a GPU:"
               " kept there; the rest is paged to host memory.  [default: all]"),
        Option("page-store", "page_store", _choice("file", "memory"),
               "Where paged state goes.  [default: a file; host memory for a GPU]"),
        Option("page-size", "page_bytes", ByteSize(), "Of a page.  [default: 4M; 8M on a GPU]"),
        Option("page-file", "page_file", _PATH,
               "Folder or free name for the page file.  [default: a temporary file]"),
    ),
    "Reports": (
        Option("log", "log", _PATH, "JSONL log of the run; times go beside it.  [default: OUT.jsonl]"),
        Option("plot", "plot", None,
               "Draw loss, rate and throughput as OUT.png.  [default: where matplotlib is installed]"),
        Option("tensorboard", "tensorboard", _PATH, "Directory for TensorBoard."),
        Option("wandb", "wandb", click.STRING, "Project of Weights & Biases.", metavar="PROJECT"),
    ),
    "Machine": (
        Option("device", "", click.STRING,
               "cpu, cuda, cuda:1; auto: a GPU where one can be used.  [default: auto]"),
        Option("dtype", "", _choice("float32", "bfloat16", "float16"),
               "Arithmetic and activations; 16 bits take half the memory. float16, with a scaled loss, is "
               "for GPUs that are slow in bfloat16.  [default: bfloat16 on a GPU, float32 on a CPU]"),
        Option("mmap", "", None,
               "Map FILE, or read it into memory: for network file systems. Its sums are checked then.  "
               "[default: mapped; a GPU's memory is filled by reading]"),
        Option("threads", "", click.INT, "CPU threads.  [default: torch's choice]"),
        Option("config", "", _PATH,
               "TOML or YAML file with any of these options, such as OUT/training_config.toml of another "
               "run; the command line wins."),
    ),
}  # fmt: skip

OPTIONS: Final = {option.key: option for options in SECTIONS.values() for option in options}


def parameters() -> list[click.Parameter]:
    """The options as click has them. None of them is set unless it was given."""
    made: list[click.Parameter] = [click.Argument(["file"], required=False, type=_PATH)]
    for option in OPTIONS.values():
        name = f"--{option.name}"
        if option.kind is None:
            made.append(click.Option([f"{name}/--no-{option.name}"], default=None, help=option.help))
        else:
            # `--resume` alone means the newest checkpoint.
            is_resume = option.name == "resume"
            alone: dict[str, Any] = {"is_flag": False, "flag_value": "newest"} if is_resume else {}
            made.append(
                click.Option(
                    [name],
                    type=option.kind,
                    default=None,
                    multiple=option.repeats,
                    nargs=option.places,
                    metavar=option.metavar,
                    help=option.help,
                    **alone,
                )
            )
    return made


def train_options(values: Mapping[str, Any]) -> TrainOptions:
    """The options of a run from those given, by their keys; the others keep their defaults.

    Raises:
        TrainError: a value that no option can have.
    """
    from ..data.options import DataOptions
    from ..lora import LoraConfig
    from ..training.options import TrainOptions

    parts: dict[str, dict[str, Any]] = {"": {}, "lora": {}, "data_options": {}}
    for key, value in values.items():
        field = OPTIONS[key].field
        if not field:
            continue
        part, _, name = field.rpartition(".")
        is_mapping = isinstance(OPTIONS[key].kind, Assignment)
        parts[part][name] = dict(value) if is_mapping else value
    weighted = parts[""].pop("data")
    return TrainOptions(
        data=tuple(path for path, _ in weighted),
        weights=tuple(weight for _, weight in weighted),
        lora=LoraConfig(**parts["lora"]),
        data_options=DataOptions(**parts["data_options"]),
        **parts[""],
    )


def given_options(options: TrainOptions) -> dict[str, Any]:
    """The value of every option that has a field, by key, as `train_options` takes them; None: not set."""
    values: dict[str, Any] = {}
    for key, option in OPTIONS.items():
        value: Any = options
        if not option.field:
            continue
        for name in option.field.split("."):
            value = getattr(value, name)
        if isinstance(option.kind, Assignment):
            value = list((value or {}).items())
        values[key] = value
    values["data"] = list(zip(options.data, options.weights or (1.0,) * len(options.data), strict=True))
    if isinstance(values["target"], str):  # the name of all layers
        values["target"] = None
    return values
