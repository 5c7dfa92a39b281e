"""Records by format; errors in lines; all of HH-RLHF."""

import gzip
import json
import pathlib
import re

import pytest

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
    ranking_pairs,
    read_records,
    split_prompt,
)

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "hh-rlhf"
ASK, YES, NO = (
    [{"role": role, "content": text}] for role, text in (("user", "Dry?"), ("assistant", "Yes."), ("assistant", "No."))
)


def write(path, lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as stream:
            stream.write(text)
    else:
        path.write_text(text)
    return path


ASKED, YESES, NOES = (Message("user", "Dry?"),), (Message("assistant", "Yes."),), (Message("assistant", "No."),)


@pytest.mark.parametrize(
    "line, record",
    [
        (
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
            Preference("The sky is", " blue.", " green."),
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            Preference("The sky is", " blue.", " green."),
        ),
        ({"prompt": ASK, "chosen": YES, "rejected": NO, "margin": 2}, Preference(ASKED, YESES, NOES, 2.0)),
        ({"chosen": ASK + YES, "rejected": ASK + NO}, Preference(ASKED, YESES, NOES)),
        ({"prompt": "a", "completions": ["b", "c"]}, Ranking("a", ("b", "c"), (1, 2))),
        (
            {"prompt": ASK, "completions": [NO, YES, NO], "ranks": [2, 1, 2]},
            Ranking(ASKED, (NOES, YESES, NOES), (2, 1, 2)),
        ),
        ({"prompt": "a", "completion": "b", "label": False}, UnpairedPreference("a", "b", label=False)),
        ({"prompt": "a", "completion": "b"}, Demonstration("a", "b")),
        ({"messages": ASK + YES}, Demonstration((), ASKED + YESES)),
        ({"text": "Once."}, Demonstration("", "Once.")),
        ({"prompt": ASK}, Prompt(ASKED)),
        ({"prompt": None, "chosen": "a b", "rejected": "a c", "source": 7}, Preference("a", " b", " c")),
    ],
)
def test_the_keys_of_a_line_determine_its_record(line, record):
    assert parse_record(json.loads(json.dumps(line))) == record


@pytest.mark.parametrize(
    "line, reason",
    [
        (["a"], "expected a JSON object, got list"),
        ({"x": 1}, "no known format has the keys x"),
        ({"chosen": "same", "rejected": "same"}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": "one", "rejected": "two"}, "share no beginning"),
        ({"prompt": "a", "chosen": YES, "rejected": NO}, "must all be strings, or all lists of messages"),
        ({"prompt": ASK, "chosen": [{"role": "assistant"}], "rejected": NO}, r"chosen\[0\] must be an object"),
        ({"prompt": 3, "completion": "b"}, "prompt must be a string or a list of messages, got int"),
        ({"prompt": "a", "completion": "b", "label": 1}, "label must be true or false"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "2"}, "margin must be a number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, "margin must be finite, got nan"),
        ({"prompt": "a", "completions": ["b"]}, "at least two"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [1]}, "2 completions and 1 ranks"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [1, True]}, "whole numbers"),
    ],
)
def test_malformed_lines_are_refused_with_a_reason(line, reason):
    with pytest.raises(ValueError, match=reason):
        parse_record(line)


@pytest.mark.parametrize(
    "chosen, rejected, parts",
    [
        ("to be fair", "to be firm", ("to be", " fair", " firm")),
        ("a  b", "a  c", ("a", "  b", "  c")),
        ("one", "one two", ("one", "", " two")),
        ("so-and", "so-or", ("so-", "and", "or")),
        ("Q: x\nA: 1", "Q: x\nA: 2", ("Q: x\nA:", " 1", " 2")),
        # Chinese, Japanese, Thai: cut between characters; Korean, Hindi: between words.
        ("天空是蓝色的", "天空是绿色的", ("天空是", "蓝色的", "绿色的")),
        ("そらはあおい", "そらはしろい", ("そらは", "あおい", "しろい")),
        ("ฟ้าขาว", "ฟ้าดำ", ("ฟ้า", "ขาว", "ดำ")),
        ("하늘은 파랗다", "하늘은 파래요", ("하늘은", " 파랗다", " 파래요")),
        ("रंग नीला", "रंग नीली", ("रंग", " नीला", " नीली")),
        # An accent belongs to its letter, and a joined emoji is one character.
        ("un cafe\u0301", "un cafe\u0300", ("un", " cafe\u0301", " cafe\u0300")),
        (
            "ok \U0001f469\u200d\U0001f467",
            "ok \U0001f469\u200d\U0001f466",
            ("ok", " \U0001f469\u200d\U0001f467", " \U0001f469\u200d\U0001f466"),
        ),
        (
            "ok \U0001f44d\U0001f3fb",
            "ok \U0001f44d\U0001f3ff",
            ("ok", " \U0001f44d\U0001f3fb", " \U0001f44d\U0001f3ff"),
        ),
    ],
)
def test_a_prompt_ends_with_a_word(chosen, rejected, parts):
    prompt, *rest = split_prompt(chosen, rejected)
    assert (prompt, *rest) == parts
    assert [prompt + part for part in rest] == [chosen, rejected]


