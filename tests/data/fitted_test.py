"""What is kept, cut and dropped, with a tokenizer of one token a word, and on the pairs of HH-RLHF."""

import pathlib

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.data import DataError, Demonstration, Judged, Message, Preference, Prompt, Ranked, read_records
from jaxrlhf.data.chat import ChatTemplate
from jaxrlhf.data.encode import codec
from jaxrlhf.data.fitted import described, fit_demonstrations, fit_pairs, fit_prompts, row_length

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared"
HH, STORIES = SHARED / "data" / "hh-rlhf", SHARED / "models" / "stories260K" / "tokenizer.json"

WORDS = ["<s>", "</s>", "?", *"abcdefghijkl", "bc"]
MADE = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="?"))
MADE.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
MADE.add_special_tokens(["<s>", "</s>"])
CODEC = codec(MADE, bos=0, eos=1)
BARE = codec(MADE)
REFUSING = codec(MADE, template=ChatTemplate("{{ raise_exception('no turns') }}", {}))
TALK = (Message("user", "a"),), (Message("assistant", "b"),), (Message("assistant", "c"),)


def words(tokens):
    return " ".join(WORDS[token] for token in tokens)


def texts(row):
    return words(row.first.tokens), words(row.second.tokens)


def reasons(fitted):
    return [tuple(entry) for entry in fitted.dropped]


def test_demonstrations_of_every_kind():
    records = [
        Demonstration("a", " b"),
        Preference("a", " c", " d"),
        Judged("a", " e", True),
        Judged("a", " f", False),
        Demonstration("", "g h"),
    ]
    fitted = fit_demonstrations(CODEC, records, max_length=9)
    assert [words(row.tokens) for row in fitted.rows] == [
        "<s> a b </s>",
        "<s> a c </s>",
        "<s> a e </s>",
        "<s> g h </s>",
    ]
    assert [row.completion.tolist() for row in fitted.rows] == [[False, False, True, True]] * 3 + [
        [False, True, True, True]
    ]
    assert fitted.shortened == 0 and reasons(fitted) == [(3, "called bad")]
    assert described(fitted) == "4 rows of 4 to 4 tokens; 1 dropped (called bad)"


def test_demonstrations_lose_their_end_and_are_dropped_where_nothing_is_left():
    records = [
        Demonstration("a b", " c d"),  # 6 tokens
        Demonstration("a", " b"),  # 4, as long as allowed
        Demonstration("a b c", " d"),  # the completion begins at the fifth token
        Demonstration("a b", " c"),  # 5, the end of text goes
    ]
    fitted = fit_demonstrations(CODEC, records, max_length=4)
    assert [words(row.tokens) for row in fitted.rows] == ["<s> a b c", "<s> a b </s>", "<s> a b c"]
    assert fitted.shortened == 2 and reasons(fitted) == [(2, "prompt of 4 tokens or more")]
    assert described(fitted) == "3 rows of 4 to 4 tokens; 2 cut to fit; 1 dropped (prompt of 4 tokens or more)"


def test_the_first_token_is_nothing_to_learn():
    fitted = fit_demonstrations(
        BARE, [Demonstration("", "a"), Demonstration("a", ""), Demonstration("", "a b")], max_length=4
    )
    assert [words(row.tokens) for row in fitted.rows] == ["a b"]
    assert reasons(fitted) == [(0, "nothing to learn"), (1, "nothing to learn")]


def test_a_first_token_that_alone_is_left_is_nothing_to_learn():
    said = "{% generation %}{{ m.content }} {% endgeneration %}"
    turn = "{% if m.role == 'user' %}{{ m.content }} {% else %}" + said + "{% endif %}"
    made = codec(MADE, template=ChatTemplate("{% for m in messages %}" + turn + "{% endfor %}", {}))
    talk = (Message("assistant", "a"), Message("user", "b c"), Message("assistant", "d"))
    records = [Demonstration((), talk), Demonstration((), talk[1:])]
    fitted = fit_demonstrations(made, records, max_length=3)
    assert [words(row.tokens) for row in fitted.rows] == ["b c d"] and fitted.dropped[0].number == 0


