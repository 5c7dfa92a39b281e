"""Adapters of jumanji, navix and MuJoCo Playground; those of gymnax and brax are in `jaxrlhf.mdp.environments`.

Each takes the library's own object, wrapped or not, and imports nothing of the library. Observations may be trees of
arrays, which are flattened and joined in the order of their leaves. A time limit of the environment truncates, and does
not terminate. That an environment begins anew by itself after an end does no harm.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.mdp.environments import Environment, brax_environment, checked, flat


def jumanji_environment(environment: Any) -> Environment:
    """Returns a jumanji environment, such as `jumanji.make("Snake-v1")`; actions are integers, or vectors with bounds.

    An episode whose last discount is 0 has terminated; any other last step is a truncation.

    Raises:
        ValueError: the environment breaks the interface, or has actions of several integers at once.
    """
    name = type(getattr(environment, "unwrapped", environment)).__name__
    spec: Any = environment.action_spec
    spec = spec() if callable(spec) else spec
    size = np.size(getattr(spec, "num_values", 1))
    if size != 1:
        raise ValueError(f"{name}: an action is {size} integers at once; wrap it to number their combinations.")
    continuous = not hasattr(spec, "num_values")
    if continuous and not np.issubdtype(np.dtype(spec.dtype), np.floating):
        raise ValueError(f"{name}: actions of the spec {type(spec).__name__} are neither one integer nor reals.")

    def reset(key: jax.Array) -> tuple[jax.Array, Any]:
        state, timestep = environment.reset(key)
        return flat(timestep.observation), state

    def step(key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, ...]:
        del key
        chosen = jnp.asarray(jnp.reshape(action, spec.shape), spec.dtype)
        state, timestep = environment.step(state, chosen)
        terminated = timestep.last() & (jnp.max(timestep.discount) == 0)
        reward = jnp.sum(jnp.asarray(timestep.reward, float))
        return flat(timestep.observation), state, reward, terminated, timestep.last() & ~terminated

    if not continuous:
        return checked(name, reset, step, int(np.ravel(spec.num_values)[0]))
    bounds = getattr(spec, "minimum", None), getattr(spec, "maximum", None)
    return checked(name, reset, step, int(np.prod(spec.shape)), bounds=bounds, continuous=True)


def navix_environment(environment: Any) -> Environment:
    """Returns a navix environment, such as `navix.make("Navix-Empty-5x5-v0")`; actions are integers.

    Raises:
        ValueError: the environment breaks the interface, or its actions are not integers below n.
    """
    name = type(environment).__name__
    space = environment.action_space
    if np.shape(space.maximum) != () or not np.issubdtype(np.asarray(space.maximum).dtype, np.integer):
        raise ValueError(f"{name}: actions of the space {type(space).__name__} are not integers below a number.")

    def reset(key: jax.Array) -> tuple[jax.Array, Any]:
        timestep = environment.reset(key)
        return flat(timestep.observation), timestep

    def step(key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, ...]:
        del key
        timestep = environment.step(state, action)
        # 0 goes on, 1 is a truncation, 2 a termination.
        kind = timestep.step_type
        return flat(timestep.observation), timestep, jnp.asarray(timestep.reward, float), kind == 2, kind == 1

    return checked(name, reset, step, int(space.maximum) + 1)


def playground_environment(environment: Any, *, observe: str = "state") -> Environment:
    """Returns an environment of MuJoCo Playground; actions lie in [-1, 1].

    An example is `registry.load("CartpoleBalance", config_overrides={"impl": "jax"})`. Physics by Warp, the default of
    some versions, keeps arrays that parallel environments share, and is refused.

    Playground leaves time limits to the learner: give the environment's `episode_length` as `episode_steps`.

    Args:
        environment: the object, or a wrapper of it that holds one episode.
        observe: where observations are named, the one that the policy sees; others are for a critic that knows more.

    Raises:
        ValueError: the environment breaks the interface, simulates by Warp, or has no observation of that name.
    """
    name = type(getattr(environment, "unwrapped", environment)).__name__
    one, two = (jax.eval_shape(jax.vmap(environment.reset), jax.random.split(jax.random.key(0), n)) for n in (1, 2))
    if any(np.shape(leaf) == np.shape(other) for leaf, other in zip(*map(jax.tree.leaves, (one, two)), strict=True)):
        raise ValueError(
            f"{name}: its parallel environments share a part of their state, as Warp's do; load it with "
            'config_overrides={"impl": "jax"}.'
        )
    observed = one.obs
    if not isinstance(observed, Mapping):
        return brax_environment(environment, name)
    if observe not in observed:
        raise ValueError(f"{name}: there is no observation {observe!r}; there are {', '.join(sorted(observed))}.")
    return brax_environment(_Observing(environment, observe), name)


class _Observing:
    """Shows one of an environment's named observations; everything else is the environment's own."""

    def __init__(self, environment: Any, observe: str) -> None:
        self.environment, self.observe = environment, observe
        self.action_size = environment.action_size

    def reset(self, key: jax.Array) -> Any:
        return _Seen(self.environment.reset(key), self.observe)

    def step(self, state: Any, action: jax.Array) -> Any:
        return _Seen(self.environment.step(state.state, action), self.observe)


@jax.tree_util.register_pytree_node_class
class _Seen:
    """A state of which one observation is seen."""

    def __init__(self, state: Any, observe: str) -> None:
        self.state, self.observe = state, observe

    @property
    def obs(self) -> Any:
        return self.state.obs[self.observe]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)

    def tree_flatten(self) -> tuple[tuple[Any], str]:
        return (self.state,), self.observe

    @classmethod
    def tree_unflatten(cls, observe: str, children: tuple[Any]) -> "_Seen":
        return cls(children[0], observe)
