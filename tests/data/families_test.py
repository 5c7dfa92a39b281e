"""Twelve families' templates against transformers: texts, token ids and masks, for conversations in every form."""

import importlib
import json
import pathlib
import sys

import numpy as np
import pytest
import tokenizers
import transformers

from jaxrlhf.commands.models import open_bundle
from jaxrlhf.data import Demonstration, Prompt, parse_record
from jaxrlhf.data.chat import ChatTemplate, render, render_prompt
from jaxrlhf.data.encode import chat_tokenizer, encode, encode_prompt
from jaxrlhf.data.jinja import has_generation_blocks

sys.path.insert(0, str(pathlib.Path(__file__).parent))
families = importlib.import_module("families")
sys.path.pop(0)
ROWS, TEMPLATES = families.ROWS, families.TEMPLATES

SMOLLM = pathlib.Path(__file__).resolve().parents[3] / "shared" / "models" / "smollm2"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def byte_level():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=families.SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["Is it dry? Verily dry. And in Ravenna? Quite so."] * 5, trainer)
    return made


MADE = byte_level()


def oracle(source, row, *, messages=None, **arguments):
    """What transformers makes of a row; None if its template fails."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=MADE, **TOKENS)
    tokenizer.chat_template = source
    tools = row.get("tools")
    try:
        return tokenizer.apply_chat_template(
            row["messages"] if messages is None else messages,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            documents=row.get("documents"),
            **row.get("chat_template_kwargs", {}),
            **arguments,
        )
    except Exception:
        return None


def ours(function, *arguments):
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)


# Refused here where transformers writes a turn without its call, or a list as Python prints it.
REFUSED = (
    "does not write tool_calls, so the assistant's turn would lack its call",
    "as Python prints it; write a string.",
)
EVERY = pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
FAMILY = pytest.mark.parametrize("source", TEMPLATES.values(), ids=list(TEMPLATES))


def check(found, expected):
    """An oracle that fails is answered with a sentence about the template; two refusals are this library's own."""
    if isinstance(found, str) and found.startswith("The chat template"):
        assert found.endswith(".") and "\n" not in found
        assert expected is None or any(reason in found for reason in REFUSED), found
        return False
    assert expected is not None
    return True


def prompt_row(row):
    return {**{key: value for key, value in row.items() if key != "messages"}, "prompt": row["messages"][:-1]}


@EVERY
@FAMILY
def test_texts_are_those_of_transformers(source, row):
    template = ChatTemplate(source, TOKENS)
    expected = oracle(source, row, tokenize=False)
    found = ours(render, template, parse_record(row).completion)
    if check(found, expected):
        assert found.text == expected
    expected = oracle(source, row, messages=row["messages"][:-1], tokenize=False, add_generation_prompt=True)
    found = ours(render_prompt, template, parse_record(prompt_row(row)).prompt)
    assert found == expected or not check(found, expected)


def runs(mask):
    """The blocks of True in a mask, as arrays of positions."""
    positions = np.flatnonzero(mask)
    return np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1) if len(positions) else []


@EVERY
@FAMILY
def test_tokens_and_masks_are_those_of_transformers_in_every_form(source, row):
    made, messages = chat_tokenizer(MADE, eos=1, template=ChatTemplate(source, TOKENS)), row["messages"]
    blocks = has_generation_blocks(source)
    expected = oracle(source, row, return_dict=True, return_assistant_tokens_mask=blocks)
    whole = ours(encode, made, (), parse_record(row).completion)
    if not check(whole, expected):
        return
    assert whole.tokens.tolist() == expected["input_ids"]
    if blocks:
        assert whole.completion_mask.tolist() == [bool(one) for one in expected["assistant_masks"]]
    # Each turn of the assistant is one block, with its words and an end, and nobody else's.
    said = [message for message in messages if message["role"] == "assistant"]
    found = [MADE.decode(whole.tokens[run].tolist(), skip_special_tokens=False) for run in runs(whole.completion_mask)]
    assert len(found) == len(said)
    for text, message in zip(found, said, strict=True):
        words = (message.get("content") or "").split("</think>")[-1].strip()
        assert words in text and all(call["function"]["name"] in text for call in message.get("tool_calls") or [])
        assert not any(other in text for other in ("Is it dry?", "Ravenna", "sunny", "Be brief", "[INST]", "<|user|>"))
        # This family ends the last turn with another token than the turns before it.
        assert text.rstrip().endswith((">", "]")) or (source == families.HARMONY and text != found[-1])
    others = {key: value for key, value in row.items() if key != "messages"}
    for first in (index for index, message in enumerate(messages) if message["role"] == "assistant"):
        record = parse_record({**others, "prompt": messages[:first], "completion": messages[first:]})
        assert isinstance(record, Demonstration)
        split = encode(made, record.prompt, record.completion)
        np.testing.assert_array_equal(split.tokens, whole.tokens)
        learned = runs(whole.completion_mask)[sum(message["role"] == "assistant" for message in messages[:first]) :]
        np.testing.assert_array_equal(np.flatnonzero(split.completion_mask), np.concatenate(learned))
        asked = encode_prompt(made, record.prompt)
        np.testing.assert_array_equal(split.tokens[: len(asked)], asked)


@pytest.mark.skipif(not SMOLLM.exists(), reason=f"smollm2 is missing: {SMOLLM}")
def test_a_published_tokenizer_and_its_template():
    oracle, bundle, same = transformers.AutoTokenizer.from_pretrained(SMOLLM), open_bundle(SMOLLM), 0
    for row in ROWS.values():
        found = ours(encode, bundle.chat_tokenizer(), (), parse_record(row).completion)
        if not isinstance(found, str):
            given = {**row.get("chat_template_kwargs", {}), "tokenize": True, "return_dict": True}
            expected = oracle.apply_chat_template(row["messages"], **given)
            assert found.tokens.tolist() == expected["input_ids"]
            same += 1
    # Its template has no tools and no parts of contents.
    assert same == len(ROWS) - 3


@FAMILY
@pytest.mark.parametrize("name", ["one turn", "turns", "system", "no tools", "settings"])
def test_a_prefilled_turn_is_continued(source, name):
    row = ROWS[name]
    messages, last = row["messages"][:-1], row["messages"][-1]
    others = {key: value for key, value in row.items() if key != "messages"}
    begun, rest = {**last, "content": last["content"].split()[0]}, {**last, "content": " " + last["content"].split()[1]}
    made = chat_tokenizer(MADE, eos=1, template=ChatTemplate(source, TOKENS))
    prompt = parse_record({**others, "prompt": [*messages, begun]})
    expected = oracle(source, row, messages=[*messages, begun], tokenize=False, continue_final_message=True)
    assert isinstance(prompt, Prompt) and render_prompt(made.template, prompt.prompt) == expected
    whole = encode(
        made,
        (),
        parse_record({**others, "messages": [*messages, {**last, "content": last["content"].strip()}]}).completion,
    )
    record = parse_record({**others, "prompt": [*messages, begun], "completion": [rest]})
    split = encode(made, record.prompt, record.completion)
    np.testing.assert_array_equal(split.tokens, whole.tokens)
    learned = MADE.decode(split.tokens[split.completion_mask].tolist(), skip_special_tokens=False)
    turn = MADE.decode(whole.tokens[runs(whole.completion_mask)[-1]].tolist(), skip_special_tokens=False)
    assert turn.endswith(learned) and learned.startswith(rest["content"]) and begun["content"] not in learned
