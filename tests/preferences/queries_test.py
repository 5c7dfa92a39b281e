"""Which pairs are asked about: the posterior against matrices inverted outright and against an ensemble that is drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.base.problem import SKIPPED, Labelled, Sample, uniform_measure
from jaxrlhf.preferences import buffer, queries

SOURCE = np.random.default_rng(0)
CANDIDATES, KNOWN = SOURCE.normal(size=(9, 4)), SOURCE.normal(size=(6, 4))
HEAD = SOURCE.normal(size=4)


def information(differences):
    chances = 1 / (1 + np.exp(-differences @ HEAD))
    return chances * (1 - chances)


def exact_posterior(candidates, known):
    """A^-1 between the candidates, from its definition."""
    prior = np.mean(np.sum(CANDIDATES**2, axis=-1)) / 4
    inverse = np.linalg.inv(prior * np.eye(4) + known.T @ (information(known)[:, None] * known))
    return candidates @ inverse @ candidates.T


def test_the_covariance_is_that_of_the_posterior(x64):
    found = queries.covariance(jnp.asarray(CANDIDATES), jnp.asarray(KNOWN), jnp.asarray(information(KNOWN)))
    np.testing.assert_allclose(found, exact_posterior(CANDIDATES, KNOWN), atol=1e-12)
    none = queries.covariance(jnp.asarray(CANDIDATES), jnp.asarray(KNOWN), jnp.zeros(6))
    assert np.mean(np.diagonal(none)) == pytest.approx(4.0)
    assert np.all(np.diagonal(found) < np.diagonal(none))


def test_each_choice_takes_account_of_those_before_it(x64):
    margins = jnp.asarray(CANDIDATES @ HEAD)
    found = queries.choose(margins, jnp.asarray(exact_posterior(CANDIDATES, KNOWN)), 5)
    known, expected = KNOWN, []
    for _ in range(5):
        gain = information(CANDIDATES) * np.diagonal(exact_posterior(CANDIDATES, known))
        gain[expected] = -1
        expected.append(int(np.argmax(gain)))
        known = np.concatenate([known, CANDIDATES[expected[-1:]]])
    assert found.tolist() == expected


def test_two_pairs_that_say_the_same_are_not_both_asked_about():
    directions = jnp.eye(3)[jnp.array([0, 0, 1, 2, 0])] * jnp.array([3.0, 2.9, 2.5, 2.4, 2.8])[:, None]
    posterior = queries.covariance(directions, jnp.zeros((1, 3)), jnp.zeros(1))
    choose = jax.jit(queries.choose, static_argnums=2)
    assert choose(jnp.zeros(5), posterior, 4)[:3].tolist() == [0, 2, 3]
    # A pair whose label is known beforehand is worth nothing, and one with equal responses neither.
    assert choose(jnp.array([30.0, 0.0, 0.0, 0.0, 0.0]), posterior, 4)[0] == 1
    equal = np.asarray(posterior) * np.outer([1, 1, 1, 1, 0], [1, 1, 1, 1, 0])
    assert 4 not in choose(jnp.zeros(5), equal, 4).tolist()
    with pytest.raises(ValueError, match="takes 1 to 5 of the 5 candidate pairs, got 6"):
        queries.choose(jnp.zeros(5), posterior, 6)


def labelled_buffer(labels):
    rows, pairs = labels.shape
    zeros = jnp.zeros((rows, pairs, 2, 1))
    places = jnp.arange(rows * pairs).reshape(rows, pairs, 1, 1) * jnp.ones((1, 1, 2, 1), int)
    measure, draws = uniform_measure(rows, pairs)
    sample = Sample(jnp.arange(rows), places, zeros, zeros, zeros + 1, measure, jnp.ones(2), draws)
    empty = buffer.empty(sample, labels=1, capacity=rows + 2)
    return buffer.add(empty, Labelled(sample, jnp.asarray(labels)[..., None]))


@pytest.mark.parametrize("size", [2, 9])
def test_labelled_pairs_alone_are_read(size):
    read_pairs = jax.jit(functools.partial(queries.labelled_pairs, size=size))
    labels = np.full((4, 3), SKIPPED)
    given = [1, 5, 6, 11]
    labels.flat[given] = [1.0, 0.0, 0.5, 1.0]
    held = labelled_buffer(labels)
    pairs, weights = jax.tree.map(np.asarray, read_pairs(jax.random.key(0), held))
    assert len(weights) == size and np.sum(weights) == pytest.approx(4.0)
    read = pairs.sample.responses[:, 0, 0, 0][weights > 0].tolist()
    assert len(set(read)) == len(read) == min(size, 4) and set(read) <= set(given)
    assert pairs.labels[:, 0, 0][weights > 0].tolist() == labels.flat[read].tolist()
    assert pairs.sample.prompts[weights > 0].tolist() == [place // 3 for place in read]
    without = held._replace(pairs=held.pairs._replace(labels=np.full_like(held.pairs.labels, SKIPPED)))
    assert not np.any(read_pairs(jax.random.key(0), without)[1])
    with pytest.raises(ValueError, match="18 pairs has no 19"):
        queries.labelled_pairs(jax.random.key(0), held, size=19)
