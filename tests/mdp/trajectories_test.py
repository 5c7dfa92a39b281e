"""Environments through their adapters; trajectory preferences against exact values on a tabular process."""

from typing import Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnax import wrappers
from gymnax.environments import spaces
from jax.flatten_util import ravel_pytree

from jaxrlhf import bilevel, objectives, preferences
from jaxrlhf.mdp import environments, tabular
from jaxrlhf.mdp.trajectories import FrozenPolicies, gold_score, trajectory_problem


def process():
    keys = jax.random.split(jax.random.key(0), 3)
    mdp = tabular.TabularMDP(
        transition=jax.nn.softmax(2.0 * jax.random.normal(keys[0], (4, 3, 4))),
        start=jax.nn.softmax(jax.random.normal(keys[1], (4,))),
        terminal=(jnp.arange(4) < 1).astype(float),
        discount=jnp.asarray(0.9),
    )
    gold = jax.random.normal(keys[2], (4, 3))
    return environments.tabular_environment(mdp, gold, name="Chain"), mdp, gold


TABLE = environments.categorical_actor(lambda lower, observations: observations @ lower)
UNIFORM = environments.categorical_actor(lambda frozen, observations: jnp.zeros((*observations.shape[:-1], 3)))


def table_reward(upper, observations, actions):
    return jnp.sum((observations @ upper) * jax.nn.one_hot(actions, 3), axis=-1)


class Toy:
    """An environment with gymnax's interface and an optional fault."""

    def __init__(self, fault=None):
        self.fault = fault
        self.default_params = None
        self.name = "Toy"

    def action_space(self, params):
        return type("Discrete", (), {"n": 2})

    def reset_env(self, key, params):
        return jnp.zeros(3), {"time": 0}

    def step_env(self, key, state, action, params):
        observation = jnp.zeros(2) if self.fault == "shape" else jnp.ones(3) * action
        reward = jnp.nan if self.fault == "reward" else 1.0
        ends = jnp.zeros(2, bool) if self.fault == "ends" else state["time"] >= 4
        after = {} if self.fault == "state" else {"time": state["time"] + 1}
        return observation, after, reward, ends, {}


def test_an_environment_of_gymnaxs_interface_plugs_in():
    environment = environments.gymnax_environment(Toy())
    assert (environment.actions, environment.observation_size, environment.continuous) == (2, 3, False)
    fair = environments.categorical_actor(lambda lower, observations: jnp.zeros((*observations.shape[:-1], 2)))
    drawn = environments.roll_out(jax.random.key(0), fair, (), environment, episodes=6, steps=8)
    np.testing.assert_array_equal(drawn.alive.sum(axis=1), np.full(6, 5))
    np.testing.assert_array_equal(drawn.reward.sum(axis=1), np.full(6, 5))
    assert jnp.all(drawn.observations[:, 5:] == 0) and jnp.all(drawn.actions[:, 5:] == 0)
    np.testing.assert_array_equal(drawn.observations[:, 1:5, 0], drawn.actions[:, :4])


@pytest.mark.parametrize(
    "fault, message",
    [
        ("shape", r"Toy: the observation after a step has the shape \(2,\), expected \(3,\)"),
        ("reward", "Toy: the reward is not finite"),
        ("ends", r"Toy: the end of the episode has the shape \(2,\)"),
        ("state", "Toy: the state changes its structure"),
    ],
)
def test_a_broken_environment_is_named(fault, message):
    with pytest.raises(ValueError, match=message):
        environments.gymnax_environment(Toy(fault))


class Slide:
    """An object with brax's interface: a point pushed by the action; the episode ends after three steps."""

    action_size, observation_size = 1, 2

    class State(NamedTuple):
        """The fields of brax's states that are used."""

        obs: jax.Array
        reward: jax.Array
        done: jax.Array

    def reset(self, key):
        return self.State(jnp.zeros(2), jnp.zeros(()), jnp.zeros(()))

    def step(self, state, action):
        place = state.obs + jnp.stack([action[0], 1.0])
        return self.State(place, -jnp.abs(place[0]), (place[1] >= 3).astype(float))


