"""Direct preference losses against their closed-form optima and a tabular minimiser of their own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from jaxrlhf import bandit, exact, objectives, preferences
from jaxrlhf.algorithms.direct_preference import direct_preference, dpo, ipo, simpo
from jaxrlhf.bilevel import SKIPPED, Labelled

BETA = 0.5


def make(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    gold = jax.random.normal(keys[0], (2, 5), dtype)
    reference = jax.nn.log_softmax(jax.random.normal(keys[1], (2, 5), dtype))
    return bandit.Bandit(jnp.zeros((2, 5, 1), dtype), gold, reference)


def from_reference(policy, frozen):
    del policy
    return frozen.reference


def assemble(loss, optimizer, *, pairs=None, **options):
    problem = bandit.bandit_problem(
        lambda upper, features: features[..., 0], objectives.likelihood(), against_reference=False, pairs=pairs
    )
    annotate = (preferences.gold_annotator if pairs else preferences.expected_annotator)(bandit.gold_score)
    return direct_preference(problem, loss, optimizer, annotate=annotate, **options)


def solve(algorithm, frozen, steps=2500):
    state = algorithm.init(jax.random.key(0), (), frozen.reference)
    body = jax.jit(lambda state, key: algorithm.step(key, state, None, frozen))
    state, info = jax.lax.scan(body, state, jax.random.split(jax.random.key(0), steps))
    return jnp.exp(jax.nn.log_softmax(state.policy)), info


def expected(loss, frozen, *, first, second):
    """The expected pair loss as a function of a table of logits, written apart from the library's sampling."""

    def value(logits):
        own = jax.nn.log_softmax(logits)
        labels = preferences.preference(
            jnp.stack(jnp.broadcast_arrays(frozen.gold[:, :, None], frozen.gold[:, None, :]), axis=-1)
        )
        ratio = own - frozen.reference
        both = jnp.stack(jnp.broadcast_arrays(ratio[:, :, None], ratio[:, None, :]), axis=-1)
        weights = jnp.exp(first(own)[:, :, None] + second(own)[:, None, :])
        return jnp.mean(jnp.sum(weights * loss(both, labels), axis=(1, 2)))

    return value


def logistic(both, labels):
    h = BETA * (both[..., 0] - both[..., 1])
    return -labels * jax.nn.log_sigmoid(h) - (1 - labels) * jax.nn.log_sigmoid(-h)


@pytest.mark.parametrize("sampler", ["reference", "policy"])
def test_dpo_reaches_the_soft_optimum_of_the_gold_reward(x64, sampler):
    frozen = make(float)
    keywords = {"sampler": from_reference} if sampler == "reference" else {}
    reached, info = solve(assemble(dpo(beta=BETA), optax.adam(0.05), **keywords), frozen)
    optimum = jnp.exp(exact.soft_policy(frozen.gold, frozen.reference, BETA))
    np.testing.assert_allclose(reached, optimum, atol=1e-5)
    np.testing.assert_allclose(info.loss[0], np.log(2), rtol=1e-12)
    kl = jnp.mean(exact.mean_under(jnp.log(optimum), jnp.log(optimum) - frozen.reference))
    np.testing.assert_allclose(info.kl[-1], kl, rtol=1e-3)
    assert info.labels[-1] == 0


def test_ipo_reaches_the_soft_optimum_of_the_win_rate(x64):
    frozen = make(float)
    reached, _ = solve(assemble(ipo(beta=BETA), optax.adam(0.05), sampler=from_reference), frozen)
    wins = exact.row_mean(lambda own, other: jax.nn.sigmoid(own - other), frozen.reference, frozen.gold)
    np.testing.assert_allclose(reached, jnp.exp(exact.soft_policy(wins, frozen.reference, BETA)), atol=1e-5)


def test_simpo_reaches_the_minimum_that_scipy_finds(x64):
    frozen, margin, scale = make(float), 0.4, 2.0
    lengths = jnp.array([1.0, 2.0, 3.0, 2.0, 1.0])
    loss = simpo(beta=scale, margin=margin, lengths=lambda sample: lengths[sample.responses])
    reached, _ = solve(assemble(loss, optax.adam(0.05), sampler=from_reference), frozen, steps=4000)

    @jax.jit
    def value(flat):
        mean = jax.nn.log_softmax(flat.reshape(2, 5)) / lengths[None]
        difference = mean[:, :, None] - mean[:, None, :]
        labels = jax.nn.sigmoid(frozen.gold[:, :, None] - frozen.gold[:, None, :])
        cost = -labels * jax.nn.log_sigmoid(scale * (difference - margin))
        cost -= (1 - labels) * jax.nn.log_sigmoid(scale * (-difference - margin))
        weights = jnp.exp(frozen.reference[:, :, None] + frozen.reference[:, None, :])
        return jnp.sum(weights * cost)

    found = scipy.optimize.minimize(value, np.zeros(10), jac=jax.jit(jax.grad(value)), tol=1e-10)
    np.testing.assert_allclose(reached, jax.nn.softmax(found.x.reshape(2, 5)), atol=1e-4)


