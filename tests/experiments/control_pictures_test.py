"""How observations are drawn, and the films."""

import pathlib
import sys

import numpy as np
import pytest

pytest.importorskip("gymnax", reason="needs the extra control")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "experiments"))

import control_pictures as pictures


def test_poles_point_where_the_observations_say():
    # Upright, and lying towards positive angles.
    np.testing.assert_allclose(pictures.pendulum(np.array([1.0, 0.0, 3.0]))[0][1], (0.0, 0.8), atol=1e-6)
    np.testing.assert_allclose(
        pictures.cartpole(np.array([1.2, 0.0, np.pi / 2, 0.0]))[1], [(0.5, 0.0), (1.3, 0.0)], atol=1e-6
    )
    # The second pole hangs from the first one: both angles are a quarter, so that it points down.
    double = pictures.double_pendulum(np.array([0.1, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(double[1], [(0.1, 0.0), (0.5, 0.0), (0.5, -0.4)], atol=1e-6)
    seen = np.array([0.0, 0.0, 1.0, 0.0, 0.1, 0.1, 0.0, 0.0, -0.05, 0.05, 0.0])
    np.testing.assert_allclose(pictures.reacher(seen)[0], [(0.0, 0.0), (0.0, 0.4), (0.2, 0.6)], atol=1e-6)
    assert set(pictures.DRAWN) == set(pictures.TASKS)


def test_a_film_has_what_was_drawn(tmp_path):
    from PIL import Image

    observations = np.array([[np.cos(angle), np.sin(angle), 0.0] for angle in (0.0, 1.0, 2.0)])
    pictures.write_gif(tmp_path / "film.gif", observations, pictures.pendulum, size=40)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3 and film.size == (40, 40) and film.info["duration"] == 40
        dark = np.argwhere(np.asarray(film.convert("L")) < 200)
        # Upright: in the middle, in the upper half.
        assert len(dark) > 20 and dark[:, 0].max() <= 23 and abs(dark[:, 1].mean() - 20) < 2
