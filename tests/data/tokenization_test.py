"""Which tokens and records are kept, truncated and dropped, with a tokenizer of one token a word, and on HH-RLHF."""

import pathlib

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.data import (
    DataError,
    Demonstration,
    Message,
    Preference,
    Prompt,
    Ranking,
    UnpairedPreference,
    parse_record,
    read_records,
)
from jaxrlhf.data.chat import ChatTemplate
from jaxrlhf.data.encode import chat_tokenizer
from jaxrlhf.data.tokenization import (
    describe_counts,
    describe_rows,
    row_length,
    tokenize_demonstrations,
    tokenize_pairs,
    tokenize_prompts,
)

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared"
HH, STORIES = SHARED / "data" / "hh-rlhf", SHARED / "models" / "stories260K" / "tokenizer.json"

WORDS = ["<s>", "</s>", "?", *"abcdefghijkl", "bc"]
MADE = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="?"))
MADE.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
MADE.add_special_tokens(["<s>", "</s>"])
TOKENIZER = chat_tokenizer(MADE, bos=0, eos=1)
BARE = chat_tokenizer(MADE)
REFUSING = chat_tokenizer(MADE, template=ChatTemplate("{{ raise_exception('no turns') }}", {}))
TALK = (Message("user", "a"),), (Message("assistant", "b"),), (Message("assistant", "c"),)


def words(tokens):
    return " ".join(WORDS[token] for token in tokens)


def texts(row):
    return words(row.first.tokens), words(row.second.tokens)


def reasons(tokenized):
    return [tuple(entry) for entry in tokenized.dropped]


def test_demonstrations_of_every_kind():
    records = [
        Demonstration("a", " b"),
        Preference("a", " c", " d"),
        UnpairedPreference("a", " e", True),
        UnpairedPreference("a", " f", False),
        Demonstration("", "g h"),
    ]
    tokenized = tokenize_demonstrations(TOKENIZER, records, max_length=9)
    assert [words(row.tokens) for row in tokenized.rows] == [
        "<s> a b </s>",
        "<s> a c </s>",
        "<s> a e </s>",
        "<s> g h </s>",
    ]
    assert [row.completion_mask.tolist() for row in tokenized.rows] == [[False, False, True, True]] * 3 + [
        [False, True, True, True]
    ]
    assert tokenized.truncated == 0 and reasons(tokenized) == [(3, "labelled undesirable")]
    assert describe_rows(tokenized) == "4 rows of 4 to 4 tokens; 1 dropped (labelled undesirable)"


def test_demonstrations_are_truncated_at_their_end_or_dropped():
    records = [
        Demonstration("a b", " c d"),  # 6 tokens
        Demonstration("a", " b"),  # 4, as long as allowed
        Demonstration("a b c", " d"),  # the completion begins at the fifth token
        Demonstration("a b", " c"),  # 5, the end of text goes
    ]
    tokenized = tokenize_demonstrations(TOKENIZER, records, max_length=4)
    assert [words(row.tokens) for row in tokenized.rows] == ["<s> a b c", "<s> a b </s>", "<s> a b c"]
    assert tokenized.truncated == 2 and reasons(tokenized) == [(2, "prompt of 4 tokens or more")]
    assert describe_rows(tokenized) == "3 rows of 4 to 4 tokens; 2 truncated; 1 dropped (prompt of 4 tokens or more)"


def test_the_first_token_is_not_in_the_loss():
    tokenized = tokenize_demonstrations(
        BARE, [Demonstration("", "a"), Demonstration("a", ""), Demonstration("", "a b")], max_length=4
    )
    assert [words(row.tokens) for row in tokenized.rows] == ["a b"]
    assert reasons(tokenized) == [(0, "nothing to learn"), (1, "nothing to learn")]


def test_a_demonstration_truncated_to_its_first_token_is_dropped():
    said = "{% generation %}{{ m.content }} {% endgeneration %}"
    turn = "{% if m.role == 'user' %}{{ m.content }} {% else %}" + said + "{% endif %}"
    made = chat_tokenizer(MADE, template=ChatTemplate("{% for m in messages %}" + turn + "{% endfor %}", {}))
    talk = (Message("assistant", "a"), Message("user", "b c"), Message("assistant", "d"))
    records = [Demonstration((), talk), Demonstration((), talk[1:])]
    tokenized = tokenize_demonstrations(made, records, max_length=3)
    assert [words(row.tokens) for row in tokenized.rows] == ["b c d"] and tokenized.dropped[0].index == 0


