"""Chat templates against transformers; the assistant's spans; and what the sandbox must refuse."""

import json
import pathlib
import shutil

import pytest
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from jaxrlhf.data import DataError, Message, hh_rlhf, parse_record, read_records
from jaxrlhf.data.chat import (
    TRANSCRIPT,
    ChatTemplate,
    load_chat_template,
    render,
    render_prompt,
    split_completion,
)
from jaxrlhf.data.unwritten import Unwritten

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "hh-rlhf"
STORIES = pathlib.Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"
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


@pytest.mark.parametrize(
    "source",
    [
        "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ add_generation_prompt }}{{ unknown }}",
        "{{ strftime_now('%Y-%m-%d') }}{{ strftime_now is defined }}{{ raise_exception is defined }}",
        "{{ {'b': 'é<', 'a': [1]} | tojson }}{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}",
        "{{ ['é', 1] | tojson(true) }}{{ {'a': 1, 'b': [2]} | tojson(separators=(',', ':'), ensure_ascii=true) }}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% break %}{% endfor %}",
        "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
        "{{ dict.fromkeys(['a']) }}{{ dict(x=1) }}{{ messages | map(attribute='role') | list }}",
        "{% macro say(m) %}{{ m.role }}{{ raise_exception('x') if m.role == 'x' }}{% endmacro %}{{ say(messages[0]) }}",
        "{% set ns = namespace(_a=1) %}",
        "{{ messages[0].massage.x }}",
        "{{ raise_exception('Refused.') }}",
    ],
)
def test_a_template_has_the_names_and_filters_of_transformers(source):
    source += "{% generation %}{% endgeneration %}"
    told = [{"role": message.role, "content": message.content} for message in TALK]
    try:
        expected = render_jinja_template([told], chat_template=source, **TOKENS)[0][0]
    except Exception:
        with pytest.raises(ValueError, match=r"^The chat template fails on a conversation of 4 messages: [^\n]*\.$"):
            render(ChatTemplate(source, TOKENS), TALK)
    else:
        assert render(ChatTemplate(source, TOKENS), TALK).text == expected


@pytest.mark.parametrize(
    "source, reason",
    [
        ("{{ to_markdown(messages) }}", "it asks for 'to_markdown', which neither this library nor transformers gives"),
        ("{{ date.year }}", "it asks for 'date', .* chat_template_kwargs"),
        ("{{ messages | from_json }}", "it asks for the filter 'from_json', which neither Jinja nor transformers has"),
        ("{% if messages is emptyish %}{% endif %}", "it asks for the test 'emptyish'"),
        ("{% do messages.pop() %}", r"Encountered unknown tag 'do' \(line 1\)\.$"),
        ("\n{% for m in messages %}", r"Unexpected end of template \(line 2\)\.$"),
        ("{{ messages[0].name | upper }}{{ messages[0].name.x }}", "has no attribute 'name'"),
        ("{{ messages | tojson(indnt=2) }}", "unexpected keyword argument 'indnt'"),
    ],
)
def test_what_a_template_lacks_is_one_sentence(source, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        render(ChatTemplate(source, TOKENS), TALK)
    assert "\n" not in str(caught.value)


TOOL = [{"type": "function", "function": {"name": "rain"}}]
CALLING = [
    {"role": "user", "content": "Dry?", "name": "Ann"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "rain", "arguments": {}}}], "reasoning": "Hm."},
    {"role": "tool", "content": {"dry": True}, "tool_call_id": "1"},
    {"role": "assistant", "content": "Yes.", "weight": 1},
]


ALL = {"name", "tool_call_id", "weight", "reasoning", "tools", "depth"}


@pytest.mark.parametrize(
    "written, unwritten",
    [
        ("m.tool_calls", ALL),
        ("m['tool_calls'], m.get('weight'), m.reasoning_content, tools", {"name", "tool_call_id", "depth"}),
        ("m.tool_calls and 1, 'name' in m, m.thinking, depth", {"tool_call_id", "weight", "tools"}),
        ("m | tojson", {"tools", "depth"}),
        ("m.items() | list, tools, depth", set()),
        # Mentioned, but of a call and not of the message, or for no message that there is.
        ("m.tool_calls and m.tool_calls[0].function.name", ALL),
        ("m.tool_calls, m.weight if m.role == 'x', tools if depth == 5", ALL),
    ],
)
def test_what_a_template_does_not_write_is_known(written, unwritten):
    row = {"messages": CALLING, "tools": TOOL, "chat_template_kwargs": {"depth": 1}}
    source = "{% for m in messages %}{{ m.role }}{{ (" + written + ") }}{% endfor %}"
    found = Unwritten(ChatTemplate(source, {}))
    for text in (parse_record(row).completion, TALK, "words"):
        found.add([text])
    assert found.counts() == dict.fromkeys(unwritten, 1)


