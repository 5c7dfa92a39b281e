"""Wins against the reference from labels within the policy: the rate by quadrature, the gradient by enumeration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import bandit, bilevel, objectives, preferences
from jaxrlhf.preferences.scale import learn_scale, with_scale
from jaxrlhf.preferences.self_play import LEVEL, exchange_rate, wins_against_reference

CONTEXTS, ARMS, BETA, PRICE = 3, 5, 0.7, 0.05


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("seed", range(3))
def test_the_exchange_rate_is_the_wins_that_a_margin_is_worth(seed):
    random = np.random.default_rng(seed)
    returns, reference = 3 * random.normal(size=(4, 6, 2)), 3 * random.normal(size=(4, 3))
    with jax.enable_x64(True):
        rate = np.asarray(exchange_rate(jnp.asarray(returns), jnp.asarray(reference)))
        swapped = np.asarray(exchange_rate(jnp.asarray(returns[..., ::-1]), jnp.asarray(reference)))
    # u_0 - u_1 as the integral of the slope between the two returns.
    steps = (np.arange(2000) + 0.5) / 2000
    path = returns[..., 1:] + steps * (returns[..., :1] - returns[..., 1:])
    wins = sigmoid(path[..., None] - reference[:, None, None, :])
    gained = (wins * (1 - wins)).mean(axis=(-2, -1)) * (returns[..., 0] - returns[..., 1])
    np.testing.assert_allclose(rate * (sigmoid(returns[..., 0] - returns[..., 1]) - 0.5), gained, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rate, swapped, rtol=1e-12)
    assert np.all((rate > 0) & (rate < 2))


def test_the_rate_is_continuous_and_1_where_all_are_level():
    level = np.array([0.0, 1e-7, LEVEL * 0.999, LEVEL * 1.001])
    returns = jnp.asarray(np.stack([level / 2, -level / 2], axis=-1)[None] + 0.8)
    rate = np.asarray(exchange_rate(returns, jnp.array([[-1.0, 0.5]])))
    np.testing.assert_allclose(rate, rate[0, 0], rtol=1e-3)
    np.testing.assert_allclose(exchange_rate(jnp.zeros((1, 1, 2)), jnp.zeros((1, 4))), 1.0, rtol=1e-6)


def arms(learned):
    keys = jax.random.split(jax.random.key(4), 2)
    gold = 1.5 * jax.random.normal(keys[0], (CONTEXTS, ARMS), float)
    frozen = bandit.Bandit(jnp.zeros((CONTEXTS, ARMS, 1)), gold, jnp.full((CONTEXTS, ARMS), -jnp.log(float(ARMS))))
    policy = jax.nn.log_softmax(frozen.reference + gold / BETA * (1.7 if learned else 1.0))
    return frozen, policy, keys[1]


def reward_of(upper, features):
    return upper


@functools.partial(jax.jit, static_argnames=("against", "learned"))
def gradient(frozen, policy, key, *, against, learned, skip=None):
    """The gradient of the utility in the reward (and its scale) at a policy, from all pairs with their probabilities."""
    objective = objectives.utility(kl_price=PRICE)
    if against == "self":
        objective = objective._replace(against_reference=False)
    problem = bandit.bandit_problem(reward_of, objective, against_reference=against == "reference")
    every = jnp.broadcast_to(jnp.arange(ARMS), (CONTEXTS, ARMS))  # the reference is uniform
    draw = problem.sample
    problem = problem._replace(
        sample=lambda *arguments: draw(*arguments)._replace(reference_responses=every),
        reference_returns=lambda upper, sample, frozen: upper[sample.prompts],
    )
    problem = learn_scale(problem, beta=BETA) if learned else problem
    if against == "self":
        problem = wins_against_reference(problem, scale=lambda upper: jnp.exp(upper.log_scale) if learned else 1.0)
    solver = bilevel.closed_form(lambda task, index: policy)
    algorithm = bilevel.bilevel_descent(problem, bilevel.boltzmann(), solver, optax.sgd(1.0), beta=BETA)
    upper = with_scale(frozen.gold, 1.7) if learned else frozen.gold
    state = algorithm.init(key, upper, policy)
    sample = algorithm.propose(key, state, None, frozen)
    labels = preferences.expected_annotator(bandit.gold_score)(key, sample, frozen)
    if skip is not None:
        labels = jnp.where(skip, bilevel.SKIPPED, labels)
    labelled = bilevel.Labelled(sample, labels)
    if against == "self":
        labelled = preferences.from_both_sides(labelled)
    after, _ = algorithm.update(key, state, labelled, frozen)
    return jax.tree.map(jnp.subtract, after.upper, upper)


@pytest.mark.parametrize("learned", [False, True])
def test_self_play_has_the_gradient_of_the_win_rate_against_the_reference(learned):
    with jax.enable_x64(True):
        setting = arms(learned)
        expected = gradient(*setting, against="reference", learned=learned)
        found = gradient(*setting, against="self", learned=learned)
        plain = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
        assert plain > 1e-3
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * plain + 1e-9)


def test_a_skipped_pair_says_nothing():
    frozen, policy, key = arms(False)
    every = gradient(frozen, policy, key, against="self", learned=False, skip=jnp.ones((CONTEXTS, ARMS**2, 1), bool))
    price_alone = gradient(
        frozen, policy, key, against="reference", learned=False, skip=jnp.ones((CONTEXTS, 1, 1), bool)
    )
    np.testing.assert_allclose(every, price_alone, rtol=1e-4, atol=1e-6)


def test_a_problem_without_responses_of_the_reference_is_refused():
    problem = bandit.bandit_problem(reward_of, objectives.utility(kl_price=PRICE))
    with pytest.raises(ValueError, match="need its responses"):
        wins_against_reference(problem)