def test_an_object_of_braxs_interface_plugs_in():
    environment = environments.brax_environment(Slide(), "Slide")
    assert (environment.actions, environment.observation_size, environment.continuous) == (1, 2, True)
    actor = environments.gaussian_actor(
        lambda lower, observations: (jnp.full((*observations.shape[:-1], 1), lower),) * 2
    )
    lower = jnp.asarray(0.5)
    drawn = environments.roll_out(jax.random.key(0), actor, lower, environment, episodes=500, steps=5)
    np.testing.assert_array_equal(drawn.alive.sum(axis=1), np.full(500, 3))
    places = np.cumsum(drawn.actions[:, :3, 0], axis=1)
    np.testing.assert_allclose(drawn.reward[:, :3], -np.abs(places), rtol=1e-5)
    actions = np.asarray(drawn.actions[:, :3, 0])
    np.testing.assert_allclose(actions.mean(), 0.5, atol=5 * np.exp(0.5) / np.sqrt(1500))
    expected = -0.5 * ((actions - 0.5) / np.exp(0.5)) ** 2 - 0.5 - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(drawn.log_prob[:, :3], expected, atol=1e-5)
    again = actor.log_prob(lower, drawn.observations[:, :3], drawn.actions[:, :3])
    np.testing.assert_allclose(again, expected, atol=1e-5)


@pytest.mark.parametrize("name, actions, continuous", [("CartPole-v1", 2, False), ("Pendulum-v1", 1, True)])
def test_gymnax_itself(name, actions, continuous):
    environment = environments.gymnax_environment(*gymnax.make(name))
    assert (environment.actions, environment.continuous) == (actions, continuous)
    if continuous:
        actor = environments.gaussian_actor(lambda lower, observations: (jnp.zeros((*observations.shape[:-1], 1)),) * 2)
    else:
        actor = environments.categorical_actor(lambda lower, observations: jnp.zeros((*observations.shape[:-1], 2)))
    drawn = jax.jit(lambda key: environments.roll_out(key, actor, (), environment, episodes=200, steps=100))(
        jax.random.key(0)
    )
    lengths = drawn.alive.sum(axis=1)
    if continuous:
        assert jnp.all(lengths == 100) and jnp.all(drawn.reward < 0)
    else:
        assert 18 < lengths.mean() < 27  # a random policy balances the pole for 22 steps on average
        np.testing.assert_array_equal(drawn.reward.sum(axis=1), lengths)


class Passing:
    """A wrapper as others write them: names that it does not define are those of the environment inside."""

    def __init__(self, inside):
        self._inside = inside

    def __getattr__(self, name):
        return getattr(self._inside, name)


class Doubled(Passing):
    def step(self, key, state, action, params=None):
        observation, state, reward, *rest = self._inside.step(key, state, action, params)
        return observation, state, 2.0 * reward, *rest


class DoubledInside(Passing):
    def step_env(self, key, state, action, params):
        observation, state, reward, *rest = self._inside.step_env(key, state, action, params)
        return observation, state, 2.0 * reward, *rest


class Named(Passing):
    """Observations as a tree."""

    def __init__(self, inside, tree):
        super().__init__(inside)
        self._tree = tree

    def reset(self, key, params=None):
        observation, state = self._inside.reset(key, params)
        return self._tree(observation), state

    def step(self, key, state, action, params=None):
        observation, *rest = self._inside.step(key, state, action, params)
        return self._tree(observation), *rest


def cart_pole(wrap=lambda inside: inside, **limits):
    inside, parameters = gymnax.make("CartPole-v1")
    return environments.gymnax_environment(wrap(inside), parameters.replace(**limits) if limits else parameters)


def draw(environment, steps=30):
    fair = environments.categorical_actor(lambda lower, observations: jnp.zeros((*observations.shape[:-1], 2)))
    return jax.jit(lambda key: environments.roll_out(key, fair, (), environment, episodes=8, steps=steps))(
        jax.random.key(0)
    )


