"""The state entropy bonus against brute-force distances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.mdp.exploration import state_entropy_bonus


def brute_force(states, particles, neighbours):
    distances = np.sort(np.linalg.norm(states[:, None] - particles[None], axis=-1), axis=1)
    return np.log1p(distances[:, neighbours - 1])


def test_the_bonus_is_the_log_distance_to_a_neighbour(x64):
    observations = jax.random.normal(jax.random.key(0), (2, 3, 7, 4))
    visited = jnp.arange(7)[None, None] < jnp.array([[7, 3, 1], [5, 7, 2]])[..., None]
    for count in (10, 64):
        bonus = jax.jit(functools.partial(state_entropy_bonus, neighbours=3, particles=count))
        result = np.asarray(bonus(observations, visited))
        mask = np.asarray(visited)
        states = np.asarray(observations)[mask]
        particles = states[np.arange(10) * 25 // 10] if count == 10 else states
        np.testing.assert_allclose(result[mask], brute_force(states, particles, 3), rtol=1e-7)
        assert np.all(result[~mask] == 0)


def test_an_isolated_state_has_a_larger_bonus():
    cluster = 0.1 * jax.random.normal(jax.random.key(0), (1, 99, 2))
    observations = jnp.concatenate([cluster, jnp.full((1, 1, 2), 3.0)], axis=1)
    bonus = jax.jit(state_entropy_bonus)(observations, jnp.ones((1, 100)))
    assert bonus[0, -1] > 2 * jnp.max(bonus[0, :-1])


def test_too_few_visits_give_no_bonus_and_no_nan():
    bonus = state_entropy_bonus(jnp.ones((4, 3)), jnp.array([True, True, False, False]), neighbours=5)
    np.testing.assert_array_equal(bonus, np.zeros(4))
    with pytest.raises(ValueError, match="1 neighbour and more particles"):
        state_entropy_bonus(jnp.ones((4, 3)), jnp.ones(4), neighbours=0)
