"""How a command recognises the format of its data, and what it says about lines and keys that it does not read."""

import json

import pytest

from jaxrlhf.commands.data import open_records, skipped_lines, unread_rows
from jaxrlhf.data import DataError, Message, Preference

START = "\n\nHuman: Dry?\n\nAssistant:"
PUBLISHED = {"chosen": START + " Yes.", "rejected": START + " No."}
EXPLICIT = {"prompt": START, "chosen": " Yes.", "rejected": " No."}
TALK = Preference((Message("user", "Dry?"),), (Message("assistant", "Yes."),), (Message("assistant", "No."),))


def opened(tmp_path, *lines, form="auto", skip_bad=False):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return open_records(str(path), form=form, held_out=0.0, skip_bad=skip_bad, data_dir=tmp_path / "prepared")


@pytest.mark.parametrize(
    "line, form, record",
    [
        (PUBLISHED, "auto", TALK),
        (PUBLISHED | {"prompt": None}, "auto", TALK),
        (PUBLISHED, "records", Preference(START, " Yes.", " No.")),
        (EXPLICIT, "auto", Preference(START, " Yes.", " No.")),
        (
            {"prompt": "As they say,", "chosen": f"a{START}", "rejected": "b"},
            "auto",
            Preference("As they say,", f"a{START}", "b"),
        ),
        ({"chosen": f"Say{START} a", "rejected": f"Say{START} b"}, "auto", Preference(f"Say{START}", " a", " b")),
    ],
)
def test_formats_are_told_by_keys_and_types(tmp_path, line, form, record):
    assert list(opened(tmp_path, line, form=form).splits["train"]) == [record]


def test_an_unreadable_first_line_does_not_decide_the_format(tmp_path):
    prepared = opened(tmp_path, "x", PUBLISHED, PUBLISHED | {"id": 1}, skip_bad=True)
    assert list(prepared.splits["train"]) == [TALK, TALK]
    assert skipped_lines(prepared) == [
        "Skipped pairs.jsonl, line 1: not JSON (Expecting value at column 1).",
        "Keys not read: id (1).",
    ]
    assert unread_rows(prepared) == {"keys not read": "id (1)"}
    assert unread_rows(opened(tmp_path, PUBLISHED)) == {}


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize(
    "lines, form, reason",
    [
        ([EXPLICIT], "hh-rlhf", "has no prompt beside chosen and rejected; --format records reads this line"),
        (
            [{"prompt": "a", "completion": "b"}],
            "hh-rlhf",
            "strings chosen and rejected; --format records reads this line",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "auto", "chosen and rejected are the same"),
        ([{"x": 1}], "auto", "no known format has the keys x"),
    ],
)
def test_the_flag_that_works_is_named_and_no_other(tmp_path, lines, form, reason, skip_bad):
    with pytest.raises(DataError, match=reason) as caught:
        opened(tmp_path, *lines, form=form, skip_bad=skip_bad)
    assert ("--format" in str(caught.value)) == ("--format" in reason) and "line 1: " in str(caught.value)


def test_a_line_of_another_format_is_named(tmp_path):
    with pytest.raises(DataError, match=r"line 2: .*--format records reads this line\. Mend"):
        opened(tmp_path, PUBLISHED, EXPLICIT)
    prepared = opened(tmp_path, PUBLISHED, EXPLICIT, skip_bad=True)
    assert [(line.line, "--format records" in line.reason) for line in prepared.bad] == [(2, True)]
