"""HTTP judges, played by a real server that is right, biased, slow, wrong, failing or absent; no paid verdict is lost."""

import collections
import email.utils
import hashlib
import http.server
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax.numpy as jnp
import pytest
import tokenizers

from jaxrlhf.annotation import (
    BudgetError,
    Journal,
    JudgeError,
    Replies,
    concurrency,
    http_judge,
    load_judge,
    question_key,
)
from jaxrlhf.annotation.judge import fill_template
from jaxrlhf.base.problem import Sample
from jaxrlhf.commands.annotators import open_annotator
from jaxrlhf.lm.pairing import Prompts, Responses

KEY = "sk-most-secret-1234567890"
TEMPLATE = "{prompt}|{first}|{second}"
PAIRS = (["p", "q", "r", "s"], ["good", "bad", "fair", "good"], ["bad", "good", "equally fair", "fair"])
RIGHT = [1.0, 0.0, 0.5, 1.0]
WORTH = {"bad": 0, "fair": 1, "equally fair": 1, "good": 2}
BRIEF = {"first_pause": 0.001, "longest_pause": 0.01, "retries": 2, "timeout": 5.0, "template": TEMPLATE}


def chat_reply(verdict):
    message = {"role": "assistant", "content": f"So it seems.\n\n**Verdict: {verdict}**"}
    return 200, json.dumps({"choices": [{"index": 0, "message": message}]})


def right(number, question):
    _, first, second = question.split("|")
    better = WORTH[first] - WORTH[second]
    return chat_reply("A" if better > 0 else "B" if better < 0 else "tie")


class Server(http.server.ThreadingHTTPServer):
    """Replies to each question with `play(number, question)`: status, text and perhaps headers."""

    daemon_threads = True

    def __init__(self, play):
        self.play, self.asked, self.requests, self.lock = play, [], [], threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, client_address):
        """Silent: clients hang up on purpose here."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append(body["messages"][0]["content"])
            self.server.requests.append((self.path, self.headers["Authorization"], body))
        played = self.server.play(number, body["messages"][0]["content"])
        if played is None:
            self.close_connection = True
            return
        status, text, *headers = played
        written = text if isinstance(text, bytes) else text.encode()
        # In one piece: with two writes, Nagle's algorithm would wait for an acknowledgement.
        lines = [f"HTTP/1.1 {status} Played", f"Content-Length: {len(written)}", *headers, "", ""]
        self.wfile.write("\r\n".join(lines).encode() + written)

    def log_message(self, format, *args):
        """Silent."""


@pytest.fixture
def serve(monkeypatch):
    """Returns `(play) -> Server`; all are closed at the end."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(play):
        servers.append(Server(play))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def judge(server, **settings):
    return http_judge(server if isinstance(server, str) else server.url, "wise", **BRIEF | settings)


def test_every_pair_is_asked_about_in_both_orders(serve):
    server = serve(right)
    annotate = judge(server, api_key=KEY, max_tokens=77)
    assert annotate(*PAIRS) == RIGHT
    assert {"p|bad|good", "p|good|bad"} < set(server.asked)
    path, authorization, body = server.requests[0]
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("wise", 0, 77)
    assert (annotate.calls, annotate.counts.asked, annotate.counts.found) == (8, 8, 0)
    assert annotate([], [], []) == []


def test_swapped_answers_have_swapped_labels_and_cost_nothing(serve):
    server = serve(right)
    annotate = judge(server)
    prompts, firsts, seconds = PAIRS
    labels = annotate(prompts + prompts, firsts + seconds, seconds + firsts)
    assert labels == RIGHT + [1 - label for label in RIGHT]
    assert annotate(prompts, seconds, firsts) == [1 - label for label in RIGHT]
    assert max(collections.Counter(server.asked).values()) == 1


def test_position_bias_cancels(serve):
    server = serve(lambda number, question: chat_reply("A"))
    assert judge(server)(*PAIRS) == [0.5] * 4
    assert judge(server, both_orders=False)(*PAIRS) == [1.0] * 4
    assert len(server.asked) == 12
    # Equal texts need no judge.
    assert judge(server)(["p"], ["same"], ["same"]) == [0.5]
    assert len(server.asked) == 12
    # A tie in one order only.
    half = serve(lambda number, question: chat_reply("A" if question == "p|good|bad" else "tie"))
    assert judge(half)(["p"], ["good"], ["bad"]) == [0.75]
    assert judge(half)(["p"], ["bad"], ["good"]) == [0.25]