def test_preferences_and_their_margins():
    records = [Preference("a", " b", " c", 2.5), Preference("a", " d", " e")]
    tokenized = tokenize_pairs(TOKENIZER, records, max_length=9)
    assert [texts(row) for row in tokenized.rows] == [
        ("<s> a b </s>", "<s> a c </s>"),
        ("<s> a d </s>", "<s> a e </s>"),
    ]
    assert [row[2:] for row in tokenized.rows] == [(1.0, 2.5), (1.0, 0.0)]


def test_rankings_make_every_pair_and_ties():
    tokenized = tokenize_pairs(BARE, [Ranking("a", (" b", " c", " d"), (2, 1, 2))], max_length=9)
    assert [(*texts(row), row.label, row.margin) for row in tokenized.rows] == [
        ("a c", "a b", 1.0, 0.0),
        ("a c", "a d", 1.0, 0.0),
        ("a b", "a d", 0.5, 0.0),
    ]


def test_unpaired_preferences_are_paired_within_their_prompt():
    said = [("a", " b", True), ("c", " d", True), ("a", " e", False), ("a", " f", True), ("g", " h", False)]
    records = [UnpairedPreference(*each) for each in said] + [Preference("i", " j", " k")]
    tokenized = tokenize_pairs(BARE, records, max_length=9)
    assert [texts(row) for row in tokenized.rows] == [("i j", "i k"), ("a b", "a e"), ("a f", "a e")]
    assert [row.label for row in tokenized.rows] == [1.0] * 3
    assert reasons(tokenized) == [
        (1, "no undesirable completion of the same prompt"),
        (4, "no desirable completion of the same prompt"),
    ]


def test_only_completions_are_truncated_in_pairs():
    records = [
        Preference("a b", " c d", " e"),  # 4 and 3 tokens
        Preference("a b", " c d", " c e"),  # the same, once cut
        Preference("a b c", " d", " e"),  # no room
        Preference("a b", "", " e"),
        Preference("a", " c", "  c"),  # spaces that the tokenizer does not see
    ]
    tokenized = tokenize_pairs(BARE, records, max_length=3)
    assert [texts(row) for row in tokenized.rows] == [("a b c", "a b e")] and tokenized.truncated == 1
    assert reasons(tokenized) == [
        (1, "both completions are the same in the first 3 tokens"),
        (2, "prompt of 3 tokens or more"),
        (3, "a completion without tokens"),
        (4, "both completions are the same"),
    ]
    assert "4 dropped (1 × both" in describe_rows(tokenized) and describe_rows(tokenized).endswith(
        "; 1 for other reasons)"
    )


def test_prompts_are_cut_equally_in_both_texts():
    tokenized = tokenize_pairs(
        TOKENIZER, [Preference("a b c d e f", " g", " h i j k l")], max_length=6, cut_prompts=True
    )
    # Half the length for the longer completion; the shorter one keeps all.
    assert [texts(row) for row in tokenized.rows] == [("<s> e f g </s>", "<s> e f h i j")]
    assert tokenized.rows[0].first.completion_mask.tolist() == [False] * 3 + [True] * 2 and tokenized.truncated == 1
    # Without a beginning of text, and where cutting the end is enough.
    tokenized = tokenize_pairs(
        BARE, [Preference("a b c", " d e", " f"), Preference("a", " b c d e", " f")], max_length=4, cut_prompts=True
    )
    assert [texts(row) for row in tokenized.rows] == [("b c d e", "b c f"), ("a b c d", "a f")]


