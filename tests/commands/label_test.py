"""`jaxrlhf label`: what it writes when all is labelled, and that a command which cannot be carried out leaves nothing."""

import dataclasses
import json
import socket

import pytest

pytest.importorskip("starlette", reason="the labelling page needs the extra labelling")
pytest.importorskip("uvicorn", reason="the labelling page needs the extra labelling")

from jaxrlhf.commands import label
from jaxrlhf.commands.data import read_all
from jaxrlhf.commands.label_data import pairs_of
from jaxrlhf.data.records import DataError
from jaxrlhf.labelling.queue import Queue
from jaxrlhf.labelling.store import LabelStore

ROWS = [{"prompt": f"Question {n}?", "chosen": f"long answer {n}", "rejected": f"no {n}"} for n in range(4)]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def settings(folder, data, **others):
    return label.Label(data=str(data), to=folder / "labels.jsonl", port=0, data_dir=folder / "data", **others)


def test_preferences_are_written_as_they_were_given(pairs, tmp_path):
    """Somebody prefers the short answer of every pair but one, which is a tie."""
    config = settings(tmp_path, pairs)
    queue = Queue(LabelStore(tmp_path / "labels.sqlite"), repeats=0.0)
    waiting = pairs_of(read_all(str(pairs), form="auto", skip_bad=False, data_dir=tmp_path).records).pairs
    queue.add(each.pair for each in waiting)
    for _ in ROWS:
        shown = queue.next("somebody", "tab")
        first_is_short = shown.pair.first[0].text.strip().startswith("no")
        left = "left" if first_is_short != shown.lease.swapped else "right"
        choice = "tie" if "2" in shown.pair.prompt[0].text else left
        queue.give("somebody", shown.lease.lease, choice)
    assert label.main(config) == config.to
    written = [json.loads(line) for line in config.to.read_text().splitlines()]
    assert [row["prompt"] for row in written] == [row["prompt"] for row in ROWS if "2" not in row["prompt"]]
    assert all(row["chosen"].startswith("no") and row["rejected"].startswith("long") for row in written)


@pytest.mark.parametrize(
    "others, error, message",
    [
        ({"data": "nowhere.jsonl"}, DataError, "There is no file or folder"),
        ({"repeats": 1.0}, ValueError, "--repeats must lie in"),
        ({"people_per_pair": 0}, ValueError, "--people-per-pair must be at least 1"),
        ({"temperature": 0.5}, ValueError, "--temperature does not apply without --policy"),
    ],
)
def test_what_cannot_be_carried_out_leaves_nothing(pairs, tmp_path, others, error, message):
    folder = tmp_path / "new"
    folder.mkdir()
    with pytest.raises(error, match=message):
        label.main(settings(folder, **{"data": pairs} | others))
    assert list(folder.iterdir()) == []


def test_sampled_pairs_outlive_a_page_that_cannot_be_served(here, tmp_path):
    """They took time; with them the journal stays, which knows the settings that they were sampled with."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        sampled = {"policy": here / "base", "max_new_tokens": 4}
        config = settings(tmp_path, here / "pairs.jsonl", **sampled)
        with pytest.raises(ValueError, match="cannot be served"):
            label.main(dataclasses.replace(config, port=taken.getsockname()[1]))
    assert len((tmp_path / "labels.pairs.jsonl").read_text().splitlines()) > 4
    with pytest.raises(ValueError, match="sampled with other settings"):
        label.main(dataclasses.replace(config, seed=1))
