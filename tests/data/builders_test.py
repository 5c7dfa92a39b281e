"""Round trips through prepared data; published files by checksum, from a local server."""

import functools
import hashlib
import http.server
import json
import pathlib
import subprocess
import sys
import threading

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
)
from jaxrlhf.data.builders import HH_RLHF, PublishedFile, download, prepare

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "hh-rlhf"
TALK = [{"role": "user", "content": "Hé?\n"}, {"role": "assistant", "content": ""}]
TOLD = (Message("user", "Hé?\n"), Message("assistant", ""))
ANSWER = [{"role": "assistant", "content": "Yes."}]


def write(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    "lines, records",
    [
        (
            [
                {"prompt": "a", "chosen": "b", "rejected": "c"},
                {"prompt": TALK, "chosen": ANSWER, "rejected": [], "margin": 0.1},
            ],
            [Preference("a", "b", "c"), Preference(TOLD, (Message("assistant", "Yes."),), (), 0.1)],
        ),
        (
            [
                {"prompt": TALK, "completions": [ANSWER, [], ANSWER + TALK], "ranks": [1, 3, 1]},
                {"prompt": "", "completions": ["x", ""]},
            ],
            [
                Ranking(TOLD, ((Message("assistant", "Yes."),), (), (Message("assistant", "Yes."), *TOLD)), (1, 3, 1)),
                Ranking("", ("x", ""), (1, 2)),
            ],
        ),
        ([{"prompt": "a", "completion": "b", "label": True}], [UnpairedPreference("a", "b", label=True)]),
        ([{"messages": TALK}, {"text": "Once."}], [Demonstration((), TOLD), Demonstration("", "Once.")]),
        ([{"prompt": TALK}, {"prompt": ""}], [Prompt(TOLD), Prompt("")]),
    ],
)
def test_records_come_back_as_they_were(tmp_path, lines, records):
    path = write(tmp_path / "data.jsonl", lines)
    for _ in range(2):  # prepared, then found
        splits, bad, _ = prepare(path, data_dir=tmp_path / "prepared")
        assert [splits["train"][index] for index in range(len(splits["train"]))] == records
        assert list(splits) == ["train"] and bad == []


def test_messages_come_back_with_all_that_templates_see(tmp_path):
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "é", "arguments": {"b": [1], "a": None}}}]}]
    lines = [
        {"messages": TALK + call, "tools": [{"z": 1, "y": 2}], "chat_template_kwargs": {"x": False}, "id": n}
        for n in (1, 2)
    ]
    splits, bad, unread = prepare(write(tmp_path / "data.jsonl", lines), data_dir=tmp_path / "prepared")
    assert list(splits["train"]) == [parse_record(line) for line in lines] and not bad and unread == {"id": 2}
    message = splits["train"][0].completion[2]
    assert message.as_dict() == call[0] and list(message.as_dict()["tool_calls"][0]["function"]["arguments"]) == [
        "b",
        "a",
    ]


def test_prompts_stay_in_their_split(tmp_path):
    lines = [{"prompt": f"p{number % 300}", "chosen": f"{number}", "rejected": "x"} for number in range(900)]
    splits, *_ = prepare(write(tmp_path / "a.jsonl", lines), held_out=0.2, data_dir=tmp_path / "prepared")
    prompts = {name: {source[index].prompt for index in range(len(source))} for name, source in splits.items()}
    assert not prompts["train"] & prompts["test"] and len(prompts["train"] | prompts["test"]) == 300
    assert sum(map(len, splits.values())) == 900
    assert abs(len(prompts["test"]) - 60) < 5 * (300 * 0.2 * 0.8) ** 0.5
    more, *_ = prepare(write(tmp_path / "a.jsonl", lines[:450]), held_out=0.2, data_dir=tmp_path / "prepared")
    assert {more["test"][index].prompt for index in range(len(more["test"]))} <= prompts["test"]
    assert len(more["train"]) < len(splits["train"])


def test_records_without_a_prompt_are_held_out_one_by_one(tmp_path):
    lines = [{"prompt": "", "chosen": f"{number}", "rejected": "x"} for number in range(200)]
    splits, *_ = prepare(write(tmp_path / "a.jsonl", lines), held_out=0.2, data_dir=tmp_path / "prepared")
    assert 15 < len(splits["test"]) < 65


