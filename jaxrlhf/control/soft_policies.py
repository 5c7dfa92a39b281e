"""What a soft actor-critic needs of a policy and its critics: `discrete` sums over actions, `continuous` draws one.

Critics are stacked, leaves `[2, ...]`; a soft policy takes the smaller value of the two.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.base.types import Key, Params
from jaxrlhf.mdp.environments import Actor, Environment


class SoftPolicy(NamedTuple):
    """A policy with its critics.

    Attributes:
        act: `(key, policy, observations [..., O]) -> actions`. Consumes the key.
        uniform: `(key, observations) -> actions`, for the first steps. Consumes the key.
        value: `(critic, observations, actions) -> [...]`, of one critic.
        expectation: `(key, policy, critics, observations) -> (values [...], entropies [...])`: E min Q and -E log pi at
            each observation, or one draw of them; differentiable in the policy. Consumes the key.
        target_entropy: what the temperature aims at, in nats.
    """

    act: Callable[[Key, Params, jax.Array], jax.Array]
    uniform: Callable[[Key, jax.Array], jax.Array]
    value: Callable[[Params, jax.Array, jax.Array], jax.Array]
    expectation: Callable[[Key, Params, Params, jax.Array], tuple[jax.Array, jax.Array]]
    target_entropy: float


def smaller(critic: Callable[..., jax.Array], critics: Params, *inputs: jax.Array) -> jax.Array:
    """Returns the smaller of the two critics' values; where they are equal the gradient is the second's.

    Not `jnp.min`: its derivative divides by the number of values that equal the minimum, which is 0, and the gradient NaN,
    where the compiler computes the values once more and rounds them otherwise.
    """
    first, second = jax.vmap(lambda one: critic(one, *inputs))(critics)
    return jnp.where(first < second, first, second)


def discrete(
    logits: Callable[[Params, jax.Array], jax.Array],
    critic: Callable[[Params, jax.Array], jax.Array],
    environment: Environment,
    *,
    target_entropy: float | None = None,
) -> SoftPolicy:
    """Returns the soft policy of integer actions; expectations over actions are exact (arXiv 1910.07207).

    Args:
        logits: `(policy, observations [..., O]) -> [..., A]`.
        critic: `(critic, observations) -> [..., A]`, the value of every action.
        environment: for the number of actions.
        target_entropy: in nats; by default half of log A. The paper's 0.98 log A keeps the policy all but uniform.

    Raises:
        ValueError: the environment's actions are not integers.
    """
    if environment.continuous:
        raise ValueError(f"{environment.name}: its actions are vectors of reals; use soft_policies.continuous.")

    def uniform(key: Key, observations: jax.Array) -> jax.Array:
        return jax.random.randint(key, observations.shape[:-1], 0, environment.actions)

    def value(one: Params, observations: jax.Array, actions: jax.Array) -> jax.Array:
        return jnp.take_along_axis(critic(one, observations), actions[..., None], axis=-1)[..., 0]

    def expectation(key: Key, policy: Params, critics: Params, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
        del key
        log_policy = jax.nn.log_softmax(logits(policy, observations))
        weights = jnp.exp(log_policy)
        values = smaller(critic, critics, observations)
        return jnp.sum(weights * values, axis=-1), -jnp.sum(weights * log_policy, axis=-1)

    return SoftPolicy(
        act=lambda key, policy, observations: jax.random.categorical(key, logits(policy, observations)),
        uniform=uniform,
        value=value,
        expectation=expectation,
        target_entropy=0.5 * float(np.log(environment.actions)) if target_entropy is None else target_entropy,
    )


def continuous(
    moments: Callable[[Params, jax.Array], Sequence[jax.Array]],
    critic: Callable[[Params, jax.Array, jax.Array], jax.Array],
    environment: Environment,
    *,
    target_entropy: float | None = None,
) -> SoftPolicy:
    """Returns the soft policy of bounded real actions: a normal squashed by tanh (arXiv 1812.05905).

    Args:
        moments: `(policy, observations [..., O]) -> (means, log deviations) [..., D]`, before tanh.
        critic: `(critic, observations, actions [..., D]) -> [...]`.
        environment: for the bounds.
        target_entropy: in nats, of the action scaled to [-1, 1]; -D by default, as published.

    Raises:
        ValueError: the environment's actions are not vectors with finite bounds.
    """
    actor = squashed_actor(moments, environment)

    def uniform(key: Key, observations: jax.Array) -> jax.Array:
        drawn = jax.random.uniform(key, (*observations.shape[:-1], environment.actions))
        return to_bounds(2.0 * drawn - 1.0, environment)

    def expectation(key: Key, policy: Params, critics: Params, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
        actions, log_prob = actor.sample(key, policy, observations)
        return smaller(critic, critics, observations, actions), -log_prob

    return SoftPolicy(
        act=lambda key, policy, observations: actor.sample(key, policy, observations)[0],
        uniform=uniform,
        value=critic,
        expectation=expectation,
        target_entropy=-float(environment.actions) if target_entropy is None else target_entropy,
    )


def squashed_actor(moments: Callable[[Params, jax.Array], Sequence[jax.Array]], environment: Environment) -> Actor:
    """Returns the actor `low + (high - low) (tanh(u) + 1) / 2` of a normal u; its samples are differentiable.

    Log-probabilities are densities of the action scaled to [-1, 1], whatever the bounds:
    `log N(u) - sum log(1 - tanh(u)^2)`. Log deviations are clipped to [-5, 2].

    Args:
        moments: `(policy, observations [..., O]) -> (means, log deviations) [..., D]` of u.
        environment: for the bounds.

    Raises:
        ValueError: the environment's actions are not vectors with finite bounds.
    """
    if not environment.continuous:
        raise ValueError(f"{environment.name}: its actions are integers; use soft_policies.discrete.")
    if environment.low is None or not np.all(np.isfinite([environment.low, environment.high])):
        raise ValueError(f"{environment.name}: its actions have no finite bounds; give the Environment low and high.")
    # The farthest that float32 tells from a bound.
    edge = 1.0 - 1e-6

    def parts(policy: Params, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, log_deviation = moments(policy, observations)
        return mean, jnp.clip(log_deviation, -5.0, 2.0)

    def density(mean: jax.Array, log_deviation: jax.Array, inner: jax.Array) -> jax.Array:
        normal = -0.5 * jnp.square((inner - mean) * jnp.exp(-log_deviation)) - log_deviation - 0.5 * np.log(2 * np.pi)
        # log(1 - tanh(u)^2), stable for large u.
        squash = 2.0 * (np.log(2.0) - inner - jax.nn.softplus(-2.0 * inner))
        return jnp.sum(normal - squash, axis=-1)

    def sample(key: Key, policy: Params, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, log_deviation = parts(policy, observations)
        inner = mean + jnp.exp(log_deviation) * jax.random.normal(key, mean.shape, mean.dtype)
        return to_bounds(jnp.tanh(inner), environment), density(mean, log_deviation, inner)

    def log_prob(policy: Params, observations: jax.Array, actions: jax.Array) -> jax.Array:
        low, high = _bounds_like(actions, environment)
        scaled = jnp.clip(2.0 * (actions - low) / (high - low) - 1.0, -edge, edge)
        return density(*parts(policy, observations), jnp.arctanh(scaled))

    return Actor(sample, log_prob)


def to_bounds(scaled: jax.Array, environment: Environment) -> jax.Array:
    """Returns actions within the environment's bounds from actions scaled to [-1, 1], `[..., D]`."""
    low, high = _bounds_like(scaled, environment)
    return low + (high - low) * (scaled + 1.0) / 2.0


def _bounds_like(actions: jax.Array, environment: Environment) -> tuple[jax.Array, jax.Array]:
    low, high = (
        jnp.broadcast_to(jnp.asarray(each, actions.dtype), actions.shape)
        for each in (environment.low, environment.high)
    )
    return low, high
