"""Hypergradients of published bilevel RL methods in the exact setting, against the exact gradient.

    python experiments/comparators.py        # Four-Rooms, half a minute

A leader's parameters x enter the follower's reward r(x); the follower's policy is the soft optimum at entropy weight b;
the leader maximises her return F(x, pi*(x)) by her own reward g(x). Everything is computed from the process itself, so
that what remains is each method's bias. In their papers' words:

    value penalty      argmax_pi F - lambda (V* - V(pi)), and its gradient (arXiv 2402.06886, value penalty)
    Bellman penalty    the same with sum_s rho(s) [max_p h(s, p) - h(s, pi)], h = <p, Q*> + b H(p) (the same, section 3.2)
    SoBiRL             d log pi* = d A* / b, with d Q* and d V* by evaluating d r (arXiv 2405.19697, model-based)

HPGD, adaptive model design and zero-order differences are in `four_rooms_methods.py`, as whole descents.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.mdp import four_rooms as rooms
from jaxrlhf.mdp import incentives, tabular

Tables = Callable[[Any], tuple[jax.Array, jax.Array]]
"""`upper -> (r, g)`, the follower's and the leader's rewards `[S, A]`."""


def exact(tables: Tables, upper: Any, mdp: tabular.TabularMDP, entropy_weight: float | jax.Array) -> Any:
    """Returns the gradient of the leader's return, through the fixed point of the soft Bellman equation."""

    def value(upper):
        follower, leader = tables(upper)
        policy = tabular.soft_policy_iteration(follower, mdp, entropy_weight).log_policy
        return incentives.expected_return(leader, policy, mdp)

    return jax.grad(value)(upper)


def value_penalty(
    tables: Tables, upper: Any, mdp: tabular.TabularMDP, entropy_weight: float | jax.Array, *, weight: float
) -> Any:
    """Returns `grad_x F(x, pi) + lambda (grad_x V(x, pi) - grad_x V(x, pi*))` at the penalised policy pi, weight lambda.

    F + lambda V is lambda times the follower's own problem with the reward r + g / lambda, so that pi is a soft optimum:
    the gradient is a one-sided difference with sigma = 1 / lambda, and its bias is of order 1 / lambda.
    """
    follower, leader = tables(upper)
    best, penalised = (
        jax.lax.stop_gradient(tabular.soft_policy_iteration(reward, mdp, entropy_weight).log_policy)
        for reward in (follower, follower + leader / weight)
    )

    def lagrangian(upper):
        follower, leader = tables(upper)
        lost = incentives.expected_return(follower, best, mdp) - incentives.expected_return(follower, penalised, mdp)
        return incentives.expected_return(leader, penalised, mdp) - weight * lost

    return jax.grad(lagrangian)(upper)


def bellman_penalty(
    tables: Tables,
    upper: Any,
    mdp: tabular.TabularMDP,
    entropy_weight: float | jax.Array,
    *,
    weight: float,
    iterations: int = 100,
) -> Any:
    """Returns the gradient of the Bellman penalty's Lagrangian at the penalised policy; rho is uniform.

    The policy solves `b log pi = Q* + d_pi(s) Q_g(s, a) / (lambda rho(s)) - const`, by iteration from pi*, which contracts
    for large lambda. Departure: the paper descends to it by policy gradients.
    """
    follower, leader = tables(upper)
    optimum = tabular.soft_policy_iteration(follower, mdp, entropy_weight)
    states = len(mdp.start)

    def improve(_, log_policy):
        value = tabular.policy_value(leader, log_policy, mdp)
        pull = tabular.occupancy(log_policy, mdp)[:, None] * tabular.action_values(leader, value, mdp)
        return jax.nn.log_softmax((optimum.action_value + pull * states / weight) / entropy_weight)

    best = jax.lax.stop_gradient(optimum.log_policy)
    penalised = jax.lax.stop_gradient(jax.lax.fori_loop(0, iterations, improve, best))

    def lagrangian(upper):
        follower, leader = tables(upper)
        action_value = tabular.soft_policy_iteration(follower, mdp, entropy_weight).action_value
        lost = jnp.mean(jnp.sum((jnp.exp(best) - jnp.exp(penalised)) * action_value, axis=-1))
        return incentives.expected_return(leader, penalised, mdp) - weight * lost

    return jax.grad(lagrangian)(upper)