def test_a_prompt_merged_with_one_completion_is_shared_up_to_the_merge():
    joined = Preference("a b", "c d", " c d")
    tokenized = tokenize_pairs(TOKENIZER, [joined], max_length=5, cut_prompts=True)
    assert [texts(row) for row in tokenized.rows] == [("<s> a bc d </s>", "<s> a b c d")]
    tokenized = tokenize_pairs(TOKENIZER, [joined, Preference("a", " b", " c")], max_length=4, cut_prompts=True)
    assert [texts(row) for row in tokenized.rows] == [("<s> bc d </s>", "<s> b c d"), ("<s> a b </s>", "<s> a c </s>")]


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
    tokenized = tokenize_pairs(BARE, [alike, other, spoken], max_length=4, cut_prompts=True)
    assert [texts(row) for row in tokenized.rows] == [("b c ? d", "b c ? e")]
    assert [entry.index for entry in tokenized.dropped] == [1, 2]
    assert all("too few to take away from both" in entry.reason for entry in tokenized.dropped)


def expected_pair(prompt, completions, max_length, cut, begun):
    """An independent implementation on words: the expected texts, None if the pair should be dropped."""
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
    records, made = [Preference(prompt, chosen, rejected)], TOKENIZER if begun else BARE
    expected = expected_pair(prompt, (chosen, rejected), max_length, cut, begun)
    if expected is None:
        with pytest.raises(DataError, match="No pairs are left"):
            tokenize_pairs(made, records, max_length=max_length, cut_prompts=cut)
        return
    tokenized = tokenize_pairs(made, records, max_length=max_length, cut_prompts=cut)
    assert [texts(row) for row in tokenized.rows] == [expected]
    whole = tokenize_pairs(made, records, max_length=99).rows[0]
    assert tokenized.truncated == (texts(whole) != expected)
    for text, said in zip(tokenized.rows[0][:2], (chosen, rejected), strict=True):
        learned = words(text.tokens[text.completion_mask])
        assert learned and (said.strip() + " </s>" * begun).startswith(learned)


def test_duplicate_prompts_are_dropped():
    records = [
        Prompt("a b"),
        Preference("c", " d", " e"),
        UnpairedPreference("a b", " c", True),
        Demonstration("", "whole"),
        Ranking("c", ("d", "e"), (1, 2)),
        Prompt("a b c"),
        Prompt("a b c"),
    ]
    tokenized = tokenize_prompts(TOKENIZER, records, max_length=3)
    assert [words(row) for row in tokenized.rows] == ["<s> a b", "<s> c"] and all(
        row.dtype == np.int32 for row in tokenized.rows
    )
    assert reasons(tokenized) == [
        (2, "duplicate prompt"),
        (3, "a whole text without a prompt"),
        (4, "duplicate prompt"),
        (5, "prompt of more than 3 tokens"),
        (6, "prompt of more than 3 tokens"),
    ]
    cut = tokenize_prompts(TOKENIZER, records, max_length=3, cut_prompts=True)
    assert [words(row) for row in cut.rows] == ["<s> a b", "<s> c", "<s> b c"] and cut.truncated == 1
    assert [words(row) for row in tokenize_prompts(BARE, records, max_length=2, cut_prompts=True).rows] == [
        "a b",
        "c",
        "b c",
    ]
    assert reasons(tokenize_prompts(BARE, [Prompt(""), Prompt("a")], max_length=2)) == [(0, "prompt without tokens")]


def test_conversations_that_a_template_refuses_are_dropped():
    records = [Preference(*TALK), Preference("a", " b", " c"), Preference("a", " b", TALK[1])]
    for fit, row in ((tokenize_demonstrations, 1), (tokenize_prompts, 1), (tokenize_pairs, 1)):
        tokenized = fit(REFUSING, records[:2], max_length=9)
        assert (
            len(tokenized.rows) == row and tokenized.dropped[0].index == 0 and "no turns" in tokenized.dropped[0].reason
        )
    assert "must both be strings" in tokenize_pairs(TOKENIZER, records[1:], max_length=9).dropped[0].reason
    with pytest.raises(DataError, match=r"No pairs are left .*no turns"):
        tokenize_pairs(REFUSING, records[:1] * 3, max_length=9)


