"""The commands, run as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from nf4 import cli


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs `nf4 ARGUMENTS` in this process: (exit status, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["nf4", *map(str, arguments)])
        capfd.readouterr()  # what came before is not the command's
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capfd.readouterr()
        return status, out, err

    return call


@pytest.fixture
def packed(make_packed):
    return make_packed("llama")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat; the dog\n<|doc|>\nand the frog were there too. " * 20)
    return path


def test_inspect(run, packed):
    status, out, _ = run("inspect", packed, "--tensors")
    assert status == 0
    assert "llama: 3 layers, 128 hidden, 320 tokens, untied embeddings" in out
    assert "model.layers.2.mlp.down_proj.weight" in out
    status, out, _ = run("inspect", packed, "--json", "-")
    facts = json.loads(out)
    assert facts["packed"]["tensors"] == 21
    assert facts["parameters"] == facts["packed"]["parameters"] + facts["kept"]["parameters"]
    assert facts["file_bytes"] == packed.stat().st_size
    tensors = {tensor["name"]: tensor for tensor in facts["tensors"]}
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    num_codes, num_scales = 344 * 128 // 2, 344 * 128 // 64
    assert (up["dtype"], up["shape"], up["parameters"]) == ("NF4", [344, 128], 344 * 128)
    constants = 4 * (3 + 16 + 256)  # 688 scales in 3 nested blocks, and the two maps
    assert 0 < up["bytes"] - (num_codes + num_scales + constants) <= 256  # the rest is the JSON state
    assert tensors["lm_head.weight"] == {
        "name": "lm_head.weight",
        "dtype": "BF16",
        "shape": [320, 128],
        "parameters": 320 * 128,
        "bytes": 320 * 128 * 2,
    }


def test_inspect_names_the_levels(run, packed, make_packed, tmp_path):
    assert re.search(r"^levels +nf4 \(21 tensors\)$", run("inspect", packed)[1], re.MULTILINE)
    (tmp_path / "levels.txt").write_text(" ".join(map(str, range(-8, 8))))
    for levels, name in (("fp4-e3m0", "fp4-e3m0"), (tmp_path / "levels.txt", "custom")):
        out = run("inspect", make_packed("llama", options={"levels": str(levels)}), "--tensors")[1]
        assert re.search(rf"^levels +{name} \(21 tensors\)$", out, re.MULTILINE)
        assert re.search(
            rf"^model\.layers\.0\.mlp\.up_proj\.weight +{name.upper()} +344x128 ", out, re.MULTILINE
        )


def test_verify_names_what_is_hurt(run, packed, tmp_path):
    status, out, err = run("verify", packed)
    assert (status, err) == (0, "")
    assert f"whole, {packed.stat().st_size:,} bytes" in out
    data = bytearray(packed.read_bytes())
    data[len(data) // 4] ^= 16
    hurt = tmp_path / "hurt.nf4"
    hurt.write_bytes(data)
    status, out, err = run("verify", hurt)
    assert (status, out) == (1, "")
    assert err.startswith(f"nf4: {hurt}: data is damaged")
    assert "model.layers.0" in err
    assert err.count("\n") == 1


def test_eval(run, packed, text):
    arguments = ("eval", packed, text, "--window", 32, "--dtype", "float32")
    status, out, err = run(*arguments, "--json", "-")
    facts = json.loads(out)
    assert (status, err) == (0, "")
    assert (facts["window"], facts["dtype"], facts["tokens"] % 31) == (32, "float32", 0)
    assert 250 < facts["perplexity"] < 400  # random weights know nothing: about the vocabulary of 320
    status, out, _ = run(*arguments, "--limit", 62)
    assert status == 0
    assert "62 predicted, windows of 32, float32" in out


def test_eval_writes_json_beside_its_text(run, packed, text, tmp_path):
    path = tmp_path / "result.json"
    status, out, _ = run("eval", packed, text, "--window", 32, "--json", path)
    assert status == 0
    assert f"perplexity  {json.loads(path.read_text())['perplexity']:.4f}" in out


def test_eval_refuses_windows_beyond_the_context(run, packed, text):
    status, out, err = run("eval", packed, text, "--window", 513)
    assert (status, out) == (1, "")
    assert err == f"nf4: {packed}: window, expected at most the model's 512 positions, got 513\n"


def test_generate(run, packed):
    options = ("-p", "the cat", "--max-new-tokens", 8, "--temperature", 1, "--top-k", 20)
    arguments = ("generate", packed, *options)
    first, again = run(*arguments, "--seed", 3), run(*arguments, "--seed", 3)
    assert first == again
    assert first[0] == 0
    assert len(first[1]) > 4
    assert run(*arguments, "--seed", 4) != first


def test_export(run, packed, tmp_path):
    status, out, _ = run("export", packed, tmp_path / "hf", "--format", "bnb")
    assert status == 0
    assert "model.safetensors (hard link" in out
    assert (tmp_path / "hf" / "model.safetensors").samefile(packed)
    status, _, err = run("export", packed, tmp_path / "hf")
    assert (status, err.count("\n")) == (1, 1)
    assert "not empty" in err
    assert run("export", packed, tmp_path / "hf", "--force")[0] == 0


def test_problems_are_one_line_and_status_1(run, packed, text, tmp_path):
    cut = tmp_path / "cut.nf4"
    cut.write_bytes(packed.read_bytes()[:-1000])
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"caf\xe9")
    for arguments, message in (
        (("inspect", tmp_path / "none.nf4"), "none.nf4"),
        (("inspect", text), "text.txt"),
        (("verify", cut), "cut.nf4"),
        (("eval", cut, text), "cut.nf4"),
        (("eval", packed, tmp_path / "none.txt"), "none.txt"),
        (("eval", packed, binary), "binary.txt: not a text, expected UTF-8, got byte 0xe9 at offset 3"),
        (("eval", packed, text, "--window", 1), "window, expected at least 2 tokens, got 1"),
        (("eval", packed, text, "--adapter", tmp_path), "adapter_config.json"),
        (("generate", packed, "-p", "x", "--top-p", 2), "top-p, expected over 0 and up to 1, got 2.0"),
        (("generate", cut, "-p", "x"), "cut.nf4"),
        (("export", packed, tmp_path / "missing" / "hf"), "there is no directory"),
        (("export", cut, tmp_path / "hf"), "cut.nf4"),
    ):
        status, out, err = run(*arguments)
        assert (status, out, err.count("\n")) == (1, "", 1), arguments
        assert err.startswith("nf4: ")
        assert message in err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["inspect", "verify", "eval", "generate", "export"])
def test_help_teaches(run, name):
    status, out, _ = run(name, "--help")
    assert status == 0
    assert f"nf4 {name} model.nf4" in out


def test_sigterm_unwinds_as_ctrl_c_does(tmp_path):
    """A process that dies of the signal leaves its temporary files behind."""
    code = (
        "import os, signal, sys, time\n"
        "from nf4format.atomic import AtomicFile\n"
        "from nf4format.container import Nf4File\n"
        "from nf4.cli import main\n"
        "def open_and_wait(path):\n"
        "    with AtomicFile(path):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "Nf4File.open = open_and_wait\n"
        f"sys.argv = ['nf4', 'inspect', {str(tmp_path / 'x')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Aborted" in done.stderr
    assert list(tmp_path.iterdir()) == []