def test_calls_run_concurrently_up_to_the_limit(serve):
    places, meeting = threading.Semaphore(3), threading.Barrier(2)

    def play(number, question):
        if not places.acquire(blocking=False):
            return 400, "too many at once"
        # Replies only when two calls are in flight.
        meeting.wait(5)
        places.release()
        return right(number, question)

    assert judge(serve(play), concurrency=3)(*PAIRS) == RIGHT


def failing(times, play):
    """Returns a `play` that fails the first `times` questions, and is right afterwards."""
    return lambda number, question: play(number) if number < times else right(number, question)


def late(number):
    time.sleep(0.5)
    return chat_reply("A")


PASSING = {
    "slow": late,
    "busy": lambda number: (429, "busy", "Retry-After: 0.01"),
    "timed-out": lambda number: (408, '{"error": {"message": "request timed out upstream"}}'),
    "conflict": lambda number: (409, '{"error": {"message": "try again"}}'),
    "too-early": lambda number: (425, ""),
    "error-in-200": lambda number: (200, '{"error": {"message": "overloaded"}}'),
    "broken": lambda number: (500, "{"),
    "hangs-up": lambda number: None,
    "garbage": lambda number: (200, b"\xff<html>"),
    "no-fields": lambda number: (200, "{}"),
}


@pytest.mark.parametrize("kind", PASSING)
def test_transient_failures_are_retried(serve, kind):
    server = serve(failing(2, PASSING[kind]))
    annotate = judge(server, timeout=0.25 if kind == "slow" else 5.0, concurrency=1, retries=5)
    assert annotate(*PAIRS) == RIGHT
    # A busy machine may time out more often.
    assert annotate.calls == 10 or (kind == "slow" and annotate.calls > 10)
    assert annotate.counts.asked == 8


def test_retry_after_is_respected_and_capped(serve):
    def pause(header, longest):
        server = serve(failing(1, lambda number: (429, "", f"Retry-After: {header}")))
        began = time.monotonic()
        judge(server, longest_pause=longest, both_orders=False)(["p"], ["good"], ["bad"])
        return time.monotonic() - began

    assert pause("0.2", 5.0) >= 0.2
    # Dates have a resolution of one second.
    assert pause(email.utils.formatdate(time.time() + 1.3, usegmt=True), 5.0) >= 0.1
    # Capped, as a number and as a date; malformed headers are ignored.
    assert pause("9", 0.05) < 5
    assert pause(email.utils.formatdate(time.time() + 9, usegmt=True), 0.05) < 5
    assert pause("soon", 9.0) < 5


CHAT = {"choices": [{"message": {"content": "Verdict: A"}}]}
LASTING = {
    "broken": (
        (500, '{"error": {"message": "out of\\nmemory"}}'),
        r"in 3 calls; the last: status 500 \(out of memory\)",
    ),
    "busy": ((429, ""), r"status 429\."),
    "hangs-up": (None, "RemoteProtocolError"),
    "no-json": ((200, "<html>Please log in</html>"), r"no chat completion \(<html>Please log in</html>\)"),
    "no-object": ((200, "[1, 2]"), "no chat completion"),
    "deep": ((200, "[" * 100_000), "no chat completion"),
    "no-choices": ((200, '{"choices": 3}'), "no chat completion"),
    "no-message": ((200, '{"choices": [{"text": "Verdict: A"}]}'), "no chat completion"),
    "a-number": ((200, json.dumps(CHAT).replace('"Verdict: A"', "7")), "content is no text"),
    "endless": ((200, b" " * (3 << 20) + json.dumps(CHAT).encode()), "no chat completion"),
}


@pytest.mark.parametrize("kind", LASTING)
def test_lasting_failures_raise_one_sentence_and_nothing_is_paid_twice(serve, tmp_path, kind):
    played, message = LASTING[kind]
    server = serve(lambda number, question: right(number, question) if number < 3 else played)
    path = tmp_path / "labels.sqlite"
    with pytest.raises(JudgeError, match=message) as caught:
        judge(server, journal=path, concurrency=1)(*PAIRS)
    assert f"Of this call's 4 labels 1 were obtained (3 verdicts) and are kept in {path}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 3 + 3
    # A restart, with a healthy judge at another address.
    healthy = serve(right)
    again = judge(healthy, journal=path)
    assert again(*PAIRS) == RIGHT
    assert (again.counts.asked, again.counts.found) == (5, 3)
    assert not set(server.asked[:3]) & set(healthy.asked)
    assert len(healthy.asked) == 5


