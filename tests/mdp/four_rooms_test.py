"""The environment matches its description, and its hypergradients agree with each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import bilevel
from jaxrlhf.mdp import four_rooms as rooms
from jaxrlhf.mdp import incentives, tabular

REWARDS = (rooms.follower_reward, rooms.leader_reward)


def state(cell):
    return rooms.CELLS.index(cell)


def test_there_are_104_cells_and_probabilities_sum_to_one():
    environment = rooms.four_rooms()
    assert len(rooms.CELLS) == 104
    assert environment.mdp.transition.shape == (2, 104, 4, 104)
    tabular.check(environment.mdp, name="Four-Rooms")
    np.testing.assert_array_equal(environment.mdp.terminal.sum(axis=1), [1, 1])
    np.testing.assert_array_equal(environment.mdp.terminal, environment.goal)
    assert environment.mdp.start[0, state((4, 1))] == 1
    assert environment.target[0, state((8, 4))] == 1


def test_actions_succeed_slip_and_stop_at_walls():
    transition = rooms.four_rooms().mdp.transition[0]
    up, right, down, left = range(4)
    inside = transition[state((4, 3))]
    for action, cell in ((up, (3, 3)), (right, (4, 4)), (down, (5, 3)), (left, (4, 2))):
        np.testing.assert_allclose(inside[action, state(cell)], 0.56, rtol=1e-6)
        others = [inside[other, state(cell)] for other in range(4) if other != action]
        np.testing.assert_allclose(others, 0.44 / 3, rtol=1e-6)
    corner = transition[state((1, 1))]
    np.testing.assert_allclose(corner[up, state((1, 1))], 0.56 + 0.44 / 3, rtol=1e-6)
    np.testing.assert_allclose(corner[right, state((1, 1))], 2 * 0.44 / 3, rtol=1e-6)


@pytest.mark.parametrize(
    "start, end, steps", [((4, 1), (1, 9), 11), ((4, 1), (11, 11), 17), ((4, 1), (8, 4), 7), ((8, 4), (1, 9), 16)]
)
def test_short_paths(start, end, steps):
    """A shortest path to the second goal passes the target; the shortest path to the first is 12 steps shorter without."""
    moves = np.asarray(rooms.four_rooms().mdp.transition[0].sum(axis=1) > 0)
    reached, count = np.eye(104, dtype=bool)[state(start)], 0
    while not reached[state(end)]:
        reached, count = reached @ moves, count + 1
    assert count == steps


def test_charges_are_bounded_and_spare_the_goal():
    environment, upper = rooms.four_rooms(), 3.0 * rooms.draw_incentives(jax.random.key(0))
    charges = rooms.charges(upper)
    assert jnp.all(charges >= 0) and charges.sum() < 0.2
    here = jax.tree.map(lambda leaf: leaf[0], environment)
    data = jax.tree.map(lambda leaf: leaf[0], rooms.coefficients(0.003, 5.0))
    reward = rooms.follower_reward(upper, data, here)
    assert reward[state((1, 9)), 0] == 1
    np.testing.assert_allclose(reward[state((4, 1))], -charges[state((4, 1))], rtol=1e-6)
    leader = rooms.leader_reward(upper, data, here)
    assert leader[state((8, 4)), 0] == 1
    np.testing.assert_allclose(leader[state((1, 9)), 0], -5.0 * charges.sum(), rtol=1e-6)
    assert np.isnan(rooms.on_grid(charges)[0, 0]) and rooms.on_grid(charges)[4, 1] == charges[state((4, 1))]


def exact_gradient(upper, data, environment):
    return jax.jit(jax.grad(lambda upper: incentives.leader_value(*REWARDS, upper, data, environment)))(upper)


def estimates(make_rule, sigmas, upper, data, environment):
    """The gradient and the info at each sigma, which the rule reads from the step number, so that step compiles once."""
    rule = make_rule(lambda step: jnp.asarray(sigmas)[step])
    upper_loss, lower_loss = incentives.incentive_losses(*REWARDS)
    algorithm = bilevel.bilevel_descent_on_losses(
        upper_loss, lower_loss, rule, incentives.best_response(*REWARDS), optax.sgd(1.0)
    )
    state = algorithm.init(jax.random.key(0), upper, jnp.zeros((2, 104, 4)))
    step = jax.jit(algorithm.step)
    for index in range(len(sigmas)):
        indexed = state._replace(step=jnp.asarray(index, jnp.int32))
        after, info = step(jax.random.key(0), indexed, data, environment)
        yield after.upper - upper, info


def test_the_exact_gradient_against_finite_differences(x64):
    environment, data = rooms.four_rooms(), rooms.coefficients(0.001, 5.0)
    upper = rooms.draw_incentives(jax.random.key(2))
    direction = rooms.draw_incentives(jax.random.key(3))
    value = jax.jit(lambda upper: incentives.leader_value(*REWARDS, upper, data, environment))
    step = 1e-4
    near, far = (
        (value(upper + size * direction) - value(upper - size * direction)) / (2 * size) for size in (step, 2 * step)
    )
    derivative = exact_gradient(upper, data, environment) @ direction
    np.testing.assert_allclose((4 * near - far) / 3, derivative, rtol=1e-6)


def test_every_rule_follows_the_exact_gradient(x64):
    environment, data = rooms.four_rooms(), rooms.coefficients(0.003, 1.0)
    upper = rooms.draw_incentives(jax.random.key(4))
    truth = exact_gradient(upper, data, environment)
    rules = {
        "boltzmann": (lambda sigma: incentives.boltzmann(rooms.leader_reward), (1.0,), 1e-10),
        "central": (bilevel.central, (1e-2, 0.3, 0.1), 1e-5),
        "five_point": (bilevel.five_point, (0.1,), 1e-5),
        "forward": (bilevel.forward, (1e-3,), 1e-3),
    }
    estimated = {}
    for name, (make_rule, sigmas, tolerance) in rules.items():
        estimated[name] = list(estimates(make_rule, sigmas, upper, data, environment))
        gradient, info = estimated[name][0]
        assert jnp.linalg.norm(gradient - truth) < tolerance * jnp.linalg.norm(truth), name
        assert info.coupling_fraction > 0.5
        assert info.residual_over_sigma < 1e-6
    coarse, fine = (gradient for gradient, _ in estimated["central"][1:])
    ratio = jnp.linalg.norm(coarse - truth) / jnp.linalg.norm(fine - truth)
    assert 8 < ratio < 10.5  # sigma^2


def test_one_step_processes_have_the_bandits_gradient(x64):
    """Where every state is terminal the rule is (1 / b) Cov(leader's reward, gradient of the follower's)."""
    mdp = tabular.TabularMDP(jnp.ones((1, 1, 6, 1)), jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.ones(1))
    frozen = rooms.FourRooms(mdp, goal=jnp.zeros((1, 1)), target=jnp.zeros((1, 1)))
    gold = jax.random.normal(jax.random.key(0), (6,))
    follower, leader = (lambda upper, data, frozen: upper[None]), (lambda upper, data, frozen: gold[None])
    data = rooms.Coefficients(jnp.ones(1), jnp.full(1, 0.4), jnp.zeros(1))
    upper = jax.random.normal(jax.random.key(1), (6,))
    losses = incentives.incentive_losses(follower, leader)
    algorithm = bilevel.bilevel_descent_on_losses(
        *losses, incentives.boltzmann(leader), incentives.best_response(follower, leader), optax.sgd(1.0)
    )
    state = algorithm.init(jax.random.key(0), upper, jnp.zeros((1, 1, 6)))
    after, _ = jax.jit(algorithm.step)(jax.random.key(0), state, data, frozen)
    policy = jax.nn.softmax(upper / 0.4)
    np.testing.assert_allclose(after.upper - upper, policy * (gold - policy @ gold) / 0.4, rtol=1e-10)


def small_design(seed=0):
    """A process of 5 states and 2 contexts whose follower's reward is a table."""
    keys = jax.random.split(jax.random.key(seed), 4)
    mdp = tabular.TabularMDP(
        transition=jax.nn.softmax(2.0 * jax.random.normal(keys[0], (2, 5, 3, 5))),
        start=jax.nn.softmax(jax.random.normal(keys[1], (2, 5))),
        terminal=jnp.tile(jnp.arange(5) < 2, (2, 1)).astype(float),
        discount=jnp.full(2, 0.9),
    )
    frozen = rooms.FourRooms(mdp, goal=jnp.zeros((2, 5)), target=jax.random.normal(keys[2], (2, 5)))
    data = rooms.Coefficients(jnp.array([0.3, 0.7]), jnp.full(2, 0.5), jnp.zeros(2))

    def follower(upper, data, frozen):
        return upper

    def leader(upper, data, frozen):
        return frozen.target[:, None] - 0.1 * upper**2

    return follower, leader, jax.random.normal(keys[3], (5, 3)), data, frozen


