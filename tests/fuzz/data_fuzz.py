"""Random files of records and random conversations: each is read rightly, or refused in one sentence.

    python tests/fuzz/data_fuzz.py --count 2000 --seed 0

A file of records has a known content, changed in ways that editors, tools and mistakes change files. A conversation is
written by a family's template or a damaged one, and compared with transformers: its text, and whose words are learned.
Prints how many inputs of each surface ended how; a wrong end stops with the seed that repeats it.
"""

import argparse
import collections
import gzip
import importlib
import json
import pathlib
import random
import re
import sys
import tempfile

import numpy as np
import tokenizers
import transformers

from jaxrlhf.data import (
    DataError,
    Demonstration,
    Message,
    Preference,
    Prompt,
    Ranking,
    UnpairedPreference,
    hh_rlhf,
    parse_record,
    read_records,
)
from jaxrlhf.data.chat import ChatTemplate, render_prompt
from jaxrlhf.data.encode import chat_tokenizer, encode, encode_prompt
from jaxrlhf.data.records import texts_of
from jaxrlhf.data.unwritten import Unwritten

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "data"))
families = importlib.import_module("families")
sys.path.pop(0)

WORDS = [
    "dry",
    "wet",
    "é",
    "the sky",
    " blue",
    "\n\nHuman: x",
    "{}",
    "",
    " ",
    "\u2028",
    "a\tb",
    "<s>",
    "\x00",
    "😀",
    "0",
]
WRONG = [None, 0, 1, -1.5, True, "", "x", [], {}, [None], ["x"], [{}], {"role": "user"}, 10**30, 1e308, [[1], [2]]]
KEYS = [
    "prompt", "chosen", "rejected", "completion", "completions", "label", "labels", "ranks", "margin", "messages", "text",
    "tools", "documents", "chat_template_kwargs", "system", "question", "score_chosen", "images", "conversations", "id",
]  # fmt: skip
READ = {
    Preference: {"prompt", "chosen", "rejected", "margin"},
    Ranking: {"prompt", "completions", "ranks"},
    UnpairedPreference: {"prompt", "completion", "label"},
    Prompt: {"prompt"},
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def sentence(error, *names):
    """Checks that an error is one sentence that holds these names."""
    text = str(error)
    assert re.fullmatch(r"[^\n]{10,900}[.]", text), f"not one sentence: {text!r}"
    assert "Traceback" not in text and "object at 0x" not in text, text
    assert all(name in text for name in names), text
    return "refused"


def told(draw, count):
    """A conversation of `count` turns, with a system's or without, as JSON and as messages."""
    roles = ["system"] * (draw.random() < 0.2) + (["user", "assistant"] * count)[:count]
    turns = [(role, draw.choice(WORDS) + str(draw.randrange(10**6))) for role in roles]
    return [{"role": role, "content": text} for role, text in turns], tuple(Message(*turn) for turn in turns)


def record(draw):
    """A JSON object and the record that it is."""
    if draw.random() < 0.5:
        prompt, first, second = (draw.choice(WORDS) + str(draw.randrange(10**6)) for _ in range(3))
        texts = [(text, text) for text in (prompt, first, second)]
    else:
        texts = [told(draw, draw.choice([1, 3]))]
        for _ in range(2):
            text = draw.choice(WORDS) + str(draw.randrange(10**6))
            texts.append(([{"role": "assistant", "content": text}], (Message("assistant", text),)))
    (prompt, asked), (first, one), (second, other) = texts
    margin, label = draw.choice([None, 0.5, -3]), draw.random() < 0.5
    whole = isinstance(prompt, list)
    kinds = [
        (
            {"prompt": prompt, "chosen": first, "rejected": second, "margin": margin},
            Preference(asked, one, other, margin),
        ),
        ({"prompt": prompt, "completions": [first, second], "ranks": [2, 1]}, Ranking(asked, (one, other), (2, 1))),
        ({"prompt": prompt, "completion": first, "label": label}, UnpairedPreference(asked, one, label)),
        ({"prompt": prompt, "completion": first}, Demonstration(asked, one)),
        ({"prompt": prompt}, Prompt(asked)),
        ({"messages": prompt + first}, Demonstration((), asked + one))
        if whole
        else ({"text": prompt}, Demonstration("", asked)),
    ]
    if whole:
        pair = {"prompt": prompt[-1]["content"], "chosen": prompt + first, "rejected": prompt + second}
        kinds += [(pair, Preference(asked, one, other)), (pair | {"prompt": prompt}, Preference(asked, one, other))]
    value, expected = draw.choice(kinds)
    return (value, expected) if one != other else record(draw)


def changed(draw, value):
    """An object with one key dropped, renamed, added, or of another value."""
    value = dict(value)
    name, other = draw.choice(list(value)), draw.choice(KEYS)
    change = draw.randrange(5)
    if change == 0:
        del value[name]
    elif change == 1:
        value[other] = value.pop(name)
    elif change == 2:
        value[other] = draw.choice(WRONG)
    elif change == 3:
        value[name] = draw.choice(WRONG)
    elif isinstance(value[name], list) and value[name]:
        entry = draw.randrange(len(value[name]))
        value[name] = [draw.choice(WRONG) if index == entry else part for index, part in enumerate(value[name])]
    return value


LINES = ["", "   ", "{", "[", "null", "3", '"x"', '{"prompt": "a", "prompt": "b"}', '{"prompt": "\\ud800"}', "{}}"]
LINES += [
    '{"prompt": "a", "x": ' + "9" * 5000 + "}",
    '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e999}',
]
LINES += ['{"prompt": "a", "chosen": "b", "rejected": "c", "margin": ' + "9" * 400 + "}", "[" * 5000, "NaN"]


def stored(draw, text):
    """Bytes of a text as some program would store them, and whether they hold the whole text."""
    text = text.replace("\n", draw.choice(["\n", "\n", "\r\n", "\r", "\n\n"]))
    data = text.encode(draw.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"]))
    if draw.random() < 0.2:
        data = gzip.compress(data, mtime=0)
    if draw.random() < 0.1 and data:
        cut = draw.randrange(len(data))
        return data[:cut] + draw.choice([b"", b"\xff", b"\xe9", b"\x00", b"\xed\xa0\x80"]) + data[cut + 1 :], False
    return data, True


def check_records(draw, folder):
    """Reads one file; returns how it ended."""
    known = [record(draw) for _ in range(draw.randrange(1, 4))]
    lines, whole = [json.dumps(value, ensure_ascii=draw.random() < 0.5) for value, _ in known], draw.random() < 0.4
    if not whole:
        place = draw.randrange(len(lines))
        lines[place] = json.dumps(changed(draw, known[place][0])) if draw.random() < 0.7 else draw.choice(LINES)
    file = folder / draw.choice(["a.jsonl", "b.JSONL", "c.jsonl.gz", "with space [1].jsonl"])
    data, intact = stored(draw, "\n".join(lines))
    file.write_bytes(data)
    parse = hh_rlhf.parse if draw.random() < 0.05 else None
    try:
        found = read_records(file, parse)
    except DataError as error:
        assert not (whole and intact and parse is None), f"refused: {error}"
        ending = sentence(error, file.name)
        try:
            skipping = read_records(file, parse, skip_bad=True)
        except DataError as error:
            return sentence(error, file.name)
        assert all(sentence(f"Skipped a line: {line.reason}") for line in skipping.bad)
        # At least the line that stopped the reading.
        assert skipping.bad
        return ending
    if whole and intact:
        assert found.records == [expected for _, expected in known], "another record"
        assert not found.unread
    if intact and parse is None and len(lines) == 1:
        every_key_is_accounted_for(json.loads(lines[0]), found)
    return "read"


def every_key_is_accounted_for(value, found):
    """Every key is read by the record's format or counted as unread; every text of a record stands in the object."""
    kind, given = type(found.records[0]), {name for name in value if value[name] is not None}
    read = READ.get(kind) or next(keys for keys in ({"prompt", "completion"}, {"messages"}, {"text"}) if keys <= given)
    read = read | {"tools", "documents", "chat_template_kwargs"}
    assert given - read == set(found.unread) and set(found.unread.values()) <= {1}
    inside = json.dumps(value, ensure_ascii=False)
    for text in texts_of(found.records[0]):
        for part in [text] if isinstance(text, str) else [message.content for message in text]:
            assert json.dumps(part, ensure_ascii=False)[1:-1] in inside


MADE = tokenizers.Tokenizer(tokenizers.models.BPE())
MADE.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
MADE.decoder = tokenizers.decoders.ByteLevel()
MADE.train_from_iterator(
    ["x"],
    tokenizers.trainers.BpeTrainer(
        special_tokens=families.SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)
DAMAGES = [
    ("message", "massage"), ("content", "kontent"), ("{%- endif %}", ""), ("+", "~"), ("'", '"'), ("tojson", "tojsn"),
    ("role", "rolle"), ("| trim", "| trimm"), ("loop.last", "loop.index > 99"), ("{{- ", "{{ "), ("=='", "!='"),
]  # fmt: skip


def conversation(draw):
    """A row of random turns; the words of each turn begin with the first letter of its role."""
    turns, number = [], iter(range(99))

    def say(role):
        words = " ".join(f"{role[0]}{next(number)}w" for _ in range(draw.randrange(1, 4)))
        return draw.choice(["", "", " ", "\n"]) + words + draw.choice(["", "", " ", ".", "\n"])

    if draw.random() < 0.3:
        turns.append({"role": "system", "content": say("system")})
    for _ in range(draw.randrange(1, 4)):
        turns.append({"role": "user", "content": say("user")})
        if draw.random() < 0.25:
            function = {"name": f"a{next(number)}w", "arguments": draw.choice([{}, {"x": [1, None]}, '{"y": 2}'])}
            call = {"id": "abcdef123", "type": "function", "function": function}
            turns.append({"role": "assistant", "content": draw.choice(["", say("assistant")]), "tool_calls": [call]})
            if draw.random() < 0.3:
                del turns[-1]["content"]
            turns.append({"role": "tool", "name": "x", "tool_call_id": "abcdef123", "content": say("tool")})
        turns.append({"role": "assistant", "content": say("assistant")})
        if draw.random() < 0.2:
            turns[-1][draw.choice(["reasoning_content", "thinking"])] = say("assistant")
        if draw.random() < 0.1:
            turns[-1]["content"] = "<think>\n" + say("assistant") + "\n</think>\n\n" + turns[-1]["content"]
    if draw.random() < 0.1:
        del turns[draw.randrange(len(turns))]
    row = {"messages": turns}
    if draw.random() < 0.3:
        row["tools"] = draw.choice([[], [families.WEATHER], json.dumps([families.WEATHER])])
    if draw.random() < 0.1:
        row["documents"] = [{"title": "d", "text": "e"}]
    if draw.random() < 0.2:
        row["chat_template_kwargs"] = draw.choice(
            [{"enable_thinking": False}, {"date_string": "1 May"}, {"unknown": 1}]
        )
    return row if turns else conversation(draw)


def template(draw):
    """A family's template, or a damaged one."""
    source = draw.choice(list(families.TEMPLATES.values()))
    if draw.random() < 0.25:
        one, other = draw.choice(DAMAGES)
        places = [match.start() for match in re.finditer(re.escape(one), source)]
        if places:
            place = draw.choice(places)
            source = source[:place] + other + source[place + len(one) :]
    return source


def oracle(source, row, messages, **arguments):
    """The text of transformers; None if its template fails."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=MADE, **TOKENS)
    tokenizer.chat_template = source
    tools = row.get("tools")
    others = {"documents": row.get("documents"), **row.get("chat_template_kwargs", {}), **arguments}
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **others)
    except Exception:
        return None


def check_conversation(draw, folder):
    """Writes one conversation in two forms; returns how it ended."""
    del folder
    row, source = conversation(draw), template(draw)
    damaged = source not in families.TEMPLATES.values()
    made = chat_tokenizer(MADE, eos=1, template=ChatTemplate(source, TOKENS))
    messages, others = row["messages"], {name: value for name, value in row.items() if name != "messages"}
    whole = parse_record(row).completion
    try:
        encoded = encode(made, (), whole)
    except ValueError as error:
        return sentence(error, "template")
    unwritten = Unwritten(made.template)
    unwritten.add([whole])
    known = (
        {key for turn in messages for key in turn}
        | set(others.get("chat_template_kwargs", {}))
        | {"tools", "documents"}
    )
    assert set(unwritten.counts()) <= known - {"role", "content"} and (
        damaged or "tool_calls" not in unwritten.counts()
    )
    assert MADE.decode(encoded.tokens.tolist(), skip_special_tokens=False) == oracle(source, row, messages), (
        "another text"
    )
    learned = MADE.decode(encoded.tokens[encoded.completion_mask].tolist(), skip_special_tokens=False)
    assert damaged or not re.search(r"\b[ust]\d+w", learned), f"learns others' words: {learned!r}"
    first = next((index for index, turn in enumerate(messages) if index and turn["role"] == "assistant"), None)
    if first is None or messages[first - 1]["role"] == "assistant":
        return "read"
    split = parse_record({**others, "prompt": messages[:first], "completion": messages[first:]})
    try:
        parted = encode(made, split.prompt, split.completion)
    except ValueError as error:
        return sentence(error, "template")
    np.testing.assert_array_equal(parted.tokens, encoded.tokens)
    begins = int(np.flatnonzero(parted.completion_mask)[0]) if parted.completion_mask.any() else len(parted.tokens)
    later = encoded.completion_mask & (np.arange(len(encoded.tokens)) >= begins)
    assert damaged or np.array_equal(parted.completion_mask, later), "another mask"
    asked = encode_prompt(made, split.prompt)
    np.testing.assert_array_equal(parted.tokens[: len(asked)], asked)
    assert render_prompt(made.template, split.prompt) == oracle(
        source, row, messages[:first], add_generation_prompt=True
    )
    return "read"


SURFACES = {"records": check_records, "conversations": check_conversation}


def run(surface, count, seed):
    """Returns how many of `count` inputs of a surface ended how; AssertionError or any other error is a finding."""
    endings = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            try:
                endings[SURFACES[surface](random.Random(f"{seed} {index}"), pathlib.Path(folder))] += 1
            except Exception as error:
                error.add_note(f"{surface}: repeat with --seed {seed}, input {index}")
                raise
    return dict(endings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="inputs of each surface")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    for surface in SURFACES:
        print(surface, run(surface, settings.count, settings.seed))
