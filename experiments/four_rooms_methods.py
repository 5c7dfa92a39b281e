"""The methods of the Four-Rooms study, all with the signature `(key, coefficients, environment, budget) -> Outcome`.

Ours are `bilevel_descent` with annealed restarts. The published comparators (arXiv 2406.01575) are implemented from the
paper and follow its protocol: one descent, plain gradient steps, gradients clipped at norm 1, one goal drawn per step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf import bilevel
from jaxrlhf.base.types import Key
from jaxrlhf.bilevel import Labelled
from jaxrlhf.mdp import four_rooms as rooms
from jaxrlhf.mdp import incentives, tabular

REWARDS = (rooms.follower_reward, rooms.leader_reward)
MULTIPLIERS = (0.4, 3.0)
SCALES = (0.1, 3.0)
RATE = 0.6
ANNEALED = 0.7
"""Fraction of a descent over which the entropy weight and the regulariser are annealed to their final values."""


class Budget(NamedTuple):
    """How much a run may use; the published budget is 10,000 outer steps of one solve and 10,000 environment steps each.

    Attributes:
        restarts: descents, of which the best is kept; comparators use one.
        steps: outer steps per descent.
        episodes: per goal and step, for methods that draw episodes.
        rate: the comparators' learning rate.
    """

    restarts: int
    steps: int
    episodes: int = 50
    rate: float = 0.5


class Outcome(NamedTuple):
    """The result of a run and what it used.

    Attributes:
        upper: the leader's weights.
        value: the leader's exact return, to be maximised.
        solves: best responses computed, each for both goals.
        environment_steps: environment steps drawn.
        curve: `[steps]`, the method's own estimate of the leader's return before each outer step, in the best descent.
    """

    upper: jax.Array
    value: jax.Array
    solves: jax.Array
    environment_steps: jax.Array
    curve: jax.Array


def exact_value(upper: jax.Array, coefficients: rooms.Coefficients, environment: rooms.FourRooms) -> jax.Array:
    """Returns the leader's exact return at the exact best response."""
    return incentives.leader_value(*REWARDS, upper, coefficients, environment)


def on_model(rule: bilevel.HypergradientRule):
    """Our descent with exact expectations: no environment steps, one solve per tilt and step."""
    upper_loss, lower_loss = incentives.incentive_losses(*REWARDS)
    tilts = len(rule.stencil.offsets)

    def descend(key, coefficients, environment, budget):
        optimizer = optax.adam(optax.cosine_decay_schedule(RATE, budget.steps, 0.03))
        solver = incentives.best_response(*REWARDS)
        algorithm = bilevel.bilevel_descent_on_losses(upper_loss, lower_loss, rule, solver, optimizer)

        def step(key, state, data):
            state, info = algorithm.step(key, state, data, environment)
            return state, -info.upper_loss, 0.0

        return _anneal(key, coefficients, environment, budget, algorithm.init, step)

    return _restarted(descend, tilts)


def on_episodes(rule: bilevel.HypergradientRule, *, length: int = 200):
    """Our descent from drawn episodes: the leader observes episodes and solves for the tilted best responses."""
    tilts = len(rule.stencil.offsets)

    def descend(key, coefficients, environment, budget):
        optimizer = optax.adam(optax.cosine_decay_schedule(RATE, budget.steps, 0.03))
        problem = incentives.incentive_problem(*REWARDS, episodes=budget.episodes, steps=length)
        solver = incentives.best_response(*REWARDS)
        algorithm = bilevel.bilevel_descent(problem, rule, solver, optimizer, beta=1.0)

        def step(key, state, data):
            sample_key, update_key = jax.random.split(key)
            sample = algorithm.propose(sample_key, state, data, environment)
            labelled = Labelled(sample, incentives.unlabelled(sample_key, sample, environment))
            state, info = algorithm.update(update_key, state, labelled, environment)
            return state, -info.upper_loss, jnp.sum(sample.responses.alive)

        return _anneal(key, coefficients, environment, budget, algorithm.init, step)

    return _restarted(descend, tilts)


def _anneal(key, coefficients, environment, budget, init, step):
    """One descent from random weights, with the follower's entropy weight and the regulariser annealed."""
    weight_key, multiplier_key, scale_key, key = jax.random.split(key, 4)
    multiplier = _log_uniform(multiplier_key, *MULTIPLIERS)
    upper = rooms.draw_incentives(weight_key, scale=_log_uniform(scale_key, *SCALES))
    state = init(key, upper, jnp.zeros_like(environment.mdp.transition[..., 0]))

    def outer_step(state, count):
        remaining = jnp.clip(1.0 - count / (ANNEALED * budget.steps), 0.0, 1.0)
        data = coefficients._replace(
            entropy_weight=coefficients.entropy_weight * multiplier**remaining,
            regulariser=coefficients.regulariser * (1.0 - remaining),
        )
        state, value, environment_steps = step(jax.random.fold_in(key, count), state, data)
        return state, (value, jnp.asarray(environment_steps, float))

    state, (curve, environment_steps) = jax.lax.scan(outer_step, state, jnp.arange(budget.steps))
    return state.upper, curve, jnp.sum(environment_steps)


