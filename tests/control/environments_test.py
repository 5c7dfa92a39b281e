"""One contract for every adapter, on two real environments each; those of a library that is not installed are skipped."""

import functools
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.control import soft_policies
from jaxrlhf.control.adapters import jumanji_environment, navix_environment, playground_environment
from jaxrlhf.control.collection import begin, collect
from jaxrlhf.control.host import HostEnvironments
from jaxrlhf.control.soft_actor_critic import soft_actor_critic
from jaxrlhf.mdp.environments import Environment, brax_environment, check, gymnax_environment


class Case(NamedTuple):
    """A library, how one of its environments is made, and whether its actions are vectors."""

    library: str
    name: str
    make: object
    continuous: bool = False

    def environment(self):
        module = pytest.importorskip(
            self.library, reason=f"{self.library} is not installed; it is in the extra control"
        )
        return self.make(module, self.name)


def load_in_jax(module, name):
    return module.registry.load(name, config_overrides={"impl": "jax"})


CASES = [
    Case("gymnax", "CartPole-v1", lambda module, name: gymnax_environment(*module.make(name))),
    Case("gymnax", "Pendulum-v1", lambda module, name: gymnax_environment(*module.make(name)), True),
    Case("jumanji", "Snake-v1", lambda module, name: jumanji_environment(module.make(name))),
    Case("jumanji", "Maze-v0", lambda module, name: jumanji_environment(module.make(name))),
    Case("navix", "Navix-Empty-5x5-v0", lambda module, name: navix_environment(module.make(name))),
    Case("navix", "Navix-DoorKey-5x5-v0", lambda module, name: navix_environment(module.make(name))),
    Case("brax.envs", "inverted_pendulum", lambda module, name: brax_environment(module.get_environment(name)), True),
    Case("brax.envs", "reacher", lambda module, name: brax_environment(module.get_environment(name)), True),
    Case("mujoco_playground", "CartpoleBalance",
         lambda module, name: playground_environment(load_in_jax(module, name)), True),
    Case("mujoco_playground", "ReacherEasy",
         lambda module, name: playground_environment(load_in_jax(module, name)), True),
]  # fmt: skip


def random_actions(environment, key, observations):
    if not environment.continuous:
        return jax.random.randint(key, observations.shape[:-1], 0, environment.actions)
    drawn = jax.random.uniform(key, (*observations.shape[:-1], environment.actions))
    return soft_policies.to_bounds(2 * drawn - 1, environment)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.library}: {case.name}")
def test_an_adapted_environment_keeps_the_contract(case):
    with jax.numpy_rank_promotion("allow"):
        environment = case.environment()
        assert check(environment) is environment and environment.continuous == case.continuous
        if case.continuous:
            assert environment.low.shape == environment.high.shape == (environment.actions,)
            assert np.all(environment.low < environment.high) and np.all(
                np.isfinite([environment.low, environment.high])
            )

        @jax.jit
        def run(key):
            tracks = begin(key, environment, environments=2)
            act = functools.partial(random_actions, environment)
            return collect(key, environment, act, tracks, steps=24, episode_steps=10)

        (experience, tracks), (again, _) = run(jax.random.key(0)), run(jax.random.key(0))
        jax.tree.map(np.testing.assert_array_equal, experience, again)
        assert experience.observations.shape == (24, 2, environment.observation_size)
        assert all(np.all(np.isfinite(leaf)) for leaf in experience)
        ended, known = np.asarray(experience.ended) > 0, np.asarray(experience.known) > 0
        # Nothing lasts longer than the limit, and a step goes on from the one before unless the episode ended there.
        for track in range(2):
            edges = np.concatenate([[-1], np.flatnonzero(ended[:, track]), [23]])
            assert np.max(np.diff(edges)) <= 10
        goes_on = ~ended[:-1]
        following, observed = np.asarray(experience.next_observations)[:-1], np.asarray(experience.observations)[1:]
        np.testing.assert_array_equal(following[goes_on], observed[goes_on])
        assert np.all(ended[~known]) and np.all(ended >= (np.asarray(experience.terminated) > 0))
        assert np.all(np.isfinite(tracks.finished)) and np.all(tracks.clock < 10)


@pytest.mark.slow
def test_shared_physics_are_refused():
    module = pytest.importorskip(
        "mujoco_playground", reason="mujoco_playground is not installed; it is in the extra control"
    )
    with pytest.raises(ValueError, match="Balance: its parallel environments share a part of their state"):
        playground_environment(module.registry.load("CartpoleBalance", config_overrides={"impl": "warp"}))


@pytest.mark.slow
def test_a_wrapper_that_cuts_off_is_respected():
    """The EpisodeWrapper of brax ends an episode after 6 steps."""
    module = pytest.importorskip("brax.envs", reason="brax is not installed; it is in the extra control")
    wrapper = importlib.import_module("brax.envs.wrappers.training")
    limited = wrapper.EpisodeWrapper(module.get_environment("reacher"), 6, 1)
    environment = brax_environment(limited, "reacher")
    tracks = begin(jax.random.key(0), environment, environments=1)
    with jax.numpy_rank_promotion("allow"):
        experience, _ = jax.jit(
            lambda key: collect(key, environment, functools.partial(random_actions, environment), tracks, steps=13)
        )(jax.random.key(0))
    np.testing.assert_array_equal(np.flatnonzero(experience.known[:, 0] == 0), [5, 11])
    assert not np.any(experience.terminated)


