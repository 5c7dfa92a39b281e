"""Chat templates against transformers; the assistant's spans; and what the sandbox must refuse."""

import json
import pathlib

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from jaxrlhf.data import DataError, Message, hh_rlhf, read_records
from jaxrlhf.data.chat import TRANSCRIPT, ChatTemplate, load_chat_template, render, split_completion

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "hh-rlhf"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TAGGED = """{{ bos_token }}{% for m in messages %}
{% if m.role == "assistant" %}<bot>{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}
{% else %}<{{ m['role'] }}>{{ m.content }}{% endif %}
{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"""
PLAIN = """{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
STRICT = """{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate.') }}{% endif %}
{%- if m.role == 'user' %}[Q] {{ m.content | tojson }} [A]{% else %} {{ m.content }}{{ eos_token }}{% endif %}
{%- endfor %}"""
TALK = (
    Message("user", "Dry?"),
    Message("assistant", "Yes, dry. "),
    Message("user", "<b>Sure</b>?"),
    Message("assistant", "é"),
)


@pytest.mark.parametrize("source", [TAGGED, PLAIN, STRICT])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_rendering_agrees_with_transformers(source, count):
    told = [{"role": message.role, "content": message.content} for message in TALK[:count]]
    ask = count % 2 == 1
    texts, marks = render_jinja_template(
        [told], chat_template=source, add_generation_prompt=ask, return_assistant_tokens_mask="{% generation" in source,
        **TOKENS,
    )  # fmt: skip
    found = render(ChatTemplate(source, TOKENS), TALK[:count], generation_prompt=ask)
    assert found.text == texts[0]
    if source == TAGGED:
        assert list(found.spans) == [tuple(span) for span in marks[0]]


@pytest.mark.parametrize(
    "source, said",
    [
        (TAGGED, ["Yes, dry.</s>", "é</s>"]),
        (PLAIN, ["Yes, dry. <|end|>\n", "é<|end|>\n"]),
        (STRICT, [" Yes, dry. </s>", " é</s>"]),
        (TRANSCRIPT, [" Yes, dry. ", " é</s>"]),
    ],
)
def test_spans_are_what_the_assistant_wrote(source, said):
    found = render(ChatTemplate(source, TOKENS), TALK)
    assert [found.text[first:last] for first, last in found.spans] == said
    prompt, completion = split_completion(ChatTemplate(source, TOKENS), TALK[:3], TALK[3:])
    assert completion == said[-1] and prompt + completion == found.text


def test_an_end_of_text_after_the_last_turn_is_in_no_other_span():
    once = PLAIN.replace("+ '<|end|>\\n' }}", "}}{% if loop.last and m.role == 'assistant' %}<end>{% endif %}")
    found = render(ChatTemplate(once, TOKENS), TALK)
    assert [found.text[first:last] for first, last in found.spans] == ["Yes, dry. ", "é<end>"]


@pytest.mark.parametrize(
    "source, reason",
    [
        ("{{ messages[9].content.x }}", "fails on a conversation of 4 messages"),
        ("{% for m in messages %}", "fails on a conversation"),
        ("{{ raise_exception('Never.') }}", "Never"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | length }}{{ messages[-1].content }}", "no {% generation %} blocks"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|access"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe|access"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{% for i in range(10000000000) %}{% endfor %}", "[Rr]ange"),
    ],
)
def test_templates_that_fail_or_leave_the_sandbox_are_refused(source, reason):
    with pytest.raises(ValueError, match=reason):
        render(ChatTemplate(source, TOKENS), TALK)


def test_a_prompt_that_a_completion_changes_is_refused():
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="writes the prompt differently"):
        split_completion(ChatTemplate("{% generation %}x{% endgeneration %}" + source, TOKENS), TALK[:1], TALK[1:2])


def test_markers_in_messages_are_refused():
    with pytest.raises(ValueError, match="private characters"):
        render(ChatTemplate(PLAIN, TOKENS), (Message("user", "a\uf8f1b"),))


def test_templates_are_loaded_from_where_transformers_saves_them(tmp_path):
    assert load_chat_template(tmp_path) is None
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": PLAIN, "unk_token": None}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(settings))
    assert load_chat_template(tmp_path) == ChatTemplate(PLAIN, TOKENS)
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": STRICT}]
    path.write_text(json.dumps(settings | {"chat_template": named}))
    assert load_chat_template(tmp_path) == ChatTemplate(STRICT, TOKENS)
    (tmp_path / "chat_template.jinja").write_text(TAGGED)
    assert load_chat_template(tmp_path) == ChatTemplate(TAGGED, TOKENS)
    path.write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON"):
        load_chat_template(tmp_path)


@pytest.mark.skipif(not SHARED.exists(), reason=f"HH-RLHF is missing: {SHARED}")
def test_transcripts_come_back_as_they_were_published():
    template = ChatTemplate(TRANSCRIPT, TOKENS)
    for pair in read_records(SHARED / "harmless-base-test.jsonl.gz", hh_rlhf.parse).records[:200]:
        prompt, completion = split_completion(template, pair.prompt, pair.chosen)
        assert completion.endswith("</s>")
        assert hh_rlhf.parse_transcript((prompt + completion).removesuffix("</s>")) == pair.prompt + pair.chosen
