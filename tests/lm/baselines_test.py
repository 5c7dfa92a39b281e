"""Every baseline on an enumerable language, run by the code that runs real models, against its own exact fixed point.

Pairs are listed with their probabilities and labels are expected ones: what is reached is the method's optimum, and no
sampling error hides a wrong gradient.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special

from jaxrlhf import bilevel, exact, objectives, preferences
from jaxrlhf.algorithms.actor_critic import actor_critic
from jaxrlhf.algorithms.direct_preference import direct_preference, dpo, implicit_reward, ipo, simpo
from jaxrlhf.algorithms.group_relative import group_relative
from jaxrlhf.algorithms.policy_gradient import label_policy_gradient
from jaxrlhf.base import importance
from jaxrlhf.lm.critic import token_critic
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.language import STOP, alphabet_gold, alphabet_language, listed_pairs, policy_table, table_of
from jaxrlhf.lm.pairing import Prompts
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import DecoderConfig, decoder

LETTERS, LENGTH, BETA = 2, 2, 1.0
STEPS = 400
# Prompts begin with a token of their own: without one, attention cannot tell "a" from "aa", nor the policy learn to.
LANGUAGE = alphabet_language(letters=LETTERS, length=LENGTH, prompts=2, prompt_length=1)._replace(
    prompts=Prompts(jnp.array([[STOP, 1], [STOP, 2]]), jnp.ones((2, 2), bool))
)
SHAPE = DecoderConfig(LETTERS + 1, 16, 1, 2, 1, 8, 32, context_length=4)
POLICY = decoder(SHAPE)
REWARD = reward_model(POLICY)


def gold_of(prompts, responses):
    return alphabet_gold(prompts, responses, letters=LETTERS)


@jax.jit
def table_of_policy(params):
    return policy_table(POLICY, params, LANGUAGE)


@pytest.fixture(scope="module")
def world():
    start = POLICY.init(jax.random.key(0))
    return LanguageFrozen(start), jax.jit(lambda: table_of(gold_of, LANGUAGE))(), table_of_policy(start)


def annotate(key, sample, frozen):
    score = lambda sample, frozen: gold_of(sample.prompts, sample.responses)  # noqa: E731
    return preferences.expected_annotator(score)(key, sample, frozen)


def problem_of(objective, *, against="policy", per_token=False, gold_reward=False):
    """Returns the enumerated problem; with `gold_reward` the reward is the gold one: only the lower level is learned."""
    problem = language_problem(
        POLICY, REWARD, objective, pairs=1, generation=Generation(LENGTH, stop_ids=(STOP,)),
        against=against, per_token=per_token,
    )  # fmt: skip
    listed = listed_pairs(POLICY, LANGUAGE, against=against, per_token=per_token)
    problem = problem._replace(sample=listed)
    if not gold_reward:
        return problem

    def reward(upper, sample, frozen):
        rewards = gold_of(sample.prompts, sample.responses)[..., None] + 0 * upper
        if not per_token:
            return rewards
        mask = sample.responses.mask
        return rewards * (mask & ~jnp.pad(mask[..., 1:], ((0, 0), (0, 0), (0, 0), (0, 1))))

    return problem._replace(reward=reward)


def solve(algorithm, frozen, *, steps=STEPS, upper=()):
    state = algorithm.init(jax.random.key(0), upper, frozen.reference)

    @jax.jit
    def run(state):
        def body(state, key):
            return algorithm.step(key, state, LANGUAGE.prompts, frozen)

        return jax.lax.scan(body, state, jax.random.split(jax.random.key(1), steps))

    state, info = run(state)
    return jnp.exp(table_of_policy(state.policy)), info


def adam(learning_rate=5e-3, steps=STEPS):
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


def of_reference(policy, frozen):
    del policy
    return frozen.reference


def wins(gold, reference):
    return exact.row_mean(lambda own, other: jax.nn.sigmoid(own - other), reference, gold)


DIRECT = {
    "offline dpo": (dpo, of_reference),
    "online dpo": (dpo, None),
    "offline ipo": (ipo, of_reference),
}


@pytest.mark.parametrize("case", DIRECT)
def test_direct_methods(world, case):
    frozen, gold, reference = world
    loss, sampler = DIRECT[case]
    keywords = {"sampler": sampler} if sampler else {}
    problem = problem_of(objectives.likelihood())
    reached, info = solve(direct_preference(problem, loss(beta=BETA), adam(), annotate=annotate, **keywords), frozen)
    utility = gold if loss is dpo else wins(gold, reference)
    np.testing.assert_allclose(reached, jnp.exp(exact.soft_policy(utility, reference, BETA)), atol=1e-3)
    if loss is dpo:
        np.testing.assert_allclose(info.loss[0], np.log(2), rtol=1e-6)


def minimum(cost, reference):
    """Returns the policies `[B, N]` that minimise `cost(log table) -> [B, N, N]` over all pairs, by scipy."""

    def value(flat):
        return np.sum(cost(scipy.special.log_softmax(flat.reshape(reference.shape), axis=-1)))

    found = scipy.optimize.minimize(value, np.asarray(reference, float).ravel(), tol=1e-9)
    return scipy.special.softmax(found.x.reshape(reference.shape), axis=-1)


def of_pairs(table):
    return table[:, :, None], table[:, None, :]


@pytest.mark.parametrize("case", ["offline simpo", "sail"])
def test_direct_methods_without_a_closed_form(world, case):
    """Against the minimum that scipy finds over all tables, with the losses implemented independently."""
    frozen, gold, reference = (world[0], *(np.asarray(table, float) for table in world[1:]))
    first, second = of_pairs(gold)
    labels, lengths = scipy.special.expit(first - second), np.asarray(LANGUAGE.completions.mask).sum(axis=-1)
    scale, margin, log = 1.0, 0.2, scipy.special.log_expit

    def simpo_cost(table):
        one, other = of_pairs(table / lengths)
        probability = np.exp(sum(of_pairs(reference)))
        won, lost = log(scale * (one - other - margin)), log(scale * (other - one - margin))
        return -probability * (labels * won + (1 - labels) * lost)

    def sail_cost(table):
        one, other = of_pairs(BETA * (table - reference))
        return -np.exp(sum(of_pairs(table))) * (labels * log(one - other) + (1 - labels) * log(other - one))

    problem, steps = problem_of(objectives.likelihood()), 700
    if case == "sail":
        algorithm = direct_preference(problem, dpo(beta=BETA), adam(steps=steps), coupling=1.0, annotate=annotate)
        optimum, uncoupled = minimum(sail_cost, reference), np.exp(exact.soft_policy(gold, reference, BETA))
        assert np.abs(optimum - uncoupled).max() > 0.05
    else:
        loss = simpo(beta=scale, margin=margin, lengths=lambda sample: jnp.sum(sample.responses.mask, axis=-1))
        algorithm = direct_preference(problem, loss, adam(steps=steps), annotate=annotate, sampler=of_reference)
        optimum = minimum(simpo_cost, reference)
    reached, _ = solve(algorithm, frozen, steps=steps)
    np.testing.assert_allclose(reached, optimum, atol=2e-3)


@pytest.mark.parametrize("coupled", [False, True])
def test_with_an_implicit_reward_bilevel_descent_of_the_likelihood_is_dpo_and_sail(world, coupled):
    """Both take the same step: lambda*(phi) = phi, and boltzmann's coupling is SAIL's term."""
    frozen, *_ = world
    start = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(7), leaf.shape), frozen.reference)
    problem = problem_of(objectives.likelihood(coupled=coupled))
    own_policy = bilevel.closed_form(lambda task, index: task.upper)
    ours = bilevel.bilevel_descent(
        implicit_reward(problem, beta=BETA),
        bilevel.boltzmann(),
        own_policy,
        optax.sgd(1.0),
        beta=BETA,
        annotate=annotate,
    )
    theirs = direct_preference(problem, dpo(beta=BETA), optax.sgd(1.0), coupling=float(coupled), annotate=annotate)
    descended, fitted = (
        jax.jit(algorithm.step)(
            jax.random.key(0), algorithm.init(jax.random.key(0), start, start), LANGUAGE.prompts, frozen
        )
        for algorithm in (ours, theirs)
    )
    chex.assert_trees_all_close(descended[0].upper, fitted[0].policy, atol=2e-5)
    assert optax.tree.norm(optax.tree.sub(descended[0].upper, start)) > 0.1


def test_label_policy_gradient(world):
    frozen, gold, reference = world
    problem = problem_of(objectives.utility(kl_price=BETA), against="reference")
    reached, _ = solve(label_policy_gradient(problem, adam(), annotate=annotate), frozen)
    np.testing.assert_allclose(reached, jnp.exp(exact.soft_policy(wins(gold, reference), reference, BETA)), atol=1e-3)


def scaled_optimum(gold, reference, beta):
    """Returns the fixed point of pi = reference exp(R / (beta std_pi R)), by prompt, by damped iteration."""
    policy = reference
    for _ in range(2000):
        mean = exact.mean_under(policy, gold)
        spread = jnp.sqrt(exact.mean_under(policy, gold**2) - mean**2)
        policy = jax.nn.log_softmax(0.8 * policy + 0.2 * (reference + gold / (beta * spread[:, None])))
    return policy


@pytest.mark.parametrize("case", ["rloo", "ppo", pytest.param("dr. grpo", marks=pytest.mark.slow), "grpo"])
def test_lower_levels_under_the_gold_reward(world, case):
    frozen, gold, reference = world
    per_token = case != "rloo"
    problem = problem_of(objectives.likelihood(coupled=False), per_token=per_token, gold_reward=True)
    critic = REWARD.from_trunk(frozen.reference)
    policy_gradient = {
        "rloo": lambda: bilevel.loss_gradient(),
        "ppo": lambda: actor_critic(problem, token_critic(POLICY), critic, adam(), beta=BETA, trace=1.0),
        "dr. grpo": lambda: group_relative(problem, beta=BETA, scaled=False),
        "grpo": lambda: group_relative(problem, beta=BETA),
    }[case]()
    solver = bilevel.tangent(adam(), optax.set_to_zero(), policy_gradient=policy_gradient)
    algorithm = bilevel.bilevel_descent(
        problem, bilevel.decoupled(), solver, optax.set_to_zero(), beta=BETA, annotate=annotate
    )
    reached, _ = solve(algorithm, frozen, upper=jnp.zeros(()))
    optimum = scaled_optimum(gold, reference, BETA) if case == "grpo" else exact.soft_policy(gold, reference, BETA)
    np.testing.assert_allclose(reached, jnp.exp(optimum), atol=1e-3)
    if case == "grpo":
        assert jnp.max(jnp.abs(jnp.exp(optimum) - jnp.exp(exact.soft_policy(gold, reference, BETA)))) > 0.05


def test_iterated_rlhf_learns_the_reward_and_reaches_its_optimum(world):
    frozen, gold, reference = world
    problem = problem_of(objectives.likelihood(coupled=False))
    solver = bilevel.tangent(adam(1e-2), optax.set_to_zero())
    algorithm = bilevel.bilevel_descent(problem, bilevel.decoupled(), solver, adam(1e-2), beta=BETA, annotate=annotate)
    reached, _ = solve(algorithm, frozen, upper=REWARD.init(jax.random.key(2)))
    np.testing.assert_allclose(reached, jnp.exp(exact.soft_policy(gold, reference, BETA)), atol=1e-2)


@pytest.mark.parametrize("per_token", [False, True])
def test_kl_estimators_have_the_exact_value_and_gradient(world, per_token):
    """At a policy away from both the reference and the policy that the pairs came from."""
    frozen, _, reference = world
    sampled, policy = (
        jax.tree.map(lambda leaf, key=key: leaf + 0.3 * jax.random.normal(key, leaf.shape), frozen.reference)
        for key in jax.random.split(jax.random.key(5), 2)
    )
    problem = problem_of(objectives.likelihood(), per_token=per_token)

    def of(estimator, behaviour):
        sample = problem.sample(jax.random.key(0), behaviour, LANGUAGE.prompts, frozen)
        return lambda policy: importance.kl(problem.log_prob(policy, sample, frozen), sample, estimator=estimator)

    def truth(policy):
        own = table_of_policy(policy)
        return jnp.mean(exact.mean_under(own, own - reference))

    @jax.jit
    def estimates(behaviour, policy):
        return {name: jax.value_and_grad(of(name, behaviour))(policy) for name in ("k1", "k2", "k3")}

    value, gradient = jax.jit(jax.value_and_grad(truth))(policy)
    assert value > 0.1
    for behaviour in (policy, sampled):
        for estimator, (found, estimate) in estimates(behaviour, policy).items():
            if estimator != "k2":
                np.testing.assert_allclose(found, value, rtol=1e-4)
            chex.assert_trees_all_close(estimate, gradient, atol=1e-5)
    with pytest.raises(ValueError, match="k1, k2 or k3, got 'k4'"):
        jax.eval_shape(lambda policy: of("k4", policy)(policy), policy)


@pytest.mark.slow
def test_differentiating_k3_directly_gives_another_gradient(world):
    """Why the KL has a gradient of its own: the gradient of the k3 estimate is that of KL(reference || policy)."""
    frozen, _, reference = world
    policy = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(6), leaf.shape), frozen.reference)
    problem = problem_of(objectives.likelihood())
    sample = problem.sample(jax.random.key(0), policy, LANGUAGE.prompts, frozen)

    def k3(policy):
        ratio = problem.log_prob(policy, sample, frozen) - sample.reference_log_prob
        return importance.expectation(jnp.mean(ratio + jnp.expm1(-ratio), axis=(-2, -1)), sample)

    def reverse(policy):
        own = policy_table(POLICY, policy, LANGUAGE)
        return jnp.mean(exact.mean_under(reference, reference - own))

    def ours(policy):
        return importance.kl(problem.log_prob(policy, sample, frozen), sample, estimator="k3")

    of_k3, of_reverse, of_kl = (jax.grad(function)(policy) for function in (k3, reverse, ours))
    chex.assert_trees_all_close(of_k3, of_reverse, atol=1e-5)
    assert optax.tree.norm(optax.tree.sub(of_k3, of_kl)) > 0.1 * optax.tree.norm(of_kl)
