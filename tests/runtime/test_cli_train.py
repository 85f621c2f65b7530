"""`nf4 train` as a user runs it: on a compiled file, from the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

import nf4
from nf4.cli.parameters import ByteSize
from nf4.cli.train import command
from nf4format.errors import FormatError, Nf4Error
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with BOS 1 and EOS 2, 259 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def packed(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    folder = make_checkpoint("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    write_tokenizer(folder)
    compile_checkpoint(folder, tmp_path / "model.nf4", CompileOptions())
    return tmp_path / "model.nf4"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [*map(str, arguments), "--device", "cpu"])


def test_trains_on_rows_and_text_and_the_adapter_loads(packed: Path, tmp_path: Path) -> None:
    rows, text = tmp_path / "rows.jsonl", tmp_path / "text.txt"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) + "\n" for n in range(20))
    )
    text.write_text("one two three four five " * 20)
    out = tmp_path / "adapter"
    result = run(
        packed, "--data", rows, "--data", text, "--eval-fraction", 0.2, "--out", out, "--steps", 8,
        "--lr", 0.01, "--seq-len", 32, "--rank", 4, "--target", "q_proj", "--target", "mlp.*",
        "--page-budget", "4K", "--eval-every", 4, "--save-every", 4,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    before, after = map(float, result.output.split("evaluation perplexity")[1].split("\n")[0].split("->"))
    assert after < before
    assert f"adapter                {out}" in result.output
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert len((tmp_path / "adapter.jsonl").read_text().splitlines()) == 8 + 3
    nf4.load(packed, adapter=out)
    again = run(packed, "--data", text, "--out", out)
    assert isinstance(again.exception, Nf4Error)  # the group turns it into one line and status 1
    assert str(again.exception) == f"{out}: exists already; choose another name or pass --force"


def test_the_settings_written_beside_an_adapter_repeat_the_run(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four five " * 20)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    settings = ["--steps", 3, "--seq-len", 32, "--rank", 4, "--target", "v_proj", "--lr", "3e-3", "--no-plot"]
    result = run(packed, "--data", tmp_path / "text.txt", "--out", first, *settings)
    assert result.exit_code == 0, result.output
    for out, more in ((second, ()), (third, ("--lr", "1e-3"))):
        result = run("--config", first / "training_config.toml", "--out", out, *more)
        assert result.exit_code == 0, result.output
    adapters = [(out / "adapter_model.safetensors").read_bytes() for out in (first, second, third)]
    assert adapters[0] == adapters[1] != adapters[2]
    assert "lr = 0.001\n" in (third / "training_config.toml").read_text()
    assert "lr = 0.001\n" in (third / "README.md").read_text()


def test_a_file_read_instead_of_mapped_gives_the_same_adapter_and_shows_damage(
    packed: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("one two three four five " * 20)
    settings = ["--data", tmp_path / "text.txt", "--steps", 2, "--seq-len", 32, "--rank", 4, "--no-plot"]
    adapters = []
    for how in ("--mmap", "--no-mmap"):
        result = run(packed, *settings, "--out", tmp_path / how, how)
        assert result.exit_code == 0, result.output
        config = (tmp_path / how / "training_config.toml").read_text()
        assert f"mmap = {str(how == '--mmap').lower()}\n" in config
        adapters.append((tmp_path / how / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    data = bytearray(packed.read_bytes())
    data[-100] ^= 1
    packed.write_bytes(data)
    result = run(packed, *settings, "--out", tmp_path / "damaged", "--no-mmap")
    assert isinstance(result.exception, FormatError)
    assert "damaged" in str(result.exception)
    assert not (tmp_path / "damaged").exists()


def test_examples_are_shown_and_nothing_else_happens(packed: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    before = sorted(tmp_path.iterdir())
    result = run(packed, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "a", "--show-example", 2)
    assert result.exit_code == 0, result.output
    assert result.output.count("\n  loss ") == 2
    assert "tokens in all" in result.output
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_arithmetic_and_checkpointing(dtype: str, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four five " * 20)
    result = run(
        packed, "--data", tmp_path / "text.txt", "--out", tmp_path / "a", "--steps", 2, "--seq-len", 32,
        "--dtype", dtype, "--checkpointing", "--dropout", 0.1, "--log", tmp_path / "log",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [record.get("loss_scale") for record in records] == [2.0**16 if dtype == "float16" else None] * 2


@pytest.mark.slow
def test_a_process_stopped_in_every_way_goes_on_as_if_it_had_not_been(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four five " * 40)
    arguments = [
        packed, "--data", tmp_path / "text.txt", "--steps", 90, "--seq-len", 32, "--rank", 4, "--threads", 1,
        "--dropout", 0.1, "--save-every", 7, "--eval-fraction", 0.1, "--eval-every", 9, "--resume",
        "--no-plot",
    ]  # fmt: skip
    out, straight = tmp_path / "stopped", tmp_path / "straight"
    log, checkpoints = tmp_path / "stopped.jsonl", tmp_path / "stopped.checkpoints"
    program = "import sys; from nf4.cli import main; sys.argv[0] = 'nf4'; main()"
    command = [sys.executable, "-c", program, "train", *map(str, arguments), "--out", str(out)]
    done = 0
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        with subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True) as process:
            while not any(int(path.name[5:]) > done for path in checkpoints.glob("step-*")):
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            process.send_signal(number)
            error = process.communicate()[1]
        assert process.returncode == (-9 if number is signal.SIGKILL else 128 + number), error
        done = max(int(path.name[5:]) for path in checkpoints.glob("step-*"))
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert 7 <= done <= steps[-1] < 90
    for name in (out, straight):
        result = run(*arguments, "--out", name)
        assert result.exit_code == 0, result.output
    checkpoint = "checkpoints/step-000090/training_state.safetensors"
    for file in ("{}.jsonl", "{}/adapter_model.safetensors", f"{{}}.{checkpoint}"):
        a, b = ((tmp_path / file.format(name)).read_bytes() for name in ("stopped", "straight"))
        assert a == b, file


def test_help_teaches_and_bad_arguments_are_told(packed: Path, tmp_path: Path) -> None:
    help_text = run("--help").output
    assert "nf4 train model.nf4 --data book.txt --out my-adapter" in help_text
    assert "[default: cosine]" in help_text
    result = run(packed, "--data", tmp_path / "missing.txt", "--out", tmp_path / "a")
    assert str(result.exception) == f"{tmp_path}/missing.txt: no such file or directory; check the path"
    result = run(packed, "--data", packed, "--out", tmp_path / "a", "--page-budget", "lots")
    assert "'lots' is not a size; write for example 64M" in result.output


def test_sizes() -> None:
    texts = ("4096", "64k", "1.5M", "2GiB", "3GB")
    sizes = [ByteSize().convert(text, None, None) for text in texts]
    assert sizes == [4096, 64 << 10, 3 << 19, 2 << 30, 3 << 30]
