"""Which tokens of a conversation carry loss, against transformers' mask for the common templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nf4.data.dataset import Dataset
from nf4.data.options import DataOptions
from nf4.data.reading import load_dataset
from nf4.data.template import BUILT_IN
from nf4.errors import TrainError
from nf4.text.tokenizer import Tokenizer, tokens_by_offsets

SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
]

# The models' templates without what is about tools, as they are, and with {% generation %} as transformers
# wants it. OPEN and CLOSE stand where the tags go.
TEMPLATES = {
    "chatml": """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}\
{% if message['role'] == 'assistant' %}OPEN{{ message['content'] + '<|im_end|>' }}CLOSE\
{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "llama3": """\
{{- '<|begin_of_text|>' }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}
{{- system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- OPEN %}{{- message['content'] | trim + '<|eot_id|>' }}{%- CLOSE %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    "mistral": """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {%- OPEN %}{{- ' ' + message['content'] + eos_token }}{%- CLOSE %}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}""",
    "qwen2.5": """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- OPEN %}{{- message.content + '<|im_end|>' }}{%- CLOSE %}{{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
}
# Earlier turns are not written like the last: thoughts are left out, the system prompt moves to the end.
UNSTEADY = {
    "qwen3": """\
{%- for message in messages %}
    {%- if message.role != "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.last %}
            {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' }}
        {%- endif %}
        {%- OPEN %}{{- content.lstrip('\\n') + '<|im_end|>' }}{%- CLOSE %}{{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "mistral-v3": """\
{%- set ns = namespace(system='') %}
{%- if messages[0].role == 'system' %}{%- set ns.system = messages[0].content + '\\n\\n' %}{%- endif %}
{{- bos_token }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (ns.system if loop.revindex <= 2 else '') + message.content + '[/INST]' }}
    {%- else %}
        {{- ' ' }}{%- OPEN %}{{- message.content | trim + eos_token }}{%- CLOSE %}
    {%- endif %}
{%- endfor %}""",
}


def tagged(template: str) -> str:
    return _with(template, "generation", "endgeneration")


def untagged(template: str) -> str:
    return _with(template, "", "")


def _with(template: str, opening: str, closing: str) -> str:
    for word, tag in (("OPEN", opening), ("CLOSE", closing)):
        for left, right in (("{%- ", " %}"), ("", "")):
            mark = f"{{%- {tag} %}}" if left else f"{{% {tag} %}}"
            template = template.replace(f"{left}{word}{right}", mark if tag else "")
    return template


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS: list[list[dict[str, str]]] = [
    [turn("user", "the cat sat?"), turn("assistant", "on the mat")],
    [turn("system", "be brief"), turn("user", "hello"), turn("assistant", "  the dog \n")],
    [
        turn("system", "be brief"),
        turn("user", "one"),
        turn("assistant", "the frog 🐸🐸"),
        turn("user", "twö"),
        turn("assistant", "日本語 and the cat; the cat"),
        turn("user", "three"),
        turn("assistant", "the cat; the cat"),
    ],
    [turn("user", "a"), turn("user", "b"), turn("assistant", ""), turn("user", "c"), turn("assistant", "d")],
    [turn("user", "a"), turn("assistant", "the end"), turn("user", "not answered")],
]


@pytest.fixture(scope="module")
def chat_tokenizer_json() -> bytes:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat; the dog and the frog were there too"] * 4, trainer)
    # BOS is put in front of plain texts: of conversations it must not come twice.
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend.to_str().encode()


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer_json: bytes) -> Tokenizer:
    ends = [SPECIAL.index(name) for name in ("</s>", "<|im_end|>", "<|eot_id|>")]
    return Tokenizer(
        chat_tokenizer_json,
        tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"},
        generation_config={"eos_token_id": ends},
    )


@pytest.fixture(scope="module")
def oracle(chat_tokenizer_json: bytes) -> Any:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    backend = Backend.from_str(chat_tokenizer_json.decode())
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


Encode = Callable[..., Dataset]


@pytest.fixture
def encode(tmp_path: Path, tokenizer: Tokenizer) -> Encode:
    """Conversations through a JSONL file, with a template by name or from a file."""

    def run(
        conversations: list[list[dict[str, str]]],
        template: str,
        with_tokenizer: Tokenizer | None = None,
        **options: Any,
    ) -> Dataset:
        rows, source = tmp_path / "rows.jsonl", tmp_path / "template.jinja"
        rows.write_text("".join(json.dumps({"messages": one}) + "\n" for one in conversations))
        if "{" in template:
            source.write_text(template)
            template = str(source)
        chosen = DataOptions(**{"seq_len": 4096, "template": template, **options})
        return load_dataset([rows], with_tokenizer or tokenizer, chosen)

    return run


def expected(oracle: Any, template: str, conversation: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    found = oracle.apply_chat_template(
        conversation, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], [bool(value) for value in found["assistant_masks"]]


@pytest.fixture(autouse=True)
def fixed_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers tells templates the day of the test; ours is fixed by DataOptions."""
    import datetime

    from transformers.utils import chat_template_utils

    class Today(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Today:
            return cls(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", Today)
    chat_template_utils._compile_jinja_template.cache_clear()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("marked", [True, False], ids=["generation tags", "found by us"])
def test_labels_are_those_of_transformers(name: str, marked: bool, encode: Encode, oracle: Any) -> None:
    template = TEMPLATES[name]
    dataset = encode(CONVERSATIONS, tagged(template) if marked else untagged(template))
    assert len(dataset) == len(CONVERSATIONS)
    for example, conversation in zip(dataset, CONVERSATIONS, strict=True):
        ids, labelled = expected(oracle, tagged(template), conversation)
        assert example.ids.tolist() == ids
        assert example.labelled.tolist() == labelled
        turns = sum(message["role"] == "assistant" for message in conversation)
        assert np.flatnonzero(np.diff([*labelled, False].copy()) != 0).size == 2 * turns


@pytest.mark.parametrize("name", UNSTEADY)
def test_turns_are_found_where_earlier_ones_are_written_otherwise(
    name: str, encode: Encode, oracle: Any, tokenizer: Tokenizer
) -> None:
    conversations = [conversation for conversation in CONVERSATIONS if conversation[-2]["role"] == "user"]
    if name == "qwen3":
        thoughts = turn("assistant", "<think>\nwhat?\n</think>\n\nthe cat")
        conversations.append([turn("user", "a"), thoughts, turn("user", "b"), turn("assistant", "the mat")])
    dataset = encode(conversations, untagged(UNSTEADY[name]))
    for example, conversation in zip(dataset, conversations, strict=True):
        ids, labelled = expected(oracle, tagged(UNSTEADY[name]), conversation)
        assert example.ids.tolist() == ids
        # A turn begins where generation would, behind the prompt, so before an empty thought; or with its
        # content.
        extra = example.labelled & ~np.array(labelled)
        assert not (np.array(labelled) & ~example.labelled).any()
        assert tokenizer.decode(example.ids[extra].tolist()).strip() in ("", "<think>\n\n</think>")
        assert example.ids[np.flatnonzero(example.labelled)[-1]] in (2, 4)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_close_every_turn_and_show_the_same_without_tags(
    name: str, encode: Encode, oracle: Any
) -> None:
    template = BUILT_IN[name]
    dataset = encode(CONVERSATIONS, name)
    bare = template.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    found = encode(CONVERSATIONS, bare)
    for example, other, conversation in zip(dataset, found, CONVERSATIONS, strict=True):
        ids, labelled = expected(oracle, template, conversation)
        assert example.ids.tolist() == other.ids.tolist() == ids
        assert example.labelled.tolist() == other.labelled.tolist() == labelled
        last = np.flatnonzero(example.labelled)[-1]
        assert SPECIAL[example.ids[last]] in ("</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")
        assert (example.ids == 1).sum() <= 1  # BOS once


def test_loss_on_everything_leaves_out_only_the_first_token(encode: Encode) -> None:
    for example in encode(CONVERSATIONS, "chatml", loss="all"):
        assert example.labelled.tolist() == [False] + [True] * (len(example.ids) - 1)


def test_truncation_is_counted_and_conversations_without_labels_left_out(encode: Encode) -> None:
    long = [turn("user", "the cat " * 40), turn("assistant", "no")]
    silent = [turn("user", "nobody answers")]
    half = [turn("user", "a"), turn("assistant", "the cat " * 40)]
    dataset = encode([CONVERSATIONS[0], long, silent, half], "chatml", seq_len=32)
    (report,) = dataset.report.files
    assert (report.rows, report.examples, report.truncated, report.dropped) == (4, 2, 2, 2)
    assert dataset.lengths.tolist()[1] == 32
    with pytest.raises(TrainError, match="every row is cut: all 1 are longer than the sequence length of 32"):
        encode([half], "chatml", seq_len=32)
    with pytest.raises(TrainError, match="every label is masked: all 1 prompts fill the sequence length"):
        encode([long], "chatml", seq_len=32)
    with pytest.raises(TrainError, match=r"every label is masked: none of 1 rows has .* message of"):
        encode([silent], "chatml")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}",
    ],
)
def test_a_template_that_drops_the_end_token_is_refused(template: str, encode: Encode) -> None:
    with pytest.raises(TrainError, match=r"drops the end token: no turn .* such as </s>; .*--chat-template"):
        encode([[turn("user", "a"), turn("assistant", "b")]], template)