@pytest.mark.slow
def test_drawn_episodes_give_the_exact_gradient_in_the_mean(x64):
    follower, leader, upper, data, frozen = small_design()
    truth = -jax.jit(jax.grad(lambda upper: incentives.leader_value(follower, leader, upper, data, frozen)))(upper)
    problem = incentives.incentive_problem(follower, leader, episodes=32, steps=40)
    solver = incentives.best_response(follower, leader)
    algorithm = bilevel.bilevel_descent(
        problem, bilevel.central(0.02), solver, optax.sgd(1.0), beta=1.0, annotate=incentives.unlabelled
    )
    state = algorithm.init(jax.random.key(0), upper, jnp.zeros((2, 5, 3)))
    # The episodes come from the policy in the state: make it the best response to this reward.
    state = state._replace(lowers=jax.jit(algorithm.step)(jax.random.key(0), state, data, frozen)[0].lowers)

    def one(key):
        after, info = algorithm.step(key, state, data, frozen)
        return upper - after.upper, info

    estimates, info = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 400))
    error = estimates.std(axis=0) / np.sqrt(400)
    # Five standard errors, the stencil's bias, and the leave-one-out correction of 1 / 32 episodes.
    assert jnp.all(jnp.abs(estimates.mean(axis=0) - truth) < 5 * error + 0.02 * jnp.linalg.norm(truth))
    assert jnp.all(info.labels == 0)
    np.testing.assert_allclose(info.ess_fraction, 1.0, atol=0.02)