def vector_of(name, count=3, mode="SameStep", **settings):
    gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed; it is in the extra control")
    return gymnasium.make_vec(
        name, count, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **settings
    )


def host_of(name, **settings):
    return HostEnvironments(vector_of(name, **settings))


@pytest.mark.parametrize("name, steps", [("CartPole-v1", 60), ("Pendulum-v1", 11), ("Acrobot-v1", 11)])
def test_a_gymnasium_environment_keeps_the_contract_on_the_host(name, steps):
    host = host_of(name, **({} if name == "CartPole-v1" else {"max_episode_steps": 5}))
    environment = host.environment
    if environment.continuous:
        soft = soft_policies.continuous(
            lambda policy, observed: (policy[None] * observed[:, :1], 0.0 * observed[:, :1]),
            lambda one, observed, actions: observed @ one, environment,
        )  # fmt: skip
        policy, critic = jnp.zeros(1), jnp.zeros(environment.observation_size)
    else:
        soft = soft_policies.discrete(
            lambda policy, observed: observed @ policy, lambda one, observed: observed @ one, environment
        )
        policy = critic = jnp.zeros((environment.observation_size, environment.actions))
    algorithm = soft_actor_critic(
        environment, soft, lambda key: critic, optimizer=optax.sgd(0.1), environments=3, batch_size=4, random_steps=0
    )
    state = algorithm.init(jax.random.key(0), (), policy)
    proposal = host.propose(jax.random.key(1), state, jax.jit(soft.act), steps=steps)
    experience = proposal.experience
    example = jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), state.replay.steps)
    assert jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), experience) == example
    ended = np.asarray(experience.ended) > 0
    assert ended.any(axis=0).all() and np.all(experience.known == 1)
    if name == "CartPole-v1":
        # The last observation of an episode is the one that lies out of bounds, not the first of the next.
        last = np.asarray(experience.next_observations)[ended]
        assert np.all((np.abs(last[:, 0]) > 2.4) | (np.abs(last[:, 2]) > 0.209)) and np.all(
            experience.terminated[ended] == 1
        )
    else:
        np.testing.assert_array_equal(np.flatnonzero(ended[:, 0]), [4, 9])
        assert not np.any(experience.terminated)
    goes_on = ~ended[:-1]
    following, observed = np.asarray(experience.next_observations)[:-1], np.asarray(experience.observations)[1:]
    np.testing.assert_array_equal(following[goes_on], observed[goes_on])
    with pytest.raises(ValueError, match=f"{name}: it steps on the host"):
        algorithm.step(jax.random.key(0), state, None, ())


def test_experience_from_the_host_trains_the_policy():
    host = host_of("CartPole-v1")
    soft = soft_policies.discrete(
        lambda policy, observed: observed @ policy, lambda one, observed: observed @ one, host.environment
    )
    algorithm = soft_actor_critic(
        host.environment, soft, lambda key: jnp.ones((4, 2)), optimizer=optax.sgd(0.1), environments=3, batch_size=4,
        random_steps=0, capacity=90,
    )  # fmt: skip
    state = algorithm.init(jax.random.key(0), (), jnp.zeros((4, 2)))
    act, update = jax.jit(soft.act), jax.jit(algorithm.update)
    for number in range(2):
        proposal = host.propose(jax.random.key(number), state, act, steps=30)
        state, info = update(jax.random.key(number), state, proposal, ())
    assert int(state.step) == 60 and int(state.replay.filled) == 30
    assert np.isfinite(info.finished) and info.critic_loss > 0
    np.testing.assert_array_equal(state.tracks.observation, host.observation)


class Wrong:
    """A jumanji-like environment with a fault."""

    def __init__(self, fault):
        self.fault = fault
        counts = np.array([2, 3]) if fault == "actions" else 2
        self.action_spec = type("Spec", (), {"num_values": counts, "shape": np.shape(counts), "dtype": np.int32})()

    def reset(self, key):
        return {"time": 0}, timestep(jnp.zeros(2))

    def step(self, state, action):
        reward = jnp.nan if self.fault == "reward" else 0.0
        return {"time": 1}, timestep(jnp.zeros(3 if self.fault == "observation" else 2), reward)


def timestep(observation, reward=0.0):
    fields = {
        "observation": observation,
        "reward": reward,
        "discount": jnp.ones(()),
        "last": lambda self: jnp.asarray(False),
    }
    return type("TimeStep", (), fields)()


def bounded(low, high):
    def reset(key):
        return jnp.zeros(1), ()

    return Environment("Box", reset, lambda key, state, action: (jnp.zeros(1), (), 0.0, False), 1, 1, True, low, high)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jumanji_environment(Wrong("actions")), "Wrong: an action is 2 integers at once"),
        (lambda: jumanji_environment(Wrong("reward")), "Wrong: the reward is not finite"),
        (
            lambda: jumanji_environment(Wrong("observation")),
            r"Wrong: the observation after a step has the shape \(3,\)",
        ),
        (lambda: check(bounded(np.ones(1), -np.ones(1))), r"Box: the bounds \[1.\] and \[-1.\] are not 1 pairs"),
        (lambda: check(bounded(np.ones(1), None)), "Box: bounds need low and high"),
        (lambda: host_of("CartPole-v1", mode="NextStep"), "CartPole-v1: it must reset in the step that ends"),
    ],
)
def test_what_breaks_the_contract_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
