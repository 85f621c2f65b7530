"""Options of `nf4 train` from its table: on the command line, in files, and written back."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import qcompile.cli
from nf4.cli import COMMANDS, group
from nf4.cli.parameters import Assignment, WeightedPath
from nf4.cli.train import command
from nf4.cli.train_config import read_config, write_config
from nf4.cli.train_options import OPTIONS, given_options, train_options
from nf4.data.options import DataOptions
from nf4.errors import TrainError
from nf4.lora import LoraConfig
from nf4.training.options import TrainOptions


def test_every_field_has_one_option() -> None:
    own = {field.name for field in dataclasses.fields(TrainOptions)}
    fields = own - {"lora", "data_options", "weights"}
    fields |= {f"lora.{field.name}" for field in dataclasses.fields(LoraConfig)}
    fields |= {f"data_options.{field.name}" for field in dataclasses.fields(DataOptions)}
    fields.remove("data_options.seq_len")  # that of the run
    named = [option.field for option in OPTIONS.values() if option.field]
    assert sorted(named) == sorted(fields)


def values_of(arguments: list[str]) -> dict[str, Any]:
    """What click makes of them, as the command merges it with a file."""
    given = command.make_context("train", arguments, resilient_parsing=True).params
    return {key: value for key, value in given.items() if value is not None and value != () and key != "file"}


EVERYTHING = [
    "m.nf4", "--data", "a.jsonl", "--data", "b=c.txt=0.5", "--out", "o", "--eval-data", "e.txt", "--loss",
    "all", "--map", "prompt=frage", "--map", "completion=antwort", "--chat-template", "chatml", "--no-chat",
    "--system", 'a "quoted"\nline\x7f', "--cache", "none", "--cache-size", "3G", "--workers", "2",
    "--seq-len", "64", "--batch", "2", "--accumulate", "3", "--packing", "best-fit", "--steps", "7",
    "--seed", "5", "--rank", "4", "--alpha", "8.5", "--target", "q_proj", "--target", "mlp.*", "--rank-of",
    "mlp.*=8", "--alpha-of", "q_proj=3.5", "--rslora", "--bias", "lora_only", "--lora-bias",
    "--modules-to-save", "lm_head", "--init", "olora", "--lr", "3e-05", "--schedule", "linear",
    "--min-lr-ratio", "0.1", "--warmup-ratio", "0.25", "--lora-plus-ratio", "16", "--betas", "0.8", "0.95",
    "--state-bits", "8", "--eval-every", "3", "--patience", "2", "--min-delta", "0.01", "--save-every", "9",
    "--keep", "0", "--checkpointing", "--page-budget", "64M", "--page-store", "memory", "--log", "l.jsonl",
    "--plot", "--tensorboard", "tb", "--wandb", "p",
]  # fmt: skip


@pytest.mark.parametrize("arguments", [EVERYTHING, ["--data", "a", "--out", "o"]])
def test_what_is_written_reads_back_as_it_was(arguments: list[str], tmp_path: Path) -> None:
    options = train_options(values_of(arguments))
    path = tmp_path / "training_config.toml"
    path.write_text(write_config(given_options(options) | {"threads": 3, "dtype": "bfloat16"}, Path("m.nf4")))
    read = read_config(path)
    assert (read.pop("model"), read.pop("threads"), read.pop("dtype")) == (Path("m.nf4"), 3, "bfloat16")
    again = train_options(read)
    if not options.weights or options.data == (Path("a"),):
        again = dataclasses.replace(again, weights=options.weights)
    assert again == options
    if arguments is EVERYTHING:
        assert options.data == (Path("a.jsonl"), Path("b=c.txt"))
        assert options.weights == (1.0, 0.5)
        assert options.data_options.columns == {"prompt": "frage", "completion": "antwort"}
        assert options.data_options.as_chat is False
        assert options.lora.ranks == {"mlp.*": 8}
        assert options.betas == (0.8, 0.95)
        assert options.page_budget == 64 << 20


def test_yaml_and_toml_mean_the_same(tmp_path: Path) -> None:
    toml, yaml = tmp_path / "run.toml", tmp_path / "run.yaml"
    toml.write_text(
        'model = "m"\ndata = ["a", "b=2"]\nlr = 2e-4\nbetas = [0.9, 0.99]\ndate = 2024-01-01\n'
        'rank-of = {"mlp.*" = 8}\nchat = true\npage_budget = "2M"\ntarget = "q_proj"\n'
    )
    # YAML 1.1 takes 2e-4 for text, and a single value where a list may stand.
    yaml.write_text(
        "model: m\ndata: [a, b=2]\nlr: 2e-4\nbetas: [0.9, 0.99]\ndate: 2024-01-01\n"
        "rank-of: {'mlp.*': 8}\nchat: yes\npage-budget: 2M\ntarget: q_proj\n"
    )
    assert read_config(toml) == read_config(yaml)
    assert read_config(toml) == {
        "model": Path("m"), "data": ((Path("a"), 1.0), (Path("b"), 2.0)), "lr": 2e-4, "betas": (0.9, 0.99),
        "date": "2024-01-01", "rank_of": (("mlp.*", 8),), "chat": True, "page_budget": 2 << 20,
        "target": ("q_proj",),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "learning_rate = 1", "unknown key 'learning_rate'"),
        ("a.toml", "epoch = 1", r"unknown key 'epoch'; did you mean epochs"),
        ("a.toml", "config = 'b.toml'", "unknown key 'config'"),
        ("a.toml", "save-every = 1\nsave_every = 2", "save_every is set twice"),
        ("a.toml", "steps = 1.5", "steps: '1.5' is not a valid integer"),
        ("a.toml", "steps = true", "steps: expected integer, got True"),
        ("a.toml", "rslora = 1", "rslora: expected true or false, got 1"),
        ("a.toml", "schedule = 'step'", "schedule: 'step' is not one of"),
        ("a.toml", "betas = [0.9]", "betas: expected 2 values, got 1"),
        ("a.toml", "page_budget = 'lots'", "page_budget: 'lots' is not a size"),
        ("a.toml", "map = ['prompt']", "map: 'prompt' is not of the form FIELD=TEXT"),
        ("a.toml", "data = [['a']]", r"data: expected path\[=weight\], got"),
        ("a.toml", "model = 5", "model, expected a path, got 5"),
        ("a.toml", "lr = ", "not TOML: "),
        ("a.toml", "a = " + "[" * 5000, "nested too deeply|not TOML"),
        ("a.yaml", "- 1", "expected keys and values, got list"),
        ("a.yaml", "lr: [", "not YAML: "),
        ("a.yaml", "!!python/object/apply:os.system [echo]", "not YAML: could not determine a constructor"),
        ("a.yaml", "lr: null", "lr: expected float, got None"),
        ("a.yaml", "x: " + "[" * 5000, "nested too deeply|not YAML"),
        ("a.json", "{}", "kind of configuration file, expected .toml, .yaml or .yml, got .json"),
    ],
)
def test_bad_files_are_told(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TrainError, match=message) as caught:
        read_config(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_pages_name_options_that_exist_and_their_file_is_read(tmp_path: Path) -> None:
    context = click.Context(group)
    commands = [qcompile.cli.command, *(group.get_command(context, name) for name in COMMANDS)]
    options = [option for one in commands if one is not None for option in one.params]
    known = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
    pages = {path.name: path.read_text() for path in (Path(__file__).parents[2] / "docs").glob("*.md")}
    for name, text in pages.items():
        assert set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]*)", text)) <= known, name
    example = re.search(r"```toml\n(.*?)```", pages["training.md"], re.DOTALL)
    assert example
    (tmp_path / "run.toml").write_text(example[1])
    values = read_config(tmp_path / "run.toml")
    assert values.pop("model") == Path("model.nf4")
    assert train_options(values).lora.ranks == {"mlp.*": 8}


def test_missing_packages_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nf4.cli.train_config.find_spec", lambda name: None)
    toml = "TOML needs Python 3.11 or tomli; pip install tomli"
    for name, message in (
        ("a.toml", toml),
        ("a.yml", "YAML needs PyYAML; pip install 'nf4.yaml.', or write"),
    ):
        (tmp_path / name).write_text("lr: 1")
        with pytest.raises(TrainError, match=message):
            read_config(tmp_path / name)


def test_kinds_of_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd=2").touch()
    kind = WeightedPath()
    assert kind.convert("odd=2", None, None) == (Path("odd=2"), 1.0)
    assert kind.convert("even=2", None, None) == (Path("even"), 2.0)
    with pytest.raises(click.BadParameter, match="'x' behind 'a' is not a weight; write for example a=0"):
        kind.convert("a=x", None, None)
    assert Assignment("key", click.INT).convert("a=b=3", None, None) == ("a=b", 3)
    for bad in ("a", "=3", "a="):
        with pytest.raises(click.BadParameter, match="is not of the form KEY=INTEGER"):
            Assignment("key", click.INT).convert(bad, None, None)


def test_what_is_missing_is_told_and_help_has_sections(tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(command, [str(argument) for argument in arguments])
        assert result.exit_code == 2 or "--help" in arguments
        return result.output

    (tmp_path / "c.toml").write_text("model = 'm.nf4'")
    assert "Missing FILE: give it here or in a --config file." in run("--data", "a", "--out", "o")
    assert "Missing --data" in run("--config", tmp_path / "c.toml", "--out", "o")
    assert "Missing --out" in run("m.nf4", "--data", "a")
    text = run("--help")
    places = [
        text.index(f"\n{section}:") for section in ("Data", "Adapter", "Optimizer", "Memory", "Machine")
    ]
    assert places == sorted(places)
    assert all(f"--{option.name}" in text for option in OPTIONS.values())
    assert "[default: 0.9 0.999]" in text
    assert "torch" in sys.modules  # help shows the defaults of the classes themselves
