"""Exact quantities where the responses to a prompt can be enumerated.

Everything is a table `[B, N]` over prompts and responses: rewards, gold rewards, log-probabilities. A bandit and an
enumerable language both reduce to such tables. Prompts have equal weight. Sums over pairs loop over the first response,
so memory stays linear in N (`coupled_costs` is the exception).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import PairCost
from jaxrlhf.preferences import BRADLEY_TERRY, Choice, preference
from jaxrlhf.preferences.objectives import Objective


class PolicyEvaluation(NamedTuple):
    """Exact metrics of a policy: scalars, averaged over prompts.

    Attributes:
        true_return: E gold.
        win_rate: P(its response is preferred to a reference response) under Bradley-Terry on gold.
        kl: KL(policy || reference) in nats.
        entropy: in nats per response.
        gap: J*_gold - J_gold >= 0, with J_gold = E gold - beta KL: how far the policy is from the best one at this beta.
    """

    true_return: jax.Array
    win_rate: jax.Array
    kl: jax.Array
    entropy: jax.Array
    gap: jax.Array


def soft_policy(reward: jax.Array, reference: jax.Array, beta: float | jax.Array) -> jax.Array:
    """Returns log pi*, `[B, N]`, pi* = argmax E R - beta KL, proportional to reference * exp(R / beta).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxrlhf import exact
        >>> reference = jnp.log(jnp.array([[0.5, 0.5]]))
        >>> jnp.exp(exact.soft_policy(jnp.array([[1.0, 0.0]]), reference, beta=0.5)).tolist()
        [[0.881, 0.119]]
    """
    return jax.nn.log_softmax(reference + reward / beta, axis=-1)


def mean_under(policy: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `[B]`, the mean of `values` `[B, N]` under log-probabilities `policy`; 0 * infinity counts as 0."""
    probability = jnp.exp(policy)
    # Masked before the product, so that gradients never contain 0 * infinity.
    return jnp.sum(probability * jnp.where(probability > 0, values, 0.0), axis=-1)


def soft_value(reward: jax.Array, reference: jax.Array, beta: float | jax.Array) -> jax.Array:
    """Returns max_pi E R - beta KL = beta log E_reference exp(R / beta), averaged over prompts."""
    return jnp.mean(beta * jax.nn.logsumexp(reference + reward / beta, axis=-1))


def evaluate_policy(
    policy: jax.Array, reference: jax.Array, gold: jax.Array, beta: float | jax.Array
) -> PolicyEvaluation:
    """Returns exact metrics of the log-probabilities `policy` `[B, N]`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxrlhf import exact
        >>> reference, gold = jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[2.0, 0.0]])
        >>> best = exact.soft_policy(gold, reference, beta=1.0)
        >>> result = exact.evaluate_policy(best, reference, gold, beta=1.0)
        >>> [float(value) for value in (result.true_return, result.kl, result.gap)]
        [1.762, 0.328, 0.0]
    """
    true_return = jnp.mean(mean_under(policy, gold))
    kl = jnp.mean(mean_under(policy, policy - reference))
    return PolicyEvaluation(
        true_return=true_return,
        win_rate=jnp.mean(mean_under(policy, win_rates(reference, gold))),
        kl=kl,
        entropy=-jnp.mean(mean_under(policy, policy)),
        gap=soft_value(gold, reference, beta) - (true_return - beta * kl),
    )


def row_mean(function, second: jax.Array, *tables: jax.Array) -> jax.Array:
    """Returns `[B, N]`: for each first response the mean of `function` over second responses drawn from `second`.

    Args:
        function: elementwise, called as `function(first_0, second_0, first_1, second_1, ...)`, one pair of arguments per
            table; the first of each is a scalar, the second `[N]`.
        second: log-probabilities `[B, N]` of the second response.
        *tables: `[B, N]` each.
    """

    def one_prompt(arguments):
        probability, *rows = arguments

        def one_response(first):
            interleaved = [value for pair in zip(first, rows, strict=True) for value in pair]
            return jnp.sum(probability * function(*interleaved))

        return jax.lax.map(one_response, tuple(rows), batch_size=64)

    return jax.lax.map(one_prompt, (jnp.exp(second), *tables))


def win_rates(reference: jax.Array, gold: jax.Array) -> jax.Array:
    """Returns `[B, N]`: P(the response is preferred to one drawn from `reference`) under Bradley-Terry on gold.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxrlhf import exact
        >>> exact.win_rates(jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[2.0, 0.0]])).tolist()
        [[0.69, 0.31]]
    """
    return row_mean(lambda first, second: jax.nn.sigmoid(first - second), reference, gold)


def _pair_cost(
    objective: Objective,
    choice: Choice,
    reward_0: jax.Array,
    reward_1: jax.Array,
    gold_0: jax.Array,
    gold_1: jax.Array,
) -> PairCost:
    """Returns the cost of pairs at the expected labels, broadcast over the rewards and gold rewards of both responses."""
    expected = preference(_stack_pair(gold_0, gold_1), choice)
    labels = jnp.repeat(expected[..., None], objective.labels, axis=-1)
    return objective.at(_stack_pair(reward_0, reward_1), labels)


def _stack_pair(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.stack(jnp.broadcast_arrays(first, second), axis=-1)


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

    def mean_of(part):
        rows = row_mean(lambda *tables: getattr(_pair_cost(objective, choice, *tables), part), second, reward, gold)
        return jnp.mean(mean_under(policy, rows))

    return PairCost(mean_of("coupled"), mean_of("uncoupled"))


def coupled_costs(
    objective: Objective, reward: jax.Array, gold: jax.Array, choice: Choice = BRADLEY_TERRY
) -> jax.Array:
    """Returns the expected coupled cost of every pair of responses, `[B, N, N]`, from rewards and gold `[B, N]`."""
    return _pair_cost(
        objective, choice, reward[:, :, None], reward[:, None, :], gold[:, :, None], gold[:, None, :]
    ).coupled


def cost_gradient(costs: jax.Array, policy: jax.Array, reference: jax.Array, *, against_reference: bool) -> jax.Array:
    """Returns dG/dpi, `[B, N]`: the gradient of the mean of `costs` `[B, N, N]` in the policy's probabilities.

    `policy` and `reference` are log-probabilities `[B, N]`. On policy-policy pairs both responses contribute.
    """
    if against_reference:
        return jnp.einsum("bij,bj->bi", costs, jnp.exp(reference))
    return jnp.einsum("bij,bj->bi", costs + costs.swapaxes(1, 2), jnp.exp(policy))


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

    Its gradient is what `bilevel_descent` estimates: the policy inside the uncoupled part is held fixed.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxrlhf import exact, objectives
        >>> reference, gold = jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[2.0, 0.0]])
        >>> def phi(reward):
        ...     objective = objectives.utility(kl_price=0.1)
        ...     return exact.upper_value(objective, reward, gold, reference, beta=0.5, against_reference=True)
        >>> value, gradient = jax.jit(jax.value_and_grad(phi))(jnp.zeros((1, 2)))
        >>> float(value), gradient.tolist()  # descending it gives the first response more reward
        (-0.5, [[-0.19, 0.19]])
    """
    policy = soft_policy(reward, reference, beta)

    def cost(policy):
        return expected_cost(
            objective, policy, reference, reward, gold, against_reference=against_reference, choice=choice
        )

    kl = jnp.mean(mean_under(policy, policy - reference))
    return cost(policy).coupled + cost(jax.lax.stop_gradient(policy)).uncoupled + objective.kl_price * kl
