"""A real Chromium, and pages to open in it."""

import os
import shutil

import pytest

from jaxrlhf.labelling.board import Board
from jaxrlhf.labelling.pairs import make_pair
from jaxrlhf.labelling.queue import Queue
from jaxrlhf.labelling.store import LabelStore


def pytest_collection_modifyitems(items):
    for item in items:
        if "/tests/browser/" in str(item.path):
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium():
    """A running browser; JAXRLHF_CHROMIUM names another than the one found."""
    pytest.importorskip("starlette", reason="the labelling page needs the extra labelling")
    playwright = pytest.importorskip("playwright.sync_api", reason="tests in a browser need the extra browser")
    found = [os.environ.get("JAXRLHF_CHROMIUM"), shutil.which("chromium"), shutil.which("google-chrome")]
    path = next(filter(None, found), None)
    if path is None:
        pytest.skip("no chromium is installed here")
    with playwright.sync_playwright() as driver:
        # A sandbox of its own is not to be had by root in a container; only pages of this test are opened.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Person:
    """Someone with a browser of their own; a script error or a request elsewhere fails the test."""

    def __init__(self, browser, **settings):
        self.context = browser.new_context(**settings)
        self.wrong = []

    def open(self, address):
        tab = self.context.new_page()
        tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        tab.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))
        origin = address.split("/?")[0]
        tab.on("request", lambda request: request.url.startswith(origin) or self.wrong.append(request.url))
        tab.goto(address)
        return tab

    def close(self):
        self.context.close()
        assert not self.wrong


@pytest.fixture
def person(chromium):
    """Returns `(**settings) -> Person`."""
    people = []

    def make(**settings):
        people.append(Person(chromium, **settings))
        return people[-1]

    yield make
    for each in people:
        each.close()


@pytest.fixture
def serve(tmp_path):
    """Returns `(pairs, **settings) -> (queue, address)` of a page that runs to the end of the test."""
    from jaxrlhf.labelling.page import Page

    pages = []

    def start(pairs, board=None, **settings):
        queue = Queue(LabelStore(tmp_path / f"{len(pages)}.sqlite"), **{"repeats": 0.0} | settings)
        queue.add(pairs)
        pages.append(Page(queue, board or Board("Which answer is better?"), port=0))
        return queue, pages[-1].start()

    yield start
    for page in pages:
        page.stop()


@pytest.fixture
def some_pairs():
    """Returns `(count) -> pairs` of short texts."""
    return lambda count: [
        make_pair("people", f"Question {n}?", f"First answer to {n}.", f"Second answer to {n}.") for n in range(count)
    ]


@pytest.fixture
def press():
    """Returns `(tab, key)`, which presses a key and waits until another pair, or none, is on the screen."""

    def press_key(tab, key):
        before = lease_of(tab)
        tab.keyboard.press(key)
        tab.wait_for_function("lease => document.body.dataset.lease !== lease", arg=before)

    return press_key


def lease_of(tab):
    """The lease of the pair on the screen."""
    tab.wait_for_selector("body[data-lease]")
    return tab.evaluate("document.body.dataset.lease")


@pytest.fixture
def lease():
    """Returns `lease_of`."""
    return lease_of
