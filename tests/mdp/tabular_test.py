"""Exact solutions of tabular processes against value iteration, series, finite differences and drawn episodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.mdp import tabular


def random_mdp(seed=0, states=5, actions=3, discount=0.9, num_terminal=1):
    transition_key, start_key = jax.random.split(jax.random.key(seed))
    return tabular.TabularMDP(
        transition=jax.nn.softmax(2.0 * jax.random.normal(transition_key, (states, actions, states))),
        start=jax.nn.softmax(jax.random.normal(start_key, (states,))),
        terminal=(jnp.arange(states) < num_terminal).astype(float),
        discount=jnp.asarray(discount),
    )


def random_tables(seed=1, states=5, actions=3):
    reward_key, policy_key = jax.random.split(jax.random.key(seed))
    reward = jax.random.normal(reward_key, (states, actions))
    return reward, jax.nn.log_softmax(jax.random.normal(policy_key, (states, actions)))


@pytest.mark.parametrize("entropy_weight", [1.0, 0.05])
@pytest.mark.parametrize("num_terminal", [0, 2])
def test_policy_iteration_agrees_with_value_iteration(x64, entropy_weight, num_terminal):
    mdp, (reward, start) = random_mdp(num_terminal=num_terminal), random_tables()
    slow = tabular.soft_value_iteration(reward, mdp, entropy_weight, sweeps=400)
    for initial in (None, start):
        fast = tabular.soft_policy_iteration(reward, mdp, entropy_weight, start=initial)
        np.testing.assert_allclose(fast.value, slow.value, atol=1e-11)
        np.testing.assert_allclose(fast.log_policy, slow.log_policy, atol=1e-9)
    np.testing.assert_allclose(
        tabular.soft_policy_value(reward, fast.log_policy, mdp, entropy_weight), fast.value, atol=1e-11
    )


def test_single_precision_is_accurate():
    mdp, (reward, _) = random_mdp(), random_tables()
    single = tabular.soft_policy_iteration(reward, mdp, 0.05)
    assert single.value.dtype == jnp.float32
    np.testing.assert_allclose(single.value, tabular.soft_value_iteration(reward, mdp, 0.05).value, atol=1e-5)


def test_values_and_occupancies_are_sums_over_time(x64):
    mdp, (reward, log_policy) = random_mdp(), random_tables()
    policy = np.exp(log_policy)
    alive, occupancy = np.asarray(mdp.start), np.zeros(5)
    for step in range(600):
        occupancy += float(mdp.discount) ** step * alive
        alive = np.einsum("s,sa,sat->t", alive * (1 - mdp.terminal), policy, mdp.transition)
    np.testing.assert_allclose(tabular.occupancy(log_policy, mdp), occupancy, atol=1e-12)
    value = tabular.policy_value(reward, log_policy, mdp)
    np.testing.assert_allclose(mdp.start @ value, occupancy @ np.sum(policy * reward, axis=-1), atol=1e-12)
    endless = mdp._replace(terminal=jnp.zeros(5))
    np.testing.assert_allclose(tabular.occupancy(log_policy, endless).sum(), 1 / (1 - 0.9), atol=1e-11)
    advantages = tabular.advantage(reward, log_policy, mdp)
    np.testing.assert_allclose(np.sum(policy * advantages, axis=-1), 0.0, atol=1e-12)


@pytest.mark.slow
def test_derivatives_go_through_the_fixed_point(x64):
    """First and second derivatives of a function of the optimal policy, against finite differences and the envelope."""
    mdp, (reward, other_reward) = random_mdp(), random_tables()

    @jax.jit
    def value(reward, entropy_weight=0.3):
        policy = tabular.soft_policy_iteration(reward, mdp, entropy_weight).log_policy
        return mdp.start @ tabular.policy_value(other_reward, policy, mdp)

    step, direction = 1e-4, random_tables(seed=7)[0]
    derivative = jax.jvp(value, (reward,), (direction,))[1]
    gradient = jax.jit(jax.grad(value))
    np.testing.assert_allclose(jnp.vdot(gradient(reward), direction), derivative, rtol=1e-10)
    numeric = (value(reward + step * direction) - value(reward - step * direction)) / (2 * step)
    np.testing.assert_allclose(numeric, derivative, rtol=1e-6)
    second = jax.jvp(gradient, (reward,), (direction,))[1]
    numeric = (gradient(reward + step * direction) - gradient(reward - step * direction)) / (2 * step)
    np.testing.assert_allclose(second, numeric, atol=1e-6)
    numeric = (value(reward, 0.3 + step) - value(reward, 0.3 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(value, argnums=1)(reward, 0.3), numeric, rtol=1e-6)

    optimum = tabular.soft_policy_iteration(reward, mdp, 0.3)
    occupancy = tabular.occupancy(optimum.log_policy, mdp)[:, None] * jnp.exp(optimum.log_policy)
    envelope = jax.grad(lambda reward: mdp.start @ tabular.soft_policy_iteration(reward, mdp, 0.3).value)(reward)
    np.testing.assert_allclose(envelope, occupancy, atol=1e-10)


def test_batched_solves_do_not_deadlock():
    """Batched factorisations within a program have deadlocked on CPUs of few cores."""
    reward, _ = random_tables(states=104, actions=4)
    mdp = random_mdp(states=104, actions=4)
    solve = jax.jit(jax.vmap(lambda scale: tabular.soft_policy_iteration(scale * reward, mdp, 0.1).value))
    scales = jnp.linspace(0.1, 1.0, 8)
    first = solve(scales)
    for _ in range(20):
        np.testing.assert_array_equal(solve(scales), first)


def test_episodes_follow_the_occupancy():
    mdp, (_, log_policy) = random_mdp(), random_tables()
    episodes, steps = 4000, 60
    drawn = jax.jit(lambda key: tabular.roll_out(key, log_policy, mdp, episodes=episodes, steps=steps))(
        jax.random.key(0)
    )
    powers = 0.9 ** np.arange(steps) * np.asarray(drawn.alive)
    visits = np.stack([np.sum(powers * (drawn.states == state), axis=1) for state in range(5)], axis=1)
    error = visits.std(axis=0) / np.sqrt(episodes)
    # Five standard errors, and the truncation after the last step.
    assert np.all(np.abs(visits.mean(axis=0) - tabular.occupancy(log_policy, mdp)) < 5 * error + 0.9**steps / 0.1)
    assert drawn.actions.max() == 2 and drawn.states.max() == 4
    ended = np.asarray(drawn.states[:, :-1] == 0) & (drawn.alive[:, :-1] == 1)
    np.testing.assert_array_equal(drawn.alive[:, 1:][ended], 0)
    assert np.all(np.diff(drawn.alive, axis=1) <= 0)
    expected = np.asarray(log_policy)[drawn.states, drawn.actions] * drawn.alive
    np.testing.assert_allclose(drawn.log_prob, expected, rtol=1e-6)


def test_invalid_processes_are_refused():
    mdp, (reward, _) = random_mdp(), random_tables()
    tabular.check(mdp)
    tabular.check(jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), mdp))
    for change, message in (
        ({"transition": mdp.transition * 0.5}, "Maze: transition is no probability"),
        ({"transition": mdp.transition.at[0, 0, 0].set(jnp.nan)}, "Maze: transition holds values that are not finite"),
        ({"start": jnp.ones(4) / 4}, r"Maze: start has the shape \(4,\)"),
        ({"terminal": jnp.zeros((5, 1))}, "Maze: terminal has the shape"),
        ({"discount": jnp.asarray(1.5)}, "Maze: discount must lie in"),
        ({"discount": jnp.asarray(1.0), "terminal": jnp.zeros(5)}, "Maze: discount is 1 and an episode may never end"),
    ):
        with pytest.raises(ValueError, match=message):
            tabular.check(mdp._replace(**change), name="Maze")
    tabular.check(mdp._replace(discount=jnp.asarray(1.0)), name="Maze")
    tabular.check_reward(reward, mdp)
    with pytest.raises(ValueError, match=r"Maze: reward is not finite at \[2, 1\]"):
        tabular.check_reward(reward.at[2, 1].set(jnp.inf), mdp, name="Maze")
    with pytest.raises(ValueError, match="Maze: reward has the shape"):
        tabular.check_reward(reward[:, :2], mdp, name="Maze")