def _restarted(descend, tilts: int):
    def run(key: Key, coefficients: rooms.Coefficients, environment: rooms.FourRooms, budget: Budget) -> Outcome:
        keys = jax.random.split(key, budget.restarts)
        uppers, curves, environment_steps = jax.vmap(lambda key: descend(key, coefficients, environment, budget))(keys)
        values = jax.vmap(lambda upper: exact_value(upper, coefficients, environment))(uppers)
        best = jnp.argmax(values)
        solves = budget.restarts * (budget.steps * tilts + 1)
        return Outcome(uppers[best], values[best], jnp.asarray(solves), jnp.sum(environment_steps), curves[best])

    return run


def _log_uniform(key: Key, low: float, high: float) -> jax.Array:
    return jnp.exp(jax.random.uniform(key, minval=jnp.log(low), maxval=jnp.log(high)))


def _published(estimate, solves_per_step: int):
    """The published protocol, for a gradient estimator.

    Args:
        estimate: `(key, upper, lower, coefficients, environment, count) -> (gradient of the leader's return, that return,
            the follower's policy, environment steps)`.
        solves_per_step: best responses that the estimator computes.
    """

    def run(key: Key, coefficients: rooms.Coefficients, environment: rooms.FourRooms, budget: Budget) -> Outcome:
        weight_key, key = jax.random.split(key)
        upper = rooms.draw_incentives(weight_key)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(budget.rate))

        def outer_step(carry, count):
            upper, lower, state = carry
            goal_key, step_key = jax.random.split(jax.random.fold_in(key, count))
            goal = jax.random.randint(goal_key, (), 0, len(rooms.GOALS))
            data = coefficients._replace(weight=jax.nn.one_hot(goal, len(rooms.GOALS)))
            gradient, value, lower, environment_steps = estimate(step_key, upper, lower, data, environment, count)
            updates, state = optimizer.update(-gradient, state, upper)
            carry = (optax.apply_updates(upper, updates), lower, state)
            return carry, (value, jnp.asarray(environment_steps, float))

        lower = jnp.full_like(environment.mdp.transition[..., 0], -jnp.log(len(rooms.MOVES)))
        carry = (upper, lower, optimizer.init(upper))
        (upper, _, _), (curve, environment_steps) = jax.lax.scan(outer_step, carry, jnp.arange(budget.steps))
        value = exact_value(upper, coefficients, environment)
        return Outcome(upper, value, jnp.asarray(budget.steps * solves_per_step), jnp.sum(environment_steps), curve)

    return run


def _best_response(upper, lower, data, environment):
    """Returns the follower's exact soft-optimal policy in every context, warm-started at `lower`."""

    def of_context(lower, data, environment):
        reward = rooms.follower_reward(upper, data, environment)
        return tabular.soft_policy_iteration(reward, environment.mdp, data.entropy_weight, start=lower).log_policy

    return jax.vmap(of_context)(lower, data, environment)


def _value_of(upper, lower, data, environment):
    upper_loss, _ = incentives.incentive_losses(*REWARDS)
    return -upper_loss(upper, lower, data, environment)


def adaptive_model_design():
    """AMD: the exact gradient from the model, by adjoints; here `incentives.boltzmann` for the drawn goal.

    Departure: the published loop makes 100 joint sweeps per step from the previous tables; this one solves exactly.
    """
    upper_loss, lower_loss = incentives.incentive_losses(*REWARDS)
    rule = incentives.boltzmann(rooms.leader_reward)

    def estimate(key, upper, lower, data, environment, count):
        del key, count
        lower = _best_response(upper, lower, data, environment)
        losses = bilevel.Losses(
            upper_loss=lambda upper, lower: upper_loss(upper, lower, data, environment),
            lower_loss=lambda upper, lower: lower_loss(upper, lower, data, environment),
            data=data,
            frozen=environment,
        )
        assert rule.surrogate is not None
        gradient = jax.grad(rule.surrogate(losses, lower[None], jnp.ones(())))(upper)
        return -gradient, _value_of(upper, lower, data, environment), lower, 0.0

    return _published(estimate, 1)


