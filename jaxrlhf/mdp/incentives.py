"""Incentive design: a leader shapes the reward of a follower, who responds with the soft optimum.

    G(phi, lambda) = - sum_c p_c E_lambda[sum_t gamma^t r_leader(phi; s_t, a_t)]                       minimised by phi
    J(phi, lambda) =   sum_c p_c E_lambda[sum_t gamma^t (r_follower(phi; s_t, a_t) / b - log lambda)]  maximised by lambda

J is measured in units of the entropy's weight b, so that b may change from step to step while a stencil's sigma keeps its
meaning. The tilted problem s G - J is the follower's own with `s b r_leader` added to its reward, so the lower problem of
every tilt is solved exactly.

Rewards are functions of one context, `(upper, data, frozen) -> [S, A]`, mapped over the leading axis `C` of `data` and
`frozen`. `data` has the fields `weight` (p) and `entropy_weight` (b), `frozen` the field `mdp`, a `TabularMDP`.
`jaxrlhf.mdp.four_rooms` is the example.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import BilevelProblem, Labelled, PairCost, Sample
from jaxrlhf.base.types import Key, Params
from jaxrlhf.bilevel import SKIPPED
from jaxrlhf.bilevel.rules import HypergradientRule, Losses, implicit_from_direction
from jaxrlhf.bilevel.solvers import LowerSolver, LowerTask
from jaxrlhf.mdp import tabular

Reward = Callable[[Params, Any, Any], jax.Array]
"""`(upper, data, frozen) -> [S, A]`, of one context."""

Policy = Callable[[Params, Any], jax.Array]
"""`(lower, frozen) -> [C, S, A]`, the follower's log-probabilities in nats in every context."""


def tabular_policy(lower: Params, frozen: Any) -> jax.Array:
    """The general follower: logits `[C, S, A]`."""
    del frozen
    return jax.nn.log_softmax(lower)


def _reward_tables(reward: Reward, upper: Params, data: Any, frozen: Any) -> jax.Array:
    """Returns the reward in every context, `[C, S, A]`."""
    return jax.vmap(lambda data, frozen: reward(upper, data, frozen))(data, frozen)


def _follower_tables(follower: Reward, upper: Params, data: Any, frozen: Any) -> jax.Array:
    """Returns the follower's reward in units of b, `[C, S, A]`."""
    return _reward_tables(follower, upper, data, frozen) / data.entropy_weight[:, None, None]


def _mean_return(reward: jax.Array, log_policy: jax.Array, data: Any, frozen: Any) -> jax.Array:
    """Returns the expected return over contexts, `[]`, for tables `[C, S, A]`."""
    return jnp.sum(data.weight * jax.vmap(expected_return)(reward, log_policy, frozen.mdp))


