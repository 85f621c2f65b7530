"""A packed file on a GPU: the bytes in the slab; the results of the CPU from model, training and text."""

from __future__ import annotations

import gc
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import nf4
from nf4 import upload
from nf4.errors import LoadError
from nf4.lora import LoraConfig
from nf4.model.linear import PACKED_PARTS, NF4Embedding, NF4Linear
from nf4.ops import cuda as ops_cuda
from nf4.text.generate import generate
from nf4.text.perplexity import encode_documents, perplexity
from nf4.text.sampling import Sampling
from nf4.text.tokenizer import Tokenizer
from nf4.training.options import TrainOptions
from nf4.training.train import train
from nf4.upload import Slab
from nf4format import container
from nf4format.container import Nf4File
from nf4format.errors import FormatError
from nf4format.region import DataRegion, glance
from nf4format.sums import CHUNK_BYTES

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda", 0)
IDS = torch.arange(3, 43).view(2, 20)


@torch.no_grad()
def test_logits_equal_the_cpus(make_packed, model_case):
    family, fields, options = model_case
    path = make_packed(family, options=options, **fields)
    expected = nf4.load(path, dtype="float32")(IDS)
    model = nf4.load(path, device="cuda", dtype="float32")
    logits = model(IDS.cuda())
    assert model.device.type == logits.device.type == "cuda"
    assert (logits.cpu() - expected).abs().max() < 1e-4
    assert torch.equal(nf4.load(path, device="cuda", dtype="float32")(IDS.cuda()), logits)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :6] = 0  # padding on the left
    padded = nf4.load(path, dtype="float32")(IDS, attention_mask=mask)
    ours = model(IDS.cuda(), attention_mask=mask.cuda()).cpu()
    assert (ours - padded)[mask.bool()].abs().max() < 1e-4
    for dtype in (torch.bfloat16, torch.float16):
        low = nf4.load(path, device="cuda", dtype=dtype)(IDS.cuda())
        assert low.dtype == dtype
        assert (low.float().cpu() - expected).norm() < 0.03 * expected.norm()


def test_every_weight_is_a_view_of_the_slab_with_the_files_bytes(make_packed):
    path = make_packed("qwen2", options={"exclude": ("*layers.0.mlp*",)})
    model = nf4.load(path, device="cuda")
    begin, size = model.slab.data_ptr(), model.slab.numel()
    with Nf4File.open(path) as file:
        for name, module in model.named_modules():
            if isinstance(module, (NF4Linear, NF4Embedding)):
                packed = file.packed(f"{name}.weight")
                for part in PACKED_PARTS:
                    tensor = getattr(module, part)
                    assert torch.equal(tensor.cpu(), torch.from_numpy(getattr(packed, part).copy())), name
                    assert begin <= tensor.data_ptr() < begin + size
    assert not [name for name, tensor in model.state_dict().items() if tensor.device.type != "cuda"]
    assert begin in ops_cuda._constant
    del model, module, tensor
    assert begin not in ops_cuda._constant


@pytest.fixture
def large(make_packed):
    """A file of several chunks."""
    return make_packed("llama", hidden_size=1024, intermediate_size=2048, num_attention_heads=8)


def test_a_file_of_many_chunks_and_few_readers(large):
    with Nf4File.open(large, mmap=False) as file:
        assert len(file.region.sums) > 2 * 8
        for readers in (1, 3, None):
            with Slab(large, file.fileno(), file.region, CUDA, readers=readers) as slab:
                slab.wait()
            raw = large.read_bytes()[file.header.data_start : file.weights_end]
            assert slab.memory.cpu().numpy().tobytes() == raw


def test_damage_is_found_on_the_way(large):
    with Nf4File.open(large) as file:
        at = file.header.data_start + CHUNK_BYTES + 17
    data = bytearray(large.read_bytes())
    data[at] ^= 4
    large.write_bytes(data)
    with pytest.raises(LoadError, match=rf"data is damaged \(bytes {at - 17} to \d+\); nf4 verify"):
        nf4.load(large, device="cuda")
    with Nf4File.open(large) as file:
        slab = Slab(large, file.fileno(), file.region, CUDA, check=False)
    slab.wait()
    assert slab.memory.cpu().numpy().tobytes() == data[file.header.data_start : file.weights_end]


def test_a_file_cut_short_while_it_is_read(large):
    with Nf4File.open(large, mmap=False) as file:
        os.truncate(large, file.header.data_start + CHUNK_BYTES + 1000)
        with pytest.raises(
            FormatError, match=r"the file ends while bytes \d+ to \d+ are read, got 4\d+ bytes"
        ):
            Slab(large, file.fileno(), file.region, CUDA).wait()


def test_a_file_that_cannot_be_read(large, tmp_path):
    directory = os.open(tmp_path, os.O_RDONLY)
    with Nf4File.open(large) as file, pytest.raises(FormatError, match=f"{large}: is a directory"):
        Slab(large, directory, file.region, CUDA).wait()
    os.close(directory)


def test_a_copy_that_fails_is_told(large, monkeypatch):
    kernels = ops_cuda.kernels()
    real = kernels.Upload
    monkeypatch.setattr(kernels, "Upload", lambda *args, **kwargs: real(*args, **{**kwargs, "device": 99}))
    message = "copying to cuda:0 failed: cudaErrorInvalidDevice: invalid device ordinal; end other programs"
    with pytest.raises(LoadError, match=message):
        nf4.load(large, device="cuda")