def zero_order(radius: float = 0.5):
    """The published two-point estimate `z [Phi(w + u z) - Phi(w)] / u` with u = radius / t and exact values."""

    def estimate(key, upper, lower, data, environment, count):
        direction = jax.random.normal(key, upper.shape)
        step = radius / (count + 1.0)
        lower = _best_response(upper, lower, data, environment)
        value = _value_of(upper, lower, data, environment)
        moved = upper + step * direction
        perturbed = _value_of(moved, _best_response(moved, lower, data, environment), data, environment)
        return direction * (perturbed - value) / step, value, lower, 0.0

    return _published(estimate, 2)


def hyper_policy_gradient(*, environment_steps: int = 10_000, length: int = 200, horizon: int = 50):
    """HPGD: the Boltzmann formula with every value averaged over drawn episodes of the exact follower.

    The tables of the leader's values and of the follower's reward gradients are every-visit means of discounted sums over
    the step's own episodes, as published. Departure: `environment_steps / horizon` episodes of the drawn goal instead of
    five endless streams; `horizon` is about the length of an episode.
    """
    episodes = environment_steps // horizon

    def estimate(key, upper, lower, data, environment, count):
        del count
        lower = _best_response(upper, lower, data, environment)
        goal = jnp.argmax(data.weight)
        frozen, coefficients = (jax.tree.map(lambda leaf: leaf[goal], tree) for tree in (environment, data))
        rollouts = tabular.roll_out(key, lower[goal], frozen.mdp, episodes=episodes, steps=length)

        def reward_tables(upper):
            follower, leader = (reward(upper, coefficients, frozen)[:, 0] for reward in REWARDS)
            return follower, leader

        (_, leader_table), pull_back = jax.vjp(reward_tables, upper)
        sums = _visit_sums(rollouts, leader_table, frozen.mdp.discount)
        response = sums.response / coefficients.entropy_weight
        gradient = pull_back((response, sums.direct))[0]
        return gradient, sums.value, lower, jnp.sum(rollouts.alive)

    return _published(estimate, 1)


class _VisitSums(NamedTuple):
    """What HPGD averages over episodes.

    Attributes:
        value: the leader's return, `[]`.
        direct: d return / d leader's reward, the discounted visits, `[S]`.
        response: d return / d follower's reward through the follower's policy, times the entropy weight, `[S]`.
    """

    value: jax.Array
    direct: jax.Array
    response: jax.Array


def _visit_sums(rollouts: tabular.Rollouts, leader_table: jax.Array, discount: float | jax.Array) -> _VisitSums:
    """Returns HPGD's averages over drawn episodes; `leader_table` is the leader's reward by state, `[S]`."""
    states, actions, alive = rollouts.states.T, rollouts.actions.T, rollouts.alive.T
    length, episodes = states.shape
    num_states, num_pairs = len(rooms.CELLS), len(rooms.CELLS) * len(rooms.MOVES)
    pairs = states * len(rooms.MOVES) + actions

    def backward(following, reward):
        total = reward + discount * following
        return total, total

    to_go = jax.lax.scan(backward, jnp.zeros(episodes), leader_table[states] * alive, reverse=True)[1]

    def visit_mean(values, index, size):
        total = jnp.zeros(size).at[index].add(values * alive)
        return total / jnp.maximum(jnp.zeros(size).at[index].add(alive), 1.0)

    action_values, state_values = visit_mean(to_go, pairs, num_pairs), visit_mean(to_go, states, num_states)
    powers = (discount ** jnp.arange(length))[:, None]
    advantages = (action_values[pairs] - state_values[states]) * powers * alive
    # sum_t gamma^t A_t [mean Q'(s_t, a_t) - mean V'(s_t)] with the order of summation exchanged: each visit's weight on
    # the reward gradients of the states that follow it.
    weights = visit_mean(advantages, pairs, num_pairs)[pairs] - visit_mean(advantages, states, num_states)[states]

    def forward(before, step):
        weight, alive = step
        total = (discount * before + weight) * alive
        return total, total

    visits = jax.lax.scan(forward, jnp.zeros(episodes), (weights * alive, alive))[1]
    return _VisitSums(
        value=jnp.mean(to_go[0]),
        direct=jnp.zeros(num_states).at[states].add(powers * alive) / episodes,
        response=jnp.zeros(num_states).at[states].add(visits) / episodes,
    )


METHODS = {
    "central": lambda: on_model(bilevel.central(0.05)),
    "boltzmann": lambda: on_model(incentives.boltzmann(rooms.leader_reward)),
    "central from episodes": lambda: on_episodes(bilevel.central(0.05)),
    "HPGD": hyper_policy_gradient,
    "AMD": adaptive_model_design,
    "zero-order": zero_order,
}
OURS = ("central", "boltzmann", "central from episodes")