@pytest.mark.parametrize(
    ("wrap", "size", "scale"),
    [
        (wrappers.LogWrapper, 4, 1),
        (wrappers.FlattenObservationWrapper, 4, 1),
        (wrappers.LegacyStepAPIWrapper, 4, 1),
        (Doubled, 4, 2),
        (DoubledInside, 4, 2),
        (lambda inside: Doubled(wrappers.LogWrapper(Doubled(inside))), 4, 4),
        (
            lambda inside: Named(
                inside, lambda seen: {"place": seen[:2], "turn": {"angle": seen[2], "speed": seen[3]}}
            ),
            4,
            1,
        ),
        (lambda inside: Named(inside, lambda seen: (seen[:1], seen[1:].reshape(3, 1))), 4, 1),
        (lambda inside: Named(inside, lambda seen: [seen, jnp.arange(2)]), 6, 1),
    ],
)
def test_wrappers_and_trees_of_observations_are_used_as_they_are(wrap, size, scale):
    environment = cart_pole(wrap)
    plain, wrapped = draw(cart_pole()), draw(environment)
    assert environment.observation_size == size
    np.testing.assert_array_equal(wrapped.reward, scale * plain.reward)
    np.testing.assert_array_equal(wrapped.alive, plain.alive)
    np.testing.assert_allclose(wrapped.observations[..., :4], plain.observations, atol=1e-6)


def test_sticky_actions_stick():
    environment = cart_pole(lambda inside: wrappers.StickyActionWrapper(inside, 1.0))
    _, state = environment.reset(jax.random.key(0))
    left, right = (environment.step(jax.random.key(1), state, jnp.asarray(action))[0] for action in (0, 1))
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("wrap", [lambda inside: inside, wrappers.LogWrapper, wrappers.LegacyStepAPIWrapper])
def test_a_time_limit_truncates_and_a_fall_terminates(wrap):
    short, long = draw(cart_pole(wrap, max_steps_in_episode=5)), draw(cart_pole(wrap), steps=100)
    np.testing.assert_array_equal(short.alive.sum(axis=1), np.full(8, 5))
    assert jnp.all(short.terminated == 0) and jnp.all(short.observations[:, 5:] == 0)
    # The pole falls before the limit of 500 steps; the last living step is the one that terminated.
    np.testing.assert_array_equal(long.terminated.sum(axis=1), np.ones(8))
    np.testing.assert_array_equal(long.terminated.argmax(axis=1) + 1, long.alive.sum(axis=1))


class Spaces(Toy):
    def __init__(self, space):
        super().__init__()
        self._space = space

    def action_space(self, params):
        return self._space

    def step_env(self, key, state, action, params):
        return jnp.ones(3), {"time": state["time"] + 1}, jnp.sum(action) * 0 + action.shape[0], jnp.zeros((), bool), {}


def test_actions_have_the_shape_of_their_space():
    environment = environments.gymnax_environment(Spaces(spaces.Box(-1.0, 1.0, (2, 3))))
    assert (environment.actions, environment.continuous) == (6, True)
    assert environment.step(jax.random.key(0), {"time": 0}, jnp.zeros(6))[2] == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: environments.gymnax_environment(Spaces(spaces.Dict({"a": spaces.Discrete(2)}))),
            "space Dict are neither",
        ),
        (lambda: environments.gymnax_environment(Named(Toy(), dict)), "Toy: "),
        (lambda: cart_pole(lambda inside: Named(inside, lambda seen: ())), "its observation holds no array"),
        (lambda: cart_pole(wrappers.GymnaxToDmEnvWrapper), "its reset returns TimeStep in place of"),
        (lambda: environments.gymnax_environment(gymnax), "needs the functions reset and step"),
        (
            lambda: environments.brax_environment(Limited(obs="privileged")),
            "privileged_state, which a policy may not see",
        ),
        (lambda: environments.brax_environment(Limited(batch=3)), "brax: the reward has the shape"),
    ],
)
def test_what_is_no_environment_here_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