TOOLS = [{"type": "function", "function": {"name": "rain"}}]
CALL = [{"role": "assistant", "tool_calls": [{"function": {"name": "rain", "arguments": {"day": 1}}}]}]


@pytest.mark.parametrize(
    "line, record, unread",
    [
        # UltraFeedback, binarized: the prompt as a string beside whole conversations.
        (
            {"prompt": "Dry?", "prompt_id": "7", "chosen": ASK + YES, "rejected": ASK + NO, "score_chosen": 8.0},
            Preference(ASKED, YESES, NOES),
            ["prompt_id", "score_chosen"],
        ),
        ({"prompt": " Dry?\n", "chosen": ASK + YES, "rejected": ASK + NO}, Preference(ASKED, YESES, NOES), []),
        ({"prompt": ASK, "chosen": ASK + YES, "rejected": ASK + NO}, Preference(ASKED, YESES, NOES), []),
        ({"prompt": ASK, "completions": [ASK + YES, ASK + NO]}, Ranking(ASKED, (YESES, NOES), (1, 2)), []),
        ({"prompt": ASK, "completion": ASK + YES}, Demonstration(ASKED, YESES), []),
        # The completion repeats the question and not the system's words; a turn of the assistant may be said twice.
        (
            {"prompt": [{"role": "system", "content": "s"}, *ASK], "completion": ASK + YES},
            Demonstration((Message("system", "s"), *ASKED), YESES),
            [],
        ),
        ({"prompt": ASK + YES, "completion": YES}, Demonstration(ASKED + YESES, YESES), []),
        ({"prompt": ASK, "completion": ASK + YES, "label": True}, UnpairedPreference(ASKED, YESES, label=True), []),
        # Turns of the assistant in a row are turns, and not one that is continued.
        (
            {"chosen": ASK + YES + YES, "rejected": ASK + YES + NO},
            Preference(ASKED, YESES + YESES, YESES + NOES),
            [],
        ),
        # HH-RLHF with a prompt of its own: strings, as TRL reads them.
        (
            {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c", "margin": None},
            Preference("\n\nHuman: a\n\nAssistant:", " b", " c"),
            [],
        ),
        # UltraChat: the conversation, not its first question again.
        (
            {"prompt": "Dry?", "prompt_id": "7", "messages": ASK + YES},
            Demonstration((), ASKED + YESES),
            ["prompt", "prompt_id"],
        ),
        (
            {"text": "Q: a A: b", "label": 1, "instruction": "a"},
            Demonstration("", "Q: a A: b"),
            ["label", "instruction"],
        ),
        ({"prompt": "a", "completion": "b", "system": None, "images": []}, Demonstration("a", "b"), ["images"]),
        (
            {"prompt": "Be brief. a", "completion": "b", "system": "Be brief."},
            Demonstration("Be brief. a", "b"),
            ["system"],
        ),
        ({"question": "Why", "chosen": "Why b", "rejected": "Why c"}, Preference("Why", " b", " c"), ["question"]),
        ({"prompt": "a", "answer": "b", "solution": {"x": 1}}, Prompt("a"), ["answer", "solution"]),
        (
            {"prompt": "a", "completions": ["b", "c"], "ranks": [2, 1], "scores": [1, 2]},
            Ranking("a", ("b", "c"), (2, 1)),
            ["scores"],
        ),
        ({"prompt": "a", "completion": "b", "tools": [], "chat_template_kwargs": {}}, Demonstration("a", "b"), []),
        ({"prompt": [{"role": "user", "content": "Dry?", "name": None}]}, Prompt(ASKED), []),
    ],
)
def test_published_formats_are_read_and_other_keys_are_counted(tmp_path, line, record, unread):
    found = read_records(write(tmp_path / "a.jsonl", [line, line]))
    assert found.records == [record, record] and found.unread == dict.fromkeys(unread, 2)


@pytest.mark.parametrize(
    "line, reason",
    [
        ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, "TRL's stepwise supervision"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [0.1, 0.9]}, "scores has a number for each; give ranks"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "ShareGPT's format.* rename conversations to messages"),
        ({"messages": [{"from": "human", "value": "a"}]}, r"messages\[0\] is in ShareGPT's format"),
        ({"instruction": "a", "input": "", "output": "b"}, "Alpaca's format"),
        ({"instruction": "a", "completions": [{"response": "b"}]}, "UltraFeedback before it was made into pairs"),
        ({"question": "a", "answer": "b"}, "question and answer, which is not read here; rename them"),
        (
            {"system": "s", "question": "Why b?", "chosen": "It a", "rejected": "It b"},
            "system is not read; write its words",
        ),
        ({"question": "Why?", "chosen": "It a", "rejected": "It b"}, "there is no prompt, and question is not read"),
        ({"input": "Why?", "chosen": ASK + YES, "rejected": ASK + NO}, "there is no prompt, and input is not read"),
        ({"history": [["a", "b"]], "chosen": "It a", "rejected": "It b"}, "history is not read"),
        ({"system_prompt": "Be kind.", "messages": ASK + YES}, "system_prompt is not read"),
        ({"prompt": "a", "completion": "b", "images": ["a.png"]}, "images cannot be read here, only text"),
        ({"prompt": "Wet?", "chosen": ASK + YES, "rejected": ASK + NO}, "share holds the prompt"),
        (
            {"prompt": ASK, "chosen": ASK + YES, "rejected": NO},
            "chosen repeats the prompt and another completion does not",
        ),
        ({"prompt": "a", "chosen": "b"}, "there is chosen and no rejected"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen is null"),
        ({"prompt": "a", "completion": None}, "completion is null"),
        ({"prompt": "a", "completion": "b", "label": None}, "label must be true or false, got None"),
        ({"prompt": "a", "label": True}, "there is label and no completion"),
        ({"completion": "b"}, "there is completion and no prompt"),
        ({"messages": "[]"}, "messages must be a list of at least one message"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"text": ASK}, "text must be a string, got list; conversations are messages"),
        ({"prompt": []}, "prompt must have at least one message"),
        ({"prompt": [{"role": "", "content": "a"}]}, r"prompt\[0\] must be an object"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            r"prompt\[0\].content has a part of the type 'image'",
        ),
        ({"prompt": [{"role": "user", "content": {"a": 1}}]}, r"prompt\[0\] must be an object"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": {}}]}, "must be an object|must be a list of objects"),
        ({"messages": ASK, "tools": "weather"}, "tools is a string that is not JSON"),
        ({"messages": ASK, "tools": ["weather"]}, "tools must be a list of objects"),
        ({"text": "a", "tools": TOOLS}, "tools can be given to a chat template only"),
        (
            {"messages": ASK, "chat_template_kwargs": {"add_generation_prompt": True}},
            "must not hold add_generation_prompt",
        ),
        ({"messages": ASK, "chat_template_kwargs": {"x": float("inf")}}, "a number that is not finite"),
        ({"messages": [{**ASK[0], "weight": float("nan")}]}, r"messages\[0\] holds a number that is not finite"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "margin must lie between"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2**70]}, "ranks must lie between"),
    ],
)
def test_what_is_of_another_format_or_would_change_the_text_is_refused_by_name(line, reason):
    with pytest.raises(ValueError, match=reason):
        parse_record(line)


