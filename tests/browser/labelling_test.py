"""The labelling page as a person uses it: by keys and clicks, in several tabs, with a network and a server that fail."""

import collections
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest


def texts(tab):
    """The prompt, and the answers left and right, as they are read."""
    tab.wait_for_selector("#pair:not([hidden])")
    return tuple(tab.inner_text(f"#{name}").strip() for name in ("prompt", "left", "right"))


def test_fifty_pairs_by_keyboard(person, serve, some_pairs, press):
    queue, address = serve(some_pairs(50))
    tab = person().open(address)
    keys = ("ArrowLeft", "ArrowRight", "t", "s", "1", "2", "0")
    expected = {}
    for number in range(50):
        prompt, left, _ = texts(tab)
        key = keys[number % len(keys)]
        first_is_left = left.startswith("First")
        wins = {"ArrowLeft": first_is_left, "1": first_is_left, "ArrowRight": not first_is_left, "2": not first_is_left}
        expected[prompt] = None if key == "s" else 0.5 if key in "t0" else float(wins[key])
        press(tab, key)
    tab.wait_for_selector("#waiting:not([hidden])")
    assert tab.inner_text("#given") == "50 of 50 labels given"
    labels = {pair.prompt[0].text: queue.labels(pair.key)[0] for pair in some_pairs(50)}
    assert labels == expected
    assert {vote.swapped for vote in queue.votes()} == {True, False}
    assert "token" not in tab.url


def test_clicks_notes_and_undo(person, serve, some_pairs, press, lease):
    queue, address = serve(some_pairs(3))
    tab = person().open(address)
    first = texts(tab)
    tab.keyboard.press("n")
    tab.keyboard.type("it is the right one, not s or t 1")
    assert queue.votes() == []  # letters in a note are no labels
    tab.keyboard.press("Escape")
    press(tab, "ArrowRight")
    second = texts(tab)
    before = lease(tab)
    tab.click("[data-choice=left]")
    tab.wait_for_function("lease => document.body.dataset.lease !== lease", arg=before)
    assert tab.input_value("#note") == ""
    assert [vote.note for vote in queue.votes()] == ["it is the right one, not s or t 1", ""]
    press(tab, "u")
    assert texts(tab) == second
    before = lease(tab)
    tab.click("#undo")
    tab.wait_for_function("lease => document.body.dataset.lease !== lease", arg=before)
    assert texts(tab) == first and queue.votes() == []
    assert tab.get_attribute("#undo", "aria-disabled") == "true"
    for _ in range(3):
        press(tab, "t")
    assert queue.counts()["left"] == 0


def test_two_tabs_never_show_one_pair(person, serve, some_pairs, press, lease):
    queue, address = serve(some_pairs(12))
    someone = person()
    one = someone.open(address)
    two = someone.open(address)
    texts(one)
    # A duplicate starts with all that the first tab keeps.
    with someone.context.expect_page() as opened:
        one.evaluate("open('/')")
    three = opened.value
    three.wait_for_selector("#pair:not([hidden])")
    shown = collections.Counter()
    while queue.counts()["left"] > 3:
        leases = [lease(tab) for tab in (one, two, three)]
        assert len(set(leases)) == 3
        prompts = [texts(tab)[0] for tab in (one, two, three)]
        assert len(set(prompts)) == 3
        for tab in (one, two, three):
            shown[texts(tab)[0]] += 1
            press(tab, "t")
    assert set(shown.values()) == {1}
    assert len({vote.pair for vote in queue.votes()}) == len(queue.votes())


def test_reload_and_back_show_the_same_pair(person, serve, some_pairs, press):
    queue, address = serve(some_pairs(5))
    tab = person().open(address)
    press(tab, "t")
    shown = texts(tab)
    tab.reload()
    assert texts(tab) == shown
    tab.goto("about:blank")
    tab.go_back()
    assert texts(tab) == shown
    assert len(queue.votes()) == 1


def test_a_lost_network_loses_no_label(person, serve, some_pairs, press):
    queue, address = serve(some_pairs(4))
    someone = person()
    tab = someone.open(address)
    shown = texts(tab)
    someone.context.set_offline(True)
    tab.keyboard.press("ArrowLeft")
    tab.wait_for_selector("#trouble:not([hidden])")
    assert "not saved yet" in tab.inner_text("#trouble")
    tab.keyboard.press("ArrowRight")  # another key is no second label
    assert texts(tab) == shown and queue.votes() == []
    someone.context.set_offline(False)
    tab.wait_for_function("shown => document.getElementById('prompt').innerText.trim() !== shown", arg=shown[0])
    (vote,) = queue.votes()
    assert vote.label == float(shown[1].startswith("First"))
    assert tab.is_hidden("#trouble")


def test_an_answer_that_is_lost_on_its_way_is_not_given_twice(person, serve, some_pairs):
    queue, address = serve(some_pairs(4))
    tab = person().open(address)
    shown = texts(tab)
    lost = []

    def lose(route):
        if lost:
            route.continue_()
            return
        lost.append(route.fetch())
        route.abort()

    tab.route("**/api/label", lose)
    tab.keyboard.press("ArrowLeft")
    tab.wait_for_function("shown => document.getElementById('prompt').innerText.trim() !== shown", arg=shown[0])
    assert lost and len(queue.votes()) == 1


