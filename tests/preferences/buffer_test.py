"""The ring of labelled pairs, and the reward fitted to it against an independent maximum likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import objectives
from jaxrlhf.algorithms.reward_learning import fit, reward_learning
from jaxrlhf.base.problem import uniform_measure
from jaxrlhf.bilevel import SKIPPED, BilevelProblem, Labelled, Sample
from jaxrlhf.preferences import buffer as preference_buffer


def sample_of(batch, pairs, *, first=0):
    """Pairs whose every array tells which pair it belongs to."""
    name = first + np.arange(batch * pairs, dtype=jnp.result_type(float)).reshape(batch, pairs)
    steps = np.broadcast_to(name[:, :, None, None], (batch, pairs, 2, 3))
    measure, num_draws = uniform_measure(batch, pairs)
    sample = Sample(
        prompts={"number": name[:, 0]},
        responses=(steps + 0.5, np.broadcast_to(name[:, :, None], (batch, pairs, 2)).astype(jnp.result_type(int))),
        behaviour_log_prob=-steps,
        reference_log_prob=-2 * steps,
        cumulative_discount=np.ones_like(steps),
        measure=measure,
        from_policy=jnp.array([1.0, 0.0]),
        num_draws=num_draws,
    )
    return jax.tree.map(jnp.asarray, sample)


def test_rows_keep_each_pair_beside_its_prompt():
    rows = preference_buffer.rows(sample_of(2, 3))
    np.testing.assert_array_equal(rows.prompts["number"], [0, 0, 0, 3, 3, 3])
    np.testing.assert_array_equal(rows.responses[1][:, 0, 0], range(6))
    np.testing.assert_array_equal(rows.behaviour_log_prob[:, 0, 1, 2], -np.arange(6))
    assert rows.measure.shape == (6, 1) and rows.num_draws == 1
    np.testing.assert_allclose(rows.measure.sum(), 1.0, rtol=1e-6)
    some = preference_buffer.take(rows, jnp.array([4, 1]))
    np.testing.assert_array_equal(some.reference_log_prob[:, 0, 0, 0], [-8.0, -2.0])
    np.testing.assert_array_equal(some.prompts["number"], [3, 0])
    np.testing.assert_allclose(some.measure, 0.5)


def test_the_oldest_pairs_go_first():
    rows = [preference_buffer.rows(sample_of(3, 1, first=10 * turn)) for turn in range(3)]
    buffer = preference_buffer.empty(rows[0], labels=2, capacity=5)
    add = jax.jit(preference_buffer.add)
    for turn, sample in enumerate(rows[:2]):
        buffer = add(buffer, Labelled(sample, jnp.full((3, 1, 2), turn / 2)))
    np.testing.assert_array_equal(buffer.pairs.sample.prompts["number"], [12, 1, 2, 10, 11])
    np.testing.assert_array_equal(buffer.pairs.labels[:, 0, 0], [0.5, 0, 0, 0.5, 0.5])
    buffer = add(buffer, Labelled(rows[2], jnp.ones((3, 1, 2))))
    np.testing.assert_array_equal(buffer.pairs.sample.responses[1][:, 0, 1], [12, 20, 21, 22, 11])
    assert buffer.added == 9


def test_draws_are_uniform_over_what_was_added():
    rows = preference_buffer.rows(sample_of(4, 1))
    buffer = preference_buffer.empty(rows, labels=1, capacity=100)
    draw = jax.jit(preference_buffer.draw, static_argnames="size")
    nothing = draw(jax.random.key(0), buffer, size=7)
    assert jnp.all(nothing.labels == SKIPPED)
    buffer = jax.jit(preference_buffer.add)(buffer, Labelled(rows, jnp.ones((4, 1, 1))))
    found = draw(jax.random.key(1), buffer, size=4000)
    assert jnp.all(found.labels == 1) and found.sample.measure.shape == (4000, 1)
    counts = np.bincount(np.asarray(found.sample.prompts["number"], int), minlength=4)
    assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(4000 * 3 / 16))


def test_what_does_not_fit_is_refused():
    sample = sample_of(2, 3)
    rows = preference_buffer.rows(sample)
    with pytest.raises(ValueError, match="room for 1 label and 1 row"):
        preference_buffer.empty(rows, labels=0, capacity=5)
    buffer = preference_buffer.empty(rows, labels=1, capacity=5)
    with pytest.raises(ValueError, match="6 rows do not fit into a buffer of 5"):
        preference_buffer.add(buffer, Labelled(rows, jnp.ones((6, 1, 1))))


def newton(features, labels, penalty):
    """Ridge-penalised logistic regression, an independent implementation."""
    weights = np.zeros(features.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-features @ weights))
        slope = features.T @ (chance - labels) / len(labels) + penalty * weights
        curve = (features * (chance * (1 - chance))[:, None]).T @ features / len(labels)
        weights = weights - np.linalg.solve(curve + penalty * np.eye(len(weights)), slope)
    return weights


def test_the_fit_is_the_maximum_likelihood(x64):
    keys = jax.random.split(jax.random.key(0), 3)
    features = jax.random.normal(keys[0], (200, 1, 2, 3, 4))
    truth = jnp.array([1.0, -0.5, 0.3, 0.0])
    difference = (features[:, 0, 0] - features[:, 0, 1]).sum(axis=1)
    labels = (jax.random.uniform(keys[1], (200,)) < jax.nn.sigmoid(difference @ truth)).astype(float)
    sample = preference_buffer.rows(sample_of(200, 1))._replace(responses=features)
    problem = BilevelProblem(
        sample=lambda *_: sample,
        log_prob=lambda *_: jnp.zeros((200, 1, 2, 3)),
        reward=lambda upper, sample, frozen: sample.responses @ upper,
        cost=objectives.likelihood(coupled=False).cost,
    )
    penalty = 0.01
    # Descent with decay stops where the penalised likelihood does.
    decayed = optax.chain(optax.add_decayed_weights(penalty), optax.sgd(0.3))
    algorithm = reward_learning(problem, decayed)
    state = algorithm.init(jnp.zeros(4))
    labelled = Labelled(sample, labels[:, None, None])
    update = jax.jit(lambda state: algorithm.update(state, labelled, ()))
    for _ in range(400):
        state, info = update(state)
    expected = newton(np.asarray(difference), np.asarray(labels), penalty)
    np.testing.assert_allclose(state.upper, expected, rtol=1e-6)
    np.testing.assert_allclose(info.gradient_norm, penalty * np.linalg.norm(expected), rtol=1e-4)
    assert state.step == 400

    buffer = jax.jit(preference_buffer.add)(preference_buffer.empty(sample, labels=1, capacity=300), labelled)
    slow = reward_learning(problem, optax.chain(optax.add_decayed_weights(penalty), optax.sgd(0.02)))
    fitted, infos = jax.jit(lambda key, state: fit(key, slow, state, buffer, (), size=50, steps=600))(
        jax.random.key(5), slow.init(jnp.zeros(4))
    )
    assert infos.loss.shape == (600,) and fitted.step == 600
    assert np.linalg.norm(fitted.upper - expected) < 0.15 * np.linalg.norm(expected)
