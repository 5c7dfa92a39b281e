"""Control tasks as people see them: pictures of states drawn from observations, and a person as the study's annotator."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from jaxrlhf import preferences
from jaxrlhf.labelling import Board, LabelStore, Page, Queue
from jaxrlhf.labelling.segments import segment_annotator
from jaxrlhf.mdp import four_rooms as rooms

SIZE = 72
"""Pixels of a picture's side."""
GROUND, LINE, BODY, AIM = (245, 246, 248), (120, 128, 138), (11, 87, 194), (214, 110, 20)
AIMS = {
    "four-rooms": "Which walk do you like better?",
    "cartpole": "Where is the pole balanced better?",
    "pendulum": "Where is the pendulum held up better?",
    "reacher": "Where does the arm's end come closer to the orange disc?",
}
"""What is asked about each task."""


def blank() -> np.ndarray:
    """Returns an empty picture `[SIZE, SIZE, 3]`."""
    return np.full((SIZE, SIZE, 3), GROUND, np.uint8)


def rod(image: np.ndarray, start: np.ndarray, end: np.ndarray, colour: tuple[int, int, int], width: float) -> None:
    """Draws what lies within half the width of a stretch; points are (right, up) in [-1, 1]."""
    down, right = np.mgrid[:SIZE, :SIZE]
    points = np.stack([right, SIZE - 1 - down], axis=-1) / (SIZE - 1) * 2 - 1
    along = np.asarray(end, float) - start
    position = np.clip(((points - start) @ along) / max(along @ along, 1e-12), 0.0, 1.0)
    distance = np.linalg.norm(points - start - position[..., None] * along, axis=-1)
    image[distance <= width / 2] = colour


def disc(image: np.ndarray, centre: np.ndarray, colour: tuple[int, int, int], width: float) -> None:
    """Draws a disc."""
    rod(image, centre, centre, colour, width)


def draw_four_rooms(observation: np.ndarray) -> np.ndarray:
    """The grid from above; the observation is the cell, one-hot."""
    image, (row, column) = blank(), rooms.CELLS[int(np.argmax(observation))]
    side = SIZE // len(rooms.GRID)
    for down, line in enumerate(rooms.GRID):
        for right, kind in enumerate(line):
            if kind == "x":
                image[down * side : (down + 1) * side, right * side : (right + 1) * side] = LINE
    image[row * side : (row + 1) * side, column * side : (column + 1) * side] = BODY
    return image


def draw_cartpole(observation: np.ndarray) -> np.ndarray:
    """Position, velocity, angle from upright to the right, and its velocity."""
    image, cart = blank(), np.array([np.clip(observation[0] / 2.4, -1, 1) * 0.9, -0.5])
    rod(image, np.array([-1.0, -0.62]), np.array([1.0, -0.62]), LINE, 0.03)
    half = np.array([0.15, 0.0])
    rod(image, cart - half, cart + half, LINE, 0.15)
    rod(image, cart, cart + 1.1 * np.array([np.sin(observation[2]), np.cos(observation[2])]), BODY, 0.08)
    return image


def draw_pendulum(observation: np.ndarray) -> np.ndarray:
    """Cosine and sine of the angle from upright, and its velocity."""
    image, centre = blank(), np.zeros(2)
    rod(image, centre, 0.8 * np.array([observation[1], observation[0]]), BODY, 0.12)
    disc(image, centre, LINE, 0.16)
    return image


def draw_reacher(observation: np.ndarray) -> np.ndarray:
    """Cosines and sines of both links' angles, their velocities, and the aim; both links have length 1."""
    image = blank()
    cosines, sines, aim = observation[:2], observation[2:4], observation[6:8]
    disc(image, aim / 2.2, AIM, 0.2)
    joint = np.zeros(2)
    for cosine, sine in zip(cosines, sines, strict=True):
        following = joint + np.array([cosine, sine]) / 2.2
        rod(image, joint, following, BODY, 0.07)
        joint = following
    disc(image, np.zeros(2), LINE, 0.12)
    return image


PICTURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "four-rooms": draw_four_rooms,
    "cartpole": draw_cartpole,
    "pendulum": draw_pendulum,
    "reacher": draw_reacher,
}


@contextlib.contextmanager
def person(name: str, journal: pathlib.Path, *, port: int) -> Iterator[Callable[[int], preferences.Annotator]]:
    """Serves the page of a task within the block; gives `labels per pair -> annotator`, which waits for people.

    Args:
        name: of the task.
        journal: of what they say; a study that goes on finds there what was said before.
        port: of the page; 0 takes any that is free.

    Raises:
        ValueError: the page cannot be served, or a pair is to have several labels.
    """
    queue, board = Queue(LabelStore(journal), repeats=0.0), Board(AIMS[name])
    with Page(queue, board, port=port) as page:
        print(f"People label at {page.address}; who knows this address can label.", flush=True)

        def annotator(labels: int) -> preferences.Annotator:
            if labels != 1:
                raise ValueError(f"a person labels a pair once, and this method asks for {labels} labels; leave it out")
            return segment_annotator(queue, PICTURES[name], prompt=AIMS[name], name=name, step=2, waiting=say)

        def say(left: int) -> None:
            board.doing = ""
            print(f"{left} labels to give", flush=True)

        yield annotator