def test_preferences_and_their_margins():
    records = [Preference("a", " b", " c", 2.5), Preference("a", " d", " e")]
    fitted = fit_pairs(CODEC, records, max_length=9)
    assert [texts(row) for row in fitted.rows] == [("<s> a b </s>", "<s> a c </s>"), ("<s> a d </s>", "<s> a e </s>")]
    assert [row[2:] for row in fitted.rows] == [(1.0, 2.5), (1.0, 0.0)]


def test_rankings_give_every_pair_and_ties():
    fitted = fit_pairs(BARE, [Ranked("a", (" b", " c", " d"), (2, 1, 2))], max_length=9)
    assert [(*texts(row), row.label, row.margin) for row in fitted.rows] == [
        ("a c", "a b", 1.0, 0.0),
        ("a c", "a d", 1.0, 0.0),
        ("a b", "a d", 0.5, 0.0),
    ]


def test_judged_completions_meet_within_their_prompt():
    said = [("a", " b", True), ("c", " d", True), ("a", " e", False), ("a", " f", True), ("g", " h", False)]
    records = [Judged(*each) for each in said] + [Preference("i", " j", " k")]
    fitted = fit_pairs(BARE, records, max_length=9)
    assert [texts(row) for row in fitted.rows] == [("i j", "i k"), ("a b", "a e"), ("a f", "a e")]
    assert [row.label for row in fitted.rows] == [1.0] * 3
    assert reasons(fitted) == [
        (1, "no bad completion of the same prompt"),
        (4, "no good completion of the same prompt"),
    ]


def test_pairs_lose_the_end_of_completions_only():
    records = [
        Preference("a b", " c d", " e"),  # 4 and 3 tokens
        Preference("a b", " c d", " c e"),  # the same, once cut
        Preference("a b c", " d", " e"),  # no room
        Preference("a b", "", " e"),
        Preference("a", " c", "  c"),  # spaces that the tokenizer does not see
    ]
    fitted = fit_pairs(BARE, records, max_length=3)
    assert [texts(row) for row in fitted.rows] == [("a b c", "a b e")] and fitted.shortened == 1
    assert reasons(fitted) == [
        (1, "both completions are the same in the first 3 tokens"),
        (2, "prompt of 3 tokens or more"),
        (3, "a completion without tokens"),
        (4, "both completions are the same"),
    ]
    assert "4 dropped (1 × both" in described(fitted) and described(fitted).endswith("; 1 for other reasons)")


def test_prompts_lose_their_beginning_alike():
    fitted = fit_pairs(CODEC, [Preference("a b c d e f", " g", " h i j k l")], max_length=6, cut_prompts=True)
    # Half the length for the longer completion; the shorter one keeps all.
    assert [texts(row) for row in fitted.rows] == [("<s> e f g </s>", "<s> e f h i j")]
    assert fitted.rows[0].first.completion.tolist() == [False] * 3 + [True] * 2 and fitted.shortened == 1
    # Without a beginning of text, and where cutting the end is enough.
    fitted = fit_pairs(
        BARE, [Preference("a b c", " d e", " f"), Preference("a", " b c d e", " f")], max_length=4, cut_prompts=True
    )
    assert [texts(row) for row in fitted.rows] == [("b c d e", "b c f"), ("a b c d", "a f")]


def test_a_prompt_joined_to_one_completion_is_shared_up_to_there():
    joined = Preference("a b", "c d", " c d")
    fitted = fit_pairs(CODEC, [joined], max_length=5, cut_prompts=True)
    assert [texts(row) for row in fitted.rows] == [("<s> a bc d </s>", "<s> a b c d")]
    fitted = fit_pairs(CODEC, [joined, Preference("a", " b", " c")], max_length=4, cut_prompts=True)
    assert [texts(row) for row in fitted.rows] == [("<s> bc d </s>", "<s> b c d"), ("<s> a b </s>", "<s> a c </s>")]


