"""An algorithm is four pure functions; bilevel descent, policy gradients, replay and controllers all have this shape.

In use:

    state = algorithm.init(key, reward_params, policy_params)
    state, info = algorithm.step(key, state, data, frozen)                    # with an annotator that JAX can trace

    sample = algorithm.propose(key, state, data, frozen)                      # with labels from outside
    state, info = algorithm.update(key, state, Labelled(sample, labels), frozen)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import Labelled, Sample
from jaxrlhf.base.types import Batch, Key, Params

State = Any
"""A pytree of arrays with a `policy`; with an `upper` too where a reward is learned."""

Info = Any
"""A pytree of diagnostics of one step."""

Annotator = Callable[[Key, Sample, Params], jax.Array]
"""`(key, sample, frozen) -> labels [B, M, L]`, traceable; see `jaxrlhf.preferences.annotators`."""


class Algorithm(NamedTuple):
    """An algorithm as pure functions. A function that takes a key consumes it.

    Attributes:
        init: `(key, upper, lower) -> state`, from reward parameters and policy parameters. Copies what the state keeps,
            so that the state may be donated.
        step: `(key, state, data, frozen) -> (state, info)`: propose, annotate, update.
        propose: `(key, state, data, frozen) -> sample`.
        update: `(key, state, labelled, frozen) -> (state, info)`.
    """

    init: Callable[[Key, Params, Params], State]
    step: Callable[[Key, State, Batch, Params], tuple[State, Info]]
    propose: Callable[[Key, State, Batch, Params], Any]
    update: Callable[[Key, State, Any, Params], tuple[State, Info]]


def owned(params: Params) -> Params:
    """Returns a copy of the parameters that a state may own: donation never takes the caller's buffers.

    Weak types are stripped, so that a step compiles once.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.asarray(leaf).dtype, copy=True), params)


def label_by(annotate: Annotator | None) -> Callable[[Key, Sample, Params], Labelled] | None:
    """Returns `(key, sample, frozen) -> Labelled`; None without an annotator."""
    if annotate is None:
        return None
    return lambda key, sample, frozen: Labelled(sample, annotate(key, sample, frozen))


def compose(propose: Callable, label: Callable | None, update: Callable) -> Callable:
    """Returns the `step` that proposes, labels and updates, each with a key of its own.

    Without a `label`, whose labels come from outside, the step raises ValueError.
    """

    def step(key: Key, state: State, data: Batch, frozen: Params) -> tuple[State, Info]:
        if label is None:
            raise ValueError("step needs an annotator: give the algorithm one, or use propose and update.")
        sample_key, label_key, update_key = jax.random.split(key, 3)
        sample = propose(sample_key, state, data, frozen)
        return update(update_key, state, label(label_key, sample, frozen), frozen)

    return step