def test_notes_tell_of_foreign_ends_and_empty_turns(encode: Encode, chat_tokenizer_json: bytes) -> None:
    other = Tokenizer(chat_tokenizer_json, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    notes = encode(CONVERSATIONS, "chatml", other).report.files[0].notes
    assert notes[0] == "conversations in the form of chat template chatml"
    assert notes[1] == "1 empty completions or assistant messages"
    assert notes[2].startswith("turns end with a token that is none of the model's end tokens")
    assert len(encode(CONVERSATIONS, "chatml").report.files[0].notes) == 2


def test_padding_like_the_end_token_masks_no_end(encode: Encode) -> None:
    """Labels follow from spans, so an end token is learned whatever padding is made of."""
    for example in encode(CONVERSATIONS, "mistral"):
        ends = example.ids == 2
        assert ends.any()
        assert example.labelled[ends].all()


def test_tokens_of_spans_are_those_that_offsets_tell(tokenizer: Tokenizer) -> None:
    text = "the cat 🐸🐸 sat<|im_end|>\n日本 on  the mat"
    spans = [(begin, end) for begin in range(len(text) + 1) for end in range(begin, len(text) + 1)]
    (found,) = tokenizer.encode_with_spans([text], [spans])
    offsets = tokenizer._backend.encode(text, add_special_tokens=False).offsets
    assert found.spans == [tokens_by_offsets(offsets, span) for span in spans]
    assert [found.characters(index) for index in range(len(found.ids))] == offsets
    assert tokenizer.encode_with_spans(["abc"], [[(1, 1), (3, 3)]])[0].spans == [(1, 1), (3, 3)]
