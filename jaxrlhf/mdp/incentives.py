"""Incentive design: a leader shapes the reward of a follower who answers with the soft optimum.

    G(phi, lambda) = - sum_c p_c E_lambda[sum_t gamma^t r_leader(phi; s_t, a_t)]                       minimised by phi
    J(phi, lambda) =   sum_c p_c E_lambda[sum_t gamma^t (r_follower(phi; s_t, a_t) / b - log lambda)]  maximised by lambda

J is measured in units of the entropy's weight b, so that b may change from step to step and a stencil's sigma keeps its
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
from jaxrlhf.bilevel.hypergradient import HypergradientRule, Losses, implicit_from_direction
from jaxrlhf.bilevel.lower import LowerSolver, LowerTask
from jaxrlhf.mdp import tabular

Reward = Callable[[Params, Any, Any], jax.Array]
"""`(upper, data, frozen) -> [S, A]`, of one context."""

Policy = Callable[[Params, Any], jax.Array]
"""`(lower, frozen) -> [C, S, A]`, the follower's log-probabilities in nats in every context."""


def tabular_policy(lower: Params, frozen: Any) -> jax.Array:
    """The general follower: logits `[C, S, A]`."""
    del frozen
    return jax.nn.log_softmax(lower)


def incentive_losses(
    follower: Reward, leader: Reward, *, policy: Policy = tabular_policy
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Returns `(upper_loss, lower_loss)`, G and -J with exact expectations, for `bilevel_descent_on_losses`."""

    def upper_loss(upper: Params, lower: Params, data: Any, frozen: Any) -> jax.Array:
        def of_context(log_policy, data, frozen):
            return -data.weight * expected_return(leader(upper, data, frozen), log_policy, frozen.mdp)

        return jnp.sum(jax.vmap(of_context)(policy(lower, frozen), data, frozen))

    def lower_loss(upper: Params, lower: Params, data: Any, frozen: Any) -> jax.Array:
        def of_context(log_policy, data, frozen):
            reward = follower(upper, data, frozen) / data.entropy_weight - log_policy
            return -data.weight * expected_return(reward, log_policy, frozen.mdp)

        return jnp.sum(jax.vmap(of_context)(policy(lower, frozen), data, frozen))

    return upper_loss, lower_loss


def expected_return(reward: jax.Array, log_policy: jax.Array, mdp: tabular.TabularMDP) -> jax.Array:
    """Returns `E sum_t gamma^t r(s_t, a_t)` from the start, `[]`, for tables `[S, A]`."""
    visits = tabular.occupancy(log_policy, mdp)
    return visits @ jnp.sum(jnp.exp(log_policy) * reward, axis=-1)


def leader_value(follower: Reward, leader: Reward, upper: Params, data: Any, frozen: Any) -> jax.Array:
    """Returns -Phi, the leader's exact return at the follower's exact answer, `[]`.

    Its gradient goes through the fixed point of the soft Bellman equation (the implicit function theorem), not through a
    solver: the reference that every estimator is compared with.
    """

    def of_context(data, frozen):
        optimum = tabular.soft_policy_iteration(follower(upper, data, frozen), frozen.mdp, data.entropy_weight)
        return data.weight * expected_return(leader(upper, data, frozen), optimum.log_policy, frozen.mdp)

    return jnp.sum(jax.vmap(of_context)(data, frozen))


def best_response(follower: Reward, leader: Reward) -> LowerSolver:
    """Returns the exact solver for a `tabular_policy`: soft policy iteration for every tilt, from the policy it had.

    The iterates are log-probabilities `[C, S, A]`, the residuals the largest Bellman errors in units of b. Used with
    `incentive_problem` it plans with the process that the leader only samples from, as the published methods do.
    """

    def step(key, lowers, solver_state, task: LowerTask):
        del key
        data = task.labelled.sample.prompts if isinstance(task.labelled, Labelled) else task.labelled

        def solved(lower, index):
            upper, tilt = task.upper_of(index), task.tilt_of(index)

            def of_context(lower, data, frozen):
                bonus = tilt * data.entropy_weight * leader(upper, data, frozen)
                optimum = tabular.soft_policy_iteration(
                    follower(upper, data, frozen) + bonus,
                    frozen.mdp,
                    data.entropy_weight,
                    start=jax.nn.log_softmax(lower),
                )
                error = jax.nn.logsumexp(optimum.action_value / data.entropy_weight, axis=-1)
                return optimum.log_policy, jnp.max(jnp.abs(error - optimum.value / data.entropy_weight))

            log_policy, errors = jax.vmap(of_context)(lower, data, task.frozen)
            return log_policy, jnp.max(errors)

        lowers, residuals = jax.vmap(solved)(lowers, task.indices)
        return lowers, solver_state, residuals

    return LowerSolver(lambda lowers: (), step)


def boltzmann(leader: Reward) -> HypergradientRule:
    """Returns the one-policy rule for `incentive_losses`, the formula of HPGD (arXiv 2406.01575, theorem 3), exact.

        grad Phi = grad_phi G + E[sum_t gamma^t A_G(s_t, a_t) grad_phi Q(s_t, a_t)],

    Q the soft action value of J and A_G the advantage for G's reward. It is `implicit_from_direction` with v = A_G: at the soft
    optimum of J the Hessian in a state's logits is its visits times the Fisher matrix of its softmax, and
    `d G / d logits = visits * policy * A_G`, so the visits cancel. On one step it is `bilevel.boltzmann`.

    Args:
        leader: the leader's reward.
    """

    def answer(losses: Losses, upper: Params, lower: Params) -> Params:
        def of_context(lower, data, frozen):
            return -tabular.advantage(leader(upper, data, frozen), jax.nn.log_softmax(lower), frozen.mdp)

        return jax.vmap(of_context)(lower, losses.data, losses.frozen)

    return implicit_from_direction(answer)


def incentive_problem(
    follower: Reward, leader: Reward, *, episodes: int, steps: int, policy: Policy = tabular_policy
) -> BilevelProblem:
    """Returns the problem with drawn episodes: what a leader sees who can only watch the follower.

    A response is an episode; slot 1 of a pair is empty, since nothing is compared, and `reference_log_prob` is 0, so that
    KL(policy || reference) is the negative entropy. `beta` is 1: J is in units of b. Episodes cut at `steps` bias the
    estimate by at most gamma^steps of a return.

    Args:
        follower: the follower's reward.
        leader: the leader's reward.
        episodes: drawn a context and step.
        steps: of an episode at most.
        policy: the follower's form.

    Raises:
        ValueError: fewer than 2 episodes, or no steps.
    """
    if episodes < 2 or steps < 1:
        raise ValueError(
            f"Needs at least 2 episodes of at least 1 step, got {episodes} of {steps}: one has no baseline."
        )

    def sample(key: Key, lower: Params, data: Any, frozen: Any) -> Sample:
        def of_context(key, log_policy, frozen):
            drawn = tabular.roll_out(key, log_policy, frozen.mdp, episodes=episodes, steps=steps)
            return drawn, (frozen.mdp.discount ** jnp.arange(steps))[None, :] * drawn.alive

        contexts = len(data.weight)
        drawn, discount = jax.vmap(of_context)(jax.random.split(key, contexts), policy(lower, frozen), frozen)
        drawn, discount = jax.tree.map(lambda leaf: jnp.stack([leaf, jnp.zeros_like(leaf)], axis=2), (drawn, discount))
        return Sample(
            prompts=data,
            responses=drawn,
            behaviour_log_prob=drawn.log_prob,
            reference_log_prob=jnp.zeros_like(drawn.log_prob),
            cumulative_discount=discount,
            measure=jnp.broadcast_to(data.weight[:, None] / episodes, (contexts, episodes)),
            from_policy=jnp.array([1.0, 0.0], discount.dtype),
            num_draws=jnp.asarray(episodes, discount.dtype),
        )

    def along(table, sample):
        drawn = sample.responses
        return jax.vmap(lambda table, states, actions: table[states, actions])(table, drawn.states, drawn.actions)

    def log_prob(lower: Params, sample: Sample, frozen: Any) -> jax.Array:
        return along(policy(lower, frozen), sample) * sample.responses.alive

    def reward(upper: Params, sample: Sample, frozen: Any) -> jax.Array:
        def of_context(data, frozen):
            return follower(upper, data, frozen) / data.entropy_weight

        return along(jax.vmap(of_context)(sample.prompts, frozen), sample)

    def cost(upper: Params, reward: jax.Array, labelled: Labelled, frozen: Any) -> PairCost:
        del reward
        sample = labelled.sample
        gains = along(jax.vmap(lambda data, frozen: leader(upper, data, frozen))(sample.prompts, frozen), sample)
        coupled = -jnp.sum(sample.cumulative_discount * gains, axis=(-2, -1))
        return PairCost(coupled, jnp.zeros_like(coupled))

    return BilevelProblem(sample=sample, log_prob=log_prob, reward=reward, cost=cost)


def unlabelled(key: Key, sample: Sample, frozen: Any) -> jax.Array:
    """The annotator of a problem in which nothing is judged: no labels, `[B, M, 1]`."""
    del key, frozen
    return jnp.full((*sample.measure.shape, 1), SKIPPED, sample.measure.dtype)