def incentive_losses(
    follower: Reward, leader: Reward, *, policy: Policy = tabular_policy
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Returns `(upper_loss, lower_loss)`, G and -J with exact expectations, for `bilevel_descent_on_losses`."""

    def upper_loss(upper: Params, lower: Params, data: Any, frozen: Any) -> jax.Array:
        return -_mean_return(_reward_tables(leader, upper, data, frozen), policy(lower, frozen), data, frozen)

    def lower_loss(upper: Params, lower: Params, data: Any, frozen: Any) -> jax.Array:
        log_policy = policy(lower, frozen)
        reward = _follower_tables(follower, upper, data, frozen) - log_policy
        return -_mean_return(reward, log_policy, data, frozen)

    return upper_loss, lower_loss


def expected_return(reward: jax.Array, log_policy: jax.Array, mdp: tabular.TabularMDP) -> jax.Array:
    """Returns `E sum_t gamma^t r(s_t, a_t)` from the start, `[]`, for tables `[S, A]`."""
    occupancy = tabular.occupancy(log_policy, mdp)
    return occupancy @ jnp.sum(jnp.exp(log_policy) * reward, axis=-1)


def leader_value(follower: Reward, leader: Reward, upper: Params, data: Any, frozen: Any) -> jax.Array:
    """Returns -Phi, the leader's exact return at the follower's exact best response, `[]`.

    Its gradient goes through the fixed point of the soft Bellman equation (the implicit function theorem), not through a
    solver: it is the reference that every estimator is compared with.
    """

    def best_policy(data, frozen):
        reward = follower(upper, data, frozen)
        return tabular.soft_policy_iteration(reward, frozen.mdp, data.entropy_weight).log_policy

    log_policy = jax.vmap(best_policy)(data, frozen)
    return _mean_return(_reward_tables(leader, upper, data, frozen), log_policy, data, frozen)


def best_response(follower: Reward, leader: Reward) -> LowerSolver:
    """Returns the exact solver for a `tabular_policy`: soft policy iteration for every tilt, from the previous policy.

    The iterates are log-probabilities `[C, S, A]`, the residuals the largest Bellman errors in units of b. Used with
    `incentive_problem` it plans with the transition probabilities that the leader only samples from, as the published
    methods do.
    """

    def step(key, lowers, solver_state, task: LowerTask):
        del key
        data = task.labelled.sample.prompts if isinstance(task.labelled, Labelled) else task.labelled

        def solve_tilt(lower, index):
            upper, tilt = task.upper, task.tilts[index]

            def tilted_reward(data, frozen):
                bonus = tilt * data.entropy_weight * leader(upper, data, frozen)
                return follower(upper, data, frozen) + bonus

            reward = jax.vmap(tilted_reward)(data, task.frozen)
            log_policy, errors = jax.vmap(_soft_optimum)(reward, lower, data.entropy_weight, task.frozen.mdp)
            return log_policy, jnp.max(errors)

        lowers, residuals = jax.vmap(solve_tilt)(lowers, task.indices)
        return lowers, solver_state, residuals

    return LowerSolver(lambda lowers: (), step)


def _soft_optimum(
    reward: jax.Array, logits: jax.Array, entropy_weight: jax.Array, mdp: tabular.TabularMDP
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probabilities of the soft optimum, from a policy `logits`, and its Bellman error in units of b."""
    optimum = tabular.soft_policy_iteration(reward, mdp, entropy_weight, start=jax.nn.log_softmax(logits))
    backup = jax.nn.logsumexp(optimum.action_value / entropy_weight, axis=-1)
    return optimum.log_policy, jnp.max(jnp.abs(backup - optimum.value / entropy_weight))


def boltzmann(leader: Reward) -> HypergradientRule:
    """Returns the one-policy rule for `incentive_losses`, the formula of HPGD (arXiv 2406.01575, theorem 3), exact.

        grad Phi = grad_phi G + E[sum_t gamma^t A_G(s_t, a_t) grad_phi Q(s_t, a_t)],

    Q the soft action value of J and A_G the advantage for G's reward. It is `implicit_from_direction` with v = A_G: at the
    soft optimum of J the Hessian in the logits of a state is its occupancy times the Fisher matrix of its softmax, and
    `d G / d logits = occupancy * policy * A_G`, so the occupancies cancel. With one step it is `bilevel.boltzmann`.

    Args:
        leader: the leader's reward.
    """

    def search_direction(losses: Losses, upper: Params, lower: Params) -> Params:
        reward = _reward_tables(leader, upper, losses.data, losses.frozen)
        return -jax.vmap(tabular.advantage)(reward, jax.nn.log_softmax(lower), losses.frozen.mdp)

    return implicit_from_direction(search_direction)


def incentive_problem(
    follower: Reward, leader: Reward, *, episodes: int, steps: int, policy: Policy = tabular_policy
) -> BilevelProblem:
    """Returns the problem with drawn episodes: the leader cannot plan and only observes the follower.

    A response is an episode; slot 1 of a pair is empty, since nothing is compared, and `reference_log_prob` is 0, so that
    KL(policy || reference) is the negative entropy. Use `beta` 1: J is in units of b. Truncation at `steps` biases the
    estimate by at most gamma^steps of a return.

    Args:
        follower: the follower's reward.
        leader: the leader's reward.
        episodes: drawn per context and step.
        steps: maximum length of an episode.
        policy: the follower's parametrisation.

    Raises:
        ValueError: fewer than 2 episodes, or no steps.
    """
    if episodes < 2 or steps < 1:
        raise ValueError(
            f"Needs at least 2 episodes of at least 1 step, got {episodes} of {steps}: one has no baseline."
        )

    def sample(key: Key, lower: Params, data: Any, frozen: Any) -> Sample:
        rollouts, discount = _draw_episodes(key, policy(lower, frozen), frozen.mdp, episodes=episodes, steps=steps)
        contexts = len(data.weight)
        return Sample(
            prompts=data,
            responses=rollouts,
            behaviour_log_prob=rollouts.log_prob,
            reference_log_prob=jnp.zeros_like(rollouts.log_prob),
            cumulative_discount=discount,
            measure=jnp.broadcast_to(data.weight[:, None] / episodes, (contexts, episodes)),
            from_policy=jnp.array([1.0, 0.0], discount.dtype),
            num_draws=jnp.asarray(episodes, discount.dtype),
        )

    def log_prob(lower: Params, sample: Sample, frozen: Any) -> jax.Array:
        return _along(policy(lower, frozen), sample.responses) * sample.responses.alive

    def reward(upper: Params, sample: Sample, frozen: Any) -> jax.Array:
        return _along(_follower_tables(follower, upper, sample.prompts, frozen), sample.responses)

    def cost(upper: Params, reward: jax.Array, labelled: Labelled, frozen: Any) -> PairCost:
        del reward
        sample = labelled.sample
        leader_rewards = _along(_reward_tables(leader, upper, sample.prompts, frozen), sample.responses)
        coupled = -jnp.sum(sample.cumulative_discount * leader_rewards, axis=(-2, -1))
        return PairCost(coupled, jnp.zeros_like(coupled))

    return BilevelProblem(sample=sample, log_prob=log_prob, reward=reward, cost=cost)


def _draw_episodes(
    key: Key, log_policy: jax.Array, mdp: tabular.TabularMDP, *, episodes: int, steps: int
) -> tuple[tabular.Rollouts, jax.Array]:
    """Draws episodes in every context; returns them and their discounts, `[C, episodes, 2, steps]`, slot 1 all zeros."""

    def in_context(key, log_policy, mdp):
        rollouts = tabular.roll_out(key, log_policy, mdp, episodes=episodes, steps=steps)
        return rollouts, (mdp.discount ** jnp.arange(steps))[None, :] * rollouts.alive

    drawn = jax.vmap(in_context)(jax.random.split(key, len(log_policy)), log_policy, mdp)
    return jax.tree.map(lambda leaf: jnp.stack([leaf, jnp.zeros_like(leaf)], axis=2), drawn)


def _along(table: jax.Array, rollouts: tabular.Rollouts) -> jax.Array:
    """Returns the table `[C, S, A]` at the steps of every episode, `[C, M, 2, T]`."""
    return jax.vmap(lambda table, states, actions: table[states, actions])(table, rollouts.states, rollouts.actions)


def unlabelled(key: Key, sample: Sample, frozen: Any) -> jax.Array:
    """The annotator of a problem without comparisons: every pair is skipped, `[B, M, 1]`."""
    del key, frozen
    return jnp.full((*sample.measure.shape, 1), SKIPPED, sample.measure.dtype)
