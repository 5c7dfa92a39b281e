"""Exact descent of every upper objective on enumerated bandits, and what the policies that it reaches are worth.

The lower level is solved in closed form and the upper objective differentiated through it, so that what is seen is the
objective and nothing else: no sample, no inner error.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from convergence_studies.objectives_structures import Case

from jaxrlhf import exact, objectives
from jaxrlhf.bilevel import PairCost

POLICY_GRADIENT = "policy gradient on the label"
OFFLINE = "offline RLHF"
ITERATED = "iterated RLHF"
MODELLED = "iterated RLHF, annotator modelled"
UTILITY = "utility alone"
DEFAULT = "uncoupled likelihood + 3 utility"
BEST_IN_CLASS = "gold itself, in the reward's class"
PAPER = "likelihood, policy-policy (the paper)"
BRIER_POLICY = "brier, policy-policy"

STARTS = ("flat", "collapsed", "true")


class Method(NamedTuple):
    """What is descended.

    Attributes:
        objective: the upper objective; None stands for J_gold itself, which no annotator could give.
        against_reference: whether the second response of a pair comes from the reference.
        from_reference: whether the first does too (offline RLHF).
        modelled: whether the likelihood is that of the annotator's own position bias and mistakes.
    """

    objective: objectives.Objective | None
    against_reference: bool = True
    from_reference: bool = False
    modelled: bool = False


def methods(beta: Any) -> dict[str, Method]:
    """Returns every method that descends an upper objective, by name; utilities price KL at beta / 4, traced or not."""
    fit = objectives.likelihood(coupled=False)

    def with_utility(weight):
        return Method(objectives.add(fit, objectives.utility(kl_price=beta / 4, weight=weight)))

    return {
        OFFLINE: Method(fit, from_reference=True),
        ITERATED: Method(fit),
        MODELLED: Method(fit, modelled=True),
        PAPER: Method(objectives.likelihood(), against_reference=False),
        "likelihood, policy-reference": Method(objectives.likelihood()),
        BRIER_POLICY: Method(objectives.brier(), against_reference=False),
        "brier, policy-reference": Method(objectives.brier()),
        "excess likelihood, policy-policy": Method(objectives.excess_likelihood(), against_reference=False),
        "excess likelihood, policy-reference": Method(objectives.excess_likelihood()),
        UTILITY: Method(objectives.utility(kl_price=beta / 4)),
        "uncoupled likelihood + 0.3 utility": with_utility(0.3),
        "uncoupled likelihood + 1 utility": with_utility(1.0),
        DEFAULT: with_utility(3.0),
        BEST_IN_CLASS: Method(None),
    }


def label_probability(case: Case) -> jax.Array:
    """Returns P(slot 0 preferred) by the annotator as it is, `[C, K, K]`."""
    difference = case.gold[:, :, None] - case.gold[:, None, :]
    return case.mistake + (1.0 - 2.0 * case.mistake) * jax.nn.sigmoid(difference + case.position)


def upper_value(method: Method, upper: jax.Array, case: Case, beta: float | jax.Array) -> jax.Array:
    """Returns Phi(upper): `exact.upper_value` with a biased annotator; in an uncoupled part the policy is held fixed."""
    rewards = case.features @ upper
    policy = exact.soft_policy(rewards, case.reference, beta)
    kl = divergence(policy, case.reference)
    if method.objective is None:
        return beta * kl - jnp.mean(exact.mean_under(policy, case.gold))
    costs = _costs(method, rewards, case)
    source = case.reference if method.from_reference else policy

    def expectation(costs, policy):
        second = case.reference if method.against_reference else policy
        return jnp.mean(jnp.einsum("cij,ci,cj->c", costs, jnp.exp(policy), jnp.exp(second)))

    uncoupled = expectation(costs.uncoupled, jax.lax.stop_gradient(source))
    return expectation(costs.coupled, source) + uncoupled + method.objective.kl_price * kl


def _costs(method: Method, rewards: jax.Array, case: Case) -> PairCost:
    """The objective at every pair of arms, `[C, K, K]`."""
    probability = label_probability(case)
    returns = jnp.stack(jnp.broadcast_arrays(rewards[:, :, None], rewards[:, None, :]), axis=-1)
    if method.modelled:
        difference = returns[..., 0] - returns[..., 1] + case.position
        predicted = case.mistake + (1.0 - 2.0 * case.mistake) * jax.nn.sigmoid(difference)
        loss = -probability * jnp.log(predicted) - (1.0 - probability) * jnp.log1p(-predicted)
        return PairCost(jnp.zeros_like(loss), loss)
    assert method.objective is not None  # J_gold has no pairs
    return method.objective.pair_cost(returns, jnp.repeat(probability[..., None], method.objective.labels, axis=-1))


def starts(case: Case) -> jax.Array:
    """Returns `[3, F]`: flat, nearly collapsed on each context's worst arm, and the best fit of the gold reward."""
    flat = case.features.reshape(-1, case.features.shape[-1])
    true = jnp.linalg.lstsq(flat, case.gold.ravel())[0]
    worst = jax.nn.one_hot(jnp.argmin(case.gold, axis=-1), case.gold.shape[-1])
    return jnp.stack([jnp.zeros_like(true), jnp.linalg.lstsq(flat, (3.0 * worst).ravel())[0], true])