def test_calls_in_flight_are_kept_when_another_fails(serve, tmp_path):
    failed, in_flight = threading.Event(), threading.Semaphore(0)

    def play(number, question):
        if question == "p|bad|good":
            assert all(in_flight.acquire(timeout=10) for _ in range(3))
            failed.set()
            return 401, "no"
        in_flight.release()
        # The others are paid for, and complete after the failure.
        failed.wait(10)
        time.sleep(0.5)
        return right(number, question)

    server, path = serve(play), tmp_path / "labels.sqlite"
    with pytest.raises(JudgeError, match=r"status 401 \(no\)\. Of this call's 4 labels 1 were obtained \(3 verdicts\)"):
        judge(server, journal=path, concurrency=4)(*PAIRS)
    healthy = serve(right)
    assert judge(healthy, journal=path)(*PAIRS) == RIGHT
    assert len(healthy.asked) == 5


@pytest.mark.parametrize("status", [307, 400, 401, 404, 422])
def test_a_rejection_is_not_retried_and_the_key_is_redacted(serve, tmp_path, status, caplog):
    caplog.set_level(logging.DEBUG)
    # The server quotes the key where cutting at 200 characters would leave half of it.
    reply = json.dumps({"error": {"message": "x" * 180 + f" the key {KEY} is wrong"}})
    server = serve(lambda number, question: (status, reply))
    with pytest.raises(JudgeError, match=f"refused with status {status}") as caught:
        judge(server, api_key=KEY, concurrency=1, journal=tmp_path / "labels.sqlite")(*PAIRS)
    assert len(server.asked) == 1
    texts = [str(caught.value), repr(caught.value), caplog.text, *map(str, caplog.records)]
    texts += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    assert caplog.records
    assert not any(KEY[:12] in text for text in texts)


def said(content, finish="stop", **message):
    return 200, json.dumps({"choices": [{"message": {"content": content} | message, "finish_reason": finish}]})


TROUBLES = {
    "merits": (said("Both have merits."), "not_understood", 10),
    "what-the-text-says": (said("Judging is hard. Verdict: A is what the text says."), "not_understood", 10),
    "empty": (said(""), "not_understood", 10),
    "null": (said(None), "not_understood", 10),
    "parts": (said([{"type": "text", "text": "No idea."}, {"type": "image"}]), "not_understood", 10),
    "no-choices": ((200, '{"choices": []}'), "not_understood", 10),
    "cut-off-thinking": (said(None, "length", reasoning_content="hm " * 50), "cut_off", 8),
    "cut-off-quoting": (said("I am to end with one of\nVerdict: A\nVerdict: B", "length"), "cut_off", 8),
    "cut-off-elsewhere": (said("Verdict: A, or rather", "max_tokens"), "cut_off", 8),
    "refused": (said(None, refusal="I cannot help with that."), "refused", 8),
    "filtered": (said("Verdict: A", "content_filter"), "refused", 8),
    "refused-in-words": (said("I'm sorry, but I can't compare these."), "refused", 8),
}


@pytest.mark.parametrize("case", TROUBLES)
def test_replies_without_a_verdict_are_told_apart_and_not_journalled(serve, tmp_path, case):
    reply, kind, calls = TROUBLES[case]
    server = serve(lambda number, question: reply if question.startswith("q") else right(0, question))
    path = tmp_path / "labels.sqlite"
    annotate = judge(server, journal=path)
    assert annotate(*PAIRS) == [1.0, None, 0.5, 1.0]
    assert (annotate.calls, annotate.counts.skipped) == (calls, 2)
    assert annotate.replies._replace(example="") == Replies(decided=4, tie=2)._replace(**{kind: 2})
    annotate.check()
    # A judge that was mended is asked, under the same name and with a larger limit on tokens; and only about those.
    mended = judge(serve(right), journal=path, max_tokens=4096)
    assert mended(*PAIRS) == RIGHT
    assert (mended.counts.asked, mended.counts.found) == (2, 6)


