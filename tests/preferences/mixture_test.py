"""What a mixture of scores reports of each, against exact derivatives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from jaxrlhf import bandit, bilevel, exact, known, objectives
from jaxrlhf.base.problem import Labelled
from jaxrlhf.known.problem import annotator
from jaxrlhf.preferences.mixture import (
    MixtureReward,
    attach_scores,
    marginal_gains,
    mixture_optimizer,
    mixture_problem,
    report_mixture,
    without_scores,
)

KAPPA, BETA = 0.07, 0.5
OBJECTIVE = objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=KAPPA))


@jax.jit
def setting_of(key):
    keys = jax.random.split(key, 4)
    scores, gold = jax.random.normal(keys[0], (3, 5, 4)), jax.random.normal(keys[1], (3, 5))
    reference, policy = (jax.nn.log_softmax(jax.random.normal(key, (3, 5)), axis=-1) for key in keys[2:])
    return bandit.Bandit(scores, gold, reference), policy


def setting(seed):
    return setting_of(jax.random.key(seed))


@jax.jit
def slopes_along_scores(policy, frozen):
    """The derivatives of the utility along every score, `[4]`."""

    def tilted(epsilon):
        return utility(jax.nn.log_softmax(policy + frozen.features @ epsilon, axis=-1), frozen)

    return jax.grad(tilted)(jnp.zeros(4))


def score_of(sample, frozen):
    return frozen.features[sample.prompts[:, None, None], sample.responses]


def utility(policy, frozen):
    result = exact.evaluate_policy(policy, frozen.reference, frozen.gold, BETA)
    return result.win_rate - KAPPA * result.kl


@pytest.mark.parametrize("seed", range(3))
def test_a_marginal_gain_is_the_derivative_of_the_utility_along_the_score(seed, x64):
    frozen, policy = setting(seed)
    problem = bandit.bandit_problem(known.linear_reward, OBJECTIVE)
    annotate = annotator(bandit.gold_score, labels=1, pairs=None)

    @jax.jit
    def gains():
        sample = problem.sample(jax.random.key(0), policy, None, frozen)
        labelled = Labelled(sample, annotate(jax.random.key(1), sample, frozen))
        return marginal_gains(attach_scores(labelled, score_of(sample, frozen)), kl_price=KAPPA)

    np.testing.assert_allclose(gains(), slopes_along_scores(policy, frozen), rtol=1e-9, atol=1e-12)


def test_drawn_pairs_give_the_gain_without_bias(x64):
    frozen, policy = setting(0)
    problem = bandit.bandit_problem(known.linear_reward, OBJECTIVE, pairs=3)
    annotate = annotator(bandit.gold_score, labels=1, pairs=3)

    def one(key, pairs_problem=problem):
        sample_key, label_key = jax.random.split(key)
        sample = pairs_problem.sample(sample_key, policy, None, frozen)
        labelled = Labelled(sample, annotate(label_key, sample, frozen))
        return marginal_gains(attach_scores(labelled, score_of(sample, frozen)), kl_price=KAPPA)

    gains = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 20_000)))
    error = (gains.mean(0) - np.asarray(slopes_along_scores(policy, frozen))) / (gains.std(0) / len(gains) ** 0.5)
    assert np.all(np.abs(error) < 4), error
    # A single pair of a prompt has none to compare it with.
    single = bandit.bandit_problem(known.linear_reward, OBJECTIVE, pairs=1)
    sample = single.sample(jax.random.key(0), policy, None, frozen)
    labelled = attach_scores(Labelled(sample, jnp.ones((3, 1, 1))), score_of(sample, frozen))
    np.testing.assert_array_equal(marginal_gains(labelled, kl_price=KAPPA), 0.0)


def test_a_pair_without_a_label_counts_as_a_tie():
    frozen, policy = setting(1)
    problem = bandit.bandit_problem(known.linear_reward, OBJECTIVE, pairs=4)
    sample = problem.sample(jax.random.key(0), policy, None, frozen)
    labels = jnp.ones((3, 4, 1)).at[:, 1:3].set(0.5)
    skipped = labels.at[:, 1:3].set(-1.0)
    gains = [
        marginal_gains(attach_scores(Labelled(sample, each), score_of(sample, frozen)), kl_price=KAPPA)
        for each in (labels, skipped)
    ]
    np.testing.assert_array_equal(*gains)
    with pytest.raises(ValueError, match="attach_scores"):
        marginal_gains(Labelled(sample, labels), kl_price=KAPPA)


def test_gains_of_some_labels_are_those_of_all_on_average(x64):
    """The mean over every choice of two pairs of four to label."""
    frozen, policy = setting(1)
    problem = bandit.bandit_problem(known.linear_reward, OBJECTIVE, pairs=4)
    sample = jax.jit(problem.sample)(jax.random.key(0), policy, None, frozen)
    labels = np.asarray(jax.random.uniform(jax.random.key(1), (3, 4, 1)))

    @jax.jit
    def gains(given, weight):
        labelled = attach_scores(Labelled(sample, given), score_of(sample, frozen))
        return marginal_gains(labelled, kl_price=KAPPA, label_weight=weight)

    chosen = [np.isin(np.arange(4), pair)[None, :, None] for pair in itertools.combinations(range(4), 2)]
    some = [gains(np.where(pairs, labels, -1.0), 2.0) for pairs in chosen]
    np.testing.assert_allclose(np.mean(some, axis=0), gains(labels, 1.0), rtol=1e-12)


def test_gains_vanish_where_the_mixture_is_the_best_of_its_class(x64):
    """At the best weights, found by another method, gains are 0 and descent on the utility stays; elsewhere neither."""
    frozen, _ = setting(2)

    def policy_of(weights):
        return exact.soft_policy(frozen.features @ weights, frozen.reference, BETA)

    loss = jax.jit(jax.value_and_grad(lambda weights: -utility(policy_of(weights), frozen)))
    best = scipy.optimize.minimize(loss, np.zeros(4), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    problem = mixture_problem(bandit.bandit_problem(known.linear_reward, objectives.utility(kl_price=KAPPA)), score_of)
    solver = bilevel.closed_form(lambda task, _: policy_of(task.upper.weights))
    descent = bilevel.bilevel_descent(
        problem, bilevel.boltzmann(), solver, mixture_optimizer(optax.sgd(1.0), optax.sgd(1.0)), beta=BETA
    )
    method = report_mixture(descent, lambda state: state.upper.weights, kl_price=KAPPA)
    label = annotator(without_scores(bandit.gold_score), labels=1, pairs=None)

    @jax.jit
    def step(state):
        sample = method.propose(jax.random.key(0), state, None, frozen)
        return method.update(jax.random.key(0), state, Labelled(sample, label(None, sample, frozen)), frozen)

    for weights, stays in ((jnp.asarray(best), True), (jnp.asarray(best) + 0.1, False)):
        state = method.init(jax.random.key(0), MixtureReward(weights), policy_of(weights))
        after, info = step(state)
        moved = np.abs(after.upper.weights - weights).max()
        assert (np.abs(info.gains).max() < 1e-8) == (moved < 1e-7) == stays
        # Weights are rewards: the log-tilt is that over beta.
        np.testing.assert_allclose(after.upper.weights - weights, info.gains / BETA, atol=1e-8)
        np.testing.assert_array_equal(info.weights, weights)
        np.testing.assert_array_equal(info.kl, info.inner.kl)


def test_weights_and_network_have_their_own_optimisers():
    optimizer = mixture_optimizer(optax.sgd(0.5), optax.sgd(0.0))
    for network in ((), {"head": jnp.ones(3)}):
        upper = MixtureReward(jnp.ones(2), network)
        updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, upper), optimizer.init(upper), upper)
        np.testing.assert_allclose(updates.weights, -0.5)
        jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 0.0), updates.network)
