"""Control tasks as people see them, and a person as the annotator of the control study."""

import pathlib
import sys
import threading
import time

import httpx
import jax
import numpy as np
import pytest

pytest.importorskip("starlette", reason="the labelling page needs the extra labelling")
pytest.importorskip("uvicorn", reason="the labelling page needs the extra labelling")

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
sys.path.append(str(EXPERIMENTS))

import control  # noqa: E402
import control_methods as methods  # noqa: E402
import control_people as people  # noqa: E402
import control_tasks as tasks  # noqa: E402

from jaxrlhf.labelling import LabelStore  # noqa: E402
from jaxrlhf.mdp import four_rooms as rooms  # noqa: E402


def where(image, colour):
    """Rows and columns of a colour's pixels, their means."""
    return np.argwhere((image == colour).all(axis=-1)).mean(axis=0)


def test_pictures_show_the_state():
    middle = (people.SIZE - 1) / 2
    upright, right = people.draw_pendulum(np.array([1.0, 0.0, 0.0])), people.draw_pendulum(np.array([0.0, 1.0, 0.0]))
    assert where(upright, people.BODY)[0] < middle - 10 and abs(where(upright, people.BODY)[1] - middle) < 1
    assert where(right, people.BODY)[1] > middle + 10
    leaning = people.draw_cartpole(np.array([0.0, 0.0, 0.2, 0.0]))
    assert where(leaning, people.BODY)[1] > middle + 3 and abs(where(leaning, people.LINE)[1] - middle) < 1
    assert where(people.draw_cartpole(np.array([-2.0, 0.0, 0.0, 0.0])), people.BODY)[1] < middle - 20
    stretched = np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0])
    reached = people.draw_reacher(stretched)
    assert where(reached, people.BODY)[1] > middle + 5 and where(reached, people.AIM)[1] > middle + 25
    cell = people.draw_four_rooms(np.eye(len(rooms.CELLS))[rooms.CELLS.index((11, 2))])
    side = people.SIZE // 13
    assert np.allclose(where(cell, people.BODY), (11.5 * side - 0.5, 2.5 * side - 0.5))
    for draw in people.PICTURES.values():
        size = len(rooms.CELLS) if draw is people.draw_four_rooms else 8
        image = draw(np.ones(size))
        assert image.shape == (people.SIZE, people.SIZE, 3) and image.dtype == np.uint8


def test_a_person_labels_one_run_at_a_time(tmp_path):
    config = control.Config(seeds=2, output=tmp_path)
    with pytest.raises(ValueError, match="give --seeds 1"):
        control.run(tasks.TASKS["cartpole"](), "iterated", "browser", config, "cartpole")


def label_until(stop, journal, port, given):
    """Prefers the pole that stays up longer, until told to stop."""
    address = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=address, headers={"origin": address}, timeout=10) as client:
        while not stop.is_set():
            try:
                if not client.cookies:
                    token = journal.with_name(f"{journal.name}.token").read_text()
                    client.get(f"/?token={token}")
                shown = client.post("/api/next", json={"tab": "t"}).json()["pair"]
            except (httpx.HTTPError, FileNotFoundError):
                shown = None
            if shown is None:
                time.sleep(0.05)
                continue
            left, right = (len(shown[side][0]["animation"]) for side in ("left", "right"))
            fields = {"tab": "t", "lease": shown["lease"], "choice": "left" if left > right else "right"}
            given.append(client.post("/api/label", json=fields).status_code)


@pytest.mark.slow
def test_a_person_labels_within_a_run(tmp_path):
    config = control.Config(
        seeds=1, port=8391, output=tmp_path, budget=methods.Budget(pairs=4, labels=2, first_steps=2)
    )
    task = tasks.TASKS["cartpole"]()._replace(steps=40, outer_steps=6)
    journal, stop, given = tmp_path / "cartpole-iterated.people.sqlite", threading.Event(), []
    helper = threading.Thread(target=label_until, args=(stop, journal, 8391, given))
    helper.start()
    try:
        with jax.numpy_rank_promotion("allow"):
            curves = control.run(task, "iterated", "browser", config, "cartpole")
    finally:
        stop.set()
        helper.join(20)
    assert np.asarray(curves["labels"]).tolist() == [[4, 4, 2, 2, 2, 2]]
    votes = LabelStore(journal).votes()
    # Episodes that look the same are ties without anybody being asked.
    assert 8 <= len(votes) <= 16 and set(given) == {200} and np.all(np.isfinite(curves["returns"]))
