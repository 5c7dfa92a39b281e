"""The page for everybody: checked by axe, and seen in light, dark and on a phone.

`JAXRLHF_SCREENSHOTS=docs pytest -m browser tests/browser/looks_test.py` draws the pictures of the documentation.
"""

import os
import pathlib

import pytest

from jaxrlhf.data.records import Message
from jaxrlhf.labelling.board import Board
from jaxrlhf.labelling.pairs import make_pair

QUESTION = "How do I reverse a list in Python, and does it copy?"
GOOD = """Both ways exist:

- `items.reverse()` turns the list around **in place** and returns `None`;
- `items[::-1]` makes a *copy*.

```python
items = [1, 2, 3]
items.reverse()      # [3, 2, 1]
```"""
POOR = """You can use `reversed(items)`, which returns a list.

```python
items = reversed([1, 2, 3])
```

It does not copy the list."""
LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1180, "height": 760}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1180, "height": 760}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}


@pytest.fixture
def look(person, serve):
    """Returns `(name) -> tab`, a page in the middle of a run."""

    def open_page(name):
        board = Board("Which answer is better?", "waiting for 11 labels of step 25")
        for step in range(1, 25):
            board.measured(step, reward_win_rate=0.5 + 0.01 * step + 0.05 * (step % 3 - 1), kl=0.02 * step)
        board.set_facts(beta="0.2", price="0.05 a nat")
        prompt = (Message("system", "You are a careful teacher."), Message("user", QUESTION))
        answers = ((Message("assistant", text),) for text in (GOOD, POOR))
        pairs = [make_pair("people", prompt, *answers, forecast=0.8)]
        pairs += [make_pair("people", f"Question {n}", "yes", "no", forecast=0.7) for n in range(11)]
        queue, address = serve(pairs, board)
        # Somebody else has given some labels already.
        first = queue.next("other", "1")
        for _ in range(5):
            shown = queue.next("other", "2")
            queue.give("other", shown.lease.lease, "left", seconds=3.0)
        queue.close([])
        queue.store.release([first.lease.lease])
        queue._end([first.lease])
        queue._open = {first.pair.key: None, **queue._open}
        tab = person(**LOOKS[name]).open(address)
        tab.wait_for_selector("#pair:not([hidden])")
        tab.wait_for_timeout(300)
        return tab

    return open_page


@pytest.mark.parametrize("name", LOOKS)
def test_the_page_is_accessible_and_fits(look, name, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    tab = look(name)
    folder = pathlib.Path(os.environ.get("JAXRLHF_SCREENSHOTS") or tmp_path)
    tab.screenshot(path=folder / f"labelling_{name}.png")
    states = ["as it opens", "differences", "undone", "waiting"]
    for state in states:
        if state == "differences":
            tab.keyboard.press("d")
        if state == "undone":
            tab.keyboard.press("t")
            tab.wait_for_timeout(300)
            tab.keyboard.press("u")
            tab.wait_for_timeout(300)
        if state == "waiting":
            while tab.is_visible("#pair"):
                tab.keyboard.press("t")
                tab.wait_for_timeout(100)
        tab.wait_for_timeout(200)
        found = axe.run(tab, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]})
        assert found.violations_count == 0, f"{state}: {found.generate_report()}"
        assert tab.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), state


def test_what_is_said_to_a_screen_reader(look):
    tab = look("light")
    tab.keyboard.press("t")
    tab.wait_for_timeout(500)
    assert tab.inner_text("#said").startswith("Saved.")
    left = "first" if tab.inner_text("#left").strip() == "yes" else "second"
    tab.keyboard.press("ArrowLeft")
    tab.wait_for_timeout(500)
    # Told after the label only.
    assert ("agreed" if left == "first" else "disagreed") in tab.inner_text("#said")
    assert "of 1" in tab.inner_text("#facts")
    # Nobody's labels: said to be the model's own opinion.
    assert "Win rate by the reward model" in tab.inner_text("#facts")
    assert "as the reward model sees it" in tab.inner_text("#curve-text")


def test_every_control_is_reached_by_the_tab_key(look):
    tab = look("light")
    reached = set()
    for _ in range(20):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("() => document.activeElement.id || document.activeElement.dataset.choice"))
    assert {"prompt", "left", "right", "note", "tie", "skip", "undo", "differences", "markdown", "keys"} <= reached
