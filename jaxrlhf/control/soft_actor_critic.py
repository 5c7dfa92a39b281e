"""Soft actor-critic (arXiv 1812.05905): the off-policy lower level, whose reward may change at any time.

With temperature tau, twin critics Q_i, their slowly following targets, and rewards of the batch by the present `reward`:

    y_t         = r_t + gamma (1 - terminated_t) E_pi[min_i Q_i^target(s_{t+1}, a) - tau log pi(a | s_{t+1})]
    critics     minimise   sum_i E (Q_i(s_t, a_t) - y_t)^2 / 2
    policy      maximises  E[min_i Q_i(s_t, a) - tau log pi(a | s_t)]
    log tau     minimises  tau E[H(pi(. | s_t)) - target entropy]

Steps at which the environment itself cut the episode off do not train the critics: what follows them is not known.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base.algorithm import Algorithm, compose, owned
from jaxrlhf.base.types import Batch, Key, Params
from jaxrlhf.control import replay as experience_replay
from jaxrlhf.control.collection import Experience, Tracks, begin, collect, example_of
from jaxrlhf.control.replay import Replay
from jaxrlhf.control.soft_policies import SoftPolicy, smaller
from jaxrlhf.mdp.environments import Environment

Relabel = Callable[[Params, Experience, Replay], jax.Array]
"""`(upper, batch [N, ...], replay) -> rewards [N]`."""


class Learned(NamedTuple):
    """What the gradient steps move.

    Attributes:
        policy: parameters.
        critics, targets: leaves `[2, ...]`.
        log_temperature: `[]`.
        optimizers: states of the policy's, the critics' and the temperature's optimisers.
    """

    policy: Params
    critics: Params
    targets: Params
    log_temperature: jax.Array
    optimizers: tuple[Any, Any, Any]


class SoftState(NamedTuple):
    """What is carried from one step to the next.

    Attributes:
        step: `[]` int32, steps taken in each environment.
        upper: parameters of the reward; the algorithm never changes them, its user may.
        learned: policy, critics and temperature.
        replay: experience.
        tracks: where the environments stand.
    """

    step: jax.Array
    upper: Params
    learned: Learned
    replay: Replay
    tracks: Tracks

    @property
    def policy(self) -> Params:
        """The policy's parameters."""
        return self.learned.policy


class SoftInfo(NamedTuple):
    """Diagnostics of one step, all scalars, of its last batch.

    Attributes:
        critic_loss: mean over the batch, summed over both critics.
        value: mean smaller value of the batch's actions.
        entropy: of the policy, in nats.
        temperature: before the update.
        reward: mean reward of the batch, by the present reward.
        finished: mean true return of the last episode of each environment; NaN until one has ended.
    """

    critic_loss: jax.Array
    value: jax.Array
    entropy: jax.Array
    temperature: jax.Array
    reward: jax.Array
    finished: jax.Array


class Proposal(NamedTuple):
    """Experience `[T, E]`, and where the environments stand after it."""

    experience: Experience
    tracks: Tracks


def true_reward(upper: Params, batch: Experience, replay: Replay) -> jax.Array:
    """The environment's own reward: an oracle."""
    del upper, replay
    return batch.reward


def relabelled(reward: Callable[[Params, jax.Array, jax.Array], jax.Array]) -> Relabel:
    """Returns a reward `(upper, observations, actions) -> [...]` of the batch at hand."""
    return lambda upper, batch, replay: reward(upper, batch.observations, batch.actions)


def soft_targets(
    reward: jax.Array,
    terminated: jax.Array,
    next_value: jax.Array,
    next_entropy: jax.Array,
    *,
    gamma: float,
    temperature: Any,
) -> jax.Array:
    """Returns y, `[N]`, from rewards, ends, and the targets' value and the policy's entropy at the next observations."""
    return reward + gamma * (1.0 - terminated) * (next_value + temperature * next_entropy)


