"""The widget's side of the conversation: the page's requests, one answer each, and a step of the run after labels."""

import json

import pytest

from jaxrlhf.labelling.board import Board
from jaxrlhf.labelling.pairs import make_pair
from jaxrlhf.labelling.queue import Queue
from jaxrlhf.labelling.store import LabelStore
from jaxrlhf.labelling.widget import label_widget, responder


def pairs(*numbers):
    return [make_pair("people", f"Question {n}?", f"first {n}", f"second {n}") for n in numbers]


@pytest.fixture
def queue():
    return Queue(LabelStore(None), repeats=0.0)


def talk(respond, name, **fields):
    """The one answer to a message, as it arrives in the browser."""
    answers = []
    respond({"name": name, "fields": {"tab": "t"} | fields}, answers.append)
    (answer,) = answers
    return json.loads(json.dumps(answer))


def test_labels_reach_the_queue_and_steps_follow_them(queue):
    queue.add(pairs(0, 1))
    steps = []

    def after():
        if queue.counts()["left"] == 0 and not steps:
            steps.append(queue.counts()["given"])
            queue.close([pair.key for pair in pairs(0, 1)])
            queue.add(pairs(2))

    respond = responder(queue, Board("Which?"), person="me", after=after)
    shown = talk(respond, "next")
    for _ in range(2):
        wins = "left" if shown["pair"]["left"][0]["text"].startswith("first") else "right"
        shown = talk(respond, "label", lease=shown["pair"]["lease"], choice=wins, note="", seconds=1.0)
        assert shown["saved"] and shown["tab"] == "t"
    assert steps == [2] and shown["pair"]["prompt"][0]["text"] == "Question 2?"
    assert shown["counts"]["left"] == 1 and shown["undo"] == ""
    assert [queue.labels(pair.key) for pair in pairs(0, 1)] == [[1.0], [1.0]]
    last = talk(respond, "label", lease=shown["pair"]["lease"], choice="tie", note="", seconds=1.0)
    assert last["pair"] is None and last["undo"]
    assert talk(respond, "undo", lease=last["undo"])["pair"]["prompt"] == shown["pair"]["prompt"]


def test_what_cannot_be_done_is_said_and_a_failing_step_is_shown_and_raised(queue):
    queue.add(pairs(0, 1))

    def after():
        raise RuntimeError("no memory")

    respond, answers = responder(queue, Board("Which?"), person="me", after=after), []
    shown = talk(respond, "next")
    gone = talk(respond, "label", lease="none", choice="left", note="", seconds=1.0)
    assert "no longer waiting" in gone["error"] and gone["pair"] == shown["pair"]
    message = {"tab": "t", "lease": shown["pair"]["lease"], "choice": "left", "note": "", "seconds": 1.0}
    with pytest.raises(RuntimeError, match="no memory"):
        respond({"name": "label", "fields": message}, answers.append)
    assert answers[0]["error"] == "RuntimeError: no memory" and answers[0]["pair"]["lease"] != shown["pair"]["lease"]
    assert len(queue.votes()) == 1


def test_two_views_are_two_tabs(queue):
    queue.add(pairs(0, 1))
    respond = responder(queue, Board("Which?"), person="me", after=lambda: None)
    leases = [talk(respond, "next", tab=tab)["pair"]["lease"] for tab in ("a", "b")]
    assert len(set(leases)) == 2 and talk(respond, "next", tab="a")["pair"]["lease"] == leases[0]


def test_the_widget_carries_the_pages_own_code(queue):
    pytest.importorskip("anywidget", reason="the widget needs the extra notebooks")
    queue.add(pairs(0))
    widget = label_widget(queue, Board("Which?"))
    sent = []
    widget.send = sent.append
    widget._handle_custom_msg({"name": "next", "fields": {"tab": "t"}}, [])
    assert sent[0]["pair"]["prompt"] == [{"role": "", "text": "Question 0?"}]
    assert "export function showTurns" in widget._esm and "export default" in widget._esm
    assert "innerHTML" not in widget._esm