def test_skipped_lines_are_remembered(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": 3}, {"prompt": "y"}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: prompt must be a string"):
        prepare(path, data_dir=tmp_path / "prepared")
    for _ in range(2):
        splits, bad, _ = prepare(path, skip_bad=True, data_dir=tmp_path / "prepared")
        assert len(splits["train"]) == 2
        assert [(line.path, line.line) for line in bad] == [(path, 2)] and "prompt must be" in bad[0].reason


def test_data_that_cannot_be_prepared_is_refused(tmp_path):
    mixed = write(tmp_path / "a.jsonl", [{"prompt": "x"}, {"text": "y"}])
    with pytest.raises(DataError, match=r"mixes kinds of records \(1 Demonstration, 1 Prompt\)"):
        prepare(mixed, data_dir=tmp_path / "prepared")
    bad = write(tmp_path / "b.jsonl", [{"text": None}, {"prompt": "a", "completion": 3}])
    with pytest.raises(
        DataError, match=r"No line of .*b\.jsonl can be read; the first bad one is line 1: no known format"
    ):
        prepare(bad, skip_bad=True, data_dir=tmp_path / "prepared")
    with pytest.raises(DataError, match=r"held-out share must lie in \[0, 1\), got 1"):
        prepare(mixed, held_out=1.0, data_dir=tmp_path / "prepared")
    with pytest.raises(DataError, match="No checksum is known for 'helpful'"):
        download("helpful", tmp_path)


def test_another_parser_prepares_the_data_again(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x"}])
    for text in ("one", "two"):
        splits, *_ = prepare(path, parse=lambda value, text=text: Prompt(text), data_dir=tmp_path / "prepared")
        assert splits["train"][0] == Prompt(text)


@pytest.fixture
def address(tmp_path):
    """A local server of one file."""
    folder = tmp_path / "served"
    folder.mkdir()
    write(folder / "pairs.jsonl", [{"prompt": "x"}])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/pairs.jsonl", folder / "pairs.jsonl"
        server.shutdown()
        thread.join()


def test_a_published_file_is_checked(tmp_path, address):
    url, file = address
    content = file.read_bytes()
    right = PublishedFile(url, len(content), hashlib.sha256(content).hexdigest())
    found = download(right, tmp_path / "data")
    assert found.read_bytes() == content
    file.unlink()
    assert download(right, tmp_path / "data") == found
    with pytest.raises(DataError, match=r"pairs\.jsonl cannot be fetched"):
        download(right, tmp_path / "elsewhere")


def test_a_file_of_another_checksum_is_refused(tmp_path, address):
    url, file = address
    wrong = PublishedFile(url, len(file.read_bytes()), "0" * 64)
    with pytest.raises(DataError, match=r"pairs\.jsonl gave has another checksum than 0000"):
        download(wrong, tmp_path / "data")
    assert not list((tmp_path / "data" / "downloads").glob("0000*"))


def test_tensorflow_is_not_needed():
    code = "import sys, jaxrlhf.data.builders; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


@pytest.mark.skipif(not SHARED.exists(), reason=f"HH-RLHF is missing: {SHARED}")
def test_the_published_pairs(tmp_path):
    file = SHARED / "harmless-base-test.jsonl.gz"
    known = HH_RLHF["harmless-base/test"]
    assert (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size) == (known.checksum, known.size)
    splits, bad, _ = prepare(file, parse=hh_rlhf.parse, held_out=0.1, data_dir=tmp_path)
    assert len(splits["train"]) + len(splits["test"]) == 2312 and not bad
    assert 150 < len(splits["test"]) < 320
    assert splits["test"][3].prompt[-1].role == "user"
    assert len(list(splits["test"])) == len(splits["test"])


@pytest.mark.parametrize("count", [2, 3, 10])
def test_of_few_records_those_of_one_prompt_are_held_out(tmp_path, count):
    rows = [
        {"prompt": f"Question {number}", "chosen": "a", "rejected": "b"} for number in range(count) for _ in range(2)
    ]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(tmp_path / "few.jsonl", held_out=1e-9, data_dir=tmp_path / "prepared")
    assert {name: len(split) for name, split in prepared.splits.items()} == {"train": 2 * count - 2, "test": 2}
    alone = prepare(tmp_path / "few.jsonl", held_out=0.0, data_dir=tmp_path / "prepared")
    assert {name: len(split) for name, split in alone.splits.items()} == {"train": 2 * count}
