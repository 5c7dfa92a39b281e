"""Methods by name: each ends where its objective says, on a bandit whose pairs are listed; flags and table agree."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import bandit, exact, preferences
from jaxrlhf.algorithms.methods import METHODS, Critic, Parts
from jaxrlhf.base.algorithm import label_by
from jaxrlhf.bilevel import SKIPPED, Labelled, boltzmann
from jaxrlhf.commands import method_flags

BETA, PRICE, STEPS = 0.5, 0.1, 2500


def make():
    keys = jax.random.split(jax.random.key(0), 2)
    gold = 0.7 * jax.random.normal(keys[0], (2, 4))
    reference = jax.nn.log_softmax(0.5 * jax.random.normal(keys[1], (2, 4)))
    return bandit.Bandit(jnp.zeros((2, 4, 1)), gold, reference)


def parts(**options):
    def problem(objective, *, against, per_token=False, reference_responses=0):
        del per_token  # an arm is one step
        if against == "self":
            objective = objective._replace(against_reference=False)  # the opponent takes the reference's place
        return bandit.bandit_problem(
            lambda upper, features: upper,
            objective,
            against_reference=against == "reference",
            reference_responses=reference_responses,
            **options,
        )

    def value(critic, sample, frozen):
        return critic[sample.prompts][:, None, None, None] + jnp.zeros(sample.behaviour_log_prob.shape)

    return Parts(
        problem,
        policy_optimizer=optax.adam(0.03),
        reward_optimizer=optax.adam(0.03),
        fit_optimizer=optax.adam(0.03),
        rule=boltzmann(),
        kl_price=PRICE,
        critic=Critic(value, jnp.zeros(2), optax.adam(0.03)),
    )


def start_of(name, frozen):
    return {"reward": jnp.zeros((2, 4)), "log-ratio": frozen.reference, "policy": ()}[METHODS[name].learns]


def weight_of(name):
    # IPO's beta is in win rate a nat, like the price.
    return PRICE if METHODS[name].weighs == "kl_price" or name == "online-ipo" else BETA


def solve(name, frozen):
    algorithm = METHODS[name].assemble(parts(), weight_of(name))
    label = label_by(preferences.expected_annotator(bandit.gold_score))

    def step(state, key):
        sample = algorithm.propose(key, state, None, frozen)
        state, info = algorithm.update(key, state, label(key, sample, frozen), frozen)
        return state, info.labels

    @jax.jit
    def run(key):
        state = algorithm.init(key, start_of(name, frozen), frozen.reference)
        return jax.lax.scan(step, state, jax.random.split(key, STEPS))

    state, _ = run(jax.random.key(1))
    return jax.nn.log_softmax(state.policy)


def utility(log_policy, frozen, price=PRICE):
    wins = exact.row_mean(lambda own, other: jax.nn.sigmoid(own - other), frozen.reference, frozen.gold)
    kl = exact.mean_under(log_policy, log_policy - frozen.reference)
    return float(jnp.mean(exact.mean_under(log_policy, wins) - price * kl))


def optimum(frozen):
    """The policy of the greatest win rate less the price of KL."""
    wins = exact.row_mean(lambda own, other: jax.nn.sigmoid(own - other), frozen.reference, frozen.gold)
    return exact.soft_policy(wins, frozen.reference, PRICE)


@pytest.mark.parametrize("name", ["iterated", "rloo", "ppo", "online-dpo"])
def test_methods_that_weigh_by_beta_end_at_the_soft_optimum_of_the_gold_reward(x64, name):
    frozen = make()
    expected = exact.soft_policy(frozen.gold, frozen.reference, BETA)
    np.testing.assert_allclose(jnp.exp(solve(name, frozen)), jnp.exp(expected), atol=1e-4)


def test_the_label_gradient_ends_at_the_optimum_of_the_stated_price(x64):
    frozen = make()
    np.testing.assert_allclose(jnp.exp(solve("label-gradient", frozen)), jnp.exp(optimum(frozen)), atol=1e-4)


def test_grpo_wins_more_than_half_of_what_can_be_won(x64):
    """It divides by the spread of a group, which vanishes as the policy concentrates: what it gains is not utility."""
    frozen = make()
    best = jnp.log(jax.nn.one_hot(jnp.argmax(frozen.gold, axis=1), 4) + 1e-12)
    won = utility(solve("grpo", frozen), frozen, price=0.0)
    assert 0.25 + 0.5 * utility(best, frozen, price=0.0) < won


@pytest.mark.parametrize("name", ["bilevel", "implicit-bilevel", "online-ipo", "sail"])
def test_the_others_gain_at_least_half_of_what_there_is_to_gain(x64, name):
    frozen = make()
    least, most = utility(frozen.reference, frozen), utility(optimum(frozen), frozen)
    np.testing.assert_allclose(least, 0.5, rtol=1e-12)
    assert least + 0.5 * (most - least) < utility(solve(name, frozen), frozen) <= most


@pytest.mark.parametrize("name", METHODS)
def test_labels_are_counted_once_and_kept_and_a_pair_without_one_costs_nothing(name):
    """By shapes and one update: half of the pairs are labelled, and the kept ones are drawn from a buffer."""
    frozen, method, key = make(), METHODS[name], jax.random.key(0)
    some = parts(pairs=6)._replace(label_weight=2.0)
    algorithm = method.assemble(some, weight_of(name))
    state = jax.eval_shape(algorithm.init, key, start_of(name, frozen), frozen.reference)
    sample = jax.eval_shape(algorithm.propose, key, state, None, frozen)
    kept, _ = method.reusing(algorithm, some, weight_of(name), sample=sample, capacity=4, size=2, updates=1)

    @jax.jit
    def update(key):
        state = kept.init(key, start_of(name, frozen), frozen.reference)
        drawn = kept.propose(key, state, None, frozen)
        labels = jnp.ones((2, 6, 1)).at[:, ::2].set(SKIPPED)
        return kept.update(key, state, Labelled(drawn, labels), frozen)

    after, info = update(key)
    assert info.labels == 6
    assert after.buffer.added == 2
    assert np.isfinite(info.ess_fraction) and np.all(np.isfinite(after.policy))


def test_the_command_knows_every_method():
    assert set(typing.get_args(method_flags.MethodName)) == set(METHODS) == set(method_flags.READS)
    for name, method in METHODS.items():
        assert ("reward" in method_flags.READS[name]) == (method.learns == "reward")
        assert ("beta" in method_flags.READS[name]) == (method.weighs == "beta")
