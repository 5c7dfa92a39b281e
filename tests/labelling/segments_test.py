"""Segments of episodes on the labelling page: what is drawn, and labels that come from outside of a compiled step."""

import base64
import json
import threading
import time
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.labelling.queue import Queue
from jaxrlhf.labelling.segments import MOST_PIXELS, animation, segment_annotator, segment_pair
from jaxrlhf.labelling.server import on_screen
from jaxrlhf.labelling.store import LabelStore


def pixels_of(text):
    spec = json.loads(text)
    return np.frombuffer(zlib.decompress(base64.b64decode(spec["data"])), np.uint8).reshape(*spec["shape"], 3)


def test_an_animation_holds_its_pixels():
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels_of(animation(frames, rate=5.0)), frames)
    assert json.loads(animation(list(frames), rate=5.0))["rate"] == 5.0


@pytest.mark.parametrize(
    "frames",
    [
        [],
        np.zeros((2, 4, 5)),
        np.zeros((2, 4, 5, 3)),
        np.zeros((2, 4, 5, 4), np.uint8),
        np.zeros((2, 0, 5, 3), np.uint8),
        [np.zeros((4, 5, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)],
        np.zeros((MOST_PIXELS // 1000 + 1, 100, 10, 3), np.uint8),
    ],
)
def test_what_is_no_animation_is_refused(frames):
    with pytest.raises(ValueError, match="An animation "):
        animation(frames)


def render(observation):
    """A bar as long as the observation's first number."""
    image = np.zeros((2, 8, 3), np.uint8)
    image[:, : int(observation[0])] = 255
    return image


def length_of(turns):
    return int((pixels_of(turns[0].animation)[..., 0] > 0).sum())


def test_labels_come_from_people_within_a_compiled_step():
    """A person who prefers longer bars labels three steps of a scan; what lies outside of the window is not drawn."""
    queue, missing = Queue(LabelStore(None), repeats=0.0), []
    annotate = segment_annotator(queue, render, step=2, waiting=missing.append)
    window = np.array([0.0, 1.0, 0.9, 0.8, 0.0]) * np.ones((1, 3, 2, 1))
    window[:, 2] = 0.0

    def step(carry, number):
        # The first pair differs within the window, the second outside of it alone, the third has no window at all.
        bars = jnp.array(
            [[[1, 2, 7, 3, 1], [1, 1, 0, 2, 1]], [[1, 4, 4, 4, 1], [8, 4, 4, 4, 8]], [[0] * 5, [0, 0, 0, 0, 6]]]
        )
        bars = bars.at[:, 0].add(number) % 9
        shown = types.SimpleNamespace(
            measure=jnp.ones((1, 3)) / 3,
            responses=types.SimpleNamespace(
                observations=bars[None, ..., None].astype(float), window=jnp.asarray(window)
            ),
        )
        return carry, annotate(jax.random.key(0), shown, ())

    done = threading.Event()

    def person():
        while not done.is_set():
            shown = queue.next("someone", "tab")
            if shown is None:
                time.sleep(0.01)
                continue
            sides = on_screen(shown)
            assert set(sides["left"][0]) == {"role", "text", "animation"} and set(sides["prompt"][0]) == {
                "role",
                "text",
            }
            longer = length_of(shown.pair.first) > length_of(shown.pair.second)
            queue.give("someone", shown.lease.lease, "left" if longer != shown.lease.swapped else "right")

    helper = threading.Thread(target=person)
    helper.start()
    try:
        _, labels = jax.block_until_ready(jax.jit(lambda: jax.lax.scan(step, 0, jnp.arange(3)))())
    finally:
        done.set()
        helper.join(10)
    assert labels.shape == (3, 1, 3, 1)
    # Frames 1 and 3 are drawn, of both rows: 2 (2 + 3 + 2 n) against 2 (1 + 2), while the bars grow with the step.
    assert labels[:, 0, 0, 0].tolist() == [1.0, 1.0, 1.0]
    assert labels[0, 0, 1, 0] == 0.5 and labels[1:, 0, 1, 0].tolist() == [1.0, 1.0]
    assert labels[:, 0, 2, 0].tolist() == [0.0, 0.0, 0.0]
    assert missing and missing[0] == 2


def test_pairs_are_told_apart_by_their_frames():
    one, two = (animation(np.full((2, 2, 2, 3), value, np.uint8)) for value in (1, 2))
    keys = {segment_pair("p", "Better?", *each).key for each in ((one, two), (two, one), (one, one))}
    assert len(keys) == 3 and segment_pair("p", "Better?", one, two).key in keys
    assert segment_pair("p", "Worse?", one, two).key not in keys
