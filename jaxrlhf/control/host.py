"""Gymnasium environments, which step on the host: experience for `soft_actor_critic.update`, without JAX in them.

    vector = gymnasium.make_vec("Pendulum-v1", 4, vectorization_mode="sync", vector_kwargs={"autoreset_mode": "SameStep"})
    host = HostEnvironments(vector)
    algorithm = soft_actor_critic(host.environment, soft, first_critic, environments=host.count, ...)
    state = algorithm.init(key, upper, policy)
    proposal = host.propose(key, state, jax.jit(soft.act), steps=1)
    state, info = jax.jit(algorithm.update)(key, state, proposal, ())

The rest is as with environments in JAX: queries are drawn from `state.replay`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.base.types import Key, Params
from jaxrlhf.control.collection import Experience, Tracks
from jaxrlhf.control.soft_actor_critic import Proposal, SoftState
from jaxrlhf.mdp.environments import Environment


class HostEnvironments:
    """A Gymnasium vector environment and where it stands.

    Attributes:
        environment: its description for `soft_actor_critic` and `soft_policies`; stepping it in JAX raises ValueError.
        count: number of parallel environments.
    """

    environment: Environment
    count: int

    def __init__(self, vector: Any, *, seed: int = 0) -> None:
        """Resets the environments.

        Args:
            vector: a `gymnasium.vector.VectorEnv` that resets in the same step.
            seed: of the first reset.

        Raises:
            ValueError: naming the environment and what breaks the contract: when it resets, its actions, its observations.
        """
        self.vector, self.count = vector, int(vector.num_envs)
        self.name = str(getattr(getattr(vector, "spec", None), "id", None) or type(vector).__name__)
        mode = getattr(vector, "metadata", {}).get("autoreset_mode")
        if getattr(mode, "value", mode) != "SameStep":
            raise ValueError(
                f"{self.name}: it must reset in the step that ends an episode; make it with "
                'vectorization_mode="sync" and vector_kwargs={"autoreset_mode": "SameStep"}.'
            )
        space = vector.single_action_space
        continuous = not hasattr(space, "n")
        if continuous and not (hasattr(space, "low") and np.issubdtype(space.dtype, np.floating)):
            raise ValueError(
                f"{self.name}: actions of the space {type(space).__name__} are neither one integer nor reals."
            )
        # Spaces may begin at another number than 0.
        self.first_action = 0 if continuous else int(getattr(space, "start", 0))
        self.action_shape = space.shape
        observation, _ = vector.reset(seed=seed)
        self.observation = self._flat(observation, "the first observation")
        self.total, self.finished = np.zeros(self.count), np.full(self.count, np.nan)
        self.clock = np.zeros(self.count, np.int32)
        bounds = (np.ravel(space.low), np.ravel(space.high)) if continuous else (None, None)
        self.environment = Environment(
            name=self.name,
            reset=lambda key: (jnp.zeros(self.observation.shape[1]), ()),
            step=self._refuse,
            actions=int(np.prod(space.shape)) if continuous else int(space.n),
            observation_size=self.observation.shape[1],
            continuous=continuous,
            low=bounds[0],
            high=bounds[1],
        )

    def propose(self, key: Key, state: SoftState, act: Callable[[Key, Params, jax.Array], jax.Array], *, steps: int):
        """Takes `steps` steps in every environment; returns them as the `Proposal` that `update` takes.

        Args:
            key: consumed.
            state: for its policy.
            act: `(key, policy, observations [E, O]) -> actions`, such as `jax.jit(soft.act)`; the first random steps are
                the caller's: `lambda key, policy, observed: soft.uniform(key, observed)`.
            steps: to take.

        Raises:
            ValueError: naming the environment and the field that is not finite or has another shape.
        """
        rows = []
        for step_key in jax.random.split(key, steps):
            actions = act(step_key, state.policy, jnp.asarray(self.observation))
            rows.append(self._step(np.asarray(actions)))
        experience = Experience(*(jnp.asarray(np.stack(leaves)) for leaves in zip(*rows, strict=True)))
        dtype = state.tracks.total.dtype
        tracks = Tracks(
            observation=jnp.asarray(self.observation),
            state=(),
            clock=jnp.asarray(self.clock),
            total=jnp.asarray(self.total, dtype),
            finished=jnp.asarray(self.finished, dtype),
        )
        return Proposal(experience, tracks)

    def _step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        before = self.observation
        given = actions.reshape(self.count, *self.action_shape) + self.first_action
        observation, reward, terminated, truncated, info = self.vector.step(given)
        following = self._flat(observation, "the observation after a step")
        reward = np.asarray(reward, np.float32)
        if reward.shape != (self.count,) or not np.all(np.isfinite(reward)):
            raise ValueError(f"{self.name}: the rewards {reward} are not {self.count} finite numbers.")
        terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
        ended = terminated | truncated
        after = following.copy()
        known = np.ones(self.count, np.float32)
        finals = info.get("final_obs")
        for number in np.flatnonzero(ended):
            if finals is None or finals[number] is None:
                known[number] = 0.0
            else:
                after[number] = _row(finals[number])
        self.total = self.total + reward
        self.finished = np.where(ended, self.total, self.finished)
        self.total, self.clock = np.where(ended, 0.0, self.total), np.where(ended, 0, self.clock + 1).astype(np.int32)
        self.observation = following
        numbers = [flag.astype(np.float32) for flag in (terminated, ended)]
        return before, actions, after, reward, *numbers, known

    def _flat(self, observation: Any, field: str) -> np.ndarray:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(observation)]
        if not leaves or any(leaf.shape[:1] != (self.count,) for leaf in leaves):
            shapes = ", ".join(str(leaf.shape) for leaf in leaves) or "none"
            raise ValueError(
                f"{self.name}: {field} has arrays of the shapes {shapes}, expected {self.count} rows in each."
            )
        rows = np.concatenate([leaf.reshape(self.count, -1) for leaf in leaves], axis=1).astype(np.float32)
        if not np.all(np.isfinite(rows)):
            raise ValueError(f"{self.name}: {field} is not finite.")
        return rows

    def _refuse(self, *arguments: Any) -> Any:
        raise ValueError(f"{self.name}: it steps on the host; use HostEnvironments.propose and the algorithm's update.")


def _row(observation: Any) -> np.ndarray:
    """Returns one environment's observation as a vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(observation)]).astype(np.float32)
