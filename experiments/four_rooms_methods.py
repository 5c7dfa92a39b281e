"""The methods of the Four-Rooms study, all on one signature: `(key, terms, rooms, budget) -> Outcome`.

Ours run through `bilevel_descent` with annealed restarts; the published comparators (arXiv 2406.01575) are written from
their paper and keep its protocol: one descent, plain gradient steps, gradients clipped at norm 1, one goal drawn a step.
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
"""Share of a descent in which the entropy's weight and the regulariser move to their own values."""


class Budget(NamedTuple):
    """How much a run may use; the published budget is 10,000 steps of one solve and 10,000 environment steps.

    Attributes:
        restarts: descents, of which the best is kept; comparators make one.
        steps: outer steps a descent.
        episodes: a goal and step, of methods that draw.
        rate: of the comparators' gradient steps.
    """

    restarts: int
    steps: int
    episodes: int = 50
    rate: float = 0.5


class Outcome(NamedTuple):
    """What a run reached and used.

    Attributes:
        upper: the leader's weights.
        value: the leader's exact return, to be maximised.
        solves: best responses computed, each for both goals.
        environment_steps: drawn.
        curve: `[steps]`, the leader's return before each outer step, of the descent that was kept, as the method saw it.
    """

    upper: jax.Array
    value: jax.Array
    solves: jax.Array
    environment_steps: jax.Array
    curve: jax.Array


def exact_value(upper: jax.Array, terms: rooms.Terms, environment: rooms.FourRooms) -> jax.Array:
    """Returns the leader's exact return at the exact best response."""
    return incentives.leader_value(*REWARDS, upper, terms, environment)


def on_model(rule: bilevel.HypergradientRule):
    """Our descent with exact expectations: no environment steps, one solve a tilt and step."""
    upper_loss, lower_loss = incentives.incentive_losses(*REWARDS)
    tilts = len(rule.stencil.offsets)

    def descend(key, terms, environment, budget):
        optimizer = optax.adam(optax.cosine_decay_schedule(RATE, budget.steps, 0.03))
        solver = incentives.best_response(*REWARDS)
        algorithm = bilevel.bilevel_descent_on_losses(upper_loss, lower_loss, rule, solver, optimizer)

        def step(key, state, data):
            state, info = algorithm.step(key, state, data, environment)
            return state, -info.upper_loss, 0.0

        return _anneal(key, terms, environment, budget, algorithm.init, step)

    return _restarted(descend, tilts)


def on_episodes(rule: bilevel.HypergradientRule, *, length: int = 200):
    """Our descent from drawn episodes: the leader sees where the follower went, and solves for its tilted answers."""
    tilts = len(rule.stencil.offsets)

    def descend(key, terms, environment, budget):
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

        return _anneal(key, terms, environment, budget, algorithm.init, step)

    return _restarted(descend, tilts)


def _anneal(key, terms, environment, budget, init, step):
    """One descent from random weights, the follower's entropy and the regulariser annealed to their own values."""
    weight_key, multiplier_key, scale_key, key = jax.random.split(key, 4)
    multiplier = _log_uniform(multiplier_key, *MULTIPLIERS)
    upper = rooms.draw_incentives(weight_key, scale=_log_uniform(scale_key, *SCALES))
    state = init(key, upper, jnp.zeros_like(environment.mdp.transition[..., 0]))

    def one(state, count):
        left = jnp.clip(1.0 - count / (ANNEALED * budget.steps), 0.0, 1.0)
        data = terms._replace(
            entropy_weight=terms.entropy_weight * multiplier**left, regulariser=terms.regulariser * (1.0 - left)
        )
        state, seen, drawn = step(jax.random.fold_in(key, count), state, data)
        return state, (seen, jnp.asarray(drawn, float))

    state, (curve, drawn) = jax.lax.scan(one, state, jnp.arange(budget.steps))
    return state.upper, curve, jnp.sum(drawn)


def _restarted(descend, tilts: int):
    def run(key: Key, terms: rooms.Terms, environment: rooms.FourRooms, budget: Budget) -> Outcome:
        keys = jax.random.split(key, budget.restarts)
        uppers, curves, drawn = jax.vmap(lambda key: descend(key, terms, environment, budget))(keys)
        values = jax.vmap(lambda upper: exact_value(upper, terms, environment))(uppers)
        best = jnp.argmax(values)
        solves = budget.restarts * (budget.steps * tilts + 1)
        return Outcome(uppers[best], values[best], jnp.asarray(solves), jnp.sum(drawn), curves[best])

    return run


def _log_uniform(key: Key, low: float, high: float) -> jax.Array:
    return jnp.exp(jax.random.uniform(key, minval=jnp.log(low), maxval=jnp.log(high)))


def _published(estimate, solves_a_step: int):
    """The published protocol around an estimator `(key, upper, lower, terms, environment, count)`.

    It returns `(gradient of the leader's return, that return, the follower's policy, environment steps)`.
    """

    def run(key: Key, terms: rooms.Terms, environment: rooms.FourRooms, budget: Budget) -> Outcome:
        weight_key, key = jax.random.split(key)
        upper = rooms.draw_incentives(weight_key)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(budget.rate))

        def one(carry, count):
            upper, lower, state = carry
            goal_key, step_key = jax.random.split(jax.random.fold_in(key, count))
            goal = jax.random.randint(goal_key, (), 0, len(rooms.GOALS))
            data = terms._replace(weight=jax.nn.one_hot(goal, len(rooms.GOALS)))
            gradient, seen, lower, drawn = estimate(step_key, upper, lower, data, environment, count)
            move, state = optimizer.update(-gradient, state, upper)
            return (optax.apply_updates(upper, move), lower, state), (seen, jnp.asarray(drawn, float))

        lower = jnp.full_like(environment.mdp.transition[..., 0], -jnp.log(len(rooms.MOVES)))
        carry = (upper, lower, optimizer.init(upper))
        (upper, _, _), (curve, drawn) = jax.lax.scan(one, carry, jnp.arange(budget.steps))
        value = exact_value(upper, terms, environment)
        return Outcome(upper, value, jnp.asarray(budget.steps * solves_a_step), jnp.sum(drawn), curve)

    return run