def test_what_a_row_gives_its_template_is_kept():
    record = parse_record(
        {"messages": ASK + CALL, "tools": json.dumps(TOOLS), "chat_template_kwargs": {"thinking": False}}
    )
    first, second = record.completion
    assert json.loads(first.variables) == {"tools": TOOLS, "thinking": False} and first[:3] == ASKED[0][:3]
    assert second.content == "" and second.as_dict() == CALL[0]
    pair = parse_record({"chosen": ASK + YES, "rejected": ASK + NO, "tools": TOOLS})
    assert json.loads(pair.prompt[0].variables) == {"tools": TOOLS} and (pair.chosen, pair.rejected) == (YESES, NOES)
    alone = parse_record({"prompt": [], "completion": ASK + YES, "documents": [{"text": "a"}]})
    assert json.loads(alone.completion[0].variables) == {"documents": [{"text": "a"}]}


def test_rankings_give_all_pairs_except_ties():
    ranking = Ranking("p", ("worst", "best", "middle", "other"), (3, 1, 2, 2))
    pairs = [(pair.chosen, pair.rejected) for pair in ranking_pairs(ranking)]
    assert set(pairs) == {
        ("best", "middle"),
        ("best", "other"),
        ("best", "worst"),
        ("middle", "worst"),
        ("other", "worst"),
    }
    assert len(pairs) == 5


