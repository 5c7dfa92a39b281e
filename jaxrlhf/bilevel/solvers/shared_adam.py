"""Adam over the stack of iterates, with one second moment for all tilts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base.types import Params


class SharedAdamState(NamedTuple):
    """Steps taken, the first moment of every tilt `[S, ...]`, and the second moment that they share `[...]`."""

    count: jax.Array
    first: Params
    second: Params


def shared_adam(
    learning_rate: float | optax.Schedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns Adam with one second moment for all tilts, the mean of their squared gradients.

    Each tilt keeps its own first moment, and all are divided by the same scale: the stack moves by one linear map, so
    differences between tilts obey the same preconditioned descent as the policies themselves. With a second moment a
    tilt, Adam turns a difference of gradients of order sigma into one of order 1 near the solution, and the single-loop
    method diverges (`tests/bilevel/descent_test.py` holds both). On one tilt it is Adam (arXiv 1412.6980).
    """

    def init(params):
        return SharedAdamState(
            count=jnp.zeros((), jnp.int32),
            first=jax.tree.map(jnp.zeros_like, params),
            second=jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), params),
        )

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        first = jax.tree.map(lambda old, new: b1 * old + (1 - b1) * new, state.first, updates)
        second = jax.tree.map(
            lambda old, new: b2 * old + (1 - b2) * jnp.mean(jnp.square(new), axis=0), state.second, updates
        )
        rate = jnp.asarray(learning_rate(state.count)) if callable(learning_rate) else learning_rate

        def move(first, second):
            scale = jnp.sqrt(second / (1 - b2**count)) + eps
            return -rate * first / (1 - b1**count) / scale[None]

        return jax.tree.map(move, first, second), SharedAdamState(count, first, second)

    return optax.GradientTransformation(init, update)