class Limited:
    """An object with brax's interface, wrapped as its trainers do: cut off after four steps, and reset at each end."""

    action_size = 1

    class State(NamedTuple):
        """The fields of brax's states that are used."""

        obs: Any
        reward: jax.Array
        done: jax.Array
        info: dict

    def __init__(self, obs="array", batch=None):
        self._obs, self._shape = obs, () if batch is None else (batch,)

    def _state(self, place, steps, reward, done, truncation):
        kinds = {"array": place[None], "dict": {"state": place, "more": jnp.ones(2)}}
        kinds |= {"privileged": {"state": place, "privileged_state": place}}
        scalars = (jnp.full(self._shape, value, float) for value in (reward, done))
        return self.State(kinds[self._obs], *scalars, {"steps": steps, "place": place, "truncation": truncation})

    def reset(self, key):
        return self._state(jnp.zeros(()), jnp.zeros(()), 0.0, 0.0, jnp.zeros(()))

    def step(self, state, action):
        place, steps = state.info["place"] + action[0], state.info["steps"] + 1
        fell = (jnp.abs(place) > 1.0).astype(float)
        done = jnp.where(steps >= 4, 1.0, fell)
        # As after brax's automatic reset.
        place, steps = jnp.where(done > 0, 0.0, place), jnp.where(done > 0, 0.0, steps)
        return self._state(place, steps, 1.0, done, jnp.where(state.info["steps"] + 1 >= 4, 1 - fell, 0.0))


@pytest.mark.parametrize(("obs", "size"), [("array", 1), ("dict", 3)])
def test_braxs_truncation_and_automatic_reset(obs, size):
    environment = environments.brax_environment(Limited(obs))
    assert environment.observation_size == size
    still, pushed = (
        environments.roll_out(
            jax.random.key(0),
            environments.gaussian_actor(lambda mean, seen: (jnp.full((*seen.shape[:-1], 1), mean), jnp.full((), -9.0))),
            mean,
            environment,
            episodes=4,
            steps=9,
        )
        for mean in (0.0, 0.6)
    )
    np.testing.assert_array_equal(still.alive.sum(axis=1), np.full(4, 4))
    assert jnp.all(still.terminated == 0)
    np.testing.assert_array_equal(pushed.alive.sum(axis=1), np.full(4, 2))
    np.testing.assert_array_equal(pushed.terminated[:, 1], np.ones(4))


def test_rollouts_of_a_tabular_process_follow_it():
    environment, mdp, gold = process()
    lower = jax.random.normal(jax.random.key(4), (4, 3))
    drawn = jax.jit(lambda key: environments.roll_out(key, TABLE, lower, environment, episodes=4000, steps=60))(
        jax.random.key(1)
    )
    log_policy = jax.nn.log_softmax(lower)
    value = mdp.start @ tabular.policy_value(gold, log_policy, mdp)
    returns = np.sum(np.asarray(drawn.reward) * 0.9 ** np.arange(60), axis=1)
    assert abs(returns.mean() - value) < 5 * returns.std() / np.sqrt(4000)
    again = TABLE.log_prob(lower, drawn.observations, drawn.actions) * drawn.alive
    np.testing.assert_allclose(drawn.log_prob, again, atol=1e-5)


def problem_of(objective, **settings):
    environment, mdp, gold = process()
    settings = {"reference": UNIFORM, "pairs": 64, "steps": 40, "gamma": 0.9} | settings
    return trajectory_problem(environment, TABLE, table_reward, objective, **settings), mdp, gold


def test_whole_episodes_are_compared_by_their_returns():
    problem, *_ = problem_of(objectives.likelihood())
    lower = jax.random.normal(jax.random.key(4), (4, 3))
    sample = jax.jit(problem.sample)(jax.random.key(0), lower, None, FrozenPolicies())
    assert sample.behaviour_log_prob.shape == (1, 64, 2, 40)
    expected = np.sum(sample.cumulative_discount * sample.responses.gold, axis=-1)
    np.testing.assert_allclose(gold_score(sample, FrozenPolicies()), expected, rtol=1e-5)
    alive = np.asarray(sample.cumulative_discount > 0)
    np.testing.assert_allclose(sample.reference_log_prob, np.where(alive, -np.log(3), 0.0), rtol=1e-5)
    np.testing.assert_allclose(
        problem.log_prob(lower, sample, FrozenPolicies())[:, :, 0], sample.behaviour_log_prob[:, :, 0], atol=1e-5
    )


