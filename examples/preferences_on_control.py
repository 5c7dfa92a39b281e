"""Preferences on a control task, step by step: PEBBLE's loop from its parts (python examples/preferences_on_control.py).

A pendulum is swung up from 120 comparisons of segments; the true reward is known to the annotator only. The parts are
those that `jaxrlhf.control.pebble` assembles: exchange any of them. It takes a minute on 2 cores and needs the extra
`control`.
"""

import gymnax
import jax
import jax.numpy as jnp
import optax

from jaxrlhf.algorithms.reward_learning import reward_learning
from jaxrlhf.base.problem import Labelled
from jaxrlhf.control import ensembles, pairs, replay, soft_policies, teachers
from jaxrlhf.control.pebble import segment_problem
from jaxrlhf.control.soft_actor_critic import relabelled, soft_actor_critic
from jaxrlhf.mdp.environments import gymnax_environment
from jaxrlhf.preferences import buffer

SESSIONS, QUERIES, SEGMENT, INTERVAL, WIDTH = 12, 10, 25, 500, 64


def network(key, inputs, outputs):
    """Returns the weights of a network with two hidden layers."""
    shapes = ((inputs + 1, WIDTH), (WIDTH + 1, WIDTH), (WIDTH + 1, outputs))
    return [
        jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, shape in zip(jax.random.split(key, 3), shapes, strict=True)
    ]


def forward(weights, *inputs):
    """Returns the network's outputs `[..., outputs]`."""
    hidden = jnp.concatenate(inputs, axis=-1)
    for number, weight in enumerate(weights):
        ones = jnp.ones((*hidden.shape[:-1], 1))
        hidden = jnp.concatenate([hidden if number == 0 else jnp.tanh(hidden), ones], axis=-1) @ weight
    return hidden


def reward(member, observations, actions):
    """The learned reward of one member of the ensemble, in [-1, 1]."""
    return jnp.tanh(forward(member, observations, actions))[..., 0]


def main(sessions: int = SESSIONS, interval: int = INTERVAL) -> float:
    """Runs the loop; returns the last true return."""
    environment = gymnax_environment(*gymnax.make("Pendulum-v1"))
    soft = soft_policies.continuous(
        lambda policy, observations: jnp.split(forward(policy, observations), 2, axis=-1),
        lambda critic, observations, actions: forward(critic, observations, actions)[..., 0],
        environment,
    )
    learner = soft_actor_critic(
        environment, soft, lambda key: network(key, 4, 1), reward=relabelled(ensembles.mean_of(reward)),
        optimizer=optax.adam(1e-3), target_rate=0.01, random_steps=200, batch_size=64, capacity=20_000, episode_steps=200,
    )  # fmt: skip
    fit, annotate = reward_learning(segment_problem(reward), optax.adam(1e-3)), teachers.teacher_annotator()

    @jax.jit
    def session(key, state, members, labels):
        draw_key, choose_key, label_key, fit_key, train_key = jax.random.split(key, 5)
        candidates = replay.draw_segments(draw_key, state.replay, pairs=10 * QUERIES, steps=SEGMENT)
        wins = ensembles.win_probabilities(ensembles.of_samples(reward), members.upper, candidates)[:, 0]
        queries = buffer.take(buffer.rows(candidates), pairs.choose(choose_key, wins, QUERIES, "disagreement"))
        labels = buffer.add(labels, Labelled(queries, annotate(label_key, queries, ())))
        members, info = ensembles.fit_members(fit_key, fit, members, labels, size=32, steps=200)
        state, infos = train(train_key, state._replace(upper=members.upper), interval)
        return state, members, labels, (info.loss[:, -1].mean(), infos.finished[-1])

    def train(key, state, steps):
        keys = jax.random.split(key, steps)
        return jax.lax.scan(lambda state, key: learner.step(key, state, None, ()), state, keys)

    first_key, policy_key, member_key, random_key, key = jax.random.split(jax.random.key(0), 5)
    members = jax.vmap(fit.init)(ensembles.first_members(member_key, lambda key: network(key, 4, 1), 3))
    state = learner.init(first_key, members.upper, network(policy_key, 3, 2))
    state, _ = jax.jit(train, static_argnums=2)(random_key, state, 200)
    rows = buffer.rows(replay.draw_segments(key, state.replay, pairs=QUERIES, steps=SEGMENT))
    labels, finished = buffer.empty(rows, labels=1, capacity=sessions * QUERIES), float("nan")
    for session_key in jax.random.split(key, sessions):
        state, members, labels, (loss, finished) = session(session_key, state, members, labels)
        print(f"{int(labels.filled):4d} labels   loss {loss:.3f}   true return of the last episode {finished:8.1f}")
    return float(finished)


if __name__ == "__main__":
    main()
