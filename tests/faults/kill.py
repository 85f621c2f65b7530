"""Kills writers at random moments and looks at what is left.

Each writer runs in a forked child, so that a trial costs what the writer costs and no start of Python. After
each kill the output is absent, the old one whole or the new one whole; what goes on ends in the right bytes.
usage: python kill.py PLACE WRITER COUNT SEED [SIGNAL]; prints one JSON object.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import nf4.cli
import nf4.cli.train
import qcompile.cli
from nf4.adapters import save_adapter
from nf4.lora import LoraConfig, add_lora
from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM
from nf4.training import train  # noqa: F401 - imported once, not in every child
from nf4.training.checkpoint import list_checkpoints, read_checkpoint
from qcompile import journal

LAYERS = 12
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


class Damage(Exception):
    """Something that must not be there after a kill."""


class Writer:
    """What is killed. `work` runs in the child; the others in the parent, where no thread may be started."""

    def __init__(self, place: Path) -> None:
        self.place, self.results = place, place / "results"

    def begin(self) -> None:
        """The state before a run."""
        shutil.rmtree(self.results, ignore_errors=True)
        self.results.mkdir()

    def work(self) -> int:
        """One whole run; returns an exit status."""
        raise NotImplementedError

    def learn(self) -> None:
        """Remember what is there after a run that was not killed."""
        self.new = self.look()

    def look(self) -> object:
        """What a reader would find: None, or content to compare."""
        raise NotImplementedError

    def judge(self) -> str:
        """ "absent", "old" or "new". Raises Damage."""
        raise NotImplementedError

    goes_on = False
    """Whether `work` again, after a kill, goes on and ends in the new output."""


class Compile(Writer):
    """`qcompile`, with or without an output to replace."""

    def __init__(self, place: Path, *options: str) -> None:
        super().__init__(place)
        self._out, self._options = self.results / "out.nf4", options
        self.goes_on = "--resume" in options
        self._model = place / "model"
        if not self._model.exists():
            self._model.mkdir()
            torch.manual_seed(0)
            tensors = {
                f"model.layers.{layer}.mlp.{part}_proj.weight": torch.randn(256, 1024).bfloat16()
                for layer in range(LAYERS)
                for part in ("up", "gate")
            }
            save_file(tensors, self._model / "model.safetensors", {"format": "pt"})
            (self._model / "config.json").write_text("{}")

    def begin(self) -> None:
        super().begin()
        if "--force" in self._options:
            self._out.write_bytes(b"old")

    def work(self) -> int:
        journal.SYNC_SECONDS = 0.0  # lines are appended all the time, as in a run of hours
        journal._PERIOD_S = 0.001
        return command(qcompile.cli.main, "qcompile", self._model, self._out, "-j", "2", *self._options)

    def look(self) -> object:
        return self._out.read_bytes() if self._out.exists() else None

    def judge(self) -> str:
        others = [path.name for path in self.results.iterdir() if path != self._out]
        if not set(others) <= {".out.nf4.partial", ".out.nf4.partial.journal"}:
            raise Damage(f"also there: {others}")
        return verdict(self.look(), None if "--force" not in self._options else b"old", self.new)


class Adapter(Writer):
    """`save_adapter` over an adapter that is there."""

    FILES = ("adapter_config.json", "adapter_model.safetensors")

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        torch.manual_seed(0)
        self._model = CausalLM(ModelConfig.from_dict(CONFIG))
        add_lora(self._model, LoraConfig(rank=32, alpha=8), 0)

    def begin(self) -> None:
        super().begin()
        (self.results / "adapter").mkdir()
        for name in self.FILES:
            (self.results / "adapter" / name).write_bytes(b"old")

    def work(self) -> int:
        save_adapter(self._model, self.results / "adapter")
        return 0

    def look(self) -> object:
        return [(self.results / "adapter" / name).read_bytes() for name in self.FILES]

    def judge(self) -> str:
        others = [path.name for path in self.results.iterdir() if path.name != "adapter"]
        if not all(name.startswith(".adapter.") and name.endswith(".partial") for name in others):
            raise Damage(f"also there: {others}")
        return verdict(self.look(), [b"old"] * 2, self.new)


class Train(Writer):
    """`nf4 train --resume`, killed and begun again until it is through."""

    goes_on = True
    STEPS = 8

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._packed, self._text = place / "model.nf4", place / "text.txt"
        self._out = self.results / "adapter"
        self._checkpoints = self.results / "adapter.checkpoints"
        if not self._packed.exists():
            source = place / "trained"
            source.mkdir()
            torch.manual_seed(0)
            model = CausalLM(ModelConfig.from_dict(CONFIG))
            weights = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
            save_file(weights, source / "model.safetensors", {"format": "pt"})
            (source / "config.json").write_text(json.dumps(CONFIG))
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
            tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
            tokenizer.save(str(source / "tokenizer.json"))
            (source / "tokenizer_config.json").write_text('{"bos_token":"<s>","eos_token":"</s>"}')
            self._text.write_text("one two three four five " * 40)
            # In a child: the compiler starts threads.
            in_child(lambda: command(qcompile.cli.main, "qcompile", source, self._packed))

    def work(self) -> int:
        torch.set_num_threads(1)
        return command(
            nf4.cli.main, "nf4", "train", self._packed, "--data", self._text, "--out", self._out, "--steps",
            self.STEPS, "--seq-len", 32, "--rank", 4, "--dropout", 0.1, "--save-every", 2, "--resume",
            "--no-plot", "--device", "cpu", "--threads", 1,
        )  # fmt: skip

    def look(self) -> object:
        weights, log = self._out / "adapter_model.safetensors", self.results / "adapter.jsonl"
        if not weights.exists():
            return None
        return [weights.read_bytes(), (self._out / "adapter_config.json").read_bytes(), log.read_bytes()]

    def judge(self) -> str:
        for path in list_checkpoints(self._checkpoints):
            read_checkpoint(path)  # every sum of it; raises
        log = self.results / "adapter.jsonl"
        for line in log.read_text().splitlines() if log.exists() else ():
            json.loads(line)
        return verdict(self.look(), None, self.new)


def verdict(found: object, old: object, new: object) -> str:
    if found == new:
        return "new"
    if found == old:
        return "absent" if old is None else "old"
    raise Damage("neither the old nor the new output")


def command(main: Callable[[], None], *arguments: object) -> int:
    """A command line in this process; its exit status."""
    sys.argv = [str(argument) for argument in arguments]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def in_child(work: Callable[[], int], kill_after: float | None = None, number: int = signal.SIGKILL) -> int:
    """Run in a forked child and perhaps send it a signal; returns its wait status."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            status = work()
        except KeyboardInterrupt:
            status = 130
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def trials(writer: Writer, count: int, seed: int, number: int) -> Counter[str]:
    """Kill `count` times; what was found, by kind. Raises Damage."""
    draw, seen = random.Random(seed), Counter[str]()
    durations = []
    for _ in range(3):
        writer.begin()
        started = time.perf_counter()
        if in_child(writer.work):
            raise Damage("it fails by itself")
        durations.append(time.perf_counter() - started)
        writer.learn()
    longest = sorted(durations)[1]
    writer.begin()
    while seen.total() - seen["ended before"] < count:
        status = in_child(writer.work, draw.uniform(0, longest), number)
        if status in (-number, 128 + number):
            found = writer.judge()
            seen[found] += 1
            if found == "new":
                writer.begin()
            if number != signal.SIGKILL and not writer.goes_on and any(writer.results.rglob("*.partial*")):
                raise Damage("a temporary file is left")
        elif status:
            raise Damage(f"exit status {status}")
        else:
            seen["ended before"] += 1
        if not writer.goes_on or status == 0:
            if status == 0 and writer.judge() != "new":
                raise Damage("ended, and not with the right bytes")
            writer.begin()
    if writer.goes_on:
        if in_child(writer.work) or writer.judge() != "new":
            raise Damage("did not go on to the right bytes")
        seen["went on to the end"] += 1
    return seen


WRITERS: dict[str, Callable[[Path], Writer]] = {
    "qcompile": Compile,
    "qcompile --force": lambda place: Compile(place, "--force"),
    "qcompile --resume": lambda place: Compile(place, "--resume"),
    "qcompile --resume --force": lambda place: Compile(place, "--resume", "--force"),
    "adapter": Adapter,
    "train": Train,
}


def main(where: str, name: str, count: str, seed: str, number: str = "9") -> None:
    torch.set_num_threads(1)
    place = Path(where)
    place.mkdir(exist_ok=True)
    started = time.perf_counter()
    seen = trials(WRITERS[name](place), int(count), int(seed), int(number))
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"writer": name, "signal": int(number), "seen": seen, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
