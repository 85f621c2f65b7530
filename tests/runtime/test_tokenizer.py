"""Encoding, special ids, and text that appears as tokens come."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nf4.errors import LoadError
from nf4.text.tokenizer import Tokenizer
from nf4format.container import Nf4File

TEXTS = [
    "the cat sat",
    " leading and  double spaces\n\n\ttabs",
    "naïve café, 日本語, 👩‍👩‍👧 and ￼",
    "",
]


@pytest.fixture(scope="module")
def byte_fallback_json() -> bytes:
    """A vocabulary as Llama 2's: words begin with ▁, what is unknown falls back to bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlostw"]
    vocabulary = {word: index for index, word in enumerate([*words, "▁t", "▁th", "▁the"])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend.to_str().encode()


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_special_tokens(tokenizer_json, text):
    tokenizer = Tokenizer(tokenizer_json)
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert tokenizer.encode(text, special=False) == ids[1:]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "the"])
def test_stream_gives_the_text_in_whole_characters(tokenizer_json, byte_fallback_json, kind, text, prompt):
    tokenizer = Tokenizer(tokenizer_json if kind == "byte_level" else byte_fallback_json)
    prompt_ids = tokenizer.encode(prompt, special=False)
    ids = tokenizer.encode(f"{prompt}{text}", special=False)
    if ids[: len(prompt_ids)] != prompt_ids:
        pytest.skip("the tokens of prompt and text join at the seam")
    stream = tokenizer.stream(prompt_ids)
    pieces = [stream.push(token) for token in ids[len(prompt_ids) :]]
    assert "".join(pieces) == tokenizer.decode(ids)[len(tokenizer.decode(prompt_ids)) :]
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.finish() == ""


def test_stream_ends_an_incomplete_character(tokenizer_json):
    tokenizer = Tokenizer(tokenizer_json)
    stream = tokenizer.stream()
    ids = tokenizer.encode("a日", special=False)
    assert [stream.push(token) for token in ids[:-1]] == ["a", *[""] * (len(ids) - 2)]
    assert set(stream.finish()) == {"\ufffd"}
    assert stream.finish() == ""


def test_begin_and_end_ids(tokenizer_json):
    def ids(**files):
        tokenizer = Tokenizer(tokenizer_json, **files)
        return tokenizer.bos_id, tokenizer.eos_ids

    config, generation = {"bos_token_id": 7, "eos_token_id": 8}, {"bos_token_id": 5, "eos_token_id": [2, 9]}
    named = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    assert ids() == (None, ())
    assert ids(config=config) == (7, (8,))
    assert ids(config=config, generation_config=generation) == (5, (2, 9))
    assert ids(config=config, tokenizer_config=named) == (1, (8,))
    assert ids(tokenizer_config=named) == (1, (2,))
    # Qwen2's config.json names a BOS, its tokenizer says that there is none
    assert ids(config=config, tokenizer_config={"bos_token": None}) == (None, (8,))


def test_embedded_tokenizer_and_its_absence(make_checkpoint, make_packed, tokenizer_json, tmp_path):
    from qcompile.pipeline import compile_checkpoint

    with Nf4File.open(make_packed("llama")) as file:
        tokenizer = Tokenizer.from_file(file)
    assert tokenizer.encode("the cat") == Tokenizer(tokenizer_json).encode("the cat")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    compile_checkpoint(make_checkpoint("llama", name="bare"), tmp_path / "bare.nf4")
    with (
        Nf4File.open(tmp_path / "bare.nf4") as file,
        pytest.raises(LoadError, match=r"bare\.nf4: the file holds no tokenizer\.json; put a"),
    ):
        Tokenizer.from_file(file)


def test_unusable_tokenizers(tokenizer_json):
    broken = json.dumps(json.loads(tokenizer_json) | {"model": {"type": "Fancy"}}).encode()
    for data in (b"{", b"\xff", broken):
        with pytest.raises(LoadError, match="x: not a usable tokenizer: "):
            Tokenizer(data, name="x")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_pieces_are_the_text_of_each_token_and_special_ones_show(tokenizer_json, byte_fallback_json, kind):
    tokenizer = Tokenizer(tokenizer_json if kind == "byte_level" else byte_fallback_json)
    ids = [1, *tokenizer.encode("the cat sat", special=False), 2]
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids)
    assert (pieces[0], pieces[-1]) == ("<s>", "</s>")
    assert "".join(pieces[1:-1]).strip() == "the cat sat"


def test_pieces_of_a_character_show_as_the_vocabulary_has_them(byte_fallback_json):
    tokenizer = Tokenizer(byte_fallback_json)
    assert tokenizer.pieces(tokenizer.encode("日", special=False)) == ["▁", "<0xE6>", "<0x97>", "日"]


def test_chat_templates_come_with_the_model(
    tokenizer_json: bytes,
) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}, {"name": "broken"}, 3]
    for configured, apart, expected in (
        (None, None, {}),
        ("a", None, {"default": "a"}),
        (named, None, {"default": "a", "tools": "b"}),
        (named, "c", {"default": "c", "tools": "b"}),
        ({"a": 1}, None, {}),
    ):
        found = Tokenizer(tokenizer_json, tokenizer_config={"chat_template": configured}, chat_template=apart)
        assert found.chat_templates == expected


def test_special_tokens_have_texts_and_end_ids(tokenizer_json: bytes) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None, "other": "x"}
    found = Tokenizer(tokenizer_json, tokenizer_config=config)
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert found.end_ids == {0, 2}  # nothing says that 0 stands for unknown ones
    assert found.max_id == found.vocab_size - 1
    bare = Tokenizer(tokenizer_json, config={"eos_token_id": [2], "bos_token_id": 1})
    assert bare.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert bare.fingerprint == found.fingerprint
    assert Tokenizer(tokenizer_json).fingerprint != found.fingerprint


def test_many_texts_are_encoded_as_one_by_one(tokenizer_json: bytes) -> None:
    found = Tokenizer(tokenizer_json)
    texts = ["the cat sat", "", "on the mat; the dog", "\u65e5\u672c"]
    for special in (True, False):
        assert found.encode_batch(texts, special) == [found.encode(text, special) for text in texts]


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_chat_templates_travel_in_packed_files(
    name: str, make_checkpoint: Callable[..., Path], tokenizer_json: bytes, tmp_path: Path
) -> None:
    from qcompile.options import CompileOptions
    from qcompile.pipeline import compile_checkpoint

    folder = make_checkpoint("llama")
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    content = (
        "{{ bos_token }}" if name.endswith("jinja") else json.dumps({"chat_template": "{{ bos_token }}"})
    )
    (folder / name).write_text(content)
    compile_checkpoint(folder, tmp_path / "a.nf4", CompileOptions())
    with Nf4File.open(tmp_path / "a.nf4") as file:
        assert Tokenizer.from_file(file).chat_templates == {"default": "{{ bos_token }}"}


@pytest.mark.parametrize("settings", [{}, {"unk_token": "<unk>"}])
def test_unknown_and_first_tokens_close_no_turn(byte_fallback_json: bytes, settings: dict[str, str]) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(byte_fallback_json.decode())
    backend.add_special_tokens([AddedToken(text) for text in ("<unk>", "<s>", "</s>", "<|turn_end|>")])
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | settings
    tokenizer = Tokenizer(backend.to_str().encode(), tokenizer_config=settings)
    assert tokenizer.end_ids == {backend.token_to_id("</s>"), backend.token_to_id("<|turn_end|>")}
