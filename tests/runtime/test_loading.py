"""`nf4.load`: the right weights in the right places, uncopied, and one-line refusals."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import nf4
from nf4 import loading
from nf4.errors import LoadError
from nf4.model.config import ModelConfig
from nf4.model.decoder import CausalLM
from nf4.model.linear import KeptEmbedding, KeptLinear, NF4Embedding, NF4Linear
from nf4format import reference
from nf4format.container import Nf4File
from nf4format.errors import FormatError, Nf4Error

IDS = torch.arange(3, 43).view(2, 20)
KEPT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def dense_copy(path: Path) -> CausalLM:
    """An ordinary fp32 model with the weights that the file decodes to, by the numpy reference."""
    with Nf4File.open(path, mmap=False) as file:
        state = {}
        for name in file.packed_names:
            packed = file.packed(name)
            values = reference.dequantize(packed, "float32").reshape(packed.shape)
            state[name] = torch.from_numpy(values)
        for name in file.kept_names:
            data, dtype, shape = file.kept(name)
            state[name] = torch.from_numpy(data).view(KEPT_DTYPES[dtype]).view(shape).float()
        model = CausalLM(ModelConfig.from_dict(file.config)).eval()
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


@torch.no_grad()
def test_logits_equal_a_dense_model_with_the_decoded_weights(make_packed, model_case):
    family, fields, options = model_case
    path = make_packed(family, options=options, **fields)
    expected = dense_copy(path)(IDS)
    assert expected.std() > 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nf4.load(path, dtype="float32")
        logits = model(IDS)
    assert (logits - expected).abs().max() < 1e-4
    assert torch.equal(nf4.load(path, dtype=torch.float32, mmap=False)(IDS), logits)
    for dtype in (torch.bfloat16, torch.float16):
        low = nf4.load(path, dtype=dtype)(IDS)
        assert low.dtype == dtype
        assert (low.float() - expected).norm() < 0.03 * expected.norm()


def test_layers_are_frozen_views_of_the_mapping(make_packed):
    path = make_packed("qwen2", options={"exclude": ("*layers.0.mlp*",)})
    model = nf4.load(path)
    assert model.source is not None
    assert model.source.path == path
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), KeptLinear)
    assert isinstance(model.get_submodule("model.layers.1.mlp.up_proj"), NF4Linear)
    assert isinstance(model.model.embed_tokens, KeptEmbedding)
    regions = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    weights = [
        tensor
        for module in model.modules()
        if isinstance(module, (NF4Linear, NF4Embedding, KeptLinear, KeptEmbedding))
        for name, tensor in module.named_buffers()
        if name != "bias"
    ]
    assert len(weights) > 20
    for tensor in weights:
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        assert any(begin <= first and last <= end for begin, end in regions)


def test_rotary_buffers_of_old_checkpoints_are_ignored(make_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    from qcompile.pipeline import compile_checkpoint

    folder = make_checkpoint("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    compile_checkpoint(folder, tmp_path / "old.nf4")
    assert nf4.load(tmp_path / "old.nf4")(IDS).isfinite().all()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            {"intermediate_size": 128},
            r"layers.0.mlp.gate_proj.weight': shape .*\[128, 128\], got \[344, 128\]",
        ),
        ({"attention_bias": True}, r"'model.layers.0.self_attn.q_proj.bias': missing; the checkpoint"),
        ({"num_hidden_layers": 2}, r"'model.layers.2.*holds 9 tensors that this model does not use"),
        ({"vocab_size": 64}, r"'model.embed_tokens.weight': shape .* \[64, 128\], got \[320, 128\]"),
        ({"model_type": "gpt2"}, r"config.json: 'model_type', expected one of llama, mistral, qwen2, qwen3"),
    ],
)
def test_file_and_config_must_agree(make_packed, edit, message):
    path = make_packed("llama", edit=edit)
    with pytest.raises(LoadError, match=message) as caught:
        nf4.load(path)
    assert str(path) in str(caught.value)


def test_arguments_out_of_range(make_packed, tmp_path):
    path = make_packed("llama")
    for device in ("mps", "gpu"):
        with pytest.raises(LoadError, match=rf"device, expected auto, cpu or cuda, got {device}"):
            nf4.load(path, device=device)
    with pytest.raises(LoadError, match=r"dtype, expected one of .*, got float64"):
        nf4.load(path, dtype=torch.float64)
    with pytest.raises(Nf4Error, match="no such adapter directory"):
        nf4.load(path, adapter=tmp_path / "none")
    with pytest.raises(Nf4Error, match=r"nothing\.nf4"):
        nf4.load(tmp_path / "nothing.nf4")


def _damage(path: Path, name: str) -> None:
    with Nf4File.open(path) as file:
        begin = file.header.entries[name].begin
    with path.open("r+b") as out:
        out.seek(begin)
        byte = out.read(1)[0]
        out.seek(begin)
        out.write(bytes([byte ^ 1]))


def test_sums_are_compared_where_bytes_are_read_unless_told_otherwise(make_packed):
    path = make_packed("llama")
    whole = nf4.load(path, mmap=False)(IDS)
    _damage(path, "model.layers.0.mlp.up_proj.weight")
    assert not torch.equal(nf4.load(path)(IDS), whole)  # mapped: not read
    assert not torch.equal(nf4.load(path, mmap=False, verify=False)(IDS), whole)
    for arguments in ({"verify": True}, {"mmap": False}, {"mmap": False, "verify": True}):
        with pytest.raises(Nf4Error, match=r"data is damaged .*fetch the file again"):
            nf4.load(path, **arguments)


def test_a_file_that_ends_while_it_is_loaded(make_packed, monkeypatch):
    path = make_packed("llama")
    original = Nf4File.read_weights

    def cut(self, **options):
        with path.open("r+b") as file:
            file.truncate(20000)
        return original(self, **options)

    monkeypatch.setattr(Nf4File, "read_weights", cut)
    with pytest.raises(FormatError, match=r"the file ends while .*cut short while in use"):
        nf4.load(path, mmap=False)


def test_read_weights_outlive_the_file(make_packed):
    path = make_packed("llama")
    model = nf4.load(path, mmap=False)
    whole = model(IDS)
    path.write_bytes(b"")
    assert torch.equal(model(IDS), whole)


def test_package_import_waits_for_torch_until_it_is_needed():
    code = "import nf4, sys; assert 'torch' not in sys.modules; nf4.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_damage_is_refused(make_packed, tmp_path):
    path = make_packed("llama")
    whole = path.read_bytes()
    cut = tmp_path / "cut.nf4"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=r"cut\.nf4"):
        nf4.load(cut)
    flipped = tmp_path / "flipped.nf4"
    with Nf4File.open(path) as file:
        at = file.header.entries[file.packed_names[0]].begin + 100
    flipped.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    nf4.load(flipped)  # opening reads no weights
    with pytest.raises(LoadError, match=r"flipped\.nf4: data is damaged .*q_proj.*; fetch the file again"):
        nf4.load(flipped, verify=True)
    nf4.load(path, verify=True)


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_collection_on_the_way(make_packed, monkeypatch, collects):
    path = make_packed("llama")
    build, seen = loading._build, []
    monkeypatch.setattr(loading, "_build", lambda *given: seen.append(gc.isenabled()) or build(*given))
    try:
        (gc.enable if collects else gc.disable)()
        nf4.load(path)
        assert gc.isenabled() == collects
        with pytest.raises(Nf4Error):
            nf4.load(path.with_name("missing.nf4"))
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    assert seen == [False]