def test_every_pair_of_a_text_that_cannot_be_encoded_is_counted():
    records = [
        Ranking("a", (" b", TALK[1], " c"), (1, 2, 3)),
        UnpairedPreference("d", " e", True),
        *[UnpairedPreference("d", TALK[1], False)] * 2,
    ]
    tokenized = tokenize_pairs(BARE, records, max_length=9)
    assert [texts(row) for row in tokenized.rows] == [("a b", "a c")]
    assert [entry.index for entry in tokenized.dropped] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("fit", "record", "message"),
    [
        (
            tokenize_demonstrations,
            Prompt("a"),
            "Record 1 is of the kind Prompt; demonstrations are made of Demonstration or",
        ),
        (tokenize_demonstrations, Ranking("a", (" b", " c"), (1, 2)), "kind Ranking; demonstrations"),
        (
            tokenize_pairs,
            Demonstration("a", " b"),
            "kind Demonstration; pairs are made of Preference or Ranking or Unpaired",
        ),
    ],
)
def test_records_of_another_kind_are_refused(fit, record, message):
    with pytest.raises(DataError, match=message):
        fit(TOKENIZER, [Preference("a", " b", " c"), record], max_length=9)


def test_what_the_template_does_not_write_is_counted():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    tokenizer = chat_tokenizer(MADE, template=template)
    asked, told = {"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": " b", "weight": 0}
    row = {"prompt": [asked], "chosen": [told], "rejected": [{**told, "content": " c"}], "tools": [{"a": 1}]}
    record = parse_record(row)
    pairs = tokenize_pairs(tokenizer, [record] * 2, max_length=9)
    assert pairs.unwritten == {"name": 2, "tools": 2, "weight": 2}
    prompts = tokenize_prompts(tokenizer, [record], max_length=9)
    assert describe_rows(prompts) == "1 row of 1 to 1 tokens; not written by the chat template: name (1), tools (1)"
    many = {f"k{number:02}": number for number in range(14)}
    assert describe_counts(many).startswith("k13 (13), k12 (12)") and describe_counts(many).endswith(
        "k02 (2) and 2 others"
    )


def test_no_rows_at_all_is_an_error():
    with pytest.raises(DataError, match=r"No demonstrations are left .*2 × labelled undesirable; 1 × prompt of 3"):
        tokenize_demonstrations(
            TOKENIZER, [UnpairedPreference("a", " b", False)] * 2 + [Demonstration("a b", " c")], max_length=3
        )
    with pytest.raises(
        DataError, match=r"prompt of 3 .*; raise --max-length \(--max-prompt of align\), or bring shorter ones\.$"
    ):
        tokenize_demonstrations(TOKENIZER, [Demonstration("a b", " c")], max_length=3)
    with pytest.raises(DataError, match="there is no record"):
        tokenize_prompts(TOKENIZER, [], max_length=3)
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        tokenize_prompts(TOKENIZER, [Prompt("a")], max_length=1)


@pytest.mark.skipif(not (HH.exists() and STORIES.exists()), reason=f"HH-RLHF or stories260K is missing in {SHARED}")
def test_no_pair_of_hh_rlhf_is_lost():
    records = read_records(HH).records
    made = chat_tokenizer(tokenizers.Tokenizer.from_file(str(STORIES)), bos=1, eos=2)
    assert len(records) == 2312
    tokenized = tokenize_pairs(made, records, max_length=512)
    left = set(range(2312)) - {entry.index for entry in tokenized.dropped}
    assert len(tokenized.rows) + len(tokenized.dropped) == 2312 and len(tokenized.rows) == len(left) > 1000
    assert {entry.reason for entry in tokenized.dropped} <= {
        "prompt of 512 tokens or more",
        "both completions are the same in the first 512 tokens",
    }
    assert max(map(row_length, tokenized.rows)) == 512 and tokenized.truncated > 0
    assert all(row.first.tokens[0] == row.second.tokens[0] == 1 for row in tokenized.rows)
    # Prompts that were too long fit once they may be cut.
    long = [records[entry.index] for entry in tokenized.dropped if entry.reason.startswith("prompt")]
    cut = tokenize_pairs(made, long, max_length=512, cut_prompts=True)
    assert len(cut.rows) + len(cut.dropped) == len(long) and len(cut.rows) > 0.9 * len(long)
    prompts = tokenize_prompts(made, records, max_length=512)
    assert len(prompts.rows) + len(prompts.dropped) == 2312