def _answer(upper, lower, data, environment):
    """Returns the follower's exact soft optimum in every context, from the policy `lower`."""

    def of_context(lower, data, environment):
        reward = rooms.follower_reward(upper, data, environment)
        return tabular.soft_policy_iteration(reward, environment.mdp, data.entropy_weight, start=lower).log_policy

    return jax.vmap(of_context)(lower, data, environment)


def _value_of(upper, lower, data, environment):
    upper_loss, _ = incentives.incentive_losses(*REWARDS)
    return -upper_loss(upper, lower, data, environment)


def adaptive_model_design():
    """AMD: the exact gradient from the model, by adjoints; here `incentives.boltzmann` for the drawn goal.

    Departure: the published loop makes 100 joint sweeps a step from carried tables, this one solves.
    """
    upper_loss, lower_loss = incentives.incentive_losses(*REWARDS)
    rule = incentives.boltzmann(rooms.leader_reward)

    def estimate(key, upper, lower, data, environment, count):
        del key, count
        lower = _answer(upper, lower, data, environment)
        losses = bilevel.Losses(
            upper=lambda upper, lower: upper_loss(upper, lower, data, environment),
            lower=lambda upper, lower: lower_loss(upper, lower, data, environment),
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
        lower = _answer(upper, lower, data, environment)
        value = _value_of(upper, lower, data, environment)
        moved = upper + step * direction
        perturbed = _value_of(moved, _answer(moved, lower, data, environment), data, environment)
        return direction * (perturbed - value) / step, value, lower, 0.0

    return _published(estimate, 2)


def hyper_policy_gradient(*, environment_steps: int = 10_000, length: int = 200, horizon: int = 50):
    """HPGD: the Boltzmann formula with every value averaged from drawn episodes of the exact follower.

    Tables of the leader's values and of the follower's reward gradients are every-visit means of discounted sums over the
    step's own episodes, as published. Departure: `environment_steps / horizon` episodes of the drawn goal in place of five
    endless streams; horizon is about the length of an episode.
    """
    episodes = environment_steps // horizon
    cells = len(rooms.CELLS)

    def estimate(key, upper, lower, data, environment, count):
        del count
        lower = _answer(upper, lower, data, environment)
        goal = jnp.argmax(data.weight)
        here = jax.tree.map(lambda leaf: leaf[goal], environment)
        terms = jax.tree.map(lambda leaf: leaf[goal], data)
        mdp, log_policy = here.mdp, lower[goal]
        drawn = tabular.roll_out(key, log_policy, mdp, episodes=episodes, steps=length)
        states, alive = drawn.states.T, drawn.alive.T
        pairs = states * len(rooms.MOVES) + drawn.actions.T
        gains = rooms.leader_reward(upper, terms, here)[:, 0][states] * alive

        def backward(following, now):
            total = now + mdp.discount * following
            return total, total

        to_go = jax.lax.scan(backward, jnp.zeros(episodes), gains, reverse=True)[1]

        def mean_at(values, index, size):
            total = jnp.zeros(size).at[index].add(values * alive)
            return total, total / jnp.maximum(jnp.zeros(size).at[index].add(alive), 1.0)

        of_pair, of_state = (mean_at(to_go, index, size)[1] for index, size in ((pairs, cells * 4), (states, cells)))
        powers = (mdp.discount ** jnp.arange(length))[:, None]
        advantages = (of_pair[pairs] - of_state[states]) * powers * alive
        # sum_t gamma^t A_t [mean Q'(s_t, a_t) - mean V'(s_t)], summed the other way: what each visit's future weighs.
        weights = mean_at(advantages, pairs, cells * 4)[1][pairs] - mean_at(advantages, states, cells)[1][states]

        def forward(before, now):
            weight, alive = now
            total = (mdp.discount * before + weight) * alive
            return total, total

        visits = jax.lax.scan(forward, jnp.zeros(episodes), (weights * alive, alive))[1]
        answer = jnp.zeros(cells).at[states].add(visits) / episodes / terms.entropy_weight
        direct = jnp.zeros(cells).at[states].add(powers * alive) / episodes
        _, pull_back = jax.vjp(
            lambda upper: (
                rooms.follower_reward(upper, terms, here)[:, 0],
                rooms.leader_reward(upper, terms, here)[:, 0],
            ),
            upper,
        )
        gradient = pull_back((answer, direct))[0]
        return gradient, jnp.mean(to_go[0]), lower, jnp.sum(alive)

    return _published(estimate, 1)


METHODS = {
    "central": lambda: on_model(bilevel.central(0.05)),
    "boltzmann": lambda: on_model(incentives.boltzmann(rooms.leader_reward)),
    "central from episodes": lambda: on_episodes(bilevel.central(0.05)),
    "HPGD": hyper_policy_gradient,
    "AMD": adaptive_model_design,
    "zero-order": zero_order,
}
OURS = ("central", "boltzmann", "central from episodes")
