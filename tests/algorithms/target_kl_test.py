"""The controller on bandits whose optimal beta for a KL is known, for a bilevel method and a direct one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import bandit, bilevel, exact, objectives, preferences
from jaxrlhf.algorithms.direct_preference import direct_preference, dpo
from jaxrlhf.algorithms.target_kl import ramp, target_kl


def make():
    keys = jax.random.split(jax.random.key(0), 2)
    gold = 2 * jax.random.normal(keys[0], (2, 5))
    reference = jax.nn.log_softmax(jax.random.normal(keys[1], (2, 5)))
    return bandit.Bandit(jnp.zeros((2, 5, 1)), gold, reference)


def kl_at(beta, frozen):
    policy = exact.soft_policy(frozen.gold, frozen.reference, beta)
    return jnp.mean(exact.mean_under(policy, policy - frozen.reference))


def right_beta(target, frozen):
    betas = jnp.exp(jnp.linspace(-4, 3, 2000))
    return float(betas[jnp.argmin(jnp.abs(jax.vmap(lambda beta: kl_at(beta, frozen))(betas) - target))])


def annotate(key, sample, frozen):
    return preferences.expected_annotator(bandit.gold_score)(key, sample, frozen)


def iterated(beta):
    """Iterated RLHF with a table for the reward, which starts at the truth and stays there."""
    problem = bandit.bandit_problem(
        lambda upper, features: upper, objectives.add(objectives.likelihood(coupled=False)), pairs=None
    )
    solver = bilevel.tangent(optax.adam(0.02), optax.set_to_zero())
    return bilevel.bilevel_descent(
        problem, bilevel.decoupled(), solver, optax.set_to_zero(), beta=beta, annotate=annotate
    )


def direct(beta):
    problem = bandit.bandit_problem(lambda upper, features: upper, objectives.likelihood(), against_reference=False)
    return direct_preference(problem, dpo(beta=beta), optax.adam(0.02), annotate=annotate)


@pytest.mark.parametrize("make_algorithm", [iterated, direct])
@pytest.mark.parametrize("target", [0.2, 0.6])
def test_it_finds_the_beta_of_a_kl(make_algorithm, target):
    frozen = make()
    algorithm = target_kl(make_algorithm, target=target, beta=3.0, gain=0.03)
    state = algorithm.init(jax.random.key(0), frozen.gold, frozen.reference)
    body = jax.jit(lambda state, key: algorithm.step(key, state, None, frozen))
    state, info = jax.lax.scan(body, state, jax.random.split(jax.random.key(0), 1500))
    np.testing.assert_allclose(info.kl[-1], target, rtol=0.02)
    np.testing.assert_allclose(jnp.exp(state.integral), right_beta(target, frozen), rtol=0.05)
    assert state.policy is state.inner.policy or jnp.all(state.policy == state.inner.policy)


def test_one_trace_halves_and_a_kl_measured_apart():
    frozen = make()
    algorithm = target_kl(direct, target=0.5, beta=1.0, measure=lambda key, state, labelled, frozen: jnp.asarray(50.0))
    state = algorithm.init(jax.random.key(0), (), frozen.reference)
    propose = jax.jit(algorithm.propose)
    update = jax.jit(chex.assert_max_traces(algorithm.update, n=1), donate_argnums=1)
    for index in range(3):
        sample = propose(jax.random.key(index), state, None, frozen)
        labelled = bilevel.Labelled(sample, annotate(None, sample, frozen))
        state, _ = update(jax.random.key(index), state, labelled, frozen)
    # Far above its target: the integral takes one full step each time, and the proportional part one more.
    np.testing.assert_allclose(state.integral, 3 * 0.05, rtol=1e-6)
    np.testing.assert_allclose(state.log_beta, 3 * 0.05 + 1.0, rtol=1e-6)
    assert state.step == 3


def test_a_ramp_rises_in_a_straight_line_and_waits():
    schedule = ramp(4.0, steps=10, begin=2, start=0.25)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.array([2, 6, 10, 20])), [1.0, 2.5, 4.0, 4.0])
    assert jnp.isnan(schedule(1))
    frozen = make()
    algorithm = target_kl(direct, target=schedule, beta=1.0)
    step = jax.jit(algorithm.step)
    state = algorithm.init(jax.random.key(0), (), frozen.reference)
    state, _ = step(jax.random.key(0), state, None, frozen)
    assert state.log_beta == 0.0
    for _ in range(2):
        state, _ = step(jax.random.key(0), state, None, frozen)
    assert state.log_beta < 0.0


def test_what_cannot_be_is_refused():
    for keywords, message in (
        ({"target": 0.0, "beta": 1.0}, "target must be positive, got 0"),
        ({"target": 1.0, "beta": -1.0}, "beta must be positive, got -1"),
        ({"target": 1.0, "beta": 1.0, "gain": 0.0}, "gain must be positive"),
        ({"target": 1.0, "beta": 1.0, "proportional": -1.0}, "proportional must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            target_kl(direct, **keywords)
    with pytest.raises(ValueError, match="needs propose and update"):
        algorithm = target_kl(direct, target=1.0, beta=1.0, measure=lambda *arguments: 1.0)
        state = algorithm.init(jax.random.key(0), (), make().reference)
        algorithm.step(jax.random.key(0), state, None, make())
