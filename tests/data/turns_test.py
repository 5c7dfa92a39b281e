"""Where texts end: behind the first stop token after the assistant's words, for every way a template ends a turn."""

import numpy as np
import pytest
import tokenizers

from jaxrlhf.data import Demonstration, Message, Preference, Ranking, UnpairedPreference
from jaxrlhf.data.chat import ChatTemplate
from jaxrlhf.data.encode import chat_tokenizer, encode, encode_pair, encode_prompt
from jaxrlhf.data.tokenization import tokenize_demonstrations, tokenize_pairs
from jaxrlhf.data.turns import turn_ending, up_to_stop

WORDS = ["<s>", "</s>", "<end>", "<user>", "\n", " ", "H", "i", "N", "o", ":", "u", "s", "e", "r", "a", "t", "n", "!"]
BOS, EOS, END, USER, LINE = range(5)


@pytest.fixture(scope="module")
def backend():
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=" ")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.add_special_tokens(WORDS[:4])
    return made


def template(ending, loop_last=""):
    last = "{% if loop.last and m.role == 'assistant' %}" + loop_last + "{% endif %}"
    return ChatTemplate(
        "{% for m in messages %}{{ m.role[:1] + ':' + m.content }}" + ending + last + "{% endfor %}"
        "{{ 'a:' if add_generation_prompt }}",
        {"eos_token": "</s>"},
    )


ASK, TELL, NO = Message("user", "Hi"), Message("assistant", "No"), Message("assistant", "Hi")
# The template's ending of turns; the token that ends the text.
ENDINGS = {
    "eos": (template("{{ eos_token }}"), EOS),
    "eos and a line": (template("{{ eos_token + '\n' }}"), EOS),
    "own and a line": (template("{{ '<end>\n' }}"), END),
    "own, a line, and eos at last": (template("{{ '<end>\n' }}", "{{ eos_token }}"), END),
    "two ends": (template("{{ '<end></s>' }}"), END),
    "a line before": (template("{{ '\n<end>\n' }}"), END),
    "lines only": (template("{{ '\n\n' }}"), LINE),
    "a word": (template("{{ '!' }}"), WORDS.index("!")),
    "at last only": (template("{{ '\n' }}", "{{ eos_token }}"), EOS),
}


@pytest.mark.parametrize(("source", "end"), ENDINGS.values(), ids=ENDINGS.keys())
def test_a_judged_text_ends_where_the_sampler_stops(backend, source, end):
    tokenizer = chat_tokenizer(backend, bos=BOS, eos=EOS, template=source)
    pair = encode_pair(tokenizer, Preference((ASK,), (TELL,), (NO,)))
    rows = tokenize_pairs(tokenizer, [Preference((ASK,), (TELL,), (NO,))], max_length=64).rows
    ranked = tokenize_pairs(tokenizer, [Ranking((ASK,), ((TELL,), (NO,)), (0, 1))], max_length=64).rows
    unpaired = [UnpairedPreference((ASK,), (TELL,), True), UnpairedPreference((ASK,), (NO,), False)]
    labelled = tokenize_pairs(tokenizer, unpaired, max_length=64).rows
    for text in (pair.chosen, rows[0].first, ranked[0].first, labelled[0].first):
        np.testing.assert_array_equal(text.tokens, pair.chosen.tokens)
        assert text.tokens[-1] == end and text.completion_mask[-1]
        stops = np.isin(text.tokens[text.completion_mask], tokenizer.stop_ids)
        assert not stops[:-1].any() and stops[-1] == (end in tokenizer.stop_ids)
    prompt = encode_prompt(tokenizer, (ASK,))
    np.testing.assert_array_equal(pair.chosen.tokens[: len(prompt)], prompt)
    np.testing.assert_array_equal(np.flatnonzero(~pair.chosen.completion_mask), np.arange(len(prompt)))


