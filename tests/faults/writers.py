"""What the fault loop runs: everything that writes an output, small."""

from __future__ import annotations

import io
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import qcompile.cli
from nf4.adapters import save_adapter
from nf4.data.encode import TextEncoder
from nf4.data.options import DataOptions
from nf4.data.reading import load_dataset
from nf4.export import export_bnb
from nf4.lora import LoraConfig, add_lora
from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM
from nf4.paging.optim import PagedAdamW
from nf4.training.checkpoint import RunState, write_checkpoint
from nf4.training.runlog import LogPosition
from nf4format.atomic import write_bytes
from nf4format.container import Nf4File
from nf4format.errors import Nf4Error


class Writer:
    """Something that writes to `results`; `old` is there before, or nothing."""

    name = ""
    begins_with_user_file = False
    without: tuple[str, ...] = ()  # kinds of calls whose failure another process is to blame for

    def __init__(self, place: Path) -> None:
        self.results = place / "results"

    def begin(self) -> None:
        """Put `results` to where they were before the run."""
        shutil.rmtree(self.results, ignore_errors=True)
        self.results.mkdir()

    def run(self) -> None:
        """Write. Raises what went wrong."""
        raise NotImplementedError

    def go_on(self) -> None:
        """What a user would do after a failure, where that must lead to the new output."""


class Compile(Writer):
    """The command, in this process; what it prints must be one line."""

    def __init__(self, place: Path, *options: str, old: bool = False) -> None:
        super().__init__(place)
        self.name = " ".join(["qcompile", *options])
        self._model, self._old = place / "model", old
        self._arguments = [str(self._model), str(self.results / "out.nf4"), "-j", "1", *options]
        if not self._model.exists():
            self._model.mkdir()
            torch.manual_seed(0)
            tensors = {
                "model.layers.0.mlp.up_proj.weight": torch.randn(256, 192).bfloat16(),
                "model.norm.weight": torch.ones(64),
            }
            save_file(tensors, self._model / "model.safetensors", {"format": "pt"})
            (self._model / "config.json").write_text('{"model_type":"llama"}')
            (self._model / "tokenizer.json").write_text("{}")

    def begin(self) -> None:
        super().begin()
        if self._old:
            (self.results / "out.nf4").write_bytes(b"old")

    def run(self) -> None:
        sys.argv = ["qcompile", *self._arguments]
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                qcompile.cli.main()
            except SystemExit as stop:
                if not stop.code:
                    return
                text = err.getvalue()
                if stop.code != 1 or not text.startswith("qcompile: ") or text.count("\n") != 1:
                    raise AssertionError(f"status {stop.code}, {text!r}") from None
                raise Nf4Error("", text.strip()) from None

    def go_on(self) -> None:
        if "--resume" in self._arguments:
            self.run()


class Files(Writer):
    """`write_bytes`, as the small outputs use it."""

    name = "a file"

    def begin(self) -> None:
        super().begin()
        (self.results / "out").write_bytes(b"old")

    def run(self) -> None:
        write_bytes(self.results / "out", b"new" * 1000)


class Adapters(Writer):
    """`save_adapter` over an adapter that is there, with a directory of the user's beside its files."""

    name = "adapter"
    begins_with_user_file = True

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.model = small_model()

    def begin(self) -> None:
        super().begin()
        out = self.results / "adapter"
        (out / "mine").mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors", "mine/notes"):
            (out / name).write_bytes(b"old")

    def run(self) -> None:
        save_adapter(self.model, self.results / "adapter")


class Checkpoints(Writer):
    """A checkpoint of training."""

    name = "checkpoint"

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._model = small_model()
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = PagedAdamW(trained, lr=1e-3)
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        self._optimizer.step()
        log = LogPosition(0, "0")
        self._state = RunState(1, 2, 3.0, {}, log, log, {}, None, "data", "start", {})

    def run(self) -> None:
        write_checkpoint(self.results / "out.checkpoints", self._model, self._optimizer, self._state)


class Exports(Writer):
    """A directory for transformers; its weights are a link to the packed file, or a copy."""

    name = "export"

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._packed = place / "packed.nf4"
        if not self._packed.exists():
            compiler = Compile(place)
            compiler.begin()
            compiler.run()
            (self.results / "out.nf4").rename(self._packed)

    def run(self) -> None:
        with Nf4File.open(self._packed) as file:
            export_bnb(file, self.results / "exported")


class Tokens(Writer):
    """Tokenized data in a cache, which the run uses too. Where it cannot lock it, another process has it."""

    name = "tokens"
    without = ("lock",)

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._rows = place / "rows.jsonl"
        rows = [{"prompt": "a b", "completion": f"c {i}" * 5} for i in range(300)]
        self._rows.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self) -> None:
        options = DataOptions(seq_len=64, cache=self.results, cache_bytes=1)
        assert len(load_dataset([self._rows], Bytes(), options)) == 300


class Bytes(TextEncoder):
    """One id a byte, BOS in front."""

    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)
    fingerprint: str | None = "bytes"

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [1] * special + [3 + byte for byte in text.encode()]


def small_model() -> CausalLM:
    """A decoder with an adapter of a few hundred kB, so that its buffers count as large."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    model = CausalLM(ModelConfig.from_dict(config))
    add_lora(model, LoraConfig(rank=80, alpha=8, targets=("q_proj", "v_proj")), 0)
    return model
