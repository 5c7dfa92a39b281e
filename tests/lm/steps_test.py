"""Tokens as steps give the same problem as whole completions; the critic of prefixes; offline pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import objectives, preferences
from jaxrlhf.algorithms.direct_preference import dpo
from jaxrlhf.base import Labelled, importance
from jaxrlhf.lm.critic import token_critic
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.language import STOP, alphabet_gold, alphabet_language, listed_pairs
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.offline import offline_pairs
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import DecoderConfig, decoder

LETTERS, LENGTH = 2, 3
LANGUAGE = alphabet_language(letters=LETTERS, length=LENGTH, prompts=2, prompt_length=2)
POLICY = decoder(DecoderConfig(LETTERS + 1, 16, 1, 2, 1, 8, 32, context_length=8))
REWARD = reward_model(POLICY)
OBJECTIVE = objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=0.1))


def problem_of(per_token, objective=OBJECTIVE, pairs=3, **options):
    """Returns the problem with its functions compiled, since the tests call them outside of `jit`."""
    generation = Generation(LENGTH, stop_ids=(STOP,))
    problem = language_problem(
        POLICY, REWARD, objective, pairs=pairs, generation=generation, per_token=per_token, **options
    )
    return problem._replace(
        sample=jax.jit(problem.sample), log_prob=jax.jit(problem.log_prob), reward=jax.jit(problem.reward)
    )


def noisy(params, seed, scale=0.3):
    leaves, shape = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        shape, [leaf + scale * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )


@pytest.fixture(scope="module")
def world():
    start = POLICY.init(jax.random.key(0))
    upper = {"trunk": noisy(REWARD.from_trunk(start)["trunk"], 3), "head": jax.random.normal(jax.random.key(4), 16)}
    return LanguageFrozen(start), noisy(start, 1), noisy(start, 2), upper


def annotate(sample):
    score = lambda sample, frozen: alphabet_gold(sample.prompts, sample.responses, letters=LETTERS)  # noqa: E731
    return preferences.expected_annotator(score)(None, sample, None)


def test_tokens_and_completions_as_steps_have_the_same_values_and_gradients(world):
    """G, J and the KL, and their gradients, at a policy that did not give the pairs."""
    frozen, behaviour, policy, upper = world
    found = []
    for per_token in (False, True):
        problem = problem_of(per_token)
        listed = listed_pairs(POLICY, LANGUAGE, against="reference", per_token=per_token)

        @jax.jit
        def levels(policy, problem=problem, listed=listed):
            sample = listed(jax.random.key(0), behaviour, LANGUAGE.prompts, frozen)
            labelled = Labelled(sample, annotate(sample))
            reward = problem.reward(upper, sample, frozen)
            cost = problem.cost(upper, reward, labelled, frozen)
            log_prob = problem.log_prob(policy, sample, frozen)
            values = importance.evaluate(log_prob, reward, cost, sample, beta=0.3, kl_price=0.1)
            return values.upper + 2.0 * values.lower, values

        (_, values), gradient = jax.value_and_grad(levels, has_aux=True)(policy)
        found.append((values, gradient))
    jax.tree.map(lambda whole, steps: np.testing.assert_allclose(steps, whole, rtol=1e-4, atol=1e-5), *found)
    assert abs(found[0][0].kl) > 0.1


def test_a_drawn_sample_agrees_token_by_token(world):
    frozen, policy, _, upper = world
    whole, steps = (
        problem_of(per_token).sample(jax.random.key(5), policy, LANGUAGE.prompts, frozen) for per_token in (False, True)
    )
    np.testing.assert_array_equal(whole.responses.tokens, steps.responses.tokens)
    for name in ("behaviour_log_prob", "reference_log_prob"):
        np.testing.assert_allclose(
            getattr(steps, name).sum(-1, keepdims=True), getattr(whole, name), rtol=1e-4, atol=1e-5
        )
    np.testing.assert_array_equal(steps.cumulative_discount, whole.responses.mask)
    rewards = problem_of(True).reward(upper, steps, frozen)
    np.testing.assert_allclose(rewards.sum(-1), problem_of(False).reward(upper, whole, frozen)[..., 0], rtol=1e-5)
    last = np.asarray(steps.responses.mask).sum(-1) - 1
    assert np.all(np.argmax(np.asarray(rewards) != 0, axis=-1) == last)


def test_the_critic_depends_on_the_prefix_alone(world):
    frozen, policy, _, upper = world
    sample = problem_of(True).sample(jax.random.key(5), policy, LANGUAGE.prompts, frozen)
    values = jax.jit(token_critic(POLICY))(upper, sample, frozen)
    hidden = jax.jit(POLICY.hidden)
    for row in range(2):
        for pair in range(3):
            for slot in range(2):
                tokens, mask = (np.asarray(leaf[row, pair, slot]) for leaf in sample.responses)
                for step in range(LENGTH):
                    before = np.concatenate([LANGUAGE.prompts.tokens[row], tokens[:step]])[None]
                    state = hidden(upper["trunk"], jnp.asarray(before), jnp.ones(before.shape, bool))[0, -1]
                    expected = float(state @ upper["head"]) if mask[step] else 0.0
                    np.testing.assert_allclose(values[row, pair, slot, step], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_token", [False, True])
def test_offline_pairs(world, per_token):
    frozen, _, policy, _ = world
    tokens = jnp.array([[[[1, 2, STOP], [2, STOP, 0]]], [[[1, 1, 1], [STOP, 0, 0]]]])
    mask = jnp.array([[[[1, 1, 1], [1, 1, 0]]], [[[1, 1, 1], [1, 0, 0]]]], bool)
    prompts = Prompts(jnp.array([[1, 2], [0, 2]]), jnp.array([[True, True], [False, True]]))
    labels = jnp.array([[1.0], [0.0]])
    log_probs = jax.jit(lambda *rows: completion_log_probs(POLICY, *rows))
    found = jax.jit(
        lambda frozen: offline_pairs(POLICY, prompts, Responses(tokens, mask), labels, frozen, per_token=per_token)
    )(frozen)
    for row in range(2):
        for slot in range(2):
            prompt = (leaf[row : row + 1] for leaf in prompts)
            each = log_probs(frozen.reference, *prompt, tokens[row, :, slot], mask[row, :, slot])
            np.testing.assert_allclose(found.sample.behaviour_log_prob[row, 0, slot].sum(), each.sum(), rtol=1e-5)
    assert found.labels.shape == (2, 1, 1) and found.sample.measure.sum() == 1
    problem = problem_of(per_token, objectives.likelihood(), pairs=1, against="policy")
    loss = lambda params: dpo(beta=0.5)(problem.log_prob(params, found.sample, frozen), found)  # noqa: E731
    np.testing.assert_allclose(loss(frozen.reference), np.log(2), rtol=1e-5)
    assert jnp.all(jnp.abs(loss(policy) - np.log(2)) > 1e-3)
    with pytest.raises(ValueError, match="2 x 1 pairs and labels of shape"):
        offline_pairs(POLICY, prompts, Responses(tokens, mask), labels[:1], frozen)


def test_self_play_scores_each_response_once(world):
    """Rewards and log-probabilities of the swapped pairs, taken from the first half, equal those computed anew."""
    frozen, policy, other, upper = world
    problem = problem_of(False, against="self")
    plain = problem_of(False, objectives.likelihood(), against="policy")
    sample = problem.sample(jax.random.key(5), policy, LANGUAGE.prompts, frozen)
    both = preferences.from_both_sides(Labelled(sample, annotate(sample))).sample
    np.testing.assert_allclose(
        problem.reward(upper, both, frozen), plain.reward(upper, both, frozen), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        problem.log_prob(other, both, frozen)[:, :, 0], plain.log_prob(other, both, frozen)[:, :, 0], rtol=1e-5
    )
