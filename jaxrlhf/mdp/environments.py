"""Environments as pure functions, and adapters for gymnax, brax and tabular processes.

An environment needs two functions only, so a custom one takes a few lines:

    Environment("name", reset, step, actions=2, observation_size=4)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.base.types import Key, Params
from jaxrlhf.mdp.tabular import TabularMDP, at_actions, check_reward
from jaxrlhf.mdp.tabular import check as check_mdp


class Environment(NamedTuple):
    """A control task.

    Attributes:
        name: for messages.
        reset: `(key) -> (observation [O], state)`. Consumes the key.
        step: `(key, state, action) -> (observation [O], state, reward [], terminated [])`; `terminated` says that the
            episode is over after this step, by the task's own rule and not by a time limit. No automatic reset. Consumes
            the key.
        actions: number of discrete actions, or dimensions of a continuous one.
        observation_size: O.
        continuous: whether an action is a vector `[actions]` of reals rather than an integer.
    """

    name: str
    reset: Callable[[Key], tuple[jax.Array, Any]]
    step: Callable[[Key, Any, jax.Array], tuple[jax.Array, Any, jax.Array, jax.Array]]
    actions: int
    observation_size: int
    continuous: bool = False


class Actor(NamedTuple):
    """A policy of observations.

    Attributes:
        sample: `(key, lower, observations [..., O]) -> (actions, log-probabilities [...])`. Consumes the key.
        log_prob: `(lower, observations [..., O], actions) -> [...]` in nats, differentiable in `lower`.
    """

    sample: Callable[[Key, Params, jax.Array], tuple[jax.Array, jax.Array]]
    log_prob: Callable[[Params, jax.Array, jax.Array], jax.Array]


class Rollouts(NamedTuple):
    """Drawn episodes, `[N, T]`; zeros after the end, so that equal episodes are equal arrays.

    Attributes:
        observations: `[N, T, O]`, before each action.
        actions: `[N, T]` int, or `[N, T, D]`.
        log_prob: of each action under the policy that chose it.
        reward: the environment's.
        alive: 1 until the episode ends, 0 after.
    """

    observations: jax.Array
    actions: jax.Array
    log_prob: jax.Array
    reward: jax.Array
    alive: jax.Array


def gymnax_environment(environment: Any, parameters: Any = None) -> Environment:
    """Returns a gymnax environment (or any object with its `reset_env` and `step_env`); observations are flattened.

    Args:
        environment: the first value that `gymnax.make` returns.
        parameters: the second; the environment's `default_params` by default.

    Raises:
        ValueError: the environment breaks the interface (`check`).
    """
    parameters = environment.default_params if parameters is None else parameters
    name = str(getattr(environment, "name", type(environment).__name__))
    space = environment.action_space(parameters)
    continuous = not hasattr(space, "n")

    def reset(key):
        observation, state = environment.reset_env(key, parameters)
        return jnp.ravel(observation).astype(float), state

    def step(key, state, action):
        observation, state, reward, terminated, *_ = environment.step_env(key, state, action, parameters)
        return jnp.ravel(observation).astype(float), state, jnp.asarray(reward, float), terminated

    size = jax.eval_shape(reset, jax.random.key(0))[0].size
    actions = int(np.prod(space.shape)) if continuous else int(space.n)
    return check(Environment(name, reset, step, actions, size, continuous))


def brax_environment(environment: Any, name: str = "brax") -> Environment:
    """Returns a brax environment (an object with brax's `reset(key)` and `step(state, action)`), unwrapped.

    Raises:
        ValueError: the environment breaks the interface (`check`).
    """

    def reset(key):
        state = environment.reset(key)
        return jnp.ravel(state.obs).astype(float), state

    def step(key, state, action):
        del key
        state = environment.step(state, action)
        return jnp.ravel(state.obs).astype(float), state, jnp.asarray(state.reward, float), state.done > 0

    return check(
        Environment(name, reset, step, int(environment.action_size), int(environment.observation_size), continuous=True)
    )


def tabular_environment(mdp: TabularMDP, reward: jax.Array, *, name: str = "a tabular process") -> Environment:
    """Returns the environment of a tabular process with a reward `[S, A]`; observations are one-hot states.

    Raises:
        ValueError: the process or the reward is invalid (`tabular.check`, `tabular.check_reward`).
    """
    check_mdp(mdp, name=name)
    check_reward(reward, mdp, name=name)
    size = len(mdp.start)

    def draw(key, probability):
        return jax.random.categorical(key, jnp.log(probability))

    def reset(key):
        state = draw(key, mdp.start)
        return jax.nn.one_hot(state, size), state

    def step(key, state, action):
        next_state = draw(key, mdp.transition[state, action])
        return jax.nn.one_hot(next_state, size), next_state, reward[state, action], mdp.terminal[state] > 0

    return Environment(name, reset, step, mdp.transition.shape[1], size)


def check(environment: Environment) -> Environment:
    """Returns the environment after checking the results of one reset and one step.

    Raises:
        ValueError: naming the environment and the field: an observation of another shape, a reward or termination that is
            no scalar, a state that changes its structure, values that are not finite.
    """
    name, key = environment.name, jax.random.key(0)
    action = jnp.zeros(environment.actions) if environment.continuous else jnp.zeros((), int)
    if environment.actions < 1:
        raise ValueError(f"{name}: actions must be at least 1, got {environment.actions}.")
    observation, state = environment.reset(key)
    next_observation, next_state, reward, terminated = environment.step(key, state, action)
    expected = (environment.observation_size,)
    for field, value, shape in (
        ("the first observation", observation, expected),
        ("the observation after a step", next_observation, expected),
        ("the reward", reward, ()),
        ("the end of the episode", terminated, ()),
    ):
        if jnp.shape(value) != shape:
            raise ValueError(f"{name}: {field} has the shape {jnp.shape(value)}, expected {shape}.")
        if not np.all(np.isfinite(np.asarray(value, float))):
            raise ValueError(f"{name}: {field} is not finite.")
    if jax.tree.structure(state) != jax.tree.structure(next_state) or any(
        jnp.shape(old) != jnp.shape(new)
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(next_state), strict=True)
    ):
        raise ValueError(f"{name}: the state changes its structure or shapes from reset to step.")
    return environment


def roll_out(key: Key, actor: Actor, lower: Params, environment: Environment, *, episodes: int, steps: int) -> Rollouts:
    """Draws episodes of at most `steps` steps by `lax.scan`. Consumes the key."""
    reset_key, key = jax.random.split(key)
    observation, state = jax.vmap(environment.reset)(jax.random.split(reset_key, episodes))

    def advance(carry, key):
        observation, state, alive = carry
        act_key, step_key = jax.random.split(key)
        action, log_prob = actor.sample(act_key, lower, observation)
        step_keys = jax.random.split(step_key, episodes)
        next_observation, next_state, reward, terminated = jax.vmap(environment.step)(step_keys, state, action)
        record = (observation, action, log_prob, reward, alive)
        # A step may return other dtypes than the reset; the scan needs those of the reset.
        next_state = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.asarray(old).dtype), next_state, state)
        return (next_observation, next_state, alive * (1.0 - terminated.astype(alive.dtype))), record

    alive = jnp.ones(episodes, observation.dtype)
    _, history = jax.lax.scan(advance, (observation, state, alive), jax.random.split(key, steps))
    observations, actions, log_prob, reward, alive = (jnp.swapaxes(leaf, 0, 1) for leaf in history)

    def zero_after_end(leaf):
        mask = alive.reshape(alive.shape + (1,) * (leaf.ndim - 2)) > 0
        return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))

    observations, actions, log_prob, reward = map(zero_after_end, (observations, actions, log_prob, reward))
    return Rollouts(observations, actions, log_prob, reward, alive)


def categorical_actor(logits: Callable[[Params, jax.Array], jax.Array]) -> Actor:
    """Returns the actor of integer actions from `(lower, observations [..., O]) -> [..., A]`."""

    def log_prob(lower, observations, actions):
        return at_actions(jax.nn.log_softmax(logits(lower, observations)), actions)

    def sample(key, lower, observations):
        log_policy = jax.nn.log_softmax(logits(lower, observations))
        actions = jax.random.categorical(key, log_policy)
        return actions, at_actions(log_policy, actions)

    return Actor(sample, log_prob)


def gaussian_actor(moments: Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]) -> Actor:
    """Returns the actor of real actions from `(lower, observations [..., O]) -> (means, log deviations) [..., D]`.

    Log-probabilities are those of the unbounded normal, also where an environment clips the drawn actions.
    """

    def log_prob(lower, observations, actions):
        mean, log_deviation = moments(lower, observations)
        scaled = (actions - mean) * jnp.exp(-log_deviation)
        return jnp.sum(-0.5 * jnp.square(scaled) - log_deviation - 0.5 * np.log(2 * np.pi), axis=-1)

    def sample(key, lower, observations):
        mean, log_deviation = moments(lower, observations)
        actions = mean + jnp.exp(log_deviation) * jax.random.normal(key, mean.shape, mean.dtype)
        return actions, log_prob(lower, observations, actions)

    return Actor(sample, log_prob)
