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
            episode is over after this step, by the task's own rule and not by a time limit. An environment with a time
            limit of its own returns `truncated []` behind it: the episode is cut off there. Consumes the key. After an
            end of either sort nothing is read, so that the environment may have begun another episode.
        actions: number of discrete actions, or dimensions of a continuous one.
        observation_size: O.
        continuous: whether an action is a vector `[actions]` of reals rather than an integer.
        low, high: bounds `[actions]` of a continuous action; None where it has none.
    """

    name: str
    reset: Callable[[Key], tuple[jax.Array, Any]]
    step: Callable[[Key, Any, jax.Array], tuple[Any, ...]]
    actions: int
    observation_size: int
    continuous: bool = False
    low: Any = None
    high: Any = None


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
        terminated: `[N, T]`, 1 at a step that ended the episode by the task's own rule; an episode without one was cut
            off by a time limit, the environment's own or that of the draw.
    """

    observations: jax.Array
    actions: jax.Array
    log_prob: jax.Array
    reward: jax.Array
    alive: jax.Array
    terminated: jax.Array


def gymnax_environment(environment: Any, parameters: Any = None) -> Environment:
    """Returns a gymnax environment, wrapped or not, by its own `reset` and `step`.

    Observations may be trees of arrays, which are flattened and joined in the order of their leaves. That `step` resets
    by itself after an end does no harm; a time limit truncates the episode and does not terminate it.

    Args:
        environment: the first value that `gymnax.make` returns, a wrapper of it, or any object with `reset` and `step`, or
            at least `reset_env` and `step_env`, of gymnax's interface.
        parameters: the second; the environment's `default_params` by default.

    Raises:
        ValueError: the environment breaks the interface (`check`), or its actions are neither integers below n nor reals.
    """
    parameters = getattr(environment, "default_params", None) if parameters is None else parameters
    name = str(getattr(environment, "name", type(environment).__name__))
    reset_own, step_own = (_own(environment, each) for each in ("reset", "step"))
    if reset_own is None or step_own is None:
        raise ValueError(f"{name}: an environment needs the functions reset and step of gymnax's interface.")
    space = environment.action_space(parameters)
    if not hasattr(space, "n") and not isinstance(getattr(space, "shape", None), tuple):
        raise ValueError(f"{name}: actions of the space {type(space).__name__} are neither integers nor vectors.")
    continuous = not hasattr(space, "n")

    def reset(key):
        result = reset_own(key, parameters)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(f"its reset returns {type(result).__name__} in place of (observation, state)")
        return flat(result[0]), result[1]

    def step(key, state, action):
        action = jnp.reshape(action, space.shape) if continuous else action
        result = step_own(key, state, action, parameters)
        if not isinstance(result, tuple) or len(result) not in (5, 6):
            raise ValueError(f"its step returns {type(result).__name__} in place of (observation, state, reward, ...)")
        # Before gymnax 1.0, and from `step_env`, one value says both how an episode ends; some keep them in `info`.
        observation, state, reward, terminated, *truncated, info = result
        if not truncated and isinstance(info, dict) and {"terminated", "truncated"} <= info.keys():
            terminated, truncated = info["terminated"], [info["truncated"]]
        cut_off = truncated[0] if truncated else jnp.zeros_like(terminated)
        return flat(observation), state, jnp.asarray(reward, float), terminated, cut_off

    if not continuous:
        return checked(name, reset, step, int(space.n))
    bounds = getattr(space, "low", None), getattr(space, "high", None)
    return checked(name, reset, step, int(np.prod(space.shape)), bounds=bounds, continuous=True)


def brax_environment(environment: Any, name: str = "brax") -> Environment:
    """Returns a brax environment: an object with brax's `reset(key)` and `step(state, action)`, wrapped or not.

    Observations may be trees of arrays, as for `gymnax_environment`. Where a wrapper sets `info["truncation"]`, `done`
    means that the episode was cut off.

    Raises:
        ValueError: the environment breaks the interface (`check`), draws several episodes at once, or has observations
            that are meant for a critic only.
    """

    def observation_of(state):
        if isinstance(state.obs, dict) and "privileged_state" in state.obs:
            raise ValueError(
                "its observations hold a privileged_state, which a policy may not see; wrap it to leave that out"
            )
        return flat(state.obs)

    def reset(key):
        state = environment.reset(key)
        return observation_of(state), state

    def step(key, state, action):
        del key
        state = environment.step(state, action)
        info = getattr(state, "info", None) or {}
        truncated = jnp.asarray(info.get("truncation", jnp.zeros_like(state.done))) > 0
        return observation_of(state), state, jnp.asarray(state.reward, float), (state.done > 0) & ~truncated, truncated

    size = np.asarray(environment.action_size() if callable(environment.action_size) else environment.action_size)
    return checked(name, reset, step, int(size), bounds=(-1.0, 1.0), continuous=True)


def _own(environment: Any, name: str) -> Any:
    """Returns an environment's `reset` or `step`, or the one with `_env` behind its name.

    Wrappers pass every other name on to the environment inside, and their own function may be of either name.
    """
    names = (name, f"{name}_env")
    defined = [each for each in names if hasattr(type(environment), each)]
    return getattr(environment, (defined or [each for each in names if hasattr(environment, each)] or names)[0], None)


