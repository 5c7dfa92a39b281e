"""`examples/bilevel_by_hand.py`: at most 50 lines, the library's gradient, and the optimum that it prints."""

import importlib.util
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import bandit, bilevel, objectives, preferences

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "bilevel_by_hand.py"


def test_it_fits_on_a_page():
    assert len(EXAMPLE.read_text().splitlines()) <= 50


@pytest.mark.parametrize("seed", [0, 1])
def test_its_gradient_is_the_library_s(seed, x64):
    """At the same reward and the same three policies, solved or not."""
    specification = importlib.util.spec_from_file_location("bilevel_by_hand", EXAMPLE)
    by_hand = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(by_hand)

    keys = jax.random.split(jax.random.key(seed), 2)
    phi = jax.random.normal(keys[0], (5,))
    lowers = by_hand.REFERENCE[None, None] + 0.3 * jax.random.normal(keys[1], (3, 1, 5))  # tilts 0, +sigma, -sigma
    expected = by_hand.penalty_gradient(phi, {by_hand.SIGMA: lowers[1, 0], -by_hand.SIGMA: lowers[2, 0]})

    frozen = bandit.Bandit(jnp.eye(5)[None], by_hand.GOLD[None], by_hand.REFERENCE[None])
    algorithm = bilevel.bilevel_descent(
        bandit.bandit_problem(lambda upper, features: features @ upper, objectives.utility(kl_price=by_hand.PRICE)),
        bilevel.central(by_hand.SIGMA / by_hand.BETA),
        bilevel.closed_form(lambda task, index: lowers[index]),
        optax.sgd(1.0),
        beta=by_hand.BETA,
        annotate=preferences.expected_annotator(bandit.gold_score),
    )
    state = algorithm.init(jax.random.key(0), phi, lowers[0])
    after, _ = jax.jit(algorithm.step)(jax.random.key(0), state, None, frozen)
    np.testing.assert_allclose(state.upper - after.upper, expected, rtol=1e-10, atol=1e-12)


def test_it_ends_at_the_optimum_that_it_prints(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    *_, last, optimum = capsys.readouterr().out.splitlines()
    assert abs(float(last.split()[3]) - float(optimum.split()[2])) < 1e-3