@torch.no_grad()
def test_loading_does_not_touch_the_mapping(make_packed, monkeypatch):
    """A file that is cut short while it is loaded must be an error, not a bus error."""
    path = make_packed("qwen2", options={"exclude": ("*layers.0.mlp*",)})
    expected = nf4.load(path, device="cuda", dtype="float32")(IDS.cuda())
    monkeypatch.setattr(container, "_map_file", lambda fd, size, path: np.zeros(size, np.uint8))
    for arguments in ({}, {"mmap": False}):
        assert torch.equal(nf4.load(path, device="cuda", dtype="float32", **arguments)(IDS.cuda()), expected)


def test_sums_can_be_left_out(large):
    with Nf4File.open(large) as file:
        begin = file.header.entries["model.norm.weight"].begin
    with large.open("r+b") as out:
        out.seek(begin)
        out.write(b"\x01")
    with pytest.raises(LoadError, match="data is damaged"):
        nf4.load(large, device="cuda")
    assert nf4.load(large, device="cuda", verify=False).slab is not None


def test_what_a_glance_tells_is_not_believed(large, monkeypatch):
    """A region that the header does not confirm is read again."""
    expected = nf4.load(large, device="cuda").slab

    def other(fd: int) -> DataRegion:
        region = glance(fd)
        return replace(region, weights_end=region.weights_end - 64)

    for found in (other, lambda fd: None):
        monkeypatch.setattr(upload, "glance", found)
        assert torch.equal(nf4.load(large, device="cuda").slab, expected)


def test_failures_leave_nothing_behind(large):
    with large.open("r+b") as file:
        file.seek(-200_000, os.SEEK_END)
        file.write(b"damage")

    def kept() -> tuple[int, int, int]:
        gc.collect()
        descriptors, threads = (len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("fd", "task"))
        return torch.cuda.memory_allocated(), descriptors, threads

    with pytest.raises(LoadError):
        nf4.load(large, device="cuda")
    before = kept()
    for _ in range(5):
        with pytest.raises(LoadError):
            nf4.load(large, device="cuda")
    assert kept() == before


def test_ctrl_c_ends_it(tmp_path):
    hole = tmp_path / "hole"
    with hole.open("wb") as file:
        file.truncate(1 << 42)
    memory = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with hole.open("rb") as file:
        endless = ops_cuda.kernels().Upload(
            file.fileno(),
            begin=0,
            end=1 << 42,
            chunk_bytes=1 << 41,
            sums=b"",
            memory=memory.data_ptr(),
            bytes=memory.numel(),
            device=0,
            after=torch.cuda.current_stream().cuda_stream,
            readers=2,
            piece_bytes=1 << 20,
            slots=2,
        )
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                endless.wait()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        endless.cancel()
    assert not memory.any()


def test_too_little_memory_is_told(make_packed, monkeypatch):
    path = make_packed("llama")
    monkeypatch.setattr(Nf4File, "weights_end", property(lambda file: 1 << 50))
    message = r"too little memory on cuda:0 for the weights, expected 1,\d{3}[\d,]+ bytes, got [\d,]+ free"
    with pytest.raises(LoadError, match=message):
        nf4.load(path, device="cuda")


def test_generation_equals_the_cpus(make_packed):
    path = make_packed("qwen3")
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]
    models = [nf4.load(path, device=device, dtype="float32") for device in ("cpu", "cuda")]
    for sampling in (Sampling(), Sampling(temperature=0.9, top_k=20, seed=3)):
        texts = [generate(model, prompts, max_new_tokens=24, sampling=sampling) for model in models]
        assert texts[0] == texts[1]


def test_training_follows_the_cpus_and_its_adapter_serves_both(make_packed, tmp_path):
    path = make_packed("llama")
    (tmp_path / "text.txt").write_text("the cat sat on the mat; the dog and the frog were there too. " * 60)
    losses, models = {}, {}
    for device in ("cpu", "cuda"):
        options = TrainOptions(
            data=(tmp_path / "text.txt",),
            out=tmp_path / device,
            lora=LoraConfig(rank=4, alpha=8),
            lr=1e-2,
            steps=12,
            warmup=2,
            batch=2,
            accumulate=2,
            seq_len=32,
            eval_fraction=0.2,
            checkpointing=device == "cuda",
        )
        model = models[device] = nf4.load(path, device=device, dtype="float32")
        train(model, Tokenizer.from_file(model.source), options)
        records = [json.loads(line) for line in options.log_path.read_text().splitlines()]
        losses[device] = [record["loss"] for record in records if "loss" in record]
        assert all(record["grad_norm"] > 0 for record in records if "loss" in record)
    assert losses["cuda"][-1] < losses["cuda"][0] - 0.5
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
    with torch.no_grad():
        trained = models["cuda"](IDS.cuda()).cpu()
        for device in ("cpu", "cuda"):
            again = nf4.load(path, device=device, dtype="float32", adapter=tmp_path / "cuda")
            assert (again(IDS.to(device)).cpu() - trained).abs().max() < 1e-4


@pytest.mark.slow
def test_wiki_llama_has_the_cpus_perplexity(shared, tmp_path):
    from qcompile.options import CompileOptions
    from qcompile.pipeline import compile_checkpoint

    path = tmp_path / "wiki.nf4"
    compile_checkpoint(shared / "models" / "wiki-llama-16m", path, CompileOptions())
    text = (shared / "data" / "wiki_en_valid.txt").read_text(encoding="utf-8")[:60_000]
    results = {}
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        model = nf4.load(path, device=device, dtype=dtype)
        tokenizer = Tokenizer.from_file(model.source)
        ids = encode_documents(tokenizer, text)
        result = perplexity(model, ids, 512, bos_id=tokenizer.bos_id, max_tokens=8_176)
        results[device, dtype] = result.perplexity
    print("perplexities:", results)
    assert results["cuda", "float32"] == pytest.approx(results["cpu", "float32"], rel=1e-4)
    assert results["cuda", "bfloat16"] == pytest.approx(results["cpu", "float32"], rel=5e-3)