def start_command(folder, port):
    command = "from jaxrlhf.commands.main import main; main()"
    arguments = ["label", "--data", "pairs.jsonl", "--to", "labels.jsonl", "--port", str(port), "--repeats", "0"]
    server = subprocess.Popen(
        [sys.executable, "-u", "-c", command, *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    lines = []
    assert server.stdout is not None
    for line in server.stdout:
        lines.append(line)
        if line.startswith("http://"):
            return server, line.strip()
    raise AssertionError("".join(lines))


def test_a_killed_server_loses_nothing_and_the_page_goes_on(person, tmp_path, press):
    rows = [{"prompt": f"Question {n}?", "completions": [f"good {n}", f"bad {n}"]} for n in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server, address = start_command(tmp_path, port)
    tab = person().open(address)
    chosen = {}

    def label():
        prompt, left, right = texts(tab)
        press(tab, "ArrowLeft")
        chosen[prompt] = (left, right)

    label()
    label()
    server.kill()
    server.wait()
    shown = texts(tab)
    tab.keyboard.press("ArrowLeft")  # while there is no server
    tab.wait_for_selector("#trouble:not([hidden])")
    server, again = start_command(tmp_path, port)
    assert again == address
    tab.wait_for_function("shown => document.getElementById('prompt').innerText.trim() !== shown", arg=shown[0])
    chosen[shown[0]] = shown[1:]
    while len(chosen) < 6:
        label()
    tab.wait_for_selector("#waiting:not([hidden])")
    server.send_signal(signal.SIGTERM)
    output, _ = server.communicate(timeout=60)
    assert server.returncode == 0 and "6 preferences are in labels.jsonl" in output
    written = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert {row["prompt"]: (row["chosen"], row["rejected"]) for row in written} == chosen


def test_pairs_that_come_later_appear(person, serve, some_pairs, press):
    queue, address = serve(some_pairs(1))
    tab = person().open(address)
    press(tab, "t")
    tab.wait_for_selector("#waiting:not([hidden])")
    queue.add(some_pairs(2))
    assert texts(tab)[0] == "Question 1?"


def test_without_the_token_the_page_says_what_to_do(person, serve, some_pairs):
    _, address = serve(some_pairs(1))
    tab = person().context.new_page()
    response = tab.goto(address.split("?")[0])
    assert response.status == 403 and "with its token" in tab.inner_text("body")


def test_keys_can_be_switched_off(person, serve, some_pairs, press):
    queue, address = serve(some_pairs(2))
    tab = person().open(address)
    texts(tab)
    tab.uncheck("#keys")
    tab.keyboard.press("t")
    time.sleep(0.3)
    assert queue.votes() == []
    tab.reload()
    texts(tab)
    assert not tab.is_checked("#keys")
    # Still by keyboard alone, through the buttons.
    tab.focus("[data-choice=tie]")
    press(tab, "Enter")
    assert [vote.label for vote in queue.votes()] == [0.5]


@pytest.mark.parametrize("many", [2, 5])
def test_differences_are_marked_on_demand(person, serve, many):
    from jaxrlhf.data.records import Message
    from jaxrlhf.labelling.pairs import make_pair

    def conversation(word):
        turns = [Message("user" if n % 2 else "assistant", f"turn {n} says {word} today") for n in range(many)]
        return tuple(turns)

    pair = make_pair("people", (Message("user", "Hello"),), conversation("yes"), conversation("no"))
    _, address = serve([pair])
    tab = person().open(address)
    texts(tab)
    assert tab.locator("#left .turn").count() == many
    assert tab.locator("mark").count() == 0
    tab.keyboard.press("d")
    marked = [set(tab.locator(f"#{side} mark").all_inner_texts()) for side in ("left", "right")]
    assert sorted(marked, key=str) == [{"no"}, {"yes"}]
    tab.keyboard.press("d")
    assert tab.locator("mark").count() == 0


def test_segments_of_episodes_are_played(person, serve, press):
    import numpy as np

    from jaxrlhf.labelling.segments import animation, segment_pair

    def frames(colour):
        made = np.zeros((4, 6, 8, 3), np.uint8)
        for number in range(4):
            made[number, :, number * 2 : number * 2 + 2] = colour
        return animation(made, rate=20.0)

    queue, address = serve([segment_pair("play", "Which one is red?", frames((255, 0, 0)), frames((0, 0, 255)))])
    tab = person().open(address)
    tab.wait_for_selector("canvas")
    context = 'document.querySelector(`#${side} canvas`).getContext("2d")'
    pixel = f"([side, x]) => [...{context}.getImageData(x, 3, 1, 1).data]"
    (held,) = queue.store.leases()
    red = "right" if held.swapped else "left"
    blue = "right" if red == "left" else "left"
    for side in (red, blue):
        tab.click(f"#{side} button")
        assert tab.inner_text(f"#{side} button") == "Play"
        tab.fill(f"#{side} input[type=range]", "2")
    assert tab.evaluate(pixel, [red, 4]) == [255, 0, 0, 255] and tab.evaluate(pixel, [red, 0]) == [0, 0, 0, 255]
    assert tab.evaluate(pixel, [blue, 5]) == [0, 0, 255, 255]
    tab.click(f"#{red} button")
    tab.wait_for_function(f"() => document.querySelector('#{red} input').value !== '2'")
    # Keys of the slider are its own.
    tab.focus(f"#{red} input")
    tab.keyboard.press("ArrowLeft")
    assert queue.votes() == []
    tab.focus("#note")
    tab.keyboard.press("Escape")
    press(tab, "ArrowLeft" if red == "left" else "ArrowRight")
    assert [vote.label for vote in queue.votes()] == [1.0]