@pytest.mark.slow
def test_a_network_follower_learns_the_best_response_from_episodes():
    """No planning: a network of state and context, trained by sampled gradients of J alone."""
    follower, leader, upper, data, frozen = small_design()

    def policy(lower, frozen):
        inside = jnp.tanh(jnp.eye(10) @ lower["in"])
        return jax.nn.log_softmax((inside @ lower["out"]).reshape(2, 5, 3))

    keys = jax.random.split(jax.random.key(2))
    lower = {"in": jax.random.normal(keys[0], (10, 16)), "out": 0.1 * jax.random.normal(keys[1], (16, 3))}
    problem = incentives.incentive_problem(follower, leader, episodes=64, steps=40, policy=policy)
    solver = bilevel.gradient(optax.adam(0.02), steps=2)
    algorithm = bilevel.bilevel_descent(
        problem, bilevel.decoupled(), solver, optax.sgd(0.0), beta=1.0, annotate=incentives.unlabelled
    )
    state = algorithm.init(jax.random.key(0), upper, lower)
    _, lower_loss = incentives.incentive_losses(follower, leader, policy=policy)
    loss_at = jax.jit(lambda lower: lower_loss(upper, lower, data, frozen))
    before = loss_at(lower)

    @jax.jit
    def train(state):
        keys = jax.vmap(jax.random.key)(jnp.arange(150))
        return jax.lax.scan(lambda state, key: (algorithm.step(key, state, data, frozen)[0], None), state, keys)[0]

    state = train(state)
    optimum = jax.vmap(tabular.soft_policy_iteration, (None, 0, 0))(upper, frozen.mdp, data.entropy_weight)
    best = jnp.sum(data.weight / data.entropy_weight * jnp.sum(frozen.mdp.start * optimum.value, axis=-1))
    gap, initial_gap = (loss + best for loss in (loss_at(state.policy), before))
    assert 0 <= gap < 0.05 * initial_gap


def test_the_exact_rule_needs_losses_and_a_baseline_needs_two_episodes():
    follower, leader, *_ = small_design()
    problem = incentives.incentive_problem(follower, leader, episodes=2, steps=3)
    with pytest.raises(ValueError, match="implicit_from_direction is for problems given as two losses"):
        bilevel.bilevel_descent(
            problem, incentives.boltzmann(leader), incentives.best_response(follower, leader), optax.sgd(1.0), beta=1.0
        )
    with pytest.raises(ValueError, match="at least 2 episodes"):
        incentives.incentive_problem(follower, leader, episodes=1, steps=3)
