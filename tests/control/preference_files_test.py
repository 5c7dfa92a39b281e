"""Files of preferences over segments: what is read, and what is refused by name."""

import numpy as np
import pytest

from jaxrlhf.control.preference_files import read_preferences, write_preferences
from jaxrlhf.mdp.environments import Environment

COUNT, STEPS = 4, 3


def arrays(**changes):
    draws = np.random.default_rng(0)
    right = {
        "observations": draws.normal(size=(COUNT, 2, STEPS, 2, 2)),
        "actions": draws.normal(size=(COUNT, 2, STEPS, 1)),
        "labels": np.array([1, 0, 0.5, -1]),
        "lengths": np.array([[1, 2], [3, 3], [3, 2], [1, 1]]),
        "rewards": draws.normal(size=(COUNT, 2, STEPS)),
    }
    return {name: array for name, array in (right | changes).items() if array is not None}


def task(**changes):
    right = {"name": "Box", "reset": None, "step": None, "actions": 1, "observation_size": 4, "continuous": True}
    return Environment(**right | changes)


def saved(path, **changes):
    np.savez(path / "pairs.npz", **arrays(**changes))
    return path / "pairs.npz"


def test_pairs_become_rows_with_zeros_past_their_ends(tmp_path):
    labelled = read_preferences(saved(tmp_path), task())
    segments, given = labelled.sample.responses, arrays()
    assert segments.observations.shape == (COUNT, 1, 2, STEPS, 4) and segments.actions.shape == (COUNT, 1, 2, STEPS, 1)
    for pair, side, step in np.ndindex(COUNT, 2, STEPS):
        inside = step < given["lengths"][pair, side]
        expected = given["observations"][pair, side, step].ravel() * inside
        np.testing.assert_allclose(segments.observations[pair, 0, side, step], expected, rtol=1e-6)
        np.testing.assert_allclose(
            segments.gold[pair, 0, side, step], given["rewards"][pair, side, step] * inside, rtol=1e-6
        )
        assert (
            segments.window[pair, 0, side, step] == labelled.sample.cumulative_discount[pair, 0, side, step] == inside
        )
    np.testing.assert_array_equal(np.ravel(labelled.labels), given["labels"])
    write_preferences(tmp_path / "again.npz", labelled)
    again = read_preferences(tmp_path / "again.npz", task())
    np.testing.assert_array_equal(again.sample.responses.observations, segments.observations)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.npz", "pairs.npz"]


def test_what_is_optional_may_be_missing(tmp_path):
    path = saved(tmp_path, lengths=None, rewards=None, actions=np.ones((COUNT, 2, STEPS), np.int64))
    labelled = read_preferences(path, task(continuous=False, actions=2))
    assert labelled.sample.responses.actions.dtype == np.int32
    assert np.all(labelled.sample.responses.window == 1) and np.all(labelled.sample.responses.gold == 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": None, "actions": None}, "it holds no actions and no labels"),
        ({"extra": np.zeros(1)}, "extra is no array of this format"),
        ({"labels": np.array(["a"] * COUNT)}, "labels has the type <U1, expected numbers"),
        ({"labels": np.array([1, 0, np.nan, 0])}, "labels is not finite"),
        ({"labels": np.array([1, 0, 2, 0])}, r"labels must lie in \[0, 1\], or be -1"),
        ({"labels": np.zeros(3)}, r"labels has the shape \(3,\), expected \(4,\)"),
        ({"observations": np.zeros((COUNT, 2, STEPS))}, r"observations has the shape \(4, 2, 3\)"),
        ({"observations": np.zeros((0, 2, STEPS, 1))}, r"observations has the shape \(0, 2, 3, 1\)"),
        ({"actions": np.zeros((COUNT, 2, 2, 1))}, "actions has the shape"),
        ({"actions": np.zeros((COUNT, 2, STEPS))}, "actions has the type float64 and no dimension D"),
        ({"lengths": np.zeros((COUNT, 2), int)}, "lengths must be whole numbers from 1 to 3"),
        ({"rewards": np.zeros((COUNT, 2))}, "rewards has the shape"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"pairs.npz: {message}"):
        read_preferences(saved(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"observation_size": 3}, "observations have 4 numbers, those of Box 3"),
        ({"continuous": False}, "the actions of Box are integers"),
        ({"actions": 2}, "actions have 1 dimensions, those of Box 2"),
    ],
)
def test_a_file_of_another_task_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_preferences(saved(tmp_path), task(**changes))


def test_what_is_no_archive_is_refused(tmp_path):
    whole = saved(tmp_path).read_bytes()
    for name, content in (("cut.npz", whole[: len(whole) // 2]), ("text.npz", b"labels"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: it is no NumPy archive"):
            read_preferences(tmp_path / name)
    np.savez(tmp_path / "objects.npz", **arrays(labels=np.array([{}] * COUNT, dtype=object)))
    with pytest.raises(ValueError, match="no NumPy archive of plain arrays"):
        read_preferences(tmp_path / "objects.npz")
    np.save(tmp_path / "one.npz.npy", np.zeros(3))
    (tmp_path / "one.npz.npy").rename(tmp_path / "one.npz")
    with pytest.raises(ValueError, match="no NumPy archive"):
        read_preferences(tmp_path / "one.npz")
    with pytest.raises(ValueError, match="There is no file"):
        read_preferences(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"ends in \.npz"):
        write_preferences(tmp_path / "pairs.txt", read_preferences(tmp_path / "pairs.npz"))