SOME = st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=9).map(
    lambda found: "".join(" " + w for w in found)
)


def test_conversations_without_a_prompt_are_not_cut_where_they_differ():
    def talk(asked, answered):
        return (Message("user", asked), Message("assistant", answered))

    # A speaker's name is the unknown token: "? a b c ? d".
    alike = Preference((), talk("a b c", "d"), talk("a b c", "e"))
    other = Preference((), talk("a b c", "d"), talk("f b c", "e"))
    spoken = Preference((), (Message("assistant", "a b c d"),), talk("a b c", "e"))
    fitted = fit_pairs(BARE, [alike, other, spoken], max_length=4, cut_prompts=True)
    assert [texts(row) for row in fitted.rows] == [("b c ? d", "b c ? e")]
    assert [entry.number for entry in fitted.dropped] == [1, 2]
    assert all("too few to take away from both" in entry.reason for entry in fitted.dropped)


def by_words(prompt, completions, max_length, cut, begun):
    """The rule again, in words: what both texts should be, None where the pair should be dropped."""
    beginning, said = ["<s>"] * begun, [text.split() + ["</s>"] * begun for text in completions]
    left = prompt.split()
    if cut:
        room = max_length - begun - max(min(len(each), max_length // 2) for each in said)
        left = left[max(0, len(left) - room) :]
    rest = [each[: max(0, max_length - begun - len(left))] for each in said]
    return None if rest[0] == rest[1] or [] in rest else tuple(" ".join(beginning + left + each) for each in rest)


@settings(max_examples=200, deadline=None)
@given(prompt=SOME, chosen=SOME, rejected=SOME, max_length=st.integers(2, 12), cut=st.booleans(), begun=st.booleans())
def test_pairs_are_cut_by_the_rules_or_dropped(prompt, chosen, rejected, max_length, cut, begun):
    records, made = [Preference(prompt, chosen, rejected)], CODEC if begun else BARE
    expected = by_words(prompt, (chosen, rejected), max_length, cut, begun)
    if expected is None:
        with pytest.raises(DataError, match="No pairs are left"):
            fit_pairs(made, records, max_length=max_length, cut_prompts=cut)
        return
    fitted = fit_pairs(made, records, max_length=max_length, cut_prompts=cut)
    assert [texts(row) for row in fitted.rows] == [expected]
    whole = fit_pairs(made, records, max_length=99).rows[0]
    assert fitted.shortened == (texts(whole) != expected)
    for text, said in zip(fitted.rows[0][:2], (chosen, rejected), strict=True):
        learned = words(text.tokens[text.completion])
        assert learned and (said.strip() + " </s>" * begun).startswith(learned)


def test_prompts_are_kept_once():
    records = [
        Prompt("a b"),
        Preference("c", " d", " e"),
        Judged("a b", " c", True),
        Demonstration("", "whole"),
        Ranked("c", ("d", "e"), (1, 2)),
        Prompt("a b c"),
        Prompt("a b c"),
    ]
    fitted = fit_prompts(CODEC, records, max_length=3)
    assert [words(row) for row in fitted.rows] == ["<s> a b", "<s> c"] and all(
        row.dtype == np.int32 for row in fitted.rows
    )
    assert reasons(fitted) == [
        (2, "prompt occurs again"),
        (3, "a whole text without a prompt"),
        (4, "prompt occurs again"),
        (5, "prompt of more than 3 tokens"),
        (6, "prompt of more than 3 tokens"),
    ]
    cut = fit_prompts(CODEC, records, max_length=3, cut_prompts=True)
    assert [words(row) for row in cut.rows] == ["<s> a b", "<s> c", "<s> b c"] and cut.shortened == 1
    assert [words(row) for row in fit_prompts(BARE, records, max_length=2, cut_prompts=True).rows] == [
        "a b",
        "c",
        "b c",
    ]
    assert reasons(fit_prompts(BARE, [Prompt(""), Prompt("a")], max_length=2)) == [(0, "prompt without tokens")]


def test_what_a_template_refuses_is_dropped():
    records = [Preference(*TALK), Preference("a", " b", " c"), Preference("a", " b", TALK[1])]
    for fit, row in ((fit_demonstrations, 1), (fit_prompts, 1), (fit_pairs, 1)):
        fitted = fit(REFUSING, records[:2], max_length=9)
        assert len(fitted.rows) == row and fitted.dropped[0].number == 0 and "no turns" in fitted.dropped[0].reason
    assert "must both be strings" in fit_pairs(CODEC, records[1:], max_length=9).dropped[0].reason
    with pytest.raises(DataError, match=r"No pairs are left .*no turns"):
        fit_pairs(REFUSING, records[:1] * 3, max_length=9)


def test_every_pair_of_a_text_that_cannot_be_encoded_is_counted():
    records = [
        Ranked("a", (" b", TALK[1], " c"), (1, 2, 3)),
        Judged("d", " e", True),
        *[Judged("d", TALK[1], False)] * 2,
    ]
    fitted = fit_pairs(BARE, records, max_length=9)
    assert [texts(row) for row in fitted.rows] == [("a b", "a c")]
    assert [entry.number for entry in fitted.dropped] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("fit", "record", "message"),
    [
        (
            fit_demonstrations,
            Prompt("a"),
            "Record 1 is of the kind Prompt; demonstrations are made of Demonstration or",
        ),
        (fit_demonstrations, Ranked("a", (" b", " c"), (1, 2)), "kind Ranked; demonstrations"),
        (fit_pairs, Demonstration("a", " b"), "kind Demonstration; pairs are made of Preference or Ranked or Judged"),
    ],
)
def test_kinds_that_do_not_fit(fit, record, message):
    with pytest.raises(DataError, match=message):
        fit(CODEC, [Preference("a", " b", " c"), record], max_length=9)


def test_what_makes_no_row_at_all():
    with pytest.raises(DataError, match=r"No demonstrations are left .*2 × called bad; 1 × prompt of 3"):
        fit_demonstrations(CODEC, [Judged("a", " b", False)] * 2 + [Demonstration("a b", " c")], max_length=3)
    with pytest.raises(DataError, match="there is no record"):
        fit_prompts(CODEC, [], max_length=3)
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        fit_prompts(CODEC, [Prompt("a")], max_length=1)


@pytest.mark.skipif(not (HH.exists() and STORIES.exists()), reason=f"HH-RLHF or stories260K is missing in {SHARED}")
def test_no_pair_of_hh_rlhf_is_lost():
    records = read_records(HH).records
    made = codec(tokenizers.Tokenizer.from_file(str(STORIES)), bos=1, eos=2)
    assert len(records) == 2312
    fitted = fit_pairs(made, records, max_length=512)
    left = set(range(2312)) - {entry.number for entry in fitted.dropped}
    assert len(fitted.rows) + len(fitted.dropped) == 2312 and len(fitted.rows) == len(left) > 1000
    assert {entry.reason for entry in fitted.dropped} <= {
        "prompt of 512 tokens or more",
        "both completions are the same in the first 512 tokens",
    }
    assert max(map(row_length, fitted.rows)) == 512 and fitted.shortened > 0
    assert all(row.first.tokens[0] == row.second.tokens[0] == 1 for row in fitted.rows)
    # A prompt that had no room has some once it may be cut.
    long = [records[entry.number] for entry in fitted.dropped if entry.reason.startswith("prompt")]
    cut = fit_pairs(made, long, max_length=512, cut_prompts=True)
    assert len(cut.rows) + len(cut.dropped) == len(long) and len(cut.rows) > 0.9 * len(long)
    prompts = fit_prompts(made, records, max_length=512)
    assert len(prompts.rows) + len(prompts.dropped) == 2312
