"""Policy gradient on labels against its closed-form fixed point, and its gradient against enumeration."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import bandit, exact, objectives, preferences
from jaxrlhf.algorithms import policy_gradient

PRICE = 0.1


def make():
    keys = jax.random.split(jax.random.key(0), 2)
    gold = jax.random.normal(keys[0], (2, 5))
    reference = jax.nn.log_softmax(jax.random.normal(keys[1], (2, 5)))
    return bandit.Bandit(jnp.zeros((2, 5, 1)), gold, reference)


def assemble(optimizer, *, pairs=None, steps=1):
    problem = bandit.bandit_problem(
        lambda upper, features: features[..., 0], objectives.utility(kl_price=PRICE), pairs=pairs
    )
    annotate = (preferences.gold_annotator if pairs else preferences.expected_annotator)(bandit.gold_score)
    return policy_gradient.label_policy_gradient(problem, optimizer, annotate=annotate, steps=steps)


def test_it_reaches_the_closed_form_optimum(x64):
    """Argmax of win rate - kappa KL is reference * exp(win rate of the arm / kappa)."""
    frozen = jax.tree.map(lambda leaf: leaf.astype(float), make())
    algorithm = assemble(optax.adam(0.05), steps=2)
    state = algorithm.init(jax.random.key(0), (), frozen.reference)
    body = jax.jit(lambda state, key: algorithm.step(key, state, None, frozen))
    state, info = jax.lax.scan(body, state, jax.random.split(jax.random.key(0), 1500))
    wins = exact.row_mean(lambda own, other: jax.nn.sigmoid(own - other), frozen.reference, frozen.gold)
    optimum = exact.soft_policy(wins, frozen.reference, PRICE)
    np.testing.assert_allclose(jnp.exp(jax.nn.log_softmax(state.policy)), jnp.exp(optimum), atol=1e-4)
    assert info.labels[-1] == 0 and info.gradient_norm[-1] < 1e-4


def test_drawn_labels_give_the_enumerated_gradient_in_the_mean(x64):
    frozen = jax.tree.map(lambda leaf: leaf.astype(float), make())
    start = frozen.reference + 0.3

    def move(key, pairs):
        algorithm = assemble(optax.sgd(1.0), pairs=pairs)
        state = algorithm.init(jax.random.key(0), (), start)
        return (start - algorithm.step(key, state, None, frozen)[0].policy).ravel()

    truth = jax.jit(lambda key: move(key, None))(jax.random.key(0))
    moves = jax.jit(jax.vmap(lambda key: move(key, 4)))(jax.random.split(jax.random.key(1), 5000))
    error = moves.std(axis=0) / np.sqrt(5000)
    assert jnp.all(jnp.abs(moves.mean(axis=0) - truth) < 5 * error)
    assert jnp.linalg.norm(error) < 0.1 * jnp.linalg.norm(truth)


def test_one_trace_halves_and_labels():
    frozen = make()
    algorithm = assemble(optax.adam(0.05), pairs=6)
    state = algorithm.init(jax.random.key(0), (), frozen.reference)
    step = jax.jit(chex.assert_max_traces(algorithm.step, n=1), donate_argnums=1)
    for index in range(3):
        state, info = step(jax.random.key(index), state, None, frozen)
    assert int(info.labels) == 12 and int(state.step) == 3
    with pytest.raises(ValueError, match="needs a KL price"):
        problem = bandit.bandit_problem(lambda upper, features: features[..., 0], objectives.likelihood())
        policy_gradient.label_policy_gradient(problem, optax.sgd(1.0))
    with pytest.raises(ValueError, match="at least 1 step"):
        assemble(optax.sgd(1.0), steps=0)