@pytest.mark.parametrize("case", ["merits", "cut-off-thinking", "refused"])
def test_a_judge_without_any_verdict_stops_with_an_example(serve, tmp_path, case):
    reply, kind, _ = TROUBLES[case]
    remedy = {"not_understood": "--judge-verdict", "cut_off": "1024 tokens", "refused": "another judge"}[kind]
    server, path = serve(lambda number, question: reply), tmp_path / "labels.sqlite"
    many = [str(number) for number in range(50)], ["good"] * 50, ["bad"] * 50
    with pytest.raises(JudgeError, match=f"Of 16 replies of the judge wise .* none has a verdict.*{remedy}") as caught:
        judge(server, journal=path, concurrency=1)(*many)
    assert "\n" not in str(caught.value)
    assert ("Both have merits" in str(caught.value)) == (case == "merits")
    assert len(server.asked) <= 32 and len(Journal(path)) == 0
    # A few replies do not condemn a judge by themselves; whoever ran it decides.
    few = judge(server)
    assert few(["p"], ["good"], ["bad"]) == [None]
    with pytest.raises(JudgeError, match="Of 2 replies"):
        few.check()
    # Verdicts in the journal show that it could be understood.
    judge(serve(right), journal=path)(*PAIRS)
    known = judge(server, journal=path, concurrency=1)
    assert known(*(column + more for column, more in zip(PAIRS, (["t"], ["good"], ["bad"]), strict=True)))[4] is None
    known.check()


def test_an_example_of_a_reply_does_not_show_a_part_of_the_key(serve):
    # Cut at 200 letters from the end, half of the key would remain.
    server = serve(lambda number, question: said(f"I was given the key {KEY}" + "x" * 185))
    asking = judge(server, api_key=KEY)
    asking(["p"], ["good"], ["bad"])
    with pytest.raises(JudgeError, match=r"one ends: .*xxx") as caught:
        asking.check()
    assert not any(KEY[start : start + 6] in str(caught.value) for start in range(len(KEY) - 6))


def test_a_missing_verdict_of_an_earlier_journal_is_asked_for(serve, tmp_path):
    path = tmp_path / "labels.sqlite"
    name = f"wise, 1024 tokens, {hashlib.sha256(TEMPLATE.encode()).hexdigest()}"
    journal = Journal(path)
    for first, second, label in (("good", "bad", None), ("bad", "good", 0.0)):
        journal.keep(question_key(name, "p", first, second), label)
    server = serve(right)
    assert judge(server, journal=path)(["p"], ["good"], ["bad"]) == [1.0]
    assert server.asked == ["p|good|bad"]
    assert Journal(path).find([question_key(name, "p", "good", "bad")]) == dict.fromkeys(
        [question_key(name, "p", "good", "bad")], 1.0
    )


def test_the_request_and_the_pattern_can_be_given(serve):
    server = serve(lambda number, question: said("<choice 1>" if question == "p|good|bad" else "Choice: b)"))
    settings = {"tokens_name": "max_completion_tokens", "max_tokens": 9, "temperature": None}
    annotate = judge(server, verdict=r"Choice: (?P<verdict>\w)", both_orders=False, **settings)
    assert annotate(["p", "p"], ["good", "bad"], ["bad", "good"]) == [None, 0.0]
    body = server.requests[0][2]
    assert body["max_completion_tokens"] == 9
    assert not {"max_tokens", "temperature"} & body.keys()
    judge(server, temperature=1.0)(["p"], ["good"], ["bad"])
    assert server.requests[-1][2]["temperature"] == 1.0


@pytest.mark.parametrize(
    ("reply", "remedy"),
    [
        ("Parameter max_tokens cannot be used with this model; max_completion_tokens can", "max_completion_tokens"),
        ("temperature other than 1 cannot be used with this model", "--judge-temperature"),
    ],
)
def test_a_parameter_that_a_server_refuses_comes_with_a_remedy(serve, reply, remedy):
    server = serve(lambda number, question: (400, json.dumps({"error": {"message": reply}})))
    with pytest.raises(JudgeError, match=rf"refused with status 400 .*\. .*{remedy}"):
        judge(server)(["p"], ["good"], ["bad"])


