"""Published hypergradients of bilevel RL against the exact one on a small process."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "experiments"))

import comparators

from jaxrlhf.mdp import tabular


@pytest.fixture(scope="module")
def gradients():
    """The exact gradient, SoBiRL's, and both penalties' by weight, from one program in double precision."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        mdp = tabular.TabularMDP(
            transition=jax.nn.softmax(2.0 * jax.random.normal(keys[0], (4, 3, 4))),
            start=jnp.array([0.4, 0.3, 0.2, 0.1]),
            terminal=jnp.array([0.0, 0.0, 0.0, 1.0]),
            discount=jnp.asarray(0.8),
        )
        follower, leader = jax.random.normal(keys[1], (2, 5, 12))

        def tables(upper):
            # Neither reward is linear in the leader's parameters.
            return jnp.tanh(upper @ follower).reshape(4, 3), jnp.sin(upper @ leader).reshape(4, 3)

        def all_of(upper):
            arguments = (tables, upper, mdp, 0.5)
            penalties = {
                name: jax.vmap(lambda weight, method=method: method(*arguments, weight=weight))(
                    jnp.array([1e3, 1e4, 1e6])
                )
                for name, method in (
                    ("value", comparators.value_penalty),
                    ("bellman", functools.partial(comparators.bellman_penalty, iterations=30)),
                )
            }
            return comparators.exact(*arguments), comparators.sobirl(*arguments), penalties

        return jax.tree.map(np.asarray, jax.jit(all_of)(jax.random.normal(keys[2], (5,))))


def test_sobirl_is_exact(gradients):
    exact, sobirl, _ = gradients
    assert np.linalg.norm(exact) > 0.1
    np.testing.assert_allclose(sobirl, exact, atol=1e-9)


@pytest.mark.parametrize("name", ["value", "bellman"])
def test_a_penalty_is_biased_by_the_inverse_of_its_weight(gradients, name):
    exact, _, penalties = gradients
    small, large, huge = (np.linalg.norm(found - exact) for found in penalties[name])
    np.testing.assert_allclose(small / large, 10.0, rtol=0.2)
    assert 1e-9 < huge < 1e-5 < large
    # One step of Richardson's extrapolation takes the first order away.
    extrapolated = (10.0 * penalties[name][1] - penalties[name][0]) / 9.0
    assert np.linalg.norm(extrapolated - exact) < 0.05 * large
