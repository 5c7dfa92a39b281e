"""Segments of episodes as people see them: short animations, side by side, on the labelling page.

    annotate = segment_annotator(queue, render)        # render: (observation) -> image [H, W, 3] uint8
    algorithm = bilevel_descent(trajectory_problem(...), ..., annotate=annotate)

The annotator can be traced: inside a compiled step it calls out to the page and waits. A pair is two segments of
`mdp.trajectories`; what lies outside of a segment's window is not shown.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jaxrlhf.annotation.journal import question_key
from jaxrlhf.base.algorithm import Annotator
from jaxrlhf.base.problem import SKIPPED
from jaxrlhf.labelling.pairs import Pair, Turn
from jaxrlhf.labelling.people import majority
from jaxrlhf.labelling.queue import Queue

MOST_PIXELS = 4_000_000
"""Of an animation, over all frames."""


def animation(frames: Sequence[np.ndarray] | np.ndarray, *, rate: float = 12.0) -> str:
    """Returns frames `[T, H, W, 3]` uint8 as a `Turn`'s animation: JSON with shape, frames a second and compressed pixels.

    Raises:
        ValueError: there is no frame, they are no images of one size, or there are more than `MOST_PIXELS` pixels.
    """
    images = [np.asarray(frame) for frame in frames]
    if not images or any(each.shape != images[0].shape or each.dtype != np.uint8 for each in images):
        kinds = sorted({f"{each.shape} {each.dtype}" for each in images})
        raise ValueError(
            f"An animation is images [H, W, 3] of bytes, all of one size; got {', '.join(kinds) or 'none'}."
        )
    pixels = np.stack(images)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or not pixels.size:
        raise ValueError(f"An animation is images [H, W, 3] of bytes; got {pixels.shape[1:]}.")
    if pixels.size > 3 * MOST_PIXELS:
        raise ValueError(
            f"An animation of {pixels.size // 3:,} pixels is too large for the page; draw fewer frames, or smaller than "
            f"{pixels.shape[1]} x {pixels.shape[2]}."
        )
    data = base64.b64encode(zlib.compress(pixels.tobytes(), 6)).decode("ascii")
    return json.dumps({"shape": list(pixels.shape[:3]), "rate": rate, "data": data})


def segment_pair(name: str, prompt: str, first: str, second: str) -> Pair:
    """Returns the pair of two animations; equal ones under the same name and prompt are one.

    Args:
        name: of the annotator, part of the key.
        prompt: what is asked, such as the task's aim.
        first, second: of `animation`.
    """
    one, other = (hashlib.sha256(each.encode()).hexdigest() for each in (first, second))
    key = question_key(name, prompt, one, other)
    return Pair(key, (Turn("", prompt),), (Turn("", "", first),), (Turn("", "", second),))


def segment_annotator(
    queue: Queue,
    render: Callable[[np.ndarray], np.ndarray],
    *,
    prompt: str = "Which of the two does better?",
    name: str = "segments",
    rate: float = 12.0,
    step: int = 1,
    waiting: Callable[[int], None] = lambda left: None,
) -> Annotator:
    """Returns a traceable annotator that shows segments to people, and waits for their labels however long they take.

    Segments that look the same are a tie that nobody is asked about; a pair that was labelled before has its label.

    Args:
        queue: of a page that is served.
        render: `(observation [O]) -> image [H, W, 3]` uint8.
        prompt: what is asked.
        name: of the annotator, part of the keys.
        rate: frames a second.
        step: every so many steps of a segment are drawn.
        waiting: called with the number of labels that are missing, before the wait.
    """

    def on_host(observations: np.ndarray, window: np.ndarray) -> np.ndarray:
        observations, window = np.asarray(observations), np.asarray(window)
        places = list(np.ndindex(*window.shape[:2]))
        shown = [
            [_frames(observations[place][slot], window[place][slot] > 0, render, step) for slot in (0, 1)]
            for place in places
        ]
        pairs = [segment_pair(name, prompt, *(animation(frames, rate=rate) for frames in each)) for each in shown]
        asked = [pair for pair in pairs if pair.first != pair.second]
        queue.add(asked)
        keys = [pair.key for pair in asked]
        if not queue.finished(keys):
            waiting(queue.counts()["left"])
        while not queue.finished(keys):
            queue.wait(0.5)
        labels = [0.5 if pair.first == pair.second else majority(queue.labels(pair.key)) for pair in pairs]
        queue.close(keys)
        given = np.array([SKIPPED if label is None else label for label in labels], np.float32)
        return given.reshape(*window.shape[:2], 1)

    def annotate(key, sample, frozen):
        del key, frozen
        shape = jax.ShapeDtypeStruct((*sample.measure.shape, 1), jnp.float32)
        return io_callback(on_host, shape, sample.responses.observations, sample.responses.window)

    return annotate


def _frames(
    observations: np.ndarray, within: np.ndarray, render: Callable[[np.ndarray], np.ndarray], step: int
) -> list[np.ndarray]:
    """Returns a segment's images; of a segment that its episode did not reach, the last one of the episode."""
    chosen = np.flatnonzero(within)[::step]
    if not chosen.size:
        chosen = np.array([len(observations) - 1])
    return [np.asarray(render(observations[index])) for index in chosen]