@pytest.mark.parametrize(("source", "end"), ENDINGS.values(), ids=ENDINGS.keys())
def test_the_same_tokens_are_learned_in_every_form_of_a_talk(backend, source, end):
    tokenizer = chat_tokenizer(backend, bos=BOS, eos=EOS, template=source)
    forms = [Demonstration((ASK,), (TELL,)), Demonstration((), (ASK, TELL))]
    first, second = (tokenize_demonstrations(tokenizer, [form], max_length=64).rows[0] for form in forms)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.completion_mask, second.completion_mask)
    learned = first.tokens[first.completion_mask]
    judged = encode_pair(tokenizer, Preference((ASK,), (TELL,), (NO,))).chosen
    np.testing.assert_array_equal(learned, judged.tokens[judged.completion_mask])
    # Nothing of the text is lost: what follows the end is there, and not learned.
    text = backend.decode(first.tokens.tolist(), skip_special_tokens=False).replace(" ", "")
    assert text.endswith((turn_ending(source) or "").replace(" ", ""))


@pytest.mark.parametrize(
    ("completion", "learned"),
    [("No", ["N", "o", "</s>"]), ("No</s>", ["N", "o", "</s>"]), ("No\n", ["N", "o", "\n", "</s>"]), ("", ["</s>"])],
)
def test_strings_end_in_one_end_of_text(backend, completion, learned):
    tokenizer = chat_tokenizer(backend, bos=BOS, eos=EOS)
    text = encode_pair(tokenizer, Preference("Hi", completion, "Hi")).chosen
    assert [WORDS[token] for token in text.tokens[text.completion_mask]] == learned
    assert text.tokens[-1] == EOS and text.tokens[0] == BOS


def test_a_conversation_begins_as_its_template_writes_it(backend):
    source = template("{{ '<end>' }}")
    own = chat_tokenizer(backend, bos=BOS, eos=EOS, template=source)
    with_bos = chat_tokenizer(backend, bos=BOS, eos=EOS, template=source._replace(source="<s>" + source.source))
    plain = chat_tokenizer(backend, bos=BOS, eos=EOS)
    counts = [(encode(each, (ASK,), (TELL,)).tokens == BOS).sum() for each in (own, with_bos, plain)]
    assert counts == [0, 1, 1]
    assert encode(own, "Hi", "No").tokens[0] == BOS


@pytest.mark.parametrize(
    ("tokens", "blank", "expected"),
    [
        ([9, 1, 4], [0, 0, 1], [1, 1, 0]),
        ([9, 2, 4, 1], [0, 0, 1, 0], [1, 1, 0, 0]),
        ([1, 9, 4], [0, 0, 1], [1, 1, 1]),
        ([9, 4, 1], [0, 1, 0], [1, 1, 1]),
        ([1], [0], [1]),
        ([], [], []),
    ],
)
def test_spans_are_cut_behind_their_stop(tokens, blank, expected):
    mask = np.ones(len(tokens), bool)
    np.testing.assert_array_equal(
        up_to_stop(mask, tokens, [bool(each) for each in blank], {1, 2}), np.array(expected, bool)
    )


REFUSING = {
    "asks for a system message": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}{{ m.content + '<end>\n' }}{% endfor %}",
        "<end>\n",
    ),
    "refuses all": ("{{ raise_exception('no') }}", None),
    "is broken": ("{% if %}", None),
    "rewrites the prompt": (
        "{{ messages | length }}{% for m in messages %}{{ m.content + '<end>' }}{% endfor %}",
        "<end>",
    ),
    "drops the assistant": ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", None),
    "trims": ("{% for m in messages %}{{ m.content | trim + '<end>' }}{% endfor %}", "<end>"),
}


@pytest.mark.parametrize(("source", "ending"), REFUSING.values(), ids=REFUSING.keys())
def test_the_ending_of_a_turn_is_found_without_failing(backend, source, ending):
    assert turn_ending(ChatTemplate(source, {})) == ending
    stops = chat_tokenizer(backend, bos=BOS, eos=EOS, template=ChatTemplate(source, {})).stop_ids
    assert (END in stops) == (ending is not None)