def descend(
    method: Method, case: Case, start: jax.Array, beta: float | jax.Array, *, rate: float, steps: int,
    watch: Callable[[jax.Array], Any] = lambda upper: None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Returns the reward's parameters after Adam on the exact hypergradient, and what `watch` saw on the way."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        upper, state = carry
        gradient = jax.grad(lambda upper: upper_value(method, upper, case, beta))(upper)
        updates, state = optimizer.update(gradient, state)
        return (upper + updates, state), watch(upper)

    (upper, _), seen = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
    return upper, seen


@functools.partial(jax.jit, static_argnames=("name", "rate", "steps"))
def descend_all(cases: Case, beta: jax.Array, *, name: str, rate: float, steps: int) -> jax.Array:
    """Returns the rewards `[runs, starts, C, K]` that one method ends at, for cases with leaves `[runs, ...]`."""
    method = methods(beta)[name]

    def one(case, start):
        return case.features @ descend(method, case, start, beta, rate=rate, steps=steps)[0]

    return jax.vmap(lambda case: jax.vmap(functools.partial(one, case))(starts(case)))(cases)


def label_scores(case: Case) -> jax.Array:
    """Returns each arm's win rate against the reference by the annotator, `[C, K]`.

    At temperature kappa its soft policy is the best table policy for win rate - kappa KL: the exact optimum of policy
    gradient on the label.
    """
    return jnp.einsum("cij,cj->ci", label_probability(case), jnp.exp(case.reference))


@jax.jit
def judge_all(cases: Case, scores: jax.Array, temperature: jax.Array, beta: jax.Array) -> dict[str, jax.Array]:
    """Returns `verdict`, leaves `[runs]`, for scores `[runs, C, K]`."""
    return jax.vmap(lambda case, scores: verdict(case, scores, temperature, beta))(cases, scores)


def divergence(policy: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns KL(policy || reference) in nats, mean over contexts, from log-probabilities `[C, K]`."""
    return jnp.mean(exact.mean_under(policy, policy - reference))


def policy_at_budget(scores: jax.Array, reference: jax.Array, budget: jax.Array) -> jax.Array:
    """Returns the soft policy of `scores` at the temperature where its KL is the budget, found by bisection."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        far = divergence(exact.soft_policy(scores, reference, jnp.exp(middle)), reference) > budget
        return jnp.where(far, middle, low), jnp.where(far, high, middle)

    low, high = jax.lax.fori_loop(0, 40, halve, (jnp.asarray(-9.0), jnp.asarray(7.0)))
    return exact.soft_policy(scores, reference, jnp.exp((low + high) / 2))


def verdict(case: Case, scores: jax.Array, temperature: jax.Array, beta: jax.Array) -> dict[str, jax.Array]:
    """Returns what the soft policy of `scores` is worth, at its temperature and at the oracle's KL; scalars.

    `missed` is gap / (J*_gold - J_gold(reference)), with J_gold = E gold - beta KL. `missed at equal KL` is the same
    share of the return, at the temperature where the KL is that of the oracle at beta, which no policy of that KL beats.
    """
    reference = case.reference
    oracle = exact.soft_policy(case.gold, reference, beta)
    budget = divergence(oracle, reference)
    own, equal = exact.soft_policy(scores, reference, temperature), policy_at_budget(scores, reference, budget)
    result = _worth(case, own) | {f"{name} at equal KL": value for name, value in _worth(case, equal).items()}
    best, nothing = _worth(case, oracle), _worth(case, reference)
    of_gain = best["return"] - nothing["return"]
    gap = (best["return"] - beta * budget) - (result["return"] - beta * result["kl"])
    return result | {
        "missed": gap / (of_gain - beta * budget),
        "missed at equal KL": (best["return"] - result["return at equal KL"]) / of_gain,
        "oracle return": best["return"],
        "oracle win rate": best["win rate"],
        "oracle kl": budget,
    }


def _worth(case: Case, policy: jax.Array) -> dict[str, jax.Array]:
    wins = jax.nn.sigmoid(case.gold[:, :, None] - case.gold[:, None, :])
    return {
        "return": jnp.mean(exact.mean_under(policy, case.gold)),
        "win rate": jnp.mean(jnp.einsum("cij,ci,cj->c", wins, jnp.exp(policy), jnp.exp(case.reference))),
        "kl": divergence(policy, case.reference),
        "entropy": -jnp.mean(exact.mean_under(policy, policy)),
        "collision": jnp.mean(jnp.sum(jnp.exp(2.0 * policy), axis=-1)),
    }


@functools.partial(jax.jit, static_argnames=("name", "rate", "steps"))
def trace_descent(cases: Case, start: jax.Array, beta: jax.Array, *, name: str, rate: float, steps: int):
    """Returns along the descent the objective's own value less the best fit's, and the return's share of the gain.

    Args:
        cases: leaves `[bandits, ...]`.
        start: `[bandits, F]`.
        beta: weight of the KL.
        name: of the method.
        rate: Adam's.
        steps: of the descent.

    Returns:
        Two arrays `[bandits, steps]`.
    """
    method = methods(beta)[name]

    def one(case, start):
        at_truth = upper_value(method, starts(case)[-1], case, beta)
        oracle = _worth(case, exact.soft_policy(case.gold, case.reference, beta))["return"]
        nothing = _worth(case, case.reference)["return"]

        def watch(upper):
            reached = _worth(case, exact.soft_policy(case.features @ upper, case.reference, beta))["return"]
            return upper_value(method, upper, case, beta) - at_truth, (reached - nothing) / (oracle - nothing)

        return descend(method, case, start, beta, rate=rate, steps=steps, watch=watch)[1]

    return jax.vmap(one)(cases, start)
