"""The off-policy level: experience, replay, the targets of a hand-written oracle, the soft optimum, two tasks solved."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.control import replay as experience_replay
from jaxrlhf.control import soft_policies
from jaxrlhf.control.collection import Experience, begin, collect
from jaxrlhf.control.soft_actor_critic import (
    first_learned,
    gradient_steps,
    relabelled,
    soft_actor_critic,
    temperature_loss,
)
from jaxrlhf.mdp import tabular
from jaxrlhf.mdp.environments import Environment, categorical_actor, gymnax_environment, roll_out, tabular_environment


def counter(*, ends_at=3, cut_at=None):
    """Counts the steps of its episode; a reward is the action. Like gymnax, it begins anew when it cuts an episode off."""

    def observe(state):
        return jnp.stack([state["time"], state["time"] ** 2]).astype(float)

    def reset(key):
        state = {"time": jnp.zeros((), jnp.int32), "key": key}
        return observe(state), state

    def step(key, state, action):
        time = state["time"] + 1
        terminated = time >= ends_at
        cut = jnp.zeros_like(terminated) if cut_at is None else time >= cut_at
        after = {"time": jnp.where(cut, 0, time), "key": state["key"]}
        return observe(after), after, jnp.asarray(action, float), terminated, cut

    return Environment("Counter", reset, step, actions=2, observation_size=2)


def ones(key, observations):
    return jnp.ones(observations.shape[:-1], jnp.int32)


def collected(environment, *, steps=8, environments=2, **limits):
    tracks = begin(jax.random.key(0), environment, environments=environments)
    return collect(jax.random.key(1), environment, ones, tracks, steps=steps, **limits)


@pytest.mark.parametrize(
    "environment, limits, ended, terminated, known, following",
    [
        (counter(), {}, [2, 5], [2, 5], [], [1, 2, 3, 1, 2, 3, 1, 2]),
        (counter(), {"episode_steps": 2}, [1, 3, 5, 7], [], [], [1, 2, 1, 2, 1, 2, 1, 2]),
        (counter(ends_at=9, cut_at=3), {}, [2, 5], [], [2, 5], [1, 2, 0, 1, 2, 0, 1, 2]),
    ],
    ids=["terminated", "out of the learner's time", "cut off by the environment"],
)
def test_episodes_begin_anew_and_ends_are_told_apart(environment, limits, ended, terminated, known, following):
    experience, tracks = collected(environment, **limits)
    for track in range(2):
        np.testing.assert_array_equal(np.flatnonzero(experience.ended[:, track]), ended)
        np.testing.assert_array_equal(np.flatnonzero(experience.terminated[:, track]), terminated)
        np.testing.assert_array_equal(np.flatnonzero(experience.known[:, track] == 0), known)
        np.testing.assert_array_equal(experience.next_observations[:, track, 0], following)
    np.testing.assert_array_equal(experience.observations[[end + 1 for end in ended if end < 7], :, 0], 0)
    np.testing.assert_array_equal(tracks.finished, ended[0] + 1)
    np.testing.assert_array_equal(tracks.clock, 7 - ended[-1])
    assert jax.dtypes.issubdtype(tracks.state["key"].dtype, jax.dtypes.prng_key)


def test_segments_follow_one_episode_across_the_edge_of_the_ring():
    environment = counter(ends_at=4)
    replay = experience_replay.empty(collected(environment)[0], capacity=10)
    for number in range(3):
        experience, _ = collected(environment)
        replay = experience_replay.add(
            replay, experience._replace(observations=experience.observations + 100.0 * number)
        )
    assert int(replay.filled) == 10 and int(replay.added) == 24
    sample = experience_replay.draw_segments(jax.random.key(0), replay, pairs=200, steps=3)
    observations, window = np.asarray(sample.responses.observations)[..., 0], np.asarray(sample.responses.window)
    assert observations.shape == window.shape == (1, 200, 2, 3)
    lengths = window.sum(-1)
    assert set(np.unique(lengths)) == {1, 2, 3}
    for segment, length in zip(observations.reshape(-1, 3), lengths.reshape(-1).astype(int), strict=True):
        # The ring holds the last two steps of the second batch and all of the third.
        assert segment[0] >= 200 or segment[0] in (102, 103)
        assert np.all(segment[length:] == 0) and (length == 3 or segment[length - 1] % 100 == 3)
        batch, time = divmod(segment[:length], 100)
        assert np.all(np.diff(time) == 1) and np.all(np.diff(batch) == 0)
    np.testing.assert_array_equal(sample.responses.gold, window)


def linear_critic(one, observations):
    return observations @ one


def test_targets_and_gradients_are_those_of_a_hand_written_oracle():
    draws = np.random.default_rng(0)
    policy, critics, targets = draws.normal(size=(2, 3)), draws.normal(size=(2, 2, 3)), draws.normal(size=(2, 2, 3))
    now, after, action, gold, weight = draws.normal(size=2), draws.normal(size=2), 1, 7.0, 0.6
    log_temperature, gamma, rate, target_entropy = np.log(0.3), 0.9, 0.1, 0.4

    def softmax(logits):
        return np.exp(logits) / np.exp(logits).sum()

    def objective(policy, critics):
        chance = softmax(now @ policy)
        smaller = np.minimum(now @ critics[0], now @ critics[1])
        return chance @ smaller - 0.3 * chance @ np.log(chance)

    chance = softmax(after @ policy)
    soft_value = chance @ np.minimum(after @ targets[0], after @ targets[1]) - 0.3 * chance @ np.log(chance)
    environment = counter()._replace(actions=3)
    soft = soft_policies.discrete(
        lambda policy, observations: observations @ policy, linear_critic, environment, target_entropy=target_entropy
    )
    step = gradient_steps(
        soft, relabelled(lambda upper, observations, actions: upper * observations[..., 0] + actions),
        optax.sgd(1.0), gamma=gamma, target_rate=rate, batch_size=4,
    )  # fmt: skip
    first = first_learned(
        jnp.asarray(policy), jax.random.key(0), lambda key: jnp.zeros((2, 3)), optax.sgd(1.0), temperature=0.3
    )
    for terminated, known in ((0.0, 1.0), (1.0, 1.0), (0.0, 0.0)):
        one = Experience(now, np.asarray(action), after, np.asarray(gold), *map(np.asarray, (terminated, 1.0, known)))
        stored = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None, None], one)
        replay = experience_replay.add(experience_replay.empty(stored, capacity=1), stored)
        learned = first._replace(critics=jnp.asarray(critics), targets=jnp.asarray(targets))
        moved, info = jax.jit(step)(jax.random.key(0), jnp.asarray(weight), learned, replay)
        # The reward is the learner's, from the observation and the action; the environment's is not read.
        target = weight * now[0] + action + gamma * (1 - terminated) * soft_value
        expected = critics.copy()
        for each in range(2):
            expected[each][:, action] -= known * (now @ critics[each][:, action] - target) * now
        np.testing.assert_allclose(moved.critics, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moved.targets, (1 - rate) * targets + rate * expected, rtol=1e-4, atol=1e-5)
        slope = np.zeros_like(policy)
        for index in np.ndindex(policy.shape):
            shift = np.zeros_like(policy)
            shift[index] = 1e-6
            slope[index] = (objective(policy + shift, expected) - objective(policy - shift, expected)) / 2e-6
        np.testing.assert_allclose(moved.policy, policy + slope, rtol=1e-3, atol=1e-4)
        chance_now = softmax(now @ policy)
        entropy = -chance_now @ np.log(chance_now)
        np.testing.assert_allclose(info.entropy, entropy, rtol=1e-5)
        np.testing.assert_allclose(moved.log_temperature, log_temperature - 0.3 * (entropy - target_entropy), rtol=1e-5)
    # Too little entropy raises the temperature, too much lowers it.
    assert jax.grad(temperature_loss)(0.0, 0.2, 0.5) < 0 < jax.grad(temperature_loss)(0.0, 0.8, 0.5)


def bounded(low=(-2.0, 0.0), high=(1.0, 5.0)):
    return Environment("Box", lambda key: key, lambda *step: step, 2, 3, True, np.asarray(low), np.asarray(high))


def test_squashed_actions_keep_their_bounds_and_their_density():
    actor = soft_policies.squashed_actor(lambda policy, observations: (policy[0], policy[1]), bounded())
    policy = (jnp.array([[0.5, -0.2]] * 500), jnp.array([[-0.5, 0.7]] * 500))
    actions, log_prob = actor.sample(jax.random.key(0), policy, jnp.zeros((500, 3)))
    actions = np.asarray(actions)
    assert np.all(actions >= [-2.0, 0.0]) and np.all(actions <= [1.0, 5.0])
    scaled = 2 * (actions.astype(float) - [-2.0, 0.0]) / [3.0, 5.0] - 1
    inner, deviation = np.arctanh(np.clip(scaled, -1 + 1e-7, 1 - 1e-7)), np.exp([-0.5, 0.7])
    expected = -0.5 * ((inner - [0.5, -0.2]) / deviation) ** 2 - np.log(deviation * np.sqrt(2 * np.pi))
    expected = np.sum(expected - np.log(1 - np.tanh(inner) ** 2), axis=-1)
    inside = np.all(np.abs(scaled) < 0.99, axis=-1)
    assert inside.sum() > 100
    np.testing.assert_allclose(log_prob[inside], expected[inside], atol=2e-3)
    np.testing.assert_allclose(actor.log_prob(policy, None, actions)[inside], expected[inside], atol=2e-3)


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: soft_policies.discrete(None, None, bounded()), "Box: its actions are vectors of reals"),
        (lambda: soft_policies.squashed_actor(None, counter()), "Counter: its actions are integers"),
        (
            lambda: soft_policies.squashed_actor(None, bounded()._replace(low=None)),
            "Box: its actions have no finite bounds",
        ),
        (lambda: soft_policies.squashed_actor(None, bounded(high=(1.0, np.inf))), "no finite bounds"),
        (lambda: tabular_learner(gamma=1.5), "gamma must lie in"),
        (lambda: tabular_learner(target_rate=0.0), "target_rate must lie in"),
        (lambda: tabular_learner(temperature=0.0), "temperature must be positive"),
        (lambda: tabular_learner(capacity=4, horizon=8), "replay of 4 steps is less than the 8"),
    ],
)
def test_what_is_out_of_range_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_the_gradient_of_the_smaller_value_goes_to_one_critic():
    def value(critics):
        return jnp.sum(soft_policies.smaller(lambda one, inputs: one * inputs, critics, jnp.array([1.0, -1.0, 0.0])))

    np.testing.assert_array_equal(jax.grad(value)(jnp.array([2.0, 3.0])), [1.0, -1.0])
    assert soft_policies.smaller(lambda one: one, jnp.array([3.0, 2.0])) == 2.0


def process():
    keys = jax.random.split(jax.random.key(0), 3)
    mdp = tabular.TabularMDP(
        transition=jax.nn.softmax(2.0 * jax.random.normal(keys[0], (3, 2, 3))),
        start=jnp.full(3, 1 / 3),
        terminal=(jnp.arange(3) < 1).astype(float),
        discount=jnp.asarray(0.8),
    )
    return mdp, jax.random.normal(keys[2], (3, 2))


def tabular_learner(**settings):
    environment = tabular_environment(*process())
    soft = soft_policies.discrete(lambda policy, observations: observations @ policy, linear_critic, environment)
    settings = {
        "gamma": 0.8, "temperature": 0.5, "optimizer": optax.adam(0.02), "target_rate": 0.1, "environments": 4,
        "horizon": 4, "updates": 4, "batch_size": 256, "random_steps": 8, "capacity": 8000,
    } | settings  # fmt: skip
    reward = relabelled(
        lambda upper, observations, actions: jnp.sum((observations @ upper) * jax.nn.one_hot(actions, 2), -1)
    )
    return soft_actor_critic(environment, soft, lambda key: jnp.zeros((3, 2)), reward=reward, **settings)


def test_a_tabular_policy_reaches_the_soft_optimum_and_follows_its_reward():
    mdp, gold = process()
    algorithm = tabular_learner()

    @jax.jit
    def train(key, state):
        return jax.lax.scan(lambda state, key: algorithm.step(key, state, None, ()), state, jax.random.split(key, 400))

    state = algorithm.init(jax.random.key(0), gold, jnp.zeros((3, 2)))
    # The reward is turned around half-way: all experience counts again, by the new one.
    for number, reward in enumerate((gold, -gold)):
        state, info = train(jax.random.key(number), state._replace(upper=reward))
        expected = soft_optimum(mdp, np.asarray(reward))
        np.testing.assert_allclose(jax.nn.softmax(state.policy), expected, atol=0.04)
        assert jnp.all(jnp.isfinite(info.critic_loss[4:])) and info.temperature[-1] == pytest.approx(0.5)


def soft_optimum(mdp, reward, *, temperature=0.5, gamma=0.8):
    """The optimal policy by soft value iteration in numpy."""
    value = np.zeros(3)
    goes_on = 1.0 - np.asarray(mdp.terminal)
    for _ in range(200):
        action_value = reward + gamma * goes_on[:, None] * (np.asarray(mdp.transition) @ value)
        value = temperature * np.log(np.exp(action_value / temperature).sum(axis=1))
    return np.exp((action_value - value[:, None]) / temperature)


@pytest.mark.slow
def test_seeds_train_together_as_they_do_alone():
    algorithm = tabular_learner(random_steps=0)

    def train(key):
        keys = jax.random.split(key, 4)
        state = algorithm.init(keys[0], process()[1], jnp.zeros((3, 2)))
        return jax.lax.scan(lambda state, key: algorithm.step(key, state, None, ()), state, keys[1:])[0].policy

    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(train))(keys)
    np.testing.assert_allclose(together[1], jax.jit(train)(keys[1]), rtol=1e-4, atol=1e-6)
    assert not np.allclose(together[0], together[1])


def dense(key, *sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = itertools.pairwise(sizes)
    layers = [
        (jax.random.normal(key, shape) / np.sqrt(shape[0]), jnp.zeros((1, shape[1])))
        for key, shape in zip(keys, shapes, strict=True)
    ]
    weight, bias = layers[-1]
    return [*layers[:-1], (0.01 * weight, bias)]


def forward(layers, inputs):
    flat = inputs.reshape(-1, inputs.shape[-1])
    for number, (weight, bias) in enumerate(layers):
        flat = flat @ weight + bias
        flat = jnp.tanh(flat) if number < len(layers) - 1 else flat
    return flat.reshape(*inputs.shape[:-1], -1)


@pytest.mark.slow
@pytest.mark.parametrize("name, scale, least", [("CartPole-v1", 0.1, 195.0), ("Pendulum-v1", 1.0, -200.0)])
def test_two_tasks_are_solved(name, scale, least):
    """The mean true return of 20 episodes of each of 3 policies without noise, after 15,000 steps, in one program.

    On CartPole, 8 policies of other seeds reach 200 of 200 each, where chance has 22. Targets that follow at
    0.01 a step are too slow for it: values of 10 at a discount of 0.99 have reached 5.8 after 15,000 steps, and 2 of 6
    policies end above 195.
    """
    gymnax = pytest.importorskip("gymnax", reason="needs the extra control")
    with jax.numpy_rank_promotion("allow"):
        environment = gymnax_environment(*gymnax.make(name))
        observed, actions = environment.observation_size, environment.actions
        if environment.continuous:

            def moments(policy, observations):
                return jnp.split(forward(policy, observations), 2, axis=-1)

            def value(one, observations, actions):
                return forward(one, jnp.concatenate([observations, actions], -1))[..., 0]

            soft = soft_policies.continuous(moments, value, environment)
            greedy = soft_policies.squashed_actor(
                lambda policy, observations: (moments(policy, observations)[0], jnp.asarray([-5.0])), environment
            )
            sizes = (observed + actions, 64, 64, 1), (observed, 64, 64, 2 * actions)
        else:
            soft = soft_policies.discrete(forward, forward, environment, target_entropy=0.15)
            greedy = categorical_actor(lambda policy, observations: 1e4 * forward(policy, observations))
            sizes = (observed, 64, 64, actions), (observed, 64, 64, actions)

        def scaled(upper, batch, replay):
            return scale * batch.reward

        algorithm = soft_actor_critic(
            environment, soft, lambda key: dense(key, *sizes[0]), reward=scaled,
            optimizer=optax.adam(optax.linear_schedule(1e-3, 0.0, 15_000)), target_rate=0.05, random_steps=500,
            batch_size=64, capacity=20_000, episode_steps=200,
        )  # fmt: skip

        def train(key):
            first_key, policy_key, key, last_key = jax.random.split(key, 4)
            state = algorithm.init(first_key, (), dense(policy_key, *sizes[1]))
            keys = jax.random.split(key, 15_000)
            state, _ = jax.lax.scan(lambda state, key: algorithm.step(key, state, None, ()), state, keys)
            return roll_out(last_key, greedy, state.policy, environment, episodes=20, steps=200).reward.sum(axis=1)

        returns = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 3))
    found = returns.mean(axis=1)
    assert jnp.mean(found) > least, found
