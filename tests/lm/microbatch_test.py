"""Microbatches: the same values and gradients as all rows at once, and their default number."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from jaxrlhf.lm import microbatch
from jaxrlhf.lm.learning import learning, preference_loss, supervised_loss
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.training.step import within


@pytest.fixture
def few_tokens(monkeypatch):
    monkeypatch.setattr(microbatch, "CPU_TOKENS", 24)


@pytest.mark.parametrize(
    "rows, max_rows, min_rows, expected",
    [
        (64, 8, 1, 8),
        (64, 9, 1, 8),
        (60, 8, 1, 10),
        (37, 8, 1, 37),
        (37, 8, 2, 1),
        (4, 8, 1, 1),
        (7, 8, 8, 1),
        (1, 1, 1, 1),
    ],
)
def test_fewest_equal_microbatches(rows, max_rows, min_rows, expected):
    assert microbatch.fewest_microbatches(rows, max_rows=max_rows, min_rows=min_rows) == expected


def test_a_cpu_has_a_thousand_tokens_a_microbatch_and_each_of_several_devices_half_as_many():
    assert [microbatch.default_microbatches(64, length) for length in (8, 16, 128, 1024, 4096)] == [1, 1, 8, 64, 64]
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    assert within(mesh, microbatch.default_microbatches)(64, 128) == 8
    for sizes, rows, expected in [
        ({"data": 2}, 64, 8),
        ({"data": 2, "fsdp": 1}, 16, 2),
        ({"data": 3}, 64, 8),  # not sharded: every device has all rows
        ({"data": 2, "fsdp": 2}, 64, 1),
        ({"tensor": 2}, 64, 1),
    ]:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))):
            assert microbatch.default_microbatches(rows, 128) == expected, sizes


def test_split_and_join_are_inverse():
    rows = {"a": jnp.arange(12.0).reshape(6, 2), "b": jnp.arange(6)}
    microbatches = microbatch.split(rows, 3)
    assert microbatches["b"].tolist() == [[0, 3], [1, 4], [2, 5]]
    jax.tree.map(np.testing.assert_array_equal, microbatch.join(microbatches), rows)
    with pytest.raises(ValueError, match="6 rows do not divide into 4 microbatches"):
        microbatch.split(rows, 4)


def test_log_probabilities_and_rewards_in_default_microbatches_are_those_of_all_rows(tiny, few_tokens):
    model, params = tiny
    keys = jax.random.split(jax.random.key(3), 3)
    prompts, completions = (jax.random.randint(key, (6, 5), 1, 23) for key in keys[:2])
    mask = jnp.ones(prompts.shape, bool)

    def loss(params, microbatches):
        log_prob = completion_log_probs(model, params, prompts, mask, completions, mask, microbatches=microbatches)
        return jnp.sum(log_prob * jnp.arange(30.0).reshape(6, 5)), log_prob

    (gradient, log_probs), (default_gradient, default_log_probs) = (
        jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(params, count) for count in (1, None)
    )
    np.testing.assert_allclose(default_log_probs, log_probs, atol=1e-5)
    chex.assert_trees_all_close(default_gradient, gradient, atol=2e-4, rtol=1e-4)

    reward = reward_model(model)
    start = reward.from_trunk(params) | {"head": jax.random.normal(keys[2], params["final_norm"]["scale"].shape)}
    rows = jnp.concatenate([prompts, completions], axis=1)
    score = jax.jit(reward.score)
    scores = score(start, rows, jnp.ones(rows.shape, bool))
    one_by_one = [score(start, row[None], jnp.ones((1, 10), bool))[0] for row in rows]
    np.testing.assert_allclose(scores, one_by_one, atol=1e-5)


@pytest.mark.parametrize("kind", ["supervised", "preference"])
def test_learning_in_default_microbatches_takes_the_same_step(tiny, few_tokens, kind):
    from jaxrlhf.data.batches import Demonstrations, Pairs

    model, params = tiny
    tokens = np.asarray(jax.random.randint(jax.random.key(5), (12, 8), 1, 23))
    if kind == "supervised":
        loss = supervised_loss(model)
        batch = Demonstrations(tokens, np.ones(tokens.shape, np.int32), np.ones(tokens.shape, bool))
    else:
        reward = reward_model(model)
        loss, params = preference_loss(reward), reward.from_trunk(params)
        pairs, weight = tokens.reshape(6, 2, 8), np.ones(6, np.float32)
        batch = Pairs(pairs, np.ones(pairs.shape, bool), np.ones(pairs.shape, bool), weight, 0 * weight, weight)

    def update(microbatches):
        algorithm = learning(loss, optax.sgd(0.5), microbatches=microbatches)
        return jax.jit(algorithm.update)(algorithm.init(params), batch)

    chex.assert_trees_all_close(update(None), update(1), atol=1e-5)
