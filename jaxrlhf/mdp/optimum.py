"""Exact solutions on the tree of histories: best responses, the upper value and its gradient, metrics of a policy.

With `b` the price of a nat of KL and discounts counted from the start, backward induction gives

    Q(n, a) = gamma^t r(s, a) + sum_k P(k | s, a) V(child)
    V(n)    = gamma^t b log sum_a ref(a | s) exp(Q(n, a) / (gamma^t b))

and the optimal policy `ref exp(Q / (gamma^t b))`, normalised: the KL of step t is discounted like its reward.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrlhf import exact
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.solvers import LowerSolver, LowerTask, closed_form
from jaxrlhf.bilevel.stencil import Index
from jaxrlhf.exact.tables import cost_gradient, coupled_costs
from jaxrlhf.mdp.episodes import Episodes
from jaxrlhf.mdp.problem import Policy, at_nodes, history_table
from jaxrlhf.mdp.tree import Tree, history_tree
from jaxrlhf.preferences import BRADLEY_TERRY, Choice
from jaxrlhf.preferences.objectives import Objective

Reward = Callable[[Params, jax.Array], jax.Array]
"""`(upper, features [S, A, F]) -> [S, A]`, the reward of a step."""


def soft_policy(
    reward: jax.Array,
    frozen: Episodes,
    price: float | jax.Array,
    *,
    bonus: float | jax.Array = 0.0,
    tree: Tree | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the policy that maximises `E[sum_t gamma^t (r - price log(pi / ref)) + bonus]`, and that maximum.

    Args:
        reward: `[S, A]`, the reward of a step.
        frozen: the episodes.
        price: of a nat of KL, positive.
        bonus: `[B, P]`, an undiscounted addition to the return of each whole trajectory.
        tree: `history_tree(frozen)`, if already computed.

    Returns:
        Normalised log-probabilities `[B, N, A]` and the value `[B]` from each start.
    """
    tree = history_tree(frozen) if tree is None else tree
    batch, actions = len(frozen.starts), reward.shape[1]
    future = jnp.broadcast_to(bonus, (batch, len(tree.nodes))).reshape(batch, -1, actions)
    policies, value = [], jnp.zeros((batch, 1), reward.dtype)
    for step in reversed(range(len(tree.levels))):
        states = tree.states[:, tree.levels[step]]
        scale = frozen.discount[step] * price
        logits = frozen.reference[states] + (frozen.discount[step] * reward[states] + future) / scale
        policies.append(jax.nn.log_softmax(logits, axis=-1))
        value = scale * jax.nn.logsumexp(logits, axis=-1)
        if step > 0:
            transition = frozen.transition[tree.states[:, tree.levels[step - 1]]]
            future = jnp.sum(transition * value.reshape(transition.shape), axis=-1)
    return jnp.concatenate(policies[::-1], axis=1), value[:, 0]


def best_response(
    reward: Reward,
    objective: Objective,
    *,
    beta: float,
    against_reference: bool = True,
    choice: Choice = BRADLEY_TERRY,
    iterations: int = 100,
) -> LowerSolver:
    """Returns the exact solver, for the policy `history_table` and labels by `choice`, of argmin s G - J.

    It is `soft_policy` at price `beta + s kappa` with bonus `-s dG/dpi(tau)`, where dG/dpi is the mean coupled cost of
    a trajectory, summed over the slots of a pair that the policy fills. Against the reference that is explicit; on
    policy-policy pairs it is iterated, a contraction while |s| times the range of the cost is small compared to beta
    times the last step's discount.
    """

    def solution(task: LowerTask, index: Index) -> Params:
        frozen: Episodes = task.frozen
        tree = history_tree(frozen)
        rewards = reward(task.upper, frozen.features)
        tilt = task.tilts[index].astype(rewards.dtype)
        costs = coupled_costs(objective, tree.returns(rewards, frozen.discount), _gold_returns(tree, frozen), choice)
        log_reference = frozen.reference[tree.states]
        reference = tree.log_prob(log_reference)
        price = beta + tilt * objective.kl_price

        def improve(_, log_policy):
            gradient = cost_gradient(costs, tree.log_prob(log_policy), reference, against_reference=against_reference)
            return soft_policy(rewards, frozen, price, bonus=-tilt * gradient, tree=tree)[0]

        return jax.lax.fori_loop(0, 1 if against_reference else iterations, improve, log_reference)

    return closed_form(solution)


def upper_value(
    reward: Reward,
    objective: Objective,
    upper: Params,
    frozen: Episodes,
    *,
    beta: float | jax.Array,
    against_reference: bool = True,
    choice: Choice = BRADLEY_TERRY,
) -> jax.Array:
    """Returns Phi = G at the exactly optimal policy, `[]`: coupled and uncoupled parts and the KL price.

    Its gradient in `upper` is what `bilevel_descent` estimates: the policy inside the uncoupled part is held fixed. Labels
    follow `choice` on discounted gold returns.
    """
    tree, rewards = history_tree(frozen), reward(upper, frozen.features)
    log_policy, _ = soft_policy(rewards, frozen, beta, tree=tree)
    reference = tree.log_prob(frozen.reference[tree.states])
    returns, gold = tree.returns(rewards, frozen.discount), _gold_returns(tree, frozen)

    def cost(policy):
        return exact.expected_cost(
            objective, policy, reference, returns, gold, against_reference=against_reference, choice=choice
        )

    policy = tree.log_prob(log_policy)
    kl = _discounted_mean(tree, policy, log_policy - frozen.reference[tree.states], frozen)
    return cost(policy).coupled + cost(jax.lax.stop_gradient(policy)).uncoupled + objective.kl_price * kl


def evaluate_policy(
    lower: Params, frozen: Episodes, *, beta: float | jax.Array, policy: Policy = history_table
) -> exact.PolicyEvaluation:
    """Returns exact metrics of a policy, as `exact.evaluate_policy` does for tables.

    The true return, KL and entropy are discounted by step, `E sum_t gamma^t (...)`; the gap is to the best of all
    policies, history-dependent ones included, for the gold reward at this beta.
    """
    tree = history_tree(frozen)
    log_policy, log_reference = at_nodes(policy, lower, tree, frozen), frozen.reference[tree.states]
    trajectory_log_prob, reference = tree.log_prob(log_policy), tree.log_prob(log_reference)
    gold = _gold_returns(tree, frozen)
    true_return = jnp.mean(exact.mean_under(trajectory_log_prob, gold))
    kl = _discounted_mean(tree, trajectory_log_prob, log_policy - log_reference, frozen)
    wins = exact.win_rates(reference, gold)
    _, best_value = soft_policy(frozen.gold, frozen, beta, tree=tree)
    return exact.PolicyEvaluation(
        true_return=true_return,
        win_rate=jnp.mean(exact.mean_under(trajectory_log_prob, wins)),
        kl=kl,
        entropy=-_discounted_mean(tree, trajectory_log_prob, log_policy, frozen),
        gap=jnp.mean(best_value) - (true_return - beta * kl),
    )


def _gold_returns(tree: Tree, frozen: Episodes) -> jax.Array:
    return tree.returns(frozen.gold, frozen.discount)


def _discounted_mean(tree: Tree, policy: jax.Array, values: jax.Array, frozen: Episodes) -> jax.Array:
    """Returns `E sum_t gamma^t values`, `[]`, from `values` `[B, N, A]` and trajectory log-probabilities `[B, P]`."""
    return jnp.mean(exact.mean_under(policy, tree.along(values) @ frozen.discount))