def flat(observation: Any) -> jax.Array:
    """Returns the leaves of an observation as one vector; for adapters."""
    leaves = [jnp.ravel(leaf).astype(float) for leaf in jax.tree.leaves(observation)]
    if not leaves:
        raise ValueError("its observation holds no array")
    return jnp.concatenate(leaves)


def checked(
    name: str, reset: Any, step: Any, actions: int, *, continuous: bool = False, bounds: tuple[Any, Any] = (None, None)
) -> Environment:
    """Returns the environment of two functions after `check`; for adapters.

    Args:
        name, reset, step, actions, continuous: fields of the environment.
        bounds: low and high, as scalars or arrays that broadcast to `[actions]`; both None where actions have none.

    Raises:
        ValueError: naming the environment, and the field that breaks the contract or what its functions raised.
    """
    low, high = (None if each is None else np.broadcast_to(np.ravel(each), actions) for each in bounds)
    try:
        shape = jax.eval_shape(reset, jax.random.key(0))[0].shape
        environment = Environment(name, reset, step, actions, shape[0], continuous, low, high)
        jax.eval_shape(lambda key: step(key, reset(key)[1], _no_action(environment)), jax.random.key(0))
    except Exception as error:  # whatever a foreign environment raises
        raise ValueError(f"{name}: {' '.join(str(error).split())[:300] or type(error).__name__}.") from error
    return check(environment)


def _no_action(environment: Environment) -> jax.Array:
    return jnp.zeros(environment.actions) if environment.continuous else jnp.zeros((), int)


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

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxrlhf.mdp.environments import Environment, check
        >>> def reset(key):  # -> observation, state
        ...     return jnp.zeros(1), 0
        >>> def step(key, state, action):  # -> observation, state, reward, terminated
        ...     return jnp.ones(1), state + 1, 1.0 * action, state >= 9
        >>> check(Environment("ten steps", reset, step, actions=2, observation_size=1)).name
        'ten steps'
    """
    name, key = environment.name, jax.random.key(0)
    if environment.actions < 1:
        raise ValueError(f"{name}: actions must be at least 1, got {environment.actions}.")
    _check_bounds(environment)
    observation, state = environment.reset(key)
    stepped = environment.step(key, state, _no_action(environment))
    if len(stepped) not in (4, 5):
        raise ValueError(
            f"{name}: a step returns {len(stepped)} values, expected 4, or 5 with a time limit of its own."
        )
    next_observation, next_state, reward, *ends = stepped
    expected = (environment.observation_size,)
    for field, value, shape in (
        ("the first observation", observation, expected),
        ("the observation after a step", next_observation, expected),
        ("the reward", reward, ()),
        *(("the end of the episode", end, ()) for end in ends),
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


def _check_bounds(environment: Environment) -> None:
    name, low, high = environment.name, environment.low, environment.high
    if low is None and high is None:
        return
    if low is None or high is None or not environment.continuous:
        raise ValueError(f"{name}: bounds need low and high, both, and a continuous action.")
    if not (np.shape(low) == np.shape(high) == (environment.actions,) and np.all(np.asarray(low) < np.asarray(high))):
        raise ValueError(
            f"{name}: the bounds {low} and {high} are not {environment.actions} pairs of a low below a high."
        )


def roll_out(key: Key, actor: Actor, lower: Params, environment: Environment, *, episodes: int, steps: int) -> Rollouts:
    """Draws episodes of at most `steps` steps by `lax.scan`. Consumes the key."""
    reset_key, key = jax.random.split(key)
    observation, state = jax.vmap(environment.reset)(jax.random.split(reset_key, episodes))

    def advance(carry, key):
        observation, state, alive = carry
        act_key, step_key = jax.random.split(key)
        action, log_prob = actor.sample(act_key, lower, observation)
        step_keys = jax.random.split(step_key, episodes)
        next_observation, next_state, reward, *ends = jax.vmap(environment.step)(step_keys, state, action)
        terminated, *truncated = (end.astype(alive.dtype) for end in ends)
        record = (observation, action, log_prob, reward, alive, alive * terminated)
        for end in (terminated, *truncated):
            alive = alive * (1.0 - end)
        # A step may return other dtypes than the reset; the scan needs those of the reset.
        next_state = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.asarray(old).dtype), next_state, state)
        return (next_observation, next_state, alive), record

    alive = jnp.ones(episodes, observation.dtype)
    _, history = jax.lax.scan(advance, (observation, state, alive), jax.random.split(key, steps))
    observations, actions, log_prob, reward, alive, terminated = (jnp.swapaxes(leaf, 0, 1) for leaf in history)

    def zero_after_end(leaf):
        mask = alive.reshape(alive.shape + (1,) * (leaf.ndim - 2)) > 0
        return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))

    observations, actions, log_prob, reward = map(zero_after_end, (observations, actions, log_prob, reward))
    return Rollouts(observations, actions, log_prob, reward, alive, terminated)


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
