"""Tokens and masks of arbitrary texts, with byte-level and prefixed-space tokenizers trained here and stories260K's."""

import pathlib

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.data import Message, Preference
from jaxrlhf.data.chat import ChatTemplate
from jaxrlhf.data.encode import chat_tokenizer, encode, encode_pair, encode_prompt

STORIES = pathlib.Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K" / "tokenizer.json"
TEXTS = ["The sky is blue and green. ", "Is it dry? Yes, dry.\n", "\n\nHuman: hello\n\nAssistant: hello there é"] * 3


def trained(kind):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    alphabet = []
    if kind == "bytes":
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def trimmed():
    """The byte-level one with offsets that exclude spaces, the library's default."""
    made = tokenizers.Tokenizer.from_str(MADE["bytes"].to_str())
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    return made


MADE = {kind: trained(kind) for kind in ("bytes", "space")}
MADE["trimmed"] = trimmed()
TOKENIZERS = {kind: chat_tokenizer(made, bos=0, eos=1) for kind, made in MADE.items()}
ANY = st.text(st.characters(codec="utf-8", exclude_characters="<▁"), max_size=30)
WORDS = st.lists(st.sampled_from(["The", " sky", " is", " blue", " ", "\n", "dry", "?", "é"]), max_size=8).map("".join)


def check_masks(kind, prompt, completion):
    found, decode = encode(TOKENIZERS[kind], prompt, completion), MADE[kind].decode
    assert found.tokens.shape == found.completion_mask.shape and found.tokens.dtype == np.int32
    np.testing.assert_array_equal(np.flatnonzero(found.tokens == 0), [0])
    np.testing.assert_array_equal(np.flatnonzero(found.tokens == 1), [len(found.tokens) - 1])
    # The mask is one block at the end; the text before it contains nothing of the completion.
    first = int(found.completion_mask.argmax())
    assert first > 0 and found.completion_mask[first:].all()
    before = decode(found.tokens[:first].tolist())
    assert prompt.startswith(before) or (kind == "space" and prompt.lstrip(" ").startswith(before.lstrip(" ")))
    whole, learned = decode(found.tokens.tolist()), decode(found.tokens[first:].tolist())
    if kind != "space":
        assert whole == prompt + completion and learned.endswith(completion)
    else:  # the first space of a text is the tokenizer's own
        assert whole.lstrip(" ") == (prompt + completion).lstrip(" ") and learned.endswith(completion.lstrip(" "))


@settings(max_examples=80, deadline=None)
@given(prompt=ANY | WORDS, completion=ANY | WORDS)
def test_masks_cover_the_completion_of_any_text(prompt, completion):
    check_masks("bytes", prompt, completion)


@settings(max_examples=80, deadline=None)
@given(prompt=WORDS, completion=WORDS)
def test_masks_cover_the_completion_with_trimmed_offsets(prompt, completion):
    # Spaces across the boundary may be one token; spaces on only one side are attributed correctly.
    if not (prompt[-1:].isspace() and completion[:1].isspace()):
        one, other = (encode(TOKENIZERS[kind], prompt, completion) for kind in ("bytes", "trimmed"))
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.completion_mask, other.completion_mask)


@settings(max_examples=80, deadline=None)
@given(prompt=WORDS, completion=WORDS)
def test_masks_cover_the_completion_with_a_prefixed_space(prompt, completion):
    check_masks("space", prompt, completion)


TURNS = st.lists(WORDS, min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(said=TURNS)
def test_every_turn_of_the_assistant_is_in_the_mask(said):
    talk = tuple(Message(("user", "assistant")[number % 2], text) for number, text in enumerate(said))
    found = encode(TOKENIZERS["bytes"], (), talk)
    learned = MADE["bytes"].decode(found.tokens[found.completion_mask].tolist())
    answers = [message.content for message in talk if message.role == "assistant"]
    assert "".join(learned.split()) == "".join("".join(answers).split())
    assert (found.tokens == 1).sum() == (len(said) % 2 == 0)


def test_a_prompt_has_a_generation_prompt_and_no_end_of_text():
    for made in TOKENIZERS.values():
        tokens = encode_prompt(made, (Message("user", "dry?"),))
        text = made.backend.decode(tokens.tolist())
        assert text.strip() == "Human: dry?\n\nAssistant:" and tokens[0] == 0 and 1 not in tokens
        both = encode(made, (Message("user", "dry?"),), (Message("assistant", "Yes"),))
        np.testing.assert_array_equal(both.tokens[: len(tokens)], tokens)
        np.testing.assert_array_equal(encode_prompt(made, ""), [0])


def test_bos_is_not_added_twice():
    template = ChatTemplate(
        "<s>{% for m in messages %}{{ m.content }}{% endfor %}{% if not add_generation_prompt %}</s>{% endif %}", {}
    )
    made = chat_tokenizer(MADE["bytes"], bos=0, eos=1, template=template)
    found = encode(made, (), (Message("user", "a"), Message("assistant", "b")))
    assert (found.tokens == 0).sum() == 1 and (found.tokens == 1).sum() == 1


def test_pairs_share_their_prompt():
    pair = encode_pair(TOKENIZERS["bytes"], Preference("The sky is", " blue", " green", 2.0))
    length = int(pair.chosen.completion_mask.argmax())
    np.testing.assert_array_equal(pair.chosen.tokens[:length], pair.rejected.tokens[:length])
    assert pair.margin == 2.0 and int(pair.rejected.completion_mask.argmax()) == length
    assert np.isnan(encode_pair(TOKENIZERS["bytes"], Preference("a", "b", "c")).margin)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="eos id 99999 is not one of the tokenizer's"):
        chat_tokenizer(MADE["bytes"], eos=99999)
    with pytest.raises(ValueError, match="must both be strings, or both conversations"):
        encode(TOKENIZERS["bytes"], "a", (Message("assistant", "b"),))
    with pytest.raises(ValueError, match=r"holds the token .*, which is not in the model's vocabulary"):
        encode(chat_tokenizer(MADE["bytes"], bos=0, eos=1, vocabulary_size=50), "The sky", " is blue")


@pytest.mark.skipif(not STORIES.exists(), reason=f"stories260K is missing: {STORIES}")
def test_a_real_tokenizer():
    made = chat_tokenizer(tokenizers.Tokenizer.from_file(str(STORIES)), bos=1, eos=2)
    found = encode(made, "The sky is", " blue.")
    assert made.backend.decode(found.tokens[found.completion_mask].tolist()) == "blue."
    np.testing.assert_array_equal(found.tokens[[0, -1]], [1, 2])
