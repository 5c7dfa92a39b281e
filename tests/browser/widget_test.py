"""The notebook's widget in a real browser: its own script, with a stand-in for the notebook between it and the queue."""

import json

import pytest

from jaxrlhf.labelling.board import Board
from jaxrlhf.labelling.pairs import make_pair
from jaxrlhf.labelling.queue import Queue
from jaxrlhf.labelling.server import STATIC
from jaxrlhf.labelling.store import LabelStore
from jaxrlhf.labelling.widget import responder

PAGE = """<!doctype html><meta charset=utf-8><title>notebook</title><style>/*css*/</style><div id=cell></div>
<script type=module>
import widget from "/widget.js";
const heard = [];
const model = {
  send: (message) => window.toKernel(JSON.stringify(message)),
  on: (name, listener) => heard.push(listener),
  off: (name, listener) => heard.splice(heard.indexOf(listener), 1),
};
window.fromKernel = (answer) => heard.forEach((listener) => listener(JSON.parse(answer)));
document.addEventListener("keydown", (event) => (window.escaped = (window.escaped ?? "") + event.key));
window.leave = widget.render({ model, el: document.getElementById("cell") });
window.heard = heard;
</script>"""


@pytest.fixture
def cell(chromium):
    """Returns `(queue, after) -> tab` that shows the widget."""
    contexts = []

    def show(queue, after=lambda: None):
        contexts.append(chromium.new_context())
        tab = contexts[-1].new_page()
        wrong = []
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.wrong = wrong
        respond = responder(queue, Board("Which reply is better?"), person="me", after=after)

        def to_kernel(message):
            respond(json.loads(message), answers.append)

        answers = []
        tab.expose_function("toKernel", to_kernel)
        script = "".join((STATIC / name).read_text() for name in ("text.js", "widget.js"))
        tab.route("http://notebook.example/", lambda route: route.fulfill(
            content_type="text/html", body=PAGE.replace("/*css*/", (STATIC / "widget.css").read_text())))  # fmt: skip
        tab.route(
            "http://notebook.example/widget.js",
            lambda route: route.fulfill(content_type="text/javascript; charset=utf-8", body=script),
        )
        tab.goto("http://notebook.example/")

        def deliver(condition):
            """Carries answers to the page until a condition holds there."""
            for _ in range(100):
                while answers:
                    tab.evaluate("answer => window.fromKernel(answer)", json.dumps(answers.pop(0)))
                if tab.evaluate(condition):
                    return
                tab.wait_for_timeout(50)
            raise AssertionError(condition)

        tab.deliver = deliver
        return tab

    yield show
    for context in contexts:
        context.close()


def prompt_is(text):
    return f"document.querySelector('.prompt .text').innerText.trim() === {json.dumps(text)}"


def test_labels_by_key_and_click_undo_and_pairs_that_come_later(cell):
    queue = Queue(LabelStore(None), repeats=0.0)
    pairs = [
        make_pair("people", f"Question {n}?", f"first {n}", f"**second** <img src=x onerror=hit()> {n}")
        for n in range(3)
    ]
    queue.add(pairs[:2])

    def after():
        if queue.counts()["left"] == 0:
            queue.add(pairs[2:])

    tab = cell(queue, after)
    tab.deliver(prompt_is("Question 0?"))
    assert tab.locator("img").count() == 0 and tab.locator("strong", has_text="second").count() == 1
    first_is_left = tab.inner_text(".left .text").startswith("first")
    tab.focus(".jaxrlhf-label")
    tab.keyboard.press("ArrowLeft")
    tab.deliver(prompt_is("Question 1?"))
    assert queue.labels(pairs[0].key) == [float(first_is_left)]
    tab.keyboard.press("u")
    tab.deliver(prompt_is("Question 0?"))
    assert queue.votes() == []
    tab.keyboard.press("2")
    tab.deliver(prompt_is("Question 1?"))
    assert queue.labels(pairs[0].key) == [float(not first_is_left)]
    tab.click("[data-choice=tie]")
    tab.deliver(prompt_is("Question 2?"))
    assert "2 labels given, 1 left" in tab.inner_text(".stands")
    # Keys that label do not reach the notebook, others do.
    tab.focus(".jaxrlhf-label")
    tab.keyboard.press("a")
    assert tab.evaluate("window.escaped") == "a"
    tab.keyboard.press("s")
    tab.deliver("document.querySelector('.waiting').textContent !== ''")
    assert queue.labels(pairs[2].key) == [None]
    assert tab.is_disabled("[data-choice=left]") and not tab.is_disabled("[data-choice=undo]")
    tab.evaluate("window.leave()")
    assert tab.evaluate("window.heard.length") == 0 and tab.wrong == []
