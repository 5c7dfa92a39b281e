"""Several completions of a prompt that is computed once: the same values and gradients as with a row for each."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import objectives
from jaxrlhf.base.problem import Sample
from jaxrlhf.lm.generate import Generation, generate
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.microbatch import completions_together
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import reward_model, score_responses
from jaxrlhf.lm.transformer.model import decoder

COUNT, LENGTH = 4, 5
PROMPTS = Prompts(
    jnp.array([[4, 7, 2, 9], [5, 5, 0, 0], [0, 3, 8, 1]], jnp.int32),
    jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]], bool),
)


def completions():
    source = np.random.default_rng(0)
    tokens = source.integers(1, 23, (3, COUNT, LENGTH))
    mask = np.arange(LENGTH) < source.integers(1, LENGTH + 1, (3, COUNT, 1))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)


def by_row(tokens, mask):
    prompts = (jnp.repeat(leaf, COUNT, axis=0) for leaf in PROMPTS)
    return *prompts, tokens.reshape(-1, LENGTH), mask.reshape(-1, LENGTH)


def models(config, **options):
    """Returns a decoder that computes a prompt once, and one that computes it with each completion."""
    shared = decoder(config, **options)
    return shared, shared._replace(shared_prompts=None)


@pytest.mark.parametrize("layout", ["unrolled", "scan", "windows"])
def test_log_probabilities_and_gradients_are_those_of_a_row_for_each_completion(tiny_config, lively, limit, layout):
    if layout == "windows":
        tiny_config = dataclasses.replace(tiny_config, windowed_layers=(1,), window=3)
    params, (tokens, mask) = lively(decoder(tiny_config)), completions()
    weights = jnp.cos(jnp.arange(tokens.size, dtype=jnp.float32)).reshape(-1, LENGTH)

    def value(params, rows):
        log_prob = completion_log_probs(decoder(tiny_config), params, *rows, temperature=0.8).reshape(-1, LENGTH)
        return jnp.sum(weights * log_prob), log_prob

    # The one computation always unrolled, the other as the layout says.
    expected = jax.jit(jax.value_and_grad(value, has_aux=True))(params, by_row(tokens, mask))
    limit("MAX_UNROLLED_LAYERS", 1 if layout == "scan" else 8)
    found = jax.jit(jax.value_and_grad(value, has_aux=True))(params, (*PROMPTS, tokens, mask))
    assert np.std(found[0][1]) > 0.5, "the comparison would be vacuous"
    chex.assert_trees_all_close(found, expected, atol=3e-5)


def test_a_scan_on_a_cpu_saves_no_activations_of_the_mlp(tiny_config, limit):
    limit("MAX_UNROLLED_LAYERS", 1)
    tokens = jnp.ones((3, 7), jnp.int32)

    def saved(**options):
        """The shapes that the scan stacks for the backward pass."""
        model = decoder(tiny_config, **options)
        params = jax.eval_shape(model.init, jax.random.key(0))

        def loss(params):
            return jnp.sum(model.hidden(params, tokens, tokens > 0))

        residuals = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        return sorted(leaf.shape for leaf in jax.tree.leaves(residuals) if leaf.shape[:3] == (2, 3, 7))

    heads = tiny_config.query_heads * tiny_config.head_size
    fused = heads + 2 * tiny_config.key_value_heads * tiny_config.head_size
    widths = [tiny_config.width, tiny_config.width, heads, fused, 2 * tiny_config.mlp_width]
    assert saved() == sorted((2, 3, 7, width) for width in widths)
    assert saved(remat="layer") == [(2, 3, 7, tiny_config.width)]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_rewards_are_those_of_a_row_for_each_response(tiny_config, lively, pooling):
    tokens, mask = completions()
    # A response without a real token is scored by its prompt.
    mask = mask.at[1, 2].set(False)
    responses = Responses(*(leaf.reshape(3, COUNT // 2, 2, LENGTH) for leaf in (tokens, mask)))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def scores(reward, microbatches):
        return score_responses(reward, params, PROMPTS, responses, microbatches=microbatches)

    shared, alone = (reward_model(model, pooling=pooling) for model in models(tiny_config))
    params = shared.from_trunk(lively(decoder(tiny_config))) | {"head": jnp.cos(jnp.arange(16.0))}
    expected = scores(alone, 1)
    assert np.std(expected) > 0.5
    # Six microbatches leave two responses of a prompt together.
    for microbatches in (1, 6):
        np.testing.assert_allclose(scores(shared, microbatches), expected, atol=1e-5)


@pytest.mark.parametrize(("unrolled", "decoding"), [(1, {}), (8, {}), (1, {"cpu": (8, 2**30, 8)})])
@pytest.mark.parametrize("prompts", [1, 3])
def test_completions_sampled_together_are_those_of_repeated_prompts(
    tiny_config, lively, limit, unrolled, decoding, prompts
):
    limit("MAX_UNROLLED_LAYERS", unrolled)
    limit("UNROLLED_DECODING", decoding)
    shared, alone = models(tiny_config)
    params, key = lively(shared), jax.random.key(3)
    rows, settings = [leaf[:prompts] for leaf in PROMPTS], {"max_new_tokens": 6, "stop_ids": (3,)}
    together = jax.jit(lambda: generate(shared, params, key, *rows, completions=COUNT, **settings))()
    repeated = [jnp.repeat(leaf, COUNT, axis=0) for leaf in rows]
    expected = jax.jit(lambda: generate(alone, params, key, *repeated, **settings))()
    np.testing.assert_array_equal(together.tokens, expected.tokens)
    np.testing.assert_array_equal(together.mask, expected.mask)
    np.testing.assert_allclose(together.log_prob, expected.log_prob, atol=1e-5)


def test_a_row_does_not_depend_on_how_many_follow_it(tiny, tiny_config):
    model, params = tiny
    settings = {"max_new_tokens": 6, "stop_ids": (), "drawn_rows": 3}

    @functools.partial(jax.jit, static_argnums=0)
    def sample(count):
        return generate(model, params, jax.random.key(3), *(leaf[:count] for leaf in PROMPTS), **settings).tokens

    np.testing.assert_array_equal(sample(2), sample(3)[:2])
    with pytest.raises(ValueError, match="drawn_rows must be at least the number of rows, 6, got 3"):
        generate(model, params, jax.random.key(3), *PROMPTS, completions=2, **settings)
    with pytest.raises(ValueError, match="completions must be at least 1, got 0"):
        generate(model, params, jax.random.key(3), *PROMPTS, completions=0, **settings)


@pytest.mark.parametrize("against", ["reference", "policy"])
def test_a_problem_is_the_same_with_prompts_computed_once(tiny_config, lively, against):
    generation = Generation(LENGTH, stop_ids=(3,))

    def outputs(model, microbatches):
        objective = objectives.likelihood(coupled=against == "policy")
        problem = language_problem(
            model,
            reward_model(model),
            objective,
            pairs=2,
            generation=generation,
            against=against,
            microbatches=microbatches,
        )

        def run(lower, upper, frozen) -> tuple[Sample, jax.Array, jax.Array]:
            sample = problem.sample(jax.random.key(1), lower, PROMPTS, frozen)
            return sample, problem.log_prob(upper["trunk"], sample, frozen), problem.reward(upper, sample, frozen)

        return jax.jit(run)(
            lively(model, 0), {"trunk": lively(model, 1), "head": jnp.ones(16)}, LanguageFrozen(lively(model, 2))
        )

    shared, alone = models(tiny_config)
    chex.assert_trees_all_close(outputs(shared, 2), outputs(alone, 1), atol=3e-5)


@pytest.mark.parametrize(
    ("prompts", "microbatches", "together"), [(3, 1, 4), (3, 3, 4), (3, 2, 2), (3, 12, 1), (3, 5, 1), (4, 8, 2)]
)
def test_completions_stay_together_as_far_as_microbatches_allow(prompts, microbatches, together):
    assert completions_together(4, prompts=prompts, microbatches=microbatches) == together
