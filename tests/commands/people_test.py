"""People label within a run: a person who speaks the page's own requests, stopped and resumed runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the labelling page needs the extra labelling")
pytest.importorskip("uvicorn", reason="the labelling page needs the extra labelling")

# Otherwise imported by httpx in the person's thread, while other libraries change how modules are imported.
import httpcore  # noqa: F401
import httpx

from jaxrlhf.commands import align, evaluate
from jaxrlhf.commands.annotators import ComparisonAnnotator
from jaxrlhf.commands.page_annotator import STORE, People
from jaxrlhf.commands.people import PageConfig
from jaxrlhf.labelling.store import LabelStore, Vote
from jaxrlhf.training.resume import StoppedError


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def text_of(turns):
    return "".join(turn["text"] for turn in turns)


class Person:
    """Labels by the number of suns until told to leave; `after` is called with the number of labels given."""

    def __init__(self, journal, port, *, after=lambda count: None, cookies=None):
        self.cookies = cookies
        self.given, self.seen, self.board, self._after = 0, [], {}, after
        self._journal, self._port, self.leave = journal, port, threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self.leave.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _work(self):
        token = self._journal.with_name(f"{self._journal.name}.token")
        address = f"http://127.0.0.1:{self._port}"
        with httpx.Client(base_url=address, headers={"origin": address}, timeout=10, cookies=self.cookies) as client:
            while not self.leave.is_set():
                try:
                    if "jaxrlhf" not in str(client.cookies):
                        client.get(f"/?token={token.read_text()}")
                    shown = client.post("/api/next", json={"tab": "t"}).json()["pair"]
                    if shown is None:
                        time.sleep(0.02)
                        continue
                    self._label(client, shown)
                    self.cookies = dict(client.cookies)
                except (httpx.HTTPError, FileNotFoundError):
                    time.sleep(0.05)

    def _label(self, client, shown):
        left, right = (text_of(shown[side]).count("sun") for side in ("left", "right"))
        choice = "tie" if left == right else "left" if left > right else "right"
        fields = {"tab": "t", "lease": shown["lease"], "choice": choice, "note": "", "seconds": 1.0}
        answer = client.post("/api/label", json=fields)
        if answer.status_code == 200:
            self.given, self.board = self.given + 1, answer.json()["board"]
            self.seen.append((text_of(shown["prompt"]), *sorted(text_of(shown[side]) for side in ("left", "right"))))
            self._after(self.given)


def settings(here, name, port, **more):
    shared = {"policy": here / "base", "data": str(here / "pairs.jsonl"), "held_out": 0.25, "evaluation_answers": 4}
    shared |= {"policy_learning_rate": 1e-2, "warmup": 1, "data_dir": here / "prepared", "output": here / "people"}
    shared |= {"steps": 3, "batch_size": 4, "pairs": 2, "max_new_tokens": 6, "max_prompt": 16, "evaluations": 1}
    shared |= {"annotator": "browser", "run": name, "port": port, "repeats": 0.0, "labels_per_step": 5}
    return align.Align(**shared | more)


def test_people_label_while_a_run_waits_and_a_stopped_one_goes_on_with_the_same_pairs(here, report_text, capsys):
    port = free_port()
    with Person(here / "people" / "whole" / STORE, port) as person:
        whole = align.main(settings(here, "whole", port))
    assert person.given == 15
    # Of the steps before the last; pairs of the policy's own have no win rate by labels. The reward is 0 at first.
    rows = person.board["curve"]
    assert [row["step"] for row in rows] == [1, 2] and not any("win_rate" in row for row in rows)
    assert [row["reward_win_rate"] for row in rows] == [0.5, 0.5]
    printed = capsys.readouterr().out
    assert "5 labels to give at http://127.0.0.1:" in printed
    report = report_text(whole)
    assert "Person 1: 15 labels (" in report and "no label" in report
    results = json.loads((whole / "results.json").read_text())
    assert results["labels"] == 15 and np.isfinite(results["aligned"]["kl"])
    votes = LabelStore(whole / STORE).votes()
    assert len(votes) == 15 and len({vote.pair for vote in votes}) == 15
    # A new reward expects nothing, and the first step's learning rate is 0.
    assert [vote.forecast for vote in votes[:10]] == [0.5] * 10
    assert all(0 < vote.forecast < 1 and vote.forecast != 0.5 for vote in votes[10:])

    def stop(count):
        if count == 7:
            first.leave.set()
            os.kill(os.getpid(), signal.SIGTERM)

    with Person(here / "people" / "stopped" / STORE, port, after=stop) as first, pytest.raises(StoppedError) as stopped:
        align.main(settings(here, "stopped", port))
    assert first.given == 7 and "stopped after step 1 of 3" in str(stopped.value)
    # The same browser, which held a pair when the run stopped.
    with Person(here / "people" / "stopped" / STORE, port, cookies=first.cookies) as second:
        resumed = align.main(settings(here, "stopped", port, resume=True))
    assert first.given + second.given == 15 and not set(first.seen) & set(second.seen)
    for name in ("policy/model.safetensors", "reward/model.safetensors"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    with Person(here / "prepared" / STORE, port) as third:
        judged = evaluate.main(
            evaluate.Evaluate(
                policy=(whole,), reference=here / "base", data=str(here / "pairs.jsonl"), annotator="browser", port=port,
                prompts=4, max_new_tokens=6, data_dir=here / "prepared", output=here / "people", repeats=0.0,
            )
        )  # fmt: skip
    assert third.given <= 4 and "Person 1:" in report_text(judged)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_pairs_and_loses_no_label(here):
    port = free_port()

    def command(name, *more):
        config = settings(here, name, port, steps=4, reuse=1, kept_labels=16, choose="disagreement")
        fields = (
            "policy",
            "data",
            "held_out",
            "evaluation_answers",
            "policy_learning_rate",
            "warmup",
            "data_dir",
            "output",
        )
        fields += (
            "steps",
            "batch_size",
            "pairs",
            "max_new_tokens",
            "max_prompt",
            "evaluations",
            "annotator",
            "run",
            "port",
        )
        fields += ("repeats", "labels_per_step", "reuse", "kept_labels", "choose")
        flags = [text for field in fields for text in (f"--{field.replace('_', '-')}", str(getattr(config, field)))]
        return [sys.executable, "-m", "jaxrlhf.commands.main", "align", *flags, *more]

    with Person(here / "people" / "quiet" / STORE, port) as person:
        subprocess.run(command("quiet"), check=True, timeout=200, cwd=here)
    cookies, given, seen = None, 0, []
    for kill_after in (3, 6, 4, None):
        run = subprocess.Popen(command("killed", "--resume", "--checkpoint-steps", "1"), cwd=here)

        def after(count, run=run, kill_after=kill_after):
            if count == kill_after:
                now.leave.set()
                run.send_signal(signal.SIGKILL)

        with Person(here / "people" / "killed" / STORE, port, after=after, cookies=cookies) as now:
            assert run.wait(timeout=200) == (0 if kill_after is None else -signal.SIGKILL)
        cookies, given, seen = now.cookies, given + now.given, seen + now.seen
    assert given == person.given == 20 and len(set(seen)) == 20
    for name in ("policy/model.safetensors", "reward/model.safetensors"):
        paths = (here / "people" / folder / name for folder in ("quiet", "killed"))
        assert len({path.read_bytes() for path in paths}) == 1


def test_labels_of_several_are_their_majority_and_equal_completions_a_tie(tmp_path):
    people = People(PageConfig(port=0, people_per_pair=3, repeats=0.0), evaluates=True)

    def label():
        queue = people._served.queue
        for person, wanted in (("a", "p"), ("b", "p"), ("c", "q")):
            while (shown := queue.next(person, "tab")) is None:
                time.sleep(0.01)
            swapped, first = shown.lease.swapped, shown.pair.first[0].text
            better = first == wanted
            queue.give(person, shown.lease.lease, "left" if better != swapped else "right")

    with people.serve(tmp_path / "journal.sqlite"):
        thread = threading.Thread(target=label)
        thread.start()
        assert people(["x", "x"], ["p", "same"], ["q", "same"]) == [1.0, 0.5]
        thread.join(10)
        # It is not asked again, and in the other order it is another question.
        assert people(["x"], ["p"], ["q"]) == [1.0]
        assert people.board.shown()["doing"]


def test_a_step_that_is_repeated_allows_for_the_same_rate_of_mistakes(tmp_path):
    def serve():
        people = People(PageConfig(port=0), evaluates=False)
        return people, people.serve(tmp_path / "journal.sqlite")

    people, page = serve()
    with page:
        assert people.mistake_rate() == 0.0
        store = people._served.queue.store
        for number in range(8):
            for repeat in (False, True):
                lease, label = f"{number}{repeat}", float(repeat)
                store.give(Vote(lease, b"%d" % number, "ann", "tab", label, False, repeat, "", 1.0, 0.0, 0.99))
    people, page = serve()
    with page:
        assert people.mistake_rate() == 0.0
        people.labelled(np.array([1.0]), against_reference=False)
        assert people.mistake_rate() > 0.1
        assert "are mistakes" in people.notes()[-1] and "0%" not in people.notes()[-1][:50]


def test_the_board_has_the_win_rate_by_the_labels_and_the_kl_by_step():
    people = People(PageConfig(), evaluates=False)
    people.labelled(np.array([1.0, 0.0, 1.0, -1.0]), against_reference=True)
    people.labelled(np.array([0.5]), against_reference=True)
    people.labelled(np.array([1.0]), against_reference=False)
    people.board.measured(1, kl=0.1)
    people.expect({}, 0.75)
    people.labelled(np.array([1.0]), against_reference=False)
    people.expect({})
    people.labelled(np.array([1.0]), against_reference=False)
    rows = people.board.shown()["curve"]
    assert rows == [
        {"step": 1, "win_rate": pytest.approx(2 / 3), "kl": 0.1},
        {"step": 2, "win_rate": 0.5},
        {"step": 4, "reward_win_rate": 0.75},
    ]
    assert ComparisonAnnotator(None, None, people=people).notes() == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"keep_best": 1}, "--keep-best does not apply to people"),
        ({"annotator_timeout": 3.0}, "--annotator-timeout does not apply"),
        ({"port": 70000}, "--port must lie in"),
        ({"mistakes": "measured", "repeats": 0.0}, "give a positive --repeats"),
        ({"mistakes": 0.5}, "--mistakes must lie in"),
        ({"mistakes": 0.1, "method": "online-dpo"}, "--mistakes does not apply with --method online-dpo"),
        ({"annotator": "x:y", "port": 8377, "repeats": 0.05, "mistakes": "measured"}, "without --annotator browser"),
        ({"annotator": "x:y"}, "--port and --repeats do not apply without --annotator browser"),
    ],
)
def test_settings_that_do_not_go_together(here, more, message):
    with pytest.raises(ValueError, match=message):
        align.main(settings(here, "refused", **{"repeats": 0.1, "port": 8300, **more}))
