"""The page on data: every example on it becomes what the page shows, and every error it lists exists."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from nf4.cli.train import command
from nf4.data.options import DataOptions
from nf4.data.plan import Batches, BatchOptions
from nf4.data.preview import run_table, shown_example
from nf4.data.reading import load_dataset, load_sources
from nf4.data.schema import Completion, Schema
from nf4.data.split import split
from nf4.errors import TrainError
from nf4.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE)
EXAMPLES = [(info, content) for kind, info, content in BLOCKS if kind == "tokens"]
CHAT = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Paris"}]}'
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Whole words, the space in front with them; of all words of the page."""
    backend = Backend(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\s|[^\w\s]"), "isolated")
    backend.decoder = decoders.Fuse()
    alpaca = Schema.recognise({"instruction": "", "output": ""}, "", {}, as_chat=False).read(
        {"instruction": "", "input": "x", "output": ""}, ""
    )
    assert isinstance(alpaca, Completion)
    words = [PAGE, "\n", alpaca.prompt, *re.findall(r"\w+", PAGE)]
    backend.train_from_iterator(words, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(backend.to_str().encode(), tokenizer_config=names)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with all files of the page; it is the current one."""
    monkeypatch.chdir(tmp_path)
    for kind, name, content in BLOCKS:
        if kind == "python":
            exec(content, {})
        elif kind not in ("tokens", "table"):
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text(content, encoding="utf-8")
    return tmp_path


def options(words: list[str]) -> DataOptions:
    """`name=value` of DataOptions, or field=column."""
    columns, given = {}, dict[str, Any]()
    for name, value in (word.split("=") for word in words):
        if name in ("prompt", "completion"):
            columns[name] = value
        else:
            given[name] = ast.literal_eval(value) if value[0].isdigit() or value == "False" else value
    return DataOptions(columns=columns, cache="none", **given)


@pytest.mark.parametrize(("info", "expected"), EXAMPLES, ids=[info.split()[0] for info, _ in EXAMPLES])
def test_examples_become_the_tokens_that_the_page_shows(
    info: str, expected: str, files: Path, tokenizer: Tokenizer
) -> None:
    if ".parquet" in info:
        pytest.importorskip("pyarrow")
    name, *words = info.split()
    (source,) = load_sources([(name, 1.0)], tokenizer, options(words))
    shown = []
    for example in source.dataset:
        text = shown_example(example, tokenizer.pieces, title="")
        shown.append("\n".join(line[2:] for line in re.sub(r'":\d+', '"', text).splitlines()[1:]))
    assert [runs(text) for text in shown] == [runs(text) for text in expected.split("\n\n")]


def runs(shown: str) -> list[tuple[str, str]]:
    """(mark, tokens) of each run of lines with one mark, however they are wrapped."""
    marked = [(line[:5].strip(), line[5:]) for line in shown.splitlines()]
    return [
        (mark, " ".join(tokens for _, tokens in lines))
        for mark, lines in itertools.groupby(marked, key=lambda pair: pair[0])
    ]


def test_options_of_the_page_exist() -> None:
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    assert len(named) > 10
    assert named <= known


def test_the_table_is_that_of_its_file(files: Path, tokenizer: Tokenizer) -> None:
    (expected,) = (content for kind, _, content in BLOCKS if kind == "table")
    sources = load_sources([("capitals.jsonl", 1.0)], tokenizer, DataOptions(cache="none"))
    assert run_table(Batches(sources, BatchOptions(), seed=0)) + "\n" == expected


ERRORS: dict[str, tuple[str, bytes, dict[str, Any]]] = {
    "no known schema": ("x.jsonl", b'{"frage": "a"}', {}),
    "the row fits several schemas": ("x.jsonl", b'{"text": "a", "prompt": "b", "completion": "c"}', {}),
    "not JSON": ("x.jsonl", b'{"prompt": ', {}),
    "not UTF-8": ("x.txt", b"\xff", {}),
    "unsupported kind of data": ("x.gz", b"", {}),
    "every label is masked": ("x.jsonl", b'{"prompt": "a b c d", "completion": "e"}', {"seq_len": 4}),
    "every row is cut": ("x.jsonl", b'{"prompt": "a", "completion": "b c d e"}', {"seq_len": 4}),
    "drops the end token": ("x.jsonl", CHAT, {"template": "endless.jinja"}),
    "conversations need a chat template": ("x.jsonl", CHAT, {}),
    "no text to train on": ("x.txt", b" ", {}),
}


def test_every_error_of_the_page_is_made_here() -> None:
    listed = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert set(listed[listed.index("no known schema") :]) == {*ERRORS, "cannot hold out"}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_of_the_page(message: str, files: Path, tokenizer: Tokenizer) -> None:
    name, content, given = ERRORS[message]
    Path(name).write_bytes(content)
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }} {% endfor %}"
    Path("endless.jinja").write_text(template)
    with pytest.raises(TrainError, match=message):
        load_dataset([name], tokenizer, DataOptions(cache="none", **given))


def test_an_evaluation_side_without_examples(files: Path, tokenizer: Tokenizer) -> None:
    sources = load_sources([("questions.csv", 1.0)], tokenizer, DataOptions(cache="none", as_chat=False))
    with pytest.raises(TrainError, match="cannot hold out"):
        split(sources, 0.5, seed=0)