def soft_actor_critic(
    environment: Environment,
    soft: SoftPolicy,
    first_critic: Callable[[Key], Params],
    *,
    reward: Relabel = true_reward,
    optimizer: optax.GradientTransformation,
    gamma: float = 0.99,
    temperature: float | None = None,
    first_temperature: float = 0.1,
    target_rate: float = 0.005,
    capacity: int = 100_000,
    environments: int = 1,
    horizon: int = 1,
    updates: int = 1,
    batch_size: int = 256,
    random_steps: int = 100,
    episode_steps: int | None = None,
) -> Algorithm:
    """Returns the algorithm, with `SoftState` and `SoftInfo`; `jax.vmap` of its functions trains many seeds at once.

    `init` makes the environments begin. `propose` takes `horizon` steps in each by the policy; its sample is a `Proposal`.
    `update` stores them and takes `updates` gradient steps, each on a batch of the replay with rewards of the moment.
    `step` does both. Its `data` and `frozen` are ignored. A host that steps the environment by itself gives `update` a
    `Proposal` of its own, with the tracks of the state.

    Args:
        environment: what is stepped.
        soft: the policy and its critics (`soft_policies`).
        first_critic: `key -> parameters` of one critic.
        reward: of the batch, computed in the compiled step.
        optimizer: of policy, critics and temperature, each with a state of its own.
        gamma: the discount.
        temperature: a fixed one, which is the beta of the KL to the uniform policy; None learns it.
        first_temperature: where a learned one begins.
        target_rate: how fast the targets follow the critics, in (0, 1].
        capacity: steps of the replay, over all environments together.
        environments: stepped in parallel.
        horizon: steps of each environment a step of the algorithm.
        updates: gradient steps a step of the algorithm.
        batch_size: of a gradient step.
        random_steps: first steps in each environment, by uniform actions and without gradient steps.
        episode_steps: a time limit; None leaves the end to the environment.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    check_range(gamma, temperature, first_temperature, target_rate)
    if horizon > capacity // environments:
        raise ValueError(
            f"A replay of {capacity} steps is less than the {horizon} that each environment takes at a time."
        )
    gradient_step = gradient_steps(
        soft, reward, optimizer, gamma=gamma, target_rate=target_rate, batch_size=batch_size, learn=temperature is None
    )

    def init(key: Key, upper: Params, lower: Params) -> SoftState:
        critic_key, track_key = jax.random.split(key)
        tracks = begin(track_key, environment, environments=environments)
        actions = jax.eval_shape(soft.uniform, key, tracks.observation)
        return SoftState(
            step=jnp.zeros((), jnp.int32),
            upper=owned(upper),
            learned=first_learned(
                owned(lower), critic_key, first_critic, optimizer,
                temperature=first_temperature if temperature is None else temperature,
            ),
            replay=experience_replay.empty(example_of(tracks, actions), capacity=capacity // environments),
            tracks=tracks,
        )  # fmt: skip

    def propose(key: Key, state: SoftState, data: Batch, frozen: Params) -> Proposal:
        del data, frozen

        def act(key: Key, observations: jax.Array) -> jax.Array:
            random, chosen = soft.uniform(key, observations), soft.act(key, state.policy, observations)
            return jnp.where(state.step < random_steps, random, chosen)

        return Proposal(*collect(key, environment, act, state.tracks, steps=horizon, episode_steps=episode_steps))

    def update(key: Key, state: SoftState, proposal: Proposal, frozen: Params) -> tuple[SoftState, SoftInfo]:
        del frozen
        replay = experience_replay.add(state.replay, proposal.experience)
        step = state.step + proposal.experience.reward.shape[0]

        def train(learned: Learned) -> tuple[Learned, SoftInfo]:
            keys = jax.random.split(key, updates)
            learned, infos = jax.lax.scan(lambda old, key: gradient_step(key, state.upper, old, replay), learned, keys)
            return learned, jax.tree.map(lambda leaf: leaf[-1], infos)

        idle = jax.tree.map(
            lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), jax.eval_shape(train, state.learned)[1]
        )
        learned, info = jax.lax.cond(step > random_steps, train, lambda learned: (learned, idle), state.learned)
        info = info._replace(finished=jnp.nanmean(proposal.tracks.finished))
        return SoftState(step, state.upper, learned, replay, proposal.tracks), info

    return Algorithm(init, compose(propose, lambda key, sample, frozen: sample, update), propose, update)


def first_learned(
    policy: Params,
    key: Key,
    first_critic: Callable[[Key], Params],
    optimizer: optax.GradientTransformation,
    *,
    temperature: float | jax.Array,
) -> Learned:
    """Returns fresh critics, temperature and optimisers for a policy. Consumes the key."""
    critics = owned(jax.vmap(first_critic)(jax.random.split(key, 2)))
    log_temperature = jnp.log(jnp.asarray(temperature, float))
    optimizers = (optimizer.init(policy), optimizer.init(critics), optimizer.init(log_temperature))
    return Learned(policy, critics, owned(critics), log_temperature, optimizers)


def gradient_steps(
    soft: SoftPolicy,
    reward: Relabel,
    optimizer: optax.GradientTransformation,
    *,
    gamma: float,
    target_rate: float,
    batch_size: int,
    learn: bool = True,
) -> Callable[[Key, Params, Learned, Replay], tuple[Learned, SoftInfo]]:
    """Returns `(key, upper, learned, replay) -> (learned, info)`: one step of critics, policy and temperature, in order.

    Args:
        soft, reward, optimizer, gamma, target_rate, batch_size: of `soft_actor_critic`.
        learn: whether the temperature moves.
    """

    def descend(gradient: Params, state: Any, params: Params) -> tuple[Params, Any]:
        move, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, move), state

    def step(key: Key, upper: Params, learned: Learned, replay: Replay) -> tuple[Learned, SoftInfo]:
        policy, critics, targets, log_temperature, (policy_state, critic_state, temperature_state) = learned
        draw_key, target_key, policy_key = jax.random.split(key, 3)
        batch = experience_replay.draw(draw_key, replay, size=batch_size)
        rewards, temperature = reward(upper, batch, replay), jnp.exp(log_temperature)
        following = soft.expectation(target_key, policy, targets, batch.next_observations)
        target = soft_targets(rewards, batch.terminated, *following, gamma=gamma, temperature=temperature)

        def critic_loss(critics: Params) -> jax.Array:
            errors = jax.vmap(lambda one: soft.value(one, batch.observations, batch.actions))(critics) - target[None]
            return jnp.sum(batch.known[None] * jnp.square(errors)) / jnp.maximum(jnp.sum(batch.known), 1.0) / 2.0

        def policy_loss(policy: Params) -> tuple[jax.Array, jax.Array]:
            values, entropies = soft.expectation(policy_key, policy, critics, batch.observations)
            return -jnp.mean(values + temperature * entropies), jnp.mean(entropies)

        loss, gradient = jax.value_and_grad(critic_loss)(critics)
        critics, critic_state = descend(gradient, critic_state, critics)
        (_, entropy), gradient = jax.value_and_grad(policy_loss, has_aux=True)(policy)
        policy, policy_state = descend(gradient, policy_state, policy)
        if learn:
            gradient = jax.grad(temperature_loss)(log_temperature, entropy, soft.target_entropy)
            log_temperature, temperature_state = descend(gradient, temperature_state, log_temperature)
        value = jnp.mean(smaller(soft.value, critics, batch.observations, batch.actions))
        targets = optax.incremental_update(critics, targets, target_rate)
        optimizers = (policy_state, critic_state, temperature_state)
        info = SoftInfo(loss, value, entropy, temperature, jnp.mean(rewards), jnp.full_like(entropy, jnp.nan))
        return Learned(policy, critics, targets, log_temperature, optimizers), info

    return step


def temperature_loss(log_temperature: jax.Array, entropy: jax.Array, target_entropy: float) -> jax.Array:
    """Returns tau (H - target entropy), `[]`: its descent raises tau while the policy's entropy H is below the target."""
    return jnp.exp(log_temperature) * jax.lax.stop_gradient(entropy - target_entropy)


def check_range(gamma: float, temperature: float | None, first_temperature: float, target_rate: float) -> None:
    """Checks the numbers of `soft_actor_critic`.

    Raises:
        ValueError: naming the one that is out of range.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma:g}.")
    if not 0 < target_rate <= 1:
        raise ValueError(f"target_rate must lie in (0, 1], got {target_rate:g}.")
    first = first_temperature if temperature is None else temperature
    if not first > 0:
        raise ValueError(f"A temperature must be positive, got {first:g}.")
