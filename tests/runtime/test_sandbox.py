"""Hostile and broken chat templates end in a message, in bounded time and memory; and what is allowed."""

from __future__ import annotations

import json
import re
import time
from datetime import date
from pathlib import Path

import pytest

from nf4.data.options import DataOptions
from nf4.data.renderer import Renderer
from nf4.data.sandbox import ChatTemplate
from nf4.data.template import BUILT_IN, find_template
from nf4.errors import TrainError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]

# What a template tries -> what the message says of it. Time limits have a test of their own.
REFUSED = {
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ messages.append(1) }}": "access to attribute 'append' of 'list' object is unsafe",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
    "{{ strftime_now.__self__.x }}": "undefined|unsafe",
    "{{ dict.__globals__.x }}": "undefined|unsafe",
    "{{ lipsum.__globals__ }}": "'lipsum' is undefined",
    "{% set ns = namespace() %}{% set ns._x = 1 %}": "cannot begin with an underscore",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ raise_exception('not  with me\n') }}": "not with me; mend the conversation",
    "{{ nothing.x }}": "'nothing' is undefined",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 'a' * 10 ** 10 }}": "power|repeated that often",
    "{{ 'a' * 1000000000 }}": "repeated that often",
    "{{ 1000000000 * [1] }}": "repeated that often",
    "{{ 10 ** 1000 ** 1000 }}": "a power that large",
    "{% for i in range(1000000000) %}{% endfor %}": "Range too big",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}": "writes more than 8,388,608 characters",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}": "nested too deeply",
    "{{ 'a' | center(10000000000) }}": "too much memory",
    "{{ '%10000000000d' % 1 }}": "too much memory",
    "{{ '{:10000000000}'.format(1) }}": "too much memory",
    "{% macro m() %}x{% generation %}a{% endgeneration %}{% endmacro %}{{ m() }}": "stands inside a macro",
    "{{ messages[1].content }}{{ messages[1].content }}{{ messages | length }}": "does not show where",
}
MALFORMED = {
    "{% for %}": "Expected an expression",
    "{{ messages": "unexpected end of template",
    "{% generation %}": "Unexpected end of template|endgeneration",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "nested too deeply",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000: "nested too deeply",
}


def render(source: str, seconds: int = 10) -> str:
    with Renderer(
        source, "x.jinja", {"bos_token": "<s>", "eos_token": "</s>"}, "2024-07-26", seconds=seconds
    ) as r:
        return next(r.render([("rows.jsonl:7", MESSAGES)])).text


@pytest.mark.parametrize("source", REFUSED)
def test_what_a_template_may_not_do_is_told_with_the_row(source: str) -> None:
    with pytest.raises(TrainError, match=REFUSED[source]) as raised:
        render(source)
    assert str(raised.value).startswith("rows.jsonl:7: chat template x.jinja: ")
    assert str(raised.value).endswith("or choose another template with --chat-template")


@pytest.mark.parametrize("source", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_templates_are_told(source: str) -> None:
    with pytest.raises(TrainError, match=f"^chat template x.jinja: .*({MALFORMED[source]})"):
        render(source)


def test_endless_templates_end() -> None:
    """Here in one call into C, which no check between instructions would interrupt."""
    started = time.monotonic()
    with pytest.raises(TrainError, match="takes more than 1 s of processor time for one conversation"):
        render("{% set n = namespace(x=3) %}{% for i in range(64) %}{% set n.x = n.x * n.x %}{% endfor %}", 1)
    assert time.monotonic() - started < 60


def test_a_conversation_that_ends_the_process_is_named_and_the_others_come_before_it() -> None:
    source = (
        "{{ messages[0].content }}{% if messages[0].content == 'slow' %}"
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    )
    rows = [(f"row {i}", [{"role": "user", "content": "slow" if i == 3 else str(i)}]) for i in range(6)]
    found = []
    with (
        Renderer(source, "x", {}, "2024-07-26", seconds=1) as renderer,
        pytest.raises(TrainError, match=r"^row 3: chat template x: it takes more than 1 s"),
    ):
        for rendered in renderer.render(rows):
            found.append(rendered.text)
    assert found == ["0", "1", "2"]


def test_many_and_large_conversations_go_through_the_pipes() -> None:
    """More than pipes hold, in both directions, and left in the middle."""
    rows = [(f"row {i}", [{"role": "user", "content": f"{i}:" + "ä\n" * 20_000}]) for i in range(40)]
    with Renderer("{{ messages[0].content }}", "x", {}, "2024-07-26") as renderer:
        texts = [rendered.text for rendered in renderer.render(rows)]
        assert texts == [messages[0]["content"] for _, messages in rows]
        assert next(renderer.render(rows)).text == texts[0]


def test_settings_and_names_are_those_of_transformers() -> None:
    source = """\
{# a comment #}
{%- set ns = namespace(n=0) -%}
{% for m in messages %}
    {% if m.role == 'user' %}{% continue %}{% endif %}
{{ m | tojson }}|{{ {'a': '<é>'} | tojson(indent=1) }}
    {% break %}
{% endfor %}
{{ strftime_now('%d %b %Y') }}{{ bos_token }}{{ dict(a=1)['a'] }}{{ tools is none }}
{{ add_generation_prompt }}"""
    from transformers.utils.chat_template_utils import render_jinja_template

    (theirs,), _ = render_jinja_template([MESSAGES], chat_template=source, bos_token="<s>")
    ours, spans = ChatTemplate(source, {"bos_token": "<s>"}, date(2024, 7, 26)).render(MESSAGES)
    assert ours == re.sub(r"\d\d \w\w\w \d{4}", "26 Jul 2024", theirs)
    assert spans == []


def test_templates_are_found_by_name_by_path_or_with_the_model(tmp_path: Path) -> None:
    own = {"default": "usual", "tools": "other"}
    assert find_template(None, {}) is None
    assert find_template(None, own) == ("of the model", "usual")
    assert find_template(None, {"only": "x"}) == ("of the model", "x")
    assert find_template("tools", own) == ("tools of the model", "other")
    assert find_template("chatml", own) == ("chatml", BUILT_IN["chatml"])
    path = tmp_path / "mine.jinja"
    path.write_bytes(b"\xef\xbb\xbfmine")
    assert find_template(str(path), own) == (str(path), "mine")
    path.write_bytes(b"\xff")
    with pytest.raises(TrainError, match="expected UTF-8"):
        find_template(str(path), own)
    with pytest.raises(TrainError, match="no such chat template, expected a path, or one of default, tools"):
        find_template(str(tmp_path / "none"), own)


def test_options_that_cannot_be_meant_are_refused() -> None:
    DataOptions(columns={"prompt": "frage"}).check()
    for options, message in (
        (DataOptions(seq_len=1), "sequence length, expected at least 2 tokens, got 1"),
        (DataOptions(loss="some"), "loss, expected completion or all, got 'some'"),  # type: ignore[arg-type]
        (DataOptions(columns={"promt": "a"}), "unknown field .*, expected one of .*prompt.*, got 'promt'"),
        (DataOptions(date="today"), "date for templates, expected YYYY-MM-DD, got 'today'"),
        (DataOptions(workers=0), "workers, expected at least 1, got 0"),
    ):
        with pytest.raises(TrainError, match=message):
            options.check()


def test_the_date_is_part_of_the_text(tmp_path: Path) -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}, date(2025, 1, 2))
    assert template.render(json.loads("[]"))[0] == "2025-01-02"