def test_an_opponent_plays_by_its_own_parameters():
    problem, *_ = problem_of(objectives.utility(kl_price=0.1), against="opponent")
    lower, opponent = jax.random.normal(jax.random.key(4), (2, 4, 3))
    sample = jax.jit(problem.sample)(jax.random.key(0), lower, None, FrozenPolicies(opponent=opponent))
    np.testing.assert_array_equal(sample.from_policy, [1.0, 0.0])
    for slot, parameters in enumerate((lower, opponent)):
        np.testing.assert_allclose(
            problem.log_prob(parameters, sample, FrozenPolicies())[:, :, slot],
            sample.behaviour_log_prob[:, :, slot],
            atol=1e-5,
        )
    assert jnp.any(
        jnp.abs(problem.log_prob(lower, sample, FrozenPolicies()) - sample.behaviour_log_prob)[:, :, 1] > 0.1
    )


@pytest.mark.parametrize("segment", [1, 5, 40])
def test_segments_lie_within_their_episodes(segment):
    problem, *_ = problem_of(objectives.likelihood(), segment=segment, against="policy")
    sample = jax.jit(problem.sample)(jax.random.key(0), jnp.zeros((4, 3)), None, FrozenPolicies())
    lengths = np.sum(sample.cumulative_discount > 0, axis=-1)
    inside = np.asarray(sample.responses.window > 0)
    np.testing.assert_array_equal(inside.sum(axis=-1), np.minimum(lengths, segment))
    assert not np.any(inside & (np.asarray(sample.cumulative_discount) == 0))
    for window in np.asarray(sample.responses.window).reshape(-1, 40)[:50]:
        weights = window[window > 0]
        np.testing.assert_allclose(weights, 0.9 ** np.arange(len(weights)), rtol=1e-5)
        places = np.flatnonzero(window)
        assert np.all(np.diff(places) == 1)
    if segment == 5:
        starts = inside.argmax(axis=-1)[lengths > 5]
        assert len(np.unique(starts)) > 5


@pytest.mark.slow
def test_the_stencils_gradient_is_that_of_two_exact_tilts(x64):
    """With fixed lower iterates the estimate is sum_i c_i grad_phi [s_i G - J](phi, lambda_i) in the mean."""
    problem, mdp, _ = problem_of(objectives.utility(kl_price=0.0), pairs=256)
    upper = jax.random.normal(jax.random.key(5), (4, 3))
    lower = jax.random.normal(jax.random.key(6), (4, 3))
    sigma, beta = 0.1, 0.5
    tilts = jnp.array([0.0, sigma, -sigma])
    lowers = lower[None] + tilts[:, None, None] * jax.random.normal(jax.random.key(7), (4, 3))[None]
    keep_lowers = bilevel.LowerSolver(lambda lowers: (), lambda key, lowers, state, task: (lowers, state, jnp.zeros(3)))
    annotate = preferences.gold_annotator(gold_score)
    algorithm = bilevel.bilevel_descent(
        problem, bilevel.central(sigma / beta), keep_lowers, optax.sgd(1.0), beta=beta, annotate=annotate
    )
    state = algorithm.init(jax.random.key(0), upper, lower)._replace(lowers=lowers)

    def one(key):
        return upper - algorithm.step(key, state, None, FrozenPolicies())[0].upper

    drawn = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(8), 150))
    # The utility does not depend on the reward: grad_phi h = -grad_phi J, the occupancies.
    occupancies = [
        tabular.occupancy(jax.nn.log_softmax(each), mdp)[:, None] * jax.nn.softmax(each)
        for each in (lowers[1], lowers[2])
    ]
    truth = -(occupancies[0] - occupancies[1]) / (2 * sigma)
    error = drawn.std(axis=0) / np.sqrt(150)
    # Episodes are truncated at 40 steps.
    assert jnp.all(jnp.abs(drawn.mean(axis=0) - truth) < 5 * error + 0.02 * jnp.linalg.norm(truth))
    assert float(ravel_pytree(truth)[0] @ ravel_pytree(drawn.mean(axis=0))[0]) > 0


def test_numbers_out_of_range_are_refused():
    for settings, message in (
        ({"segment": 41}, "A segment has 1 to 40 steps"),
        ({"gamma": 1.5}, "gamma must lie"),
        ({"pairs": 0}, "at least 1 pair"),
        ({"against": "policy"}, "policy-reference pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            problem_of(objectives.utility(kl_price=0.1), **settings)
