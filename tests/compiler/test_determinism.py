"""One checkpoint, one set of options: one SHA-256, whatever differs around the compilation."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nf4format import encode
from qcompile import emit
from qcompile.options import CompileOptions
from qcompile.pipeline import compile_checkpoint


@pytest.fixture
def model(
    write_checkpoint: Callable[..., Path], random_tensors: Callable[..., dict[str, torch.Tensor]]
) -> Path:
    """Tensors of several chunks, odd sizes, and the files that go with them."""
    tensors = random_tensors(
        model__embed_tokens__weight=(300, 256),
        model__layers__0__self_attn__q_proj__weight=(256, 256),
        model__layers__0__self_attn__o_proj__weight=(70, 1001),
        model__layers__0__mlp__up_proj__weight=(1500, 1024),
        model__layers__0__mlp__down_proj__weight=(256, 300),
        model__norm__weight=(256,),
        lm_head__weight=(300, 256),
    )
    folder = write_checkpoint(tensors, {"model_type": "test", "name": "ä ☃"})
    (folder / "tokenizer.json").write_text('{"model":{"vocab":{"ä":0}}}', encoding="utf-8")
    return folder


def in_shards(model: Path, folder: Path, order: list[int]) -> Path:
    """The same checkpoint, its tensors spread over two files."""
    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [list(tensors)[i] for i in order]
    weight_map = {}
    for shard, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{shard:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"made": "elsewhere"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("level", sorted(encode.ENCODERS))
def test_within_a_process(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    results: dict[str, str] = {}

    def compiled(way: str, source: Path = model, out: str = "out.nf4", **options: int | bool) -> None:
        path = tmp_path / out
        compile_checkpoint(source, path, CompileOptions(level=level, **options))  # type: ignore[arg-type]
        results[way] = sha256(path)
        path.unlink()

    for jobs in (1, 2, 3, 16):
        compiled(f"{jobs} threads", jobs=jobs)
    compiled("verified", verify=True)
    compiled("two shards", in_shards(model, tmp_path / "shards", [0, 1, 2, 3, 4, 5, 6]))
    compiled("two other shards", in_shards(model, tmp_path / "others", [6, 2, 4, 0, 5, 3, 1]))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    compiled("another place and name", out="deep/er/name with spaces ä.nf4")
    os.utime(model / "model.safetensors", (1, 1))
    compiled("other times of the source")
    monkeypatch.chdir(tmp_path)
    compiled("relative paths", Path("model"))
    link = tmp_path / "link"
    link.symlink_to(model)
    compiled("through a link", link)

    class Stopped(Exception):
        pass

    real, count = emit._Emitter.emit, iter(range(100))

    def stop(self: object, decision: object) -> object:
        if next(count) >= 3:
            raise Stopped
        return real(self, decision)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(emit._Emitter, "emit", stop)
        with pytest.raises(Stopped):
            compiled("stopped", resume=True, jobs=1)
    compiled("resumed", resume=True, jobs=4)
    assert len(set(results.values())) == 1, results


def test_in_other_processes(model: Path, tmp_path: Path) -> None:
    compile_checkpoint(model, tmp_path / "expected.nf4")
    expected = sha256(tmp_path / "expected.nf4")
    environments = [
        {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Asia/Tokyo", "NF4_CPU_ISA": "portable"},
        {"PYTHONHASHSEED": "77", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "HOME": "/nonexistent"},
        {"PYTHONHASHSEED": "random", "PYTHONUTF8": "0", "LC_ALL": "POSIX", "SOURCE_DATE_EPOCH": "1"},
    ]
    masks = [0o022, 0o077, 0o000]
    for number, (environment, mask) in enumerate(zip(environments, masks, strict=True)):
        out = tmp_path / f"{number}.nf4"
        subprocess.run(
            [sys.executable, "-m", "qcompile", str(model), str(out), "-q", "-j", str(number + 1)],
            env={**os.environ, **environment},
            preexec_fn=lambda mask=mask: os.umask(mask),
            cwd=tmp_path if number else "/",
            check=True,
        )
        assert sha256(out) == expected, environment
        assert out.stat().st_mode & 0o777 == 0o666 & ~mask
