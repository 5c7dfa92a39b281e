"""Parquet and CSV files give the records of the same data as JSON lines; bad ones are named with their row or line."""

import csv
import datetime
import gzip
import io
import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrlhf.commands.data import open_records, read_all, skipped_lines
from jaxrlhf.data import DataError, Demonstration, Prompt, read_records

ASK, YES, NO = (
    [{"role": role, "content": text}]
    for role, text in (("user", 'Dry,\n"or" wet?'), ("assistant", "Yes."), ("assistant", "No."))
)
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
TALK = [*ASK, CALL, {"role": "tool", "content": "7"}, *YES]
ROWS = {
    "preference": [
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5},
        {"prompt": "a, b", "chosen": '"', "rejected": "\n"},
    ],
    "implicit prompt": [{"chosen": ASK + YES, "rejected": ASK + NO}],
    "conversations": [
        {"prompt": ASK, "chosen": YES, "rejected": NO, "source": "x"},
        {"prompt": ASK, "chosen": NO, "rejected": YES},
    ],
    "ranking": [
        {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [1, 2, 2]},
        {"prompt": "a", "completions": ["b", "c"]},
    ],
    "unpaired": [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": False}],
    "messages": [
        {"messages": TALK, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": ASK + YES},
    ],
    "text": [{"text": " true "}, {"text": "12"}, {"text": "[1, 2]"}],
    "published": [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}],
}


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(
            pa.Table.from_pylist(rows, schema=pa.unify_schemas([pa.Table.from_pylist([row]).schema for row in rows])),
            path,
        )
    else:
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, list({name: None for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(
            {name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in row.items()} for row in rows
        )
        path.write_bytes(stream.getvalue().encode())
    return path


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize("name", ROWS)
def test_tables_give_the_records_of_json_lines(tmp_path, name, ending):
    rows = ROWS[name]
    expected, found = (
        read_all(str(write(tmp_path / f"a.{kind}", rows)), form="auto", skip_bad=False, data_dir=tmp_path)
        for kind in ("jsonl", ending)
    )
    assert found == expected and len(found.records) == len(rows)


@pytest.mark.parametrize(
    "columns, expected",
    [
        ({"prompt": pa.array(["a", "b"]).dictionary_encode()}, [Prompt("a"), Prompt("b")]),
        ({"prompt": pa.array(["a", "b"], pa.large_string())}, [Prompt("a"), Prompt("b")]),
        ({"prompt": pa.array(["a", "b"], pa.string_view())}, [Prompt("a"), Prompt("b")]),
        ({"prompt": ["a", "b"], "completion": pa.array([None, None], pa.null())}, "row 1: completion is null"),
        ({"prompt": ["a", None]}, r"row 2: no known format has the keys \(none\)"),
        ({"prompt": [b"a", b"b"]}, "row 1: prompt must be a string or a list of messages, got bytes"),
        ({"prompt": [[{"role": "user", "content": "a", "day": datetime.date(2020, 1, 1)}]]}, "row 1: .* that is no JSON"),
        ({"prompt": [[{"role": "user"}]]}, r"row 1: prompt\[0\] must be an object"),
        ({"prompt": ["a"], "images": [[{"bytes": b"x"}]]}, "row 1: images cannot be read here"),
        ({"prompt": ["a"], "kwargs": [pa.scalar({"a": 1})]}, [Prompt("a")]),
        (
            {"prompt": ["a"], "m": pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int32()))},
            "row 1: m holds a map with a key that stands twice",
        ),
    ],
)  # fmt: skip
def test_columns_of_any_type_are_read_or_refused_by_row(tmp_path, columns, expected):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=1)
    if isinstance(expected, str):
        with pytest.raises(
            DataError, match=rf"a\.parquet, {expected}.* Mend the row, or skip such rows with --skip-bad\."
        ):
            read_records(tmp_path)
    else:
        assert read_records(tmp_path).records == expected


def test_a_row_that_is_not_utf8_is_named_and_skipped(tmp_path):
    buffers = pa.array([b"a", b"\xff", b"c"], pa.binary()).buffers()
    pq.write_table(pa.table({"prompt": pa.Array.from_buffers(pa.string(), 3, buffers)}), tmp_path / "a.parquet")
    found = read_records(tmp_path, skip_bad=True)
    assert found.records == [Prompt("a"), Prompt("c")]
    assert skipped_lines(found) == ["Skipped a.parquet, row 2: prompt is not UTF-8."]


def test_rows_are_numbered_through_groups_and_files_follow_by_name(tmp_path):
    (tmp_path / "data").mkdir()
    for name, start in (("train-00001-of-00002", 1500), ("train-00000-of-00002", 0)):
        prompts = [f"{start + index}" for index in range(1500)]
        write(tmp_path / "data" / f"{name}.parquet", [{"prompt": prompt} for prompt in prompts])
    assert read_records(tmp_path).records == [Prompt(f"{index}") for index in range(3000)]
    table = pa.table({"prompt": [*map(str, range(2999)), None]})
    pq.write_table(table, tmp_path / "data" / "train-00001-of-00002.parquet", row_group_size=700)
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet, row 3000: "):
        read_records(tmp_path)


