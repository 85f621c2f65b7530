"""The page on adapters: its example runs, and its table names every option."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nf4.lora import INITS, LoraConfig
from nf4.lora.attach import saved_modules

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")


def test_every_option_is_in_the_table() -> None:
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")][1:]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(LoraConfig))
    assert all(f"`{init}`" in PAGE for init in INITS)


def test_the_example_runs(
    make_packed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_packed("llama", num_hidden_layers=1).rename(tmp_path / "out.nf4")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {"input_ids": torch.tensor([[1, 5, 7]])}
    exec(example, names)
    model, again = names["model"], names["again"]
    assert isinstance(model, torch.nn.Module)
    assert isinstance(again, torch.nn.Module)
    torch.testing.assert_close(again(names["input_ids"]), model.eval()(names["input_ids"]))
    assert [name for name, _ in saved_modules(again)] == ["model.norm"]
