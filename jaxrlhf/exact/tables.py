"""Exact quantities where the responses to a prompt can be enumerated.

Everything is a table `[B, N]` over prompts and responses: rewards, gold rewards, log-probabilities. A bandit and an
enumerable language both come down to such tables; prompts weigh the same. Pairs are summed one first response at a time,
so that memory stays linear in N.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import PairCost
from jaxrlhf.preferences import BRADLEY_TERRY, Choice, preference
from jaxrlhf.preferences.objectives import Objective


class PolicyEvaluation(NamedTuple):
    """What a policy is worth; scalars, means over prompts.

    Attributes:
        true_return: E gold.
        win_rate: P(its response is preferred to a reference response) under Bradley-Terry on gold.
        kl: KL(policy || reference) in nats.
        entropy: in nats a response.
        gap: J*_gold - J_gold >= 0, with J_gold = E gold - beta KL: what is missing to the best policy at this beta.
    """

    true_return: jax.Array
    win_rate: jax.Array
    kl: jax.Array
    entropy: jax.Array
    gap: jax.Array


def soft_policy(reward: jax.Array, reference: jax.Array, beta: float | jax.Array) -> jax.Array:
    """Returns log pi*, `[B, N]`, pi* = argmax E R - beta KL, proportional to reference * exp(R / beta)."""
    return jax.nn.log_softmax(reference + reward / beta, axis=-1)


def mean_under(policy: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `[B]`, the mean of `values` `[B, N]` under log-probabilities `policy`; 0 weighs 0 even at -infinity."""
    probability = jnp.exp(policy)
    # Zeroed before the product too, so that no gradient meets 0 * infinity.
    return jnp.sum(probability * jnp.where(probability > 0, values, 0.0), axis=-1)


def soft_value(reward: jax.Array, reference: jax.Array, beta: float | jax.Array) -> jax.Array:
    """Returns max_pi E R - beta KL = beta log E_reference exp(R / beta), averaged over prompts."""
    return jnp.mean(beta * jax.nn.logsumexp(reference + reward / beta, axis=-1))


def evaluate_policy(
    policy: jax.Array, reference: jax.Array, gold: jax.Array, beta: float | jax.Array
) -> PolicyEvaluation:
    """Returns the exact worth of the log-probabilities `policy` `[B, N]`."""
    true_return = jnp.mean(mean_under(policy, gold))
    kl = jnp.mean(mean_under(policy, policy - reference))
    beaten = row_mean(lambda own, other: jax.nn.sigmoid(own - other), reference, gold)
    return PolicyEvaluation(
        true_return=true_return,
        win_rate=jnp.mean(mean_under(policy, beaten)),
        kl=kl,
        entropy=-jnp.mean(mean_under(policy, policy)),
        gap=soft_value(gold, reference, beta) - (true_return - beta * kl),
    )


def row_mean(function, second: jax.Array, *tables: jax.Array) -> jax.Array:
    """Returns `[B, N]`: for each first response the mean of `function` over second responses drawn from `second`.

    Args:
        function: elementwise, called as `function(first_0, second_0, first_1, second_1, ...)` with broadcast tables.
        second: log-probabilities `[B, N]` of the second response.
        *tables: `[B, N]` each.
    """

    def one_prompt(arguments):
        weights, *rows = arguments

        def one_response(own):
            interleaved = [part for pair in zip(own, rows, strict=True) for part in pair]
            return jnp.sum(weights * function(*interleaved))

        return jax.lax.map(one_response, tuple(rows), batch_size=64)

    return jax.lax.map(one_prompt, (jnp.exp(second), *tables))


def expected_cost(
    objective: Objective,
    policy: jax.Array,
    reference: jax.Array,
    reward: jax.Array,
    gold: jax.Array,
    *,
    against_reference: bool,
    choice: Choice = BRADLEY_TERRY,
) -> PairCost:
    """Returns the expected `PairCost`, scalars without the KL price, at tables `[B, N]` of log-probabilities and rewards.

    Labels follow `choice` on gold; pairs are the policy's response against the reference's or its own.
    """
    second = reference if against_reference else policy

    def both(own, other, own_gold, other_gold):
        own, own_gold = jnp.broadcast_arrays(own, other)[0], jnp.broadcast_arrays(own_gold, other_gold)[0]
        expected = preference(jnp.stack([own_gold, other_gold], axis=-1), choice)
        labels = jnp.repeat(expected[..., None], objective.labels, axis=-1)
        return objective.at(jnp.stack([own, other], axis=-1), labels)

    def part(name):
        rows = row_mean(lambda *tables: getattr(both(*tables), name), second, reward, gold)
        return jnp.mean(mean_under(policy, rows))

    return PairCost(part("coupled"), part("uncoupled"))


def upper_value(
    objective: Objective,
    reward: jax.Array,
    gold: jax.Array,
    reference: jax.Array,
    *,
    beta: float | jax.Array,
    against_reference: bool,
    choice: Choice = BRADLEY_TERRY,
) -> jax.Array:
    """Returns Phi = G at the exactly optimal policy, coupled and uncoupled parts and the KL price.

    Its derivative is the field that `bilevel_descent` follows: the policy inside the uncoupled part is held fixed.
    """
    policy = soft_policy(reward, reference, beta)

    def cost(policy):
        return expected_cost(
            objective, policy, reference, reward, gold, against_reference=against_reference, choice=choice
        )

    kl = jnp.mean(mean_under(policy, policy - reference))
    return cost(policy).coupled + cost(jax.lax.stop_gradient(policy)).uncoupled + objective.kl_price * kl
