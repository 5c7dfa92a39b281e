"""Which pairs of a step to ask about: those on which rewards that fit the labels so far as well disagree most.

An ensemble of infinitely many reward heads, in closed form. A pair whose responses have the features f_0 and f_1 has the
margin h . d, d = f_0 - f_1, under a head h. Heads that explain labels of pairs d_k well are, in Laplace's approximation of
logistic regression's posterior,

    h ~ N(head, A^-1),      A = r I + sum_k p_k (1 - p_k) d_k d_k^T,      p_k = sigmoid(head . d_k)

so that they disagree about the margins of candidates d by the covariance d A^-1 d'. The prior r is such that before any
label the margin of an average candidate has the variance `PRIOR_VARIANCE`. Pairs are chosen one after another, each where

    p (1 - p) d^T A^-1 d

is largest (it gains most information, log(1 + .) / 2, as in arXiv 1112.5745; the greedy choice of several is the
determinant's, D-optimal design), and A grows by each before the next is: of pairs that say the same, one is asked about.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import Labelled
from jaxrlhf.base.types import Key
from jaxrlhf.preferences.buffer import PreferenceBuffer, take_pairs

PRIOR_VARIANCE = 4.0
"""Of the margin of an average pair before any label, in nats squared: a standard deviation of 2, odds of about 7 to 1."""


def covariance(candidates: jax.Array, known: jax.Array, information: jax.Array) -> jax.Array:
    """Returns the posterior covariance `[N, N]` of the margins of candidate pairs.

    Args:
        candidates: `[N, D]`, differences of features.
        known: `[K, D]`, of labelled pairs.
        information: `[K]`, p (1 - p) of each labelled pair, 0 for one that does not count.
    """
    prior = jnp.maximum(jnp.mean(jnp.sum(candidates**2, axis=-1)), jnp.finfo(candidates.dtype).tiny) / PRIOR_VARIANCE
    candidates, known = candidates / jnp.sqrt(prior), known / jnp.sqrt(prior) * jnp.sqrt(information)[:, None]
    # By K x K in place of D x D: features are many, labels few.
    inner = jnp.eye(len(known), dtype=known.dtype) + known @ known.T
    across = known @ candidates.T
    return candidates @ candidates.T - across.T @ jnp.linalg.solve(inner, across)


def choose(margins: jax.Array, posterior: jax.Array, count: int) -> jax.Array:
    """Returns the indices `[count]` of different candidates, in the order of the choice; equal ones by their place.

    Args:
        margins: `[N]`, of the reward at hand, in nats.
        posterior: `[N, N]`, of `covariance`.
        count: of pairs to ask about.

    Raises:
        ValueError: there are fewer candidates.
    """
    if not 1 <= count <= len(margins):
        raise ValueError(f"A query takes 1 to {len(margins)} of the {len(margins)} candidate pairs, got {count}.")
    information = jax.nn.sigmoid(margins) * jax.nn.sigmoid(-margins)

    def one(carry, _):
        covered, taken = carry
        gain = jnp.where(taken, -1.0, information * jnp.diagonal(covered))
        index = jnp.argmax(gain)
        column = covered[index]
        rate = information[index] / (1.0 + information[index] * column[index])
        return (covered - rate * column[:, None] * column[None, :], taken.at[index].set(True)), index

    start = posterior, jnp.zeros(len(margins), bool)
    return jax.lax.scan(one, start, length=count)[1]


def labelled_pairs(key: Key, buffer: PreferenceBuffer, *, size: int) -> tuple[Labelled, jax.Array]:
    """Returns labelled pairs of a buffer as rows `[size, 1, ...]`, drawn without replacement, and their weights `[size]`.

    The weights sum to the number of labelled pairs in the buffer; where there are fewer than `size`, the rest of the rows
    weigh 0. Consumes the key.

    Raises:
        ValueError: the buffer has fewer places.
    """
    given = jnp.any(buffer.pairs.labels >= 0, axis=-1).reshape(-1)
    if size > given.size:
        raise ValueError(f"A buffer of {given.size} pairs has no {size}.")
    order = jnp.where(given, jax.random.uniform(key, given.shape), -1.0)
    ranks, indices = jax.lax.top_k(order, size)
    found = ranks >= 0
    weights = jnp.where(found, jnp.sum(given) / jnp.maximum(jnp.sum(found), 1), 0.0)
    pairs = buffer.pairs.labels.shape[1]
    rows, columns = indices // pairs, indices % pairs
    labels = buffer.pairs.labels[rows, columns][:, None]
    return Labelled(take_pairs(buffer.pairs.sample, rows, columns), labels), weights