def test_the_coupled_gradient_is_that_of_the_loss_on_its_own_pairs(x64):
    """SAIL's objective, E over the policy's own pairs, differentiated by JAX through the loss and the distribution."""
    frozen = make(float)
    start = frozen.reference + jax.random.normal(jax.random.key(3), (2, 5))

    def gradient(coupling):
        algorithm = assemble(dpo(beta=BETA), optax.sgd(1.0), coupling=coupling)
        state = algorithm.init(jax.random.key(0), (), start)
        return start - algorithm.step(jax.random.key(0), state, None, frozen)[0].policy

    def own(table):
        return table

    stopped = jax.lax.stop_gradient
    fixed, whole = (
        jax.jit(jax.grad(expected(logistic, frozen, first=table, second=table)))(start) for table in (stopped, own)
    )
    assert jnp.linalg.norm(whole - fixed) > 0.1 * jnp.linalg.norm(fixed)
    np.testing.assert_allclose(gradient(0.0), fixed, atol=1e-12)
    np.testing.assert_allclose(gradient(1.0), whole, atol=1e-12)
    np.testing.assert_allclose(gradient(0.3), fixed + 0.3 * (whole - fixed), atol=1e-12)


def test_drawn_pairs_give_the_enumerated_gradient_in_the_mean(x64):
    frozen = make(float)
    start = frozen.reference + 0.5 * jax.random.normal(jax.random.key(3), (2, 5))

    def move(key, pairs):
        algorithm = assemble(dpo(beta=BETA), optax.sgd(1.0), coupling=1.0, pairs=pairs)
        state = algorithm.init(key, (), start)
        return (start - algorithm.step(key, state, None, frozen)[0].policy).ravel()

    moves = jax.jit(jax.vmap(lambda key: move(key, 4)))(jax.random.split(jax.random.key(1), 20000))
    error = moves.std(axis=0) / np.sqrt(20000)
    assert jnp.all(jnp.abs(moves.mean(axis=0) - move(jax.random.key(0), None)) < 5 * error)


def test_smoothing_skipping_and_one_trace():
    frozen = make()
    algorithm = assemble(dpo(beta=BETA, label_smoothing=0.2), optax.adam(0.05), pairs=6)
    state = algorithm.init(jax.random.key(0), (), frozen.reference)
    step = jax.jit(chex.assert_max_traces(algorithm.step, n=1), donate_argnums=1)
    for index in range(3):
        state, info = step(jax.random.key(index), state, None, frozen)
    assert int(info.labels) == 12 and int(state.step) == 3
    sample = jax.jit(algorithm.propose)(jax.random.key(9), state, None, frozen)
    moved, info = jax.jit(algorithm.update)(
        jax.random.key(1), state._replace(optimizer=optax.adam(0.05).init(state.policy)),
        Labelled(sample, jnp.full((2, 6, 1), SKIPPED)), frozen,
    )  # fmt: skip
    assert info.labels == 0 and info.loss == 0
    chex.assert_trees_all_close(moved.policy, state.policy)
    # A smoothed label of 1 is a label of 0.8.
    log_prob = jax.random.normal(jax.random.key(2), (2, 6, 2, 1))
    labelled = Labelled(sample, jnp.ones((2, 6, 1)))
    np.testing.assert_allclose(
        dpo(beta=BETA, label_smoothing=0.2)(log_prob, labelled),
        dpo(beta=BETA)(log_prob, labelled._replace(labels=jnp.full((2, 6, 1), 0.8))),
        rtol=1e-5,
    )


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="beta must be positive, got -1"):
        dpo(beta=-1.0)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1/2\)"):
        dpo(beta=1.0, label_smoothing=0.5)
    with pytest.raises(ValueError, match="coupling must not be negative"):
        assemble(dpo(beta=1.0), optax.sgd(1.0), coupling=-0.1)
    with pytest.raises(ValueError, match="at least 1 step"):
        assemble(ipo(beta=1.0), optax.sgd(1.0), steps=0)
    with pytest.raises(ValueError, match="needs an annotator"):
        problem = bandit.bandit_problem(lambda upper, features: features[..., 0], objectives.likelihood(), pairs=2)
        direct_preference(problem, simpo(beta=2.0), optax.sgd(1.0)).step(None, None, None, None)