def sobirl(tables: Tables, upper: Any, mdp: tabular.TabularMDP, entropy_weight: float | jax.Array) -> Any:
    """Returns `grad_x F + sum_s d(s) sum_a pi*(a | s) A_g(s, a) grad_x log pi*(a | s)`, grad log pi* = grad A* / b.

    Gradients of Q* and V* are values of the policy pi* for the gradient of r, entropy left out.
    """
    follower, leader = tables(upper)
    best = jax.lax.stop_gradient(tabular.soft_policy_iteration(follower, mdp, entropy_weight).log_policy)
    weights = jax.lax.stop_gradient(
        tabular.occupancy(best, mdp)[:, None] * jnp.exp(best) * tabular.advantage(leader, best, mdp)
    )

    def surrogate(upper):
        follower, leader = tables(upper)
        log_policy_part = tabular.advantage(follower, best, mdp) / entropy_weight
        return incentives.expected_return(leader, best, mdp) + jnp.sum(weights * log_policy_part)

    return jax.grad(surrogate)(upper)


PENALTY_WEIGHTS = (10.0, 100.0, 1_000.0, 10_000.0)
METHODS: dict[str, Callable] = {
    "SoBiRL": sobirl,
    **{f"value penalty, {weight:g}": functools.partial(value_penalty, weight=weight) for weight in PENALTY_WEIGHTS},
    **{f"Bellman penalty, {weight:g}": functools.partial(bellman_penalty, weight=weight) for weight in PENALTY_WEIGHTS},
}
"""Methods by name; a penalty's name has its weight."""


def main(points: int) -> None:
    """Prints the relative error of every gradient at random charges of Four-Rooms, in double precision."""
    jax.config.update("jax_enable_x64", True)
    environment, coefficients = rooms.four_rooms(), rooms.coefficients(0.003, 1.0)
    goal, data = (jax.tree.map(lambda leaf: jnp.asarray(leaf[0], float), tree) for tree in (environment, coefficients))

    def tables(upper):
        shape = goal.mdp.transition.shape[:2]
        follower, leader = rooms.follower_reward(upper, data, goal), rooms.leader_reward(upper, data, goal)
        return jnp.broadcast_to(follower, shape), jnp.broadcast_to(leader, shape)

    uppers = jax.vmap(rooms.draw_incentives)(jax.random.split(jax.random.key(0), points))
    truth = jax.jit(jax.vmap(lambda upper: exact(tables, upper, goal.mdp, data.entropy_weight)))(uppers)
    print("| method | relative error, median | largest | CPU seconds a gradient |\n|---|---|---|---|")
    for name, method in METHODS.items():
        compiled = jax.jit(jax.vmap(lambda upper, method=method: method(tables, upper, goal.mdp, data.entropy_weight)))
        jax.block_until_ready(compiled(uppers))
        began = time.process_time()
        found = jax.block_until_ready(compiled(uppers))
        seconds = (time.process_time() - began) / points
        error, size = (
            np.sqrt(sum(np.sum(np.square(leaf.reshape(points, -1)), axis=1) for leaf in map(np.asarray, leaves)))
            for leaves in (jax.tree.leaves(jax.tree.map(jnp.subtract, found, truth)), jax.tree.leaves(truth))
        )
        print(f"| {name} | {np.median(error / size):.1e} | {np.max(error / size):.1e} | {seconds:.4f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=8, help="Random charges.")
    main(parser.parse_args().points)