def test_a_bad_line_is_named_or_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x"}, "", "{", {"prompt": 1}, {"prompt": "y"}])
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}, line 3: not JSON .* --skip-bad\.$"):
        read_records(path)
    found = read_records(path, skip_bad=True)
    assert found.records == [Prompt("x"), Prompt("y")]
    assert [(bad.line, bad.path) for bad in found.bad] == [(3, path), (4, path)]
    assert "prompt must be a string" in found.bad[1].reason


def test_a_folder_is_read_in_order_of_names_and_links_out_of_it_are_refused(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    write(folder / "b.jsonl", [{"prompt": "2"}])
    write(folder / "a.jsonl.gz", [{"prompt": "1"}])
    write(folder / "sub" / "c.jsonl", [{"prompt": "3"}])
    write(folder / "notes.txt", ["no data"])
    assert [record.prompt for record in read_records(folder).records] == ["1", "2", "3"]
    outside = write(tmp_path / "secret.jsonl", [{"prompt": "4"}])
    (folder / "z.jsonl").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of the folder"):
        read_records(folder)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(DataError, match="There is no file or folder"):
        read_records(tmp_path / "missing")
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        read_records(tmp_path)
    cut = write(tmp_path / "cut.jsonl.gz", [{"prompt": str(number)} for number in range(2000)])
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz, after line \d+: not readable"):
        read_records(cut)
    half = write(tmp_path / "half.jsonl", ['{"prompt": "\\ud800"}', "[" * 100000])
    found = read_records(half, skip_bad=True).bad
    assert [line.reason for line in found] == ["a text holds half of a surrogate pair.", "nested too deeply."]
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary\.jsonl, after line 0: not readable as text"):
        read_records(binary)
    with pytest.raises(DataError, match="holds no line of data"):
        read_records(write(tmp_path / "empty.jsonl", [""]))


def test_transcripts_become_conversations():
    told = "\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    found = hh_rlhf.parse({"chosen": told + " yes", "rejected": told + ""})
    assert found.prompt == (Message("user", "a\n\nb"), Message("assistant", "c"), Message("user", "d"))
    assert (found.chosen, found.rejected) == ((Message("assistant", "yes"),), (Message("assistant", ""),))
    for line, reason in (
        ({"chosen": told}, "strings chosen and rejected"),
        ({"chosen": "hello", "rejected": told}, "must begin with a blank line"),
        ({"chosen": told, "rejected": told}, "are the same"),
        ({"chosen": told + "\n\nHuman: x", "rejected": told}, "go on with an Assistant's turn"),
    ):
        with pytest.raises(ValueError, match=reason):
            hh_rlhf.parse(line)


@pytest.mark.skipif(not SHARED.exists(), reason=f"HH-RLHF is missing: {SHARED}")
def test_every_published_pair_is_parsed():
    found = read_records(SHARED / "harmless-base-test.jsonl.gz", hh_rlhf.parse)
    assert len(found.records) == 2312 and not found.bad
    with gzip.open(SHARED / "harmless-base-test.jsonl.gz", "rt") as stream:
        lines = [json.loads(line) for line in stream]
    names = {"user": "Human", "assistant": "Assistant"}

    def squeezed(text):
        return "".join(text.split())

    for pair, line in zip(found.records, lines, strict=True):
        for name in ("chosen", "rejected"):
            told = "".join(f"{names[turn.role]}:{turn.content}" for turn in pair.prompt + getattr(pair, name))
            assert squeezed(told) == squeezed(line[name])
    assert sum(len(pair.chosen) + len(pair.rejected) > 2 for pair in found.records) == 5
    assert sum(pair.chosen[0].content == "" for pair in found.records) == 4


def test_plain_text_is_one_demonstration_a_line(tmp_path):
    (tmp_path / "b.txt").write_text("Once there was a dog.\n\n  It ran. \n")
    with gzip.open(tmp_path / "a.txt.gz", "wt") as stream:
        stream.write('{"prompt": "not JSON here"}\n')
    records, bad, _ = read_records(tmp_path)
    assert [record.completion for record in records] == [
        '{"prompt": "not JSON here"}',
        "Once there was a dog.",
        "  It ran. ",
    ]
    assert not bad and all(record.prompt == "" for record in records)