@pytest.mark.parametrize(
    "source, messages, reason",
    [
        (PLAIN, CALLING[:2], "The chat template does not write tool_calls"),
        (TRANSCRIPT, CALLING[:2], "The plain transcript of a model without a chat template does not write tool_calls"),
        (TRANSCRIPT, [{"role": "system", "content": "x"}], "The model has no chat template, and .* not system"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "as Python prints it",
        ),
        (PLAIN, [{"role": "user", "content": "a", "name": "\uf8f0"}], "private characters"),
    ],
)
def test_what_would_not_be_written_is_refused(source, messages, reason):
    with pytest.raises(ValueError, match=reason):
        render(ChatTemplate(source, TOKENS), parse_record({"messages": messages}).completion)


@pytest.mark.skipif(not STORIES.exists(), reason=f"stories260K is missing: {STORIES}")
def test_templates_with_names_are_chosen_as_transformers_does(tmp_path):
    plain, tools, other = (f"{kind}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}" for kind in "ptx")
    asked = [{"role": "user", "content": "Dry?"}]
    layouts = [
        {"chat_template": [{"name": "default", "template": plain}, {"name": "tool_use", "template": tools}]},
        {"chat_template": [{"name": "tool_use", "template": tools}]},
        {"chat_template": {"rag": other, "tool_use": tools}},
        {"chat_template": other, "chat_template.jinja": plain},
        {"chat_template": other, "chat_template.jinja": plain, "tool_use.jinja": tools},
        {"chat_template": plain, "tool_use.jinja": tools},
    ]
    for number, layout in enumerate(layouts):
        folder = tmp_path / str(number)
        (folder / "additional_chat_templates").mkdir(parents=True)
        shutil.copy(STORIES / "tokenizer.json", folder)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "chat_template": layout["chat_template"],
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        for name, source in layout.items():
            if name.endswith(".jinja"):
                (folder if name.startswith("chat") else folder / "additional_chat_templates").joinpath(name).write_text(
                    source
                )
        oracle, template = transformers.AutoTokenizer.from_pretrained(folder), load_chat_template(folder)
        for given in (None, [], TOOL):
            prompt = parse_record({"prompt": asked, "tools": given}).prompt
            try:
                expected = oracle.apply_chat_template(asked, tools=given, tokenize=False)
            except ValueError:
                with pytest.raises(ValueError, match=r"chat_template has the names .* and no default"):
                    render_prompt(template, prompt)
            else:
                assert render_prompt(template, prompt) == expected


# Words of the system in the last question (Mistral); reasoning taken out of earlier turns (Qwen 3, DeepSeek).
LAST_QUESTION = """{%- if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' -%}
[Q]{{ (sys if loop.last and sys is defined else '') + m.content }}[/Q]{% else %}{{ m.content + '</s>' }}{% endif %}
{%- endfor %}"""
NO_THOUGHTS = """{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content if loop.last else
m.content.split('</think>')[-1].lstrip() }}{{ '</s>' }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.mark.parametrize("source", [LAST_QUESTION, NO_THOUGHTS])
def test_nothing_of_a_prompt_has_to_be_located(source):
    told = [
        Message("system", "Short."),
        Message("user", "A?"),
        Message("assistant", "<think>b</think> B"),
        Message("user", "C?"),
    ]
    expected = render_jinja_template(
        [[m.as_dict() for m in told]], chat_template=source, add_generation_prompt=True, **TOKENS
    )[0]
    assert render_prompt(ChatTemplate(source, TOKENS), tuple(told)) == expected[0]


def test_reasoning_taken_out_of_earlier_turns_is_not_learned():
    told = (
        Message("user", "A?"),
        Message("assistant", "<think>b</think> B"),
        Message("user", "C?"),
        Message("assistant", "D"),
    )
    found = render(ChatTemplate(NO_THOUGHTS, TOKENS), told)
    assert [found.text[first:last] for first, last in found.spans] == ["B</s>", "D</s>"]


def test_a_prompt_that_a_completion_changes_is_refused():
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="writes the prompt differently"):
        split_completion(ChatTemplate("{% generation %}x{% endgeneration %}" + source, TOKENS), TALK[:1], TALK[1:2])


def test_a_generation_prompt_that_no_finished_turn_has_is_shown():
    # DeepSeek R1 begins the reasoning in the prompt, and takes it out of what was said.
    source = NO_THOUGHTS.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    with pytest.raises(
        ValueError, match=r"its generation prompt ends in '<think>', and a finished turn has no such words;"
    ):
        split_completion(ChatTemplate(source, TOKENS), TALK[:1], TALK[1:2])


@pytest.mark.parametrize("source", [LAST_QUESTION, NO_THOUGHTS])
def test_a_pair_of_several_turns_has_its_answer_located(source):
    told = (Message("user", "A?"), Message("assistant", "<think>b</think> B"), Message("user", "C?"))
    prompt, completion = split_completion(ChatTemplate(source, TOKENS), told, (Message("assistant", "D"),))
    assert completion == "D</s>" and prompt == render_prompt(ChatTemplate(source, TOKENS), told)


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
    for damaged in ({}, [], 5, [5], {"default": 5}, [{"name": "default"}], [{"name": ["default"]}]):
        path.write_text(json.dumps(settings | {"chat_template": damaged}))
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        with pytest.raises(
            DataError, match=r"tokenizer_config\.json: chat_template must be a text or a list of named ones"
        ):
            load_chat_template(tmp_path)
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
