"""Objectives: their values, how they add, and the loophole contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import bandit, bilevel, exact, objectives, preferences

BETA = 0.3


def test_values_against_hand_computed_ones():
    returns = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
    labels = jnp.array([[[1.0], [1.0]]])
    cost = objectives.likelihood().pair_cost(returns, labels)
    np.testing.assert_allclose(cost.coupled, [[np.log1p(np.exp(-1)), np.log1p(np.exp(2))]], rtol=1e-6)
    assert not cost.uncoupled.any()
    two = jnp.array([[[1.0, 0.0], [1.0, 1.0]]])
    p = 1 / (1 + np.exp([-1.0, 2.0]))
    cost = objectives.brier(coupled=False).pair_cost(returns, two)
    np.testing.assert_allclose(cost.uncoupled, [[(p[0] - 1) * p[0], (p[1] - 1) ** 2]], rtol=1e-6)
    np.testing.assert_allclose(objectives.utility(kl_price=0.1, weight=2.0).pair_cost(returns, labels).coupled, -2.0)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_a_traced_rate_of_mistakes_is_that_of_a_set_one(rate):
    returns = 3.0 * jax.random.normal(jax.random.key(0), (2, 3, 2))
    labels = jnp.array([0.0, 0.5, 1.0, 1.0, 0.0, 0.3]).reshape(2, 3, 1)

    def cost(returns, rate):
        objective = objectives.likelihood(choice=preferences.Choice(mistake=rate))
        return jnp.sum(objective.pair_cost(returns, labels).coupled)

    traced = jax.jit(jax.value_and_grad(cost))(returns, jnp.asarray(rate))
    expected = jax.value_and_grad(functools.partial(cost, rate=rate))(returns)
    np.testing.assert_allclose(traced[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(traced[1], expected[1], rtol=1e-4, atol=1e-6)


def test_objectives_add():
    both = objectives.add(objectives.brier(coupled=False), objectives.utility(kl_price=0.1, weight=3.0))
    assert (both.labels, both.against_reference) == (2, True)
    assert both.kl_price == pytest.approx(0.3)
    returns, labels = jax.random.normal(jax.random.key(0), (2, 3, 2)), jnp.ones((2, 3, 2))
    parts = [objectives.brier(coupled=False), objectives.utility(kl_price=0.1, weight=3.0)]
    expected = [part.pair_cost(returns, labels) for part in parts]
    got = both.pair_cost(returns, labels)
    np.testing.assert_allclose(got.coupled, expected[1].coupled)
    np.testing.assert_allclose(got.uncoupled, expected[0].uncoupled)


def test_brier_with_two_labels_is_unbiased():
    """Enumerating both labels gives the squared distance to the annotator's probability."""
    truth, returns = 0.7, jnp.array([[[0.4, 0.0]]])
    cost = objectives.brier().pair_cost
    mean = sum(
        (truth if first else 1 - truth) * (truth if second else 1 - truth)
        * cost(returns, jnp.array([[[float(first), float(second)]]])).coupled[0, 0]
        for first in (0, 1)
        for second in (0, 1)
    )  # fmt: skip
    np.testing.assert_allclose(mean, (jax.nn.sigmoid(0.4) - truth) ** 2, rtol=1e-5)


def make(seed, contexts=3, arms=6):
    gold_key, reference_key = jax.random.split(jax.random.key(seed))
    return bandit.Bandit(
        jnp.eye(contexts * arms).reshape(contexts, arms, -1),
        jax.random.normal(gold_key, (contexts, arms)),
        jax.nn.log_softmax(0.5 * jax.random.normal(reference_key, (contexts, arms)), axis=-1),
    )


def linear(upper, features):
    return features @ upper


@functools.cache
def descend(name, steps=1500):
    """Exact descent: `(frozen, start) -> (Phi, missed share of the gain)` at the start and at the end."""
    objective, against_reference = CANDIDATES[name]
    problem = bandit.bandit_problem(linear, objective, against_reference=against_reference)
    solver = bandit.best_response(linear, objective, beta=BETA, against_reference=against_reference)
    algorithm = bilevel.bilevel_descent(
        problem,
        bilevel.boltzmann(),
        solver,
        optax.adam(optax.cosine_decay_schedule(0.03, steps)),
        beta=BETA,
        annotate=preferences.expected_annotator(bandit.gold_score, labels=objective.labels),
    )

    def judge(frozen, upper):
        rewards = linear(upper, frozen.features)
        policy = exact.soft_policy(rewards, frozen.reference, BETA)
        phi = exact.upper_value(
            objective, rewards, frozen.gold, frozen.reference, beta=BETA, against_reference=against_reference
        )
        gain = exact.evaluate_policy(frozen.reference, frozen.reference, frozen.gold, BETA).gap
        return phi, exact.evaluate_policy(policy, frozen.reference, frozen.gold, BETA).gap / gain

    @jax.jit
    def whole(frozen, start):
        state = algorithm.init(jax.random.key(0), start, frozen.reference)

        def step(state, _):
            policy = exact.soft_policy(linear(state.upper, frozen.features), frozen.reference, BETA)
            return algorithm.step(jax.random.key(0), state._replace(lowers=policy[None]), None, frozen)[0], None

        state, _ = jax.lax.scan(step, state, None, length=steps)
        return judge(frozen, start), judge(frozen, state.upper)

    return whole


DEFAULT = objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=BETA / 4))
CANDIDATES = {
    "default": (DEFAULT, True),
    "brier": (objectives.brier(), True),
    "likelihood, policy-policy": (objectives.likelihood(), False),
    "brier, policy-policy": (objectives.brier()._replace(against_reference=False), False),
}


def starts(frozen):
    true = frozen.gold.ravel()
    worst = jax.nn.one_hot(jnp.argmin(frozen.gold, axis=-1), frozen.gold.shape[-1]).ravel()
    return {"collapsed": 4.0 * worst, "flat": jnp.zeros_like(true), "true": true}


@functools.cache
def descent_from(name, seed, start):
    frozen = make(seed)
    return descend(name)(frozen, starts(frozen)[start])


@pytest.mark.parametrize("name", ["default", "brier"])
@pytest.mark.parametrize("start", ["collapsed", "flat", "true"])
def test_loophole_contract(name, start):
    """From collapsed, flat and true rewards: collapse is no minimum, and the policy reached is nearly the best."""
    for seed in range(2):
        _, (phi, missed) = descent_from(name, seed, start)
        (phi_collapsed, _), _ = descent_from(name, seed, "collapsed")
        (phi_true, _), _ = descent_from(name, seed, "true")
        assert phi < phi_collapsed
        assert phi_true < phi_collapsed
        assert missed < 0.02, f"seed {seed}: {missed}"


def test_the_contract_catches_the_papers_objective_and_brier_on_its_own_pairs():
    """The two known loopholes: predictable pairs, and a collapsed policy whose pairs all coincide."""
    (phi_true, at_truth), (phi, missed) = descent_from("likelihood, policy-policy", 0, "true")
    assert at_truth < 1e-3
    assert phi < phi_true - 0.05  # Phi falls below the truth's ...
    assert missed > 0.2  # ... while the true return falls too
    (phi_collapsed, _), (_, missed) = descent_from("brier, policy-policy", 0, "collapsed")
    assert phi_collapsed < 0.01  # a collapsed policy has almost nothing to lose ...
    assert missed > 1.0  # ... and stays worse than the reference
