"""Reward models; weights_test compares them with transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder


@pytest.fixture(scope="module")
def scored(tiny):
    """A reward model with jitted score, its parameters under a random head, and rows."""
    model, params = tiny
    reward = reward_model(model)
    lively = reward.from_trunk(params) | {"head": jax.random.normal(jax.random.key(9), (16,))}
    tokens = jax.random.randint(jax.random.key(3), (5, 8), 0, 23)
    mask = jnp.arange(8)[None, :] < jnp.array([8, 5, 1, 3, 7])[:, None]
    return reward._replace(score=jax.jit(reward.score)), lively, tokens, mask


def test_an_untrained_reward_is_zero_and_its_head_can_learn(tiny):
    model, policy = tiny
    reward = reward_model(model)
    assert not np.any(reward.init(jax.random.key(0))["head"])
    params = reward.from_trunk(policy)
    tokens = jnp.array([[1, 2, 3], [4, 5, 6]])

    def total(params):
        return jnp.sum(reward.score(params, tokens, tokens > 0))

    value, gradient = jax.jit(jax.value_and_grad(total))(params)
    assert float(value) == 0
    assert float(jnp.min(jnp.abs(gradient["head"]))) > 0


def test_the_score_is_the_head_on_the_last_real_token(tiny, scored):
    model, _ = tiny
    reward, params, tokens, mask = scored
    hidden = np.asarray(model.hidden(params["trunk"], tokens, mask))
    expected = [hidden[row, int(mask[row].sum()) - 1] @ np.asarray(params["head"]) for row in range(5)]
    scores = reward.score(params, tokens, mask)
    assert scores.shape == (5,)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 5), (2, 4)])
def test_padding_changes_no_score(scored, left, right):
    reward, params, tokens, mask = scored
    pads = ((0, 0), (left, right))
    padded = reward.score(params, jnp.pad(tokens, pads, constant_values=17), jnp.pad(mask, pads))
    np.testing.assert_allclose(padded, reward.score(params, tokens, mask), atol=1e-5)


def test_from_trunk_copies_and_leaves_the_output_head(tiny_config, lively):
    model = decoder(dataclasses.replace(tiny_config, tied_embeddings=False))
    policy = lively(model)
    params = reward_model(model).from_trunk(policy)
    assert params.keys() == {"trunk", "head"}
    assert params["trunk"].keys() == policy.keys() - {"output_head"}
    np.testing.assert_array_equal(params["trunk"]["embedding"], policy["embedding"])
    assert not np.any(params["head"])
    # Donating the same buffer twice is an error.
    jax.jit(lambda policy, params: (policy, params), donate_argnums=(0, 1))(policy, params)


def test_bfloat16_trunks_score_in_float32(scored):
    reward, params, tokens, mask = scored
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    scores = reward.score(half, tokens, mask)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, reward.score(params, tokens, mask), atol=0.5)
    assert np.corrcoef(scores, reward.score(params, tokens, mask))[0, 1] > 0.99
