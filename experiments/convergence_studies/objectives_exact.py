"""Exact descent of every upper objective on enumerated bandits, and the evaluation of the policies it reaches.

The lower level is solved in closed form and the upper objective is differentiated through it, so the results reflect the
objective alone, without sampling or inner error.
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
    """An upper objective with the pairs that it is evaluated on.

    Attributes:
        objective: the upper objective; None is J_gold itself, which no annotator could give.
        against_reference: whether the second response of a pair comes from the reference.
        from_reference: whether the first does too (offline RLHF).
        modelled: whether the likelihood models the annotator's position bias and mistakes.
    """

    objective: objectives.Objective | None
    against_reference: bool = True
    from_reference: bool = False
    modelled: bool = False


def methods(beta: Any) -> dict[str, Method]:
    """Returns every method that descends an upper objective, by name; utilities price KL at `beta / 4`, traced or not."""
    likelihood = objectives.likelihood(coupled=False)

    def with_utility(weight):
        return Method(objectives.add(likelihood, objectives.utility(kl_price=beta / 4, weight=weight)))

    return {
        OFFLINE: Method(likelihood, from_reference=True),
        ITERATED: Method(likelihood),
        MODELLED: Method(likelihood, modelled=True),
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
    """Returns the annotator's P(slot 0 preferred), `[C, K, K]`."""
    difference = case.gold[:, :, None] - case.gold[:, None, :]
    return case.mistake + (1.0 - 2.0 * case.mistake) * jax.nn.sigmoid(difference + case.position)


def upper_value(method: Method, upper: jax.Array, case: Case, beta: float | jax.Array) -> jax.Array:
    """Returns Phi(upper): `exact.upper_value` with a biased annotator; the uncoupled part holds the policy fixed."""
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
    record: Callable[[jax.Array], Any] = lambda upper: None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Returns the reward's parameters after Adam on the exact hypergradient, and what `record` returned along the way."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        upper, state = carry
        gradient = jax.grad(lambda upper: upper_value(method, upper, case, beta))(upper)
        updates, state = optimizer.update(gradient, state)
        return (upper + updates, state), record(upper)

    (upper, _), records = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
    return upper, records


@functools.partial(jax.jit, static_argnames=("name", "rate", "steps"))
def descend_all(cases: Case, beta: jax.Array, *, name: str, rate: float, steps: int) -> jax.Array:
    """Returns the final rewards `[runs, starts, C, K]` of one method, for cases with leaves `[runs, ...]`."""
    method = methods(beta)[name]

    def descend_one(case, start):
        return case.features @ descend(method, case, start, beta, rate=rate, steps=steps)[0]

    return jax.vmap(lambda case: jax.vmap(functools.partial(descend_one, case))(starts(case)))(cases)


def label_scores(case: Case) -> jax.Array:
    """Returns each arm's win rate against the reference by the annotator, `[C, K]`.

    At temperature kappa its soft policy is the best table policy for win rate - kappa KL: the exact optimum of policy
    gradient on the label.
    """
    return jnp.einsum("cij,cj->ci", label_probability(case), jnp.exp(case.reference))


@jax.jit
def evaluate_all(cases: Case, scores: jax.Array, temperature: jax.Array, beta: jax.Array) -> dict[str, jax.Array]:
    """Returns `evaluation`, leaves `[runs]`, for scores `[runs, C, K]`."""
    return jax.vmap(lambda case, scores: evaluation(case, scores, temperature, beta))(cases, scores)


def divergence(policy: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns KL(policy || reference) in nats, mean over contexts, from log-probabilities `[C, K]`."""
    return jnp.mean(exact.mean_under(policy, policy - reference))


def policy_at_budget(scores: jax.Array, reference: jax.Array, budget: jax.Array) -> jax.Array:
    """Returns the soft policy of `scores` at the temperature where its KL is the budget, found by bisection."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        above = divergence(exact.soft_policy(scores, reference, jnp.exp(middle)), reference) > budget
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, 40, halve, (jnp.asarray(-9.0), jnp.asarray(7.0)))
    return exact.soft_policy(scores, reference, jnp.exp((low + high) / 2))


def evaluation(case: Case, scores: jax.Array, temperature: jax.Array, beta: jax.Array) -> dict[str, jax.Array]:
    """Returns measurements of the soft policy of `scores`, at its temperature and at the oracle's KL; scalars.

    `missed` is gap / (J*_gold - J_gold(reference)), with J_gold = E gold - beta KL. `missed at equal KL` is the same
    fraction of the return, at the temperature where the KL equals that of the oracle at beta, whose return is the highest
    at that KL.
    """
    reference = case.reference
    oracle = exact.soft_policy(case.gold, reference, beta)
    budget = divergence(oracle, reference)
    own, equal = exact.soft_policy(scores, reference, temperature), policy_at_budget(scores, reference, budget)
    result = _measurements(case, own) | {
        f"{name} at equal KL": value for name, value in _measurements(case, equal).items()
    }
    best, baseline = _measurements(case, oracle), _measurements(case, reference)
    gain = best["return"] - baseline["return"]
    gap = (best["return"] - beta * budget) - (result["return"] - beta * result["kl"])
    return result | {
        "missed": gap / (gain - beta * budget),
        "missed at equal KL": (best["return"] - result["return at equal KL"]) / gain,
        "oracle return": best["return"],
        "oracle win rate": best["win rate"],
        "oracle kl": budget,
    }


def _measurements(case: Case, policy: jax.Array) -> dict[str, jax.Array]:
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
    """Returns, along the descent, the objective's value minus the best fit's, and the fraction of the return's gain.

    Args:
        cases: leaves `[bandits, ...]`.
        start: `[bandits, F]`.
        beta: weight of the KL.
        name: of the method.
        rate: Adam's learning rate.
        steps: of the descent.

    Returns:
        Two arrays `[bandits, steps]`.
    """
    method = methods(beta)[name]

    def trace(case, start):
        at_truth = upper_value(method, starts(case)[-1], case, beta)
        oracle = _measurements(case, exact.soft_policy(case.gold, case.reference, beta))["return"]
        baseline = _measurements(case, case.reference)["return"]

        def record(upper):
            reached = _measurements(case, exact.soft_policy(case.features @ upper, case.reference, beta))["return"]
            return upper_value(method, upper, case, beta) - at_truth, (reached - baseline) / (oracle - baseline)

        return descend(method, case, start, beta, rate=rate, steps=steps, record=record)[1]

    return jax.vmap(trace)(cases, start)