def damaged(content: bytes) -> bytes:
    return content[:30] + bytes(60) + content[90:]


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda content: content[:-20], "after row 0: not readable as Parquet .*; copy the file again"),
        (lambda content: b"", "after row 0: not readable as Parquet"),
        (lambda content: b'{"prompt": "a"}', "after row 0: not readable as Parquet"),
        (gzip.compress, "after row 0: not readable as Parquet"),
        (damaged, "not readable as Parquet"),
    ],
)
def test_a_damaged_parquet_file_is_named(tmp_path, spoil, reason):
    file = write(tmp_path / "a.parquet", [{"prompt": "a" * 99}])
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(DataError, match=rf"a\.parquet.* {reason}"):
        read_records(tmp_path, skip_bad=True)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("prompt,completion\r\na,b\r\n", [Demonstration("a", "b")]),
        ("\ufeffprompt,completion\na,b", [Demonstration("a", "b")]),
        ("prompt,completion\ra,b\r", [Demonstration("a", "b")]),
        ('\n\nprompt\n\n"a\r\n\u2028b"\n', [Prompt("a\r\n\u2028b")]),
        ("prompt\n" + "a" * 200_000, [Prompt("a" * 200_000)]),
        (",prompt\n0,a\n", [Prompt("a")]),
        ("prompt,completion\na,b\n,\n,\n", [Demonstration("a", "b")]),
        ("prompt,completion,label\na,b,True\n", read_records),
        ("prompt,completion\na,b,c\n", "line 2: the header has 2 fields and this row 3; quote fields with commas"),
        ('prompt,completion\n"a\n\n",b\nc\n', "line 5: the header has 2 fields and this row 1"),
        ('prompt\n"a"b\n', "line 2: not CSV .*; write a quote within a quoted field twice"),
        ('prompt\nb\n"a\nb\n', "line 3: a quote that is opened in this row is never closed"),
        ("prompt,completion\n,b\n", "line 2: there is completion and no prompt"),
        ("prompt,completion,label\na,b,1\n", "line 2: label must be true or false, got '1'"),
        ("prompt,chosen,rejected,margin\na,b,c,x\n", "line 2: margin must be a number, got 'x'"),
        ("prompt,chosen,rejected,margin\na,b,c,nan\n", "line 2: margin must be finite"),
        ("messages\nhello\n", "line 2: messages is not JSON"),
        ("prompt\n\"[{'role': 'user', 'content': 'a'}]\"\n", "line 2: prompt is not JSON"),
        ('prompt,completions,scores\na,"[""b"", ""c""]","[1, 3]"\n', "line 2: completions without ranks .* scores"),
        ("prompt,system\na,be kind\n", "line 2: system is not read"),
        ("instruction,output\na,b\n", "line 2: this is Alpaca's format"),
        ("hello,there\na,b\n", "line 2: no known format has the keys hello, there"),
        ("prompt;completion\na;b\n", "has one column, 'prompt;completion'; separate its fields with commas"),
        ("prompt,prompt\na,b\n", "has two columns 'prompt'; rename one"),
        ("prompt, completion\na, b\n", "has spaces around the name of the column ' completion'; take them out"),
        ("prompt\n", "holds no line of data"),
    ],
)
def test_csv_is_read_or_named_with_the_line_that_its_row_begins_on(tmp_path, content, expected):
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode())
    if isinstance(expected, str):
        with pytest.raises(DataError, match=rf"a\.csv.* {expected}"):
            read_records(path)
    elif isinstance(expected, list):
        for encoded, name in ((content.encode(), "a.csv"), (gzip.compress(content.encode()), "a.csv.gz")):
            path.unlink(missing_ok=True)
            path = tmp_path / name
            path.write_bytes(encoded)
            assert read_records(tmp_path).records == expected
        path.write_bytes(content.encode("utf-16"))
        assert read_records(tmp_path).records == expected
    else:
        assert read_records(path).records[0].label is True


@pytest.mark.parametrize(
    "content, reason",
    [
        ("prompt\ncafé\n", r"line 2: prompt is not UTF-8 \(byte 0xe9 at column 4\); save the file as UTF-8"),
        ("prompt,é\na,b\n", "the header: not UTF-8"),
    ],
)
def test_csv_that_is_not_utf8_is_named(tmp_path, content, reason):
    (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=reason):
        read_records(tmp_path)


def test_bad_rows_of_csv_are_skipped_and_the_rest_read(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\na,b\n"x"y,b\nc\nd,e\n')
    found = read_records(tmp_path, skip_bad=True)
    assert found.records == [Demonstration("a", "b"), Demonstration("d", "e")]
    assert [line.line for line in found.bad] == [3, 4]


def test_a_folder_of_two_formats_or_of_column_folders_is_refused(tmp_path):
    write(tmp_path / "a.csv", [{"prompt": "a"}])
    write(tmp_path / "a.parquet", [{"prompt": "a"}])
    with pytest.raises(DataError, match=r"holds files that end in \.csv and \.parquet, perhaps of the same data"):
        read_records(tmp_path)
    (tmp_path / "a.csv").unlink()
    (tmp_path / "label=true").mkdir()
    (tmp_path / "a.parquet").rename(tmp_path / "label=true" / "a.parquet")
    with pytest.raises(DataError, match="lies in the folder of a column, label=true, which is not read"):
        read_records(tmp_path)


def test_tables_are_prepared_as_their_lines_are(tmp_path):
    rows = [{"prompt": f"{index}", "chosen": "b", "rejected": "c"} for index in range(20)]
    prepared = [
        open_records(
            str(write(tmp_path / f"a.{kind}", rows)), form="auto", held_out=0.2, skip_bad=False, data_dir=tmp_path / "p"
        )
        for kind in ("jsonl", "parquet", "csv")
    ]
    splits = [{name: list(split) for name, split in each.splits.items()} for each in prepared]
    assert splits[0] == splits[1] == splits[2] and set(splits[0]) == {"train", "test"}
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not readable as Parquet"):
        open_records(str(tmp_path / "a.parquet"), form="auto", held_out=0.2, skip_bad=True, data_dir=tmp_path / "p")