def test_an_unreachable_judge_raises_one_sentence(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(JudgeError, match=r"Connection refused.*4 labels 0 were obtained.*there is no journal on disk"):
        judge(url)(*PAIRS)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"])
def test_hanging_and_trickling_judges_time_out(monkeypatch, sent):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    over = threading.Event()

    def trickle(listening):
        connection, _ = listening.accept()
        with connection:
            connection.sendall(sent)
            # Each byte would restart a timeout between bytes.
            for _ in range(500 if sent else 0):
                if over.wait(0.02):
                    break
                connection.sendall(b"x")
            over.wait(10)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=trickle, args=(listening,), daemon=True)
        thread.start()
        began = time.monotonic()
        with pytest.raises(JudgeError, match=r"no reply within 0\.2 s"):
            judge(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", timeout=0.2, retries=0)(["p"], ["good"], ["bad"])
        assert time.monotonic() - began < 5
        over.set()
        thread.join(5)


def test_the_call_budget_keeps_labels_obtained_so_far(serve, tmp_path):
    server, path = serve(right), tmp_path / "labels.sqlite"
    limited = judge(server, max_calls=5, journal=path, concurrency=1)
    with pytest.raises(BudgetError, match=r"ceiling of 5 calls.*4 labels 2 were obtained \(5 verdicts\) and are kept"):
        limited(*PAIRS)
    assert (len(server.asked), limited.calls) == (5, 5)
    # Labels in the journal need no call.
    assert limited(*(column[:2] for column in PAIRS)) == RIGHT[:2]
    assert judge(server, max_calls=3, journal=path)(*PAIRS) == RIGHT
    # Retries are calls too.
    broken = serve(lambda number, question: (500, ""))
    with pytest.raises(BudgetError, match="ceiling of 2 calls"):
        judge(broken, max_calls=2, retries=5)(*PAIRS)
    assert len(broken.asked) == 2


CHILD = """
import pathlib, sys
from jaxrlhf.annotation import http_judge
url, path, template = sys.argv[1:]
annotate = http_judge(url, "wise", template=template, journal=pathlib.Path(path), concurrency=1)
annotate([str(number) for number in range(20)], ["good"] * 20, ["bad"] * 20)
"""


def test_a_killed_process_keeps_every_verdict(serve, tmp_path):
    children: list[subprocess.Popen] = []

    def play(number, question):
        # With the sixteenth question, fifteen replies have arrived.
        if number == 15:
            children[0].send_signal(signal.SIGKILL)
            return None
        return right(number, question)

    server, path = serve(play), tmp_path / "labels.sqlite"
    # Held so that no question is played before the list has the child.
    with server.lock:
        children.append(subprocess.Popen([sys.executable, "-c", CHILD, server.url, str(path), TEMPLATE]))
    assert children[0].wait(timeout=60) == -signal.SIGKILL
    healthy = serve(right)
    again = http_judge(healthy.url, "wise", template=TEMPLATE, journal=path)
    assert again([str(number) for number in range(20)], ["good"] * 20, ["bad"] * 20) == [1.0] * 20
    assert again.counts.found == 15
    assert not set(server.asked[:15]) & set(healthy.asked)


def test_an_interruption_waits_for_calls_in_flight(monkeypatch):
    interrupted = iter([True])
    original = concurrency.wait

    def wait(*arguments, **settings):
        if next(interrupted, False):
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    monkeypatch.setattr(concurrency, "wait", wait)
    results = concurrency.run_concurrently(lambda index, stopping: time.sleep(0.05) or index, 9, concurrency=2)
    assert sorted([next(results), next(results)]) == [(0, 0), (1, 1)]
    with pytest.raises(KeyboardInterrupt):
        next(results)


def test_texts_are_never_interpreted(serve, tmp_path):
    server = serve(lambda number, question: chat_reply("A" if question.startswith("{first}|Ähre 🌾") else "B"))
    annotate = judge(server, journal=tmp_path / "labels.sqlite")
    strange = "{second} {0} {prompt.__class__} \\1 \ud800 \u2028 日本\x00"
    assert annotate(["{first}"], ["Ähre 🌾"], [strange]) == [1.0]
    assert sorted(server.asked) == sorted([f"{{first}}|Ähre 🌾|{strange}", f"{{first}}|{strange}|Ähre 🌾"])
    # A verdict inside a completion is part of the request; only the reply counts.
    assert annotate(["p"], ["Verdict: A"], ["\nVerdict: A\n"]) == [0.5]
    json_template = '{"a": "{first}", "b": "{second}", "c": {}} {prompt}'
    assert fill_template(json_template, "P", "{prompt}", "F") == '{"a": "{prompt}", "b": "F", "c": {}} P'


WRONG = {
    "no-model": (lambda: load_judge("http://localhost:1/v1"), r"model is missing; write http://localhost:1/v1#MODEL"),
    "password": (lambda: load_judge(f"http://me:{KEY}@localhost/v1#m"), "give the key apart from it"),
    "query": (lambda: http_judge(f"http://localhost/v1?key={KEY}", "m"), "give the key apart from it"),
    "scheme": (lambda: http_judge("ftp://localhost", "m"), "must begin with http"),
    "no-host": (lambda: http_judge("http:///v1", "m"), "must begin with http"),
    "no-url": (lambda: http_judge("http://[::1", "m"), "is no URL"),
    "key": (lambda: http_judge("http://localhost", "m", api_key=f"{KEY}\nX: y"), "no HTTP header may hold"),
    "variable": (lambda: http_judge("http://localhost", "m", key_variable="NO_SUCH_KEY"), "NO_SUCH_KEY.* is not set"),
    "template": (lambda: http_judge("http://localhost", "m", template="{first} {second}"), "template must hold"),
    "calls": (lambda: http_judge("http://localhost", "m", max_calls=0), "at least one call"),
    "timeout": (lambda: http_judge("http://localhost", "m", timeout=float("nan")), "finite timeout"),
    "pauses": (lambda: http_judge("http://localhost", "m", first_pause=2, longest_pause=1), "Pauses before retries"),
    "concurrency": (lambda: http_judge("http://localhost", "m", concurrency=0), "at least one question at once"),
    "tokens": (lambda: http_judge("http://localhost", "m", max_tokens=0), "at least one token"),
    "tokens-name": (lambda: http_judge("http://localhost", "m", tokens_name="model"), "max_completion_tokens, not"),
    "temperature": (lambda: http_judge("http://localhost", "m", temperature=-1.0), "temperature must be 0 or more"),
    "pattern": (lambda: http_judge("http://localhost", "m", verdict="("), "no regular expression"),
    "no-group": (lambda: http_judge("http://localhost", "m", verdict="Choice"), "needs a group around A, B or tie"),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_settings_raise_one_sentence(case):
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_key_comes_from_the_environment(serve, monkeypatch):
    server = serve(right)
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    judge(server, key_variable="MY_KEY")(["p"], ["good"], ["bad"])
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    load_judge(f"{server.url}/#wise", **BRIEF)(["p"], ["good"], ["bad"])
    monkeypatch.delenv("OPENAI_API_KEY")
    load_judge(f"{server.url}#wise", **BRIEF)(["p"], ["good"], ["bad"])
    assert [request[1] for request in server.requests[::2]] == [f"Bearer {KEY}", "Bearer another", None]


def test_the_command_line_accepts_a_judge_by_address(serve, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = serve(lambda number, question: chat_reply("A" if re.search(r"<text A>\n *sun\n", question) else "B"))
    vocabulary = {"sun": 0, "rain": 1, "day": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="day"))
    model = types.SimpleNamespace(bundle=types.SimpleNamespace(tokenizer=tokenizer))
    tokens = jnp.array([[[[0], [1]], [[1], [0]]]])
    nothing = jnp.zeros((1, 2, 2, 1))
    sample = Sample(
        Prompts(jnp.array([[2]]), jnp.ones((1, 1), bool)),
        Responses(tokens, jnp.ones_like(tokens, bool)),
        *[nothing] * 3,
        jnp.full((1, 2), 0.5),
        jnp.ones(2),
        jnp.asarray(2.0),
    )
    path = tmp_path / "prepared" / "labels.sqlite"
    for _ in range(2):
        annotator = open_annotator(f"{server.url}#wise", None, model, journal=path)
        assert annotator.host(None, sample)[0, :, 0].tolist() == [1.0, 0.0]
    assert len(server.asked) == 2
    assert path.exists()
