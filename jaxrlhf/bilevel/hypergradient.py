"""Hypergradient rules: how the upper level feels the policy's answer to it.

Every first-order estimator of grad Phi is a reweighting. A rule returns one weight per pair for the cost and one per
step for the reward, and the hypergradient is a single backward pass through the reward model of

    sum_bm measure (coupled * coupled_cost + uncoupled * uncoupled_cost + sum_kt reward_weight * discount * reward).

With w_i the density ratio of the lower iterate at tilt s_i to the behaviour policy:

| rule | weight of the coupled cost | weight of the reward |
|---|---|---|
| stencil | sum_i c_i s_i w_i(y0) w_i(y1) | - sum_i c_i w_i |
| boltzmann | w_0(y0) w_0(y1) | (1 / beta) (centred dG/dpi) |
| implicit (for comparison) | w_0(y0) w_0(y1) | d w_0 along H^-1 grad_lambda G, H the Hessian of -J |
| decoupled | w_0(y0) w_0(y1) | 0 |

On a shared sample, reward weights are centred over the responses to the same prompt (leave one out): their expectation
is 0, so this changes no expectation, and a reward that is constant over a prompt's responses gets no gradient.

`zero_order`, for comparison too, is the one rule that is no reweighting: it differentiates Phi along a random direction
of the reward's parameters.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base import importance
from jaxrlhf.base.problem import Sample
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel.schedules import Balanced, SigmaSchedule, as_schedule
from jaxrlhf.bilevel.stencil import ALONE, CENTRAL, FIVE_POINT, FORWARD, Stencil

Sampling = Literal["shared", "common", "independent"]


class RuleInputs(NamedTuple):
    """What a rule sees of a labelled sample.

    Attributes:
        sample: the pairs.
        log_weights: `[S, B, M, 2, T]`, cumulative log density ratios of the S lower iterates, tilt 0 first; of one
            iterate alone, `[1, ...]`, where every tilt has a sample of its own.
        log_ratio: `[B, M, 2, T]`, log(policy / reference) of tilt 0, step by step.
        coupled_cost: `[B, M]` at the present reward.
        sigma: `[]`, the perturbation, relative_sigma * beta.
        beta: weight of the lower level's KL.
        kl_price: weight of the upper level's KL.
        tilt: `[]`, the only tilt that this sample stands for, where every tilt has its own; None for a shared sample.
        lower: the iterate at tilt 0.
        levels: `lower -> importance.Values` on this sample, differentiable (also twice).
        log_weights_of: `lower -> [B, M, 2, T]`, differentiable.
    """

    sample: Sample
    log_weights: jax.Array
    log_ratio: jax.Array
    coupled_cost: jax.Array
    sigma: jax.Array
    beta: float | jax.Array
    kl_price: float | jax.Array
    tilt: jax.Array | None
    lower: Params
    levels: Callable[[Params], importance.Values]
    log_weights_of: Callable[[Params], jax.Array]


class Weights(NamedTuple):
    """What a rule returns.

    Attributes:
        coupled: `[B, M]`, multiplies the coupled cost.
        reward: `[B, M, 2, T]`, multiplies the discounted reward.
    """

    coupled: jax.Array
    reward: jax.Array


class Losses(NamedTuple):
    """The two levels of a problem without samples, on one batch.

    Attributes:
        upper: `(upper, lower) -> []`, G.
        lower: `(upper, lower) -> []`, -J.
        data: the batch.
        frozen: what no gradient touches.
    """

    upper: Callable[[Params, Params], jax.Array]
    lower: Callable[[Params, Params], jax.Array]
    data: Any
    frozen: Params


class HypergradientRule(NamedTuple):
    """A way to estimate grad Phi.

    Attributes:
        stencil: the points that lower iterates are kept at, in units of sigma.
        relative_sigma: schedule of sigma / beta, or `Balanced`, which follows the measured inner error.
        weights: `RuleInputs -> Weights`; None for `implicit_from_direction`, which is for losses, and for `zero_order`, whose stencil
            lies in the reward's parameters and not in the tilt.
        surrogate: `(Losses, lowers, sigma) -> (upper -> [])`, a function whose gradient is the hypergradient of a problem
            given as two losses; None for a rule that is a formula for policies, and for `zero_order`.
        sampling: "shared", one sample from tilt 0 serves every iterate; "independent", each iterate draws its own;
            "common", each draws its own from the same random numbers.
    """

    stencil: Stencil
    relative_sigma: SigmaSchedule | Balanced
    weights: Callable[[RuleInputs], Weights] | None
    surrogate: Callable[[Losses, Params, jax.Array], Callable[[Params], jax.Array]] | None
    sampling: Sampling = "shared"


def stencil(
    points: Stencil, relative_sigma: float | SigmaSchedule | Balanced, *, sampling: Sampling = "shared"
) -> HypergradientRule:
    """Returns the penalty gradient over a stencil, `sum_i c_i grad_phi [s_i G - J](phi, lambda_i)`.

    For `FORWARD` it is grad G(lambda_sigma) + [grad J(lambda_0) - grad J(lambda_sigma)] / sigma of arXiv 2410.15610.
    Its error is O(sigma^order). With a shared sample, differences of weights are taken through expm1 of log-ratio
    differences, which stays exact where the weights themselves agree to the last digit, and the variance does not depend
    on sigma. With a sample per tilt, as in the paper, it grows like sigma^-2 (independent) or sigma^-1 (common).

    Args:
        points: the stencil.
        relative_sigma: sigma / beta, or a schedule of it, or `Balanced`; positive. It is a Taylor step in the tilt, so
            its useful range does not depend on beta: the error is about 0.1 relative_sigma forward, 0.03 relative_sigma^2
            central.
        sampling: who draws the pairs, see `HypergradientRule`. Departure from the paper: shared by default.

    Raises:
        ValueError: relative_sigma is not positive, or the sampling is unknown.
    """
    _check_sampling(sampling)
    offsets, coefficients = jnp.asarray(points.offsets), jnp.asarray(points.coefficients)
    # c_i s_i = coefficient_i offset_i: sigma cancels.
    products = coefficients * offsets

    def weights(evidence: RuleInputs) -> Weights:
        log_weights, sample = evidence.log_weights, evidence.sample
        pair_weights = jnp.exp(importance.pair_log_weights(log_weights))
        dtype = pair_weights.dtype
        scale = coefficients.astype(dtype) / evidence.sigma.astype(dtype)
        if evidence.tilt is not None:
            # Only this tilt's term; the others come from their own samples, so there is nothing to subtract it from.
            tilt = evidence.tilt
            reward = -scale[tilt] * jnp.exp(log_weights[0])
            return Weights(products.astype(dtype)[tilt] * pair_weights[0], _share(sample) * reward)
        coupled = jnp.tensordot(products.astype(dtype), pair_weights, axes=1)
        # The coefficients sum to 0, so sum_i c_i w_i = w_0 sum_i c_i (w_i / w_0 - 1).
        excess = jnp.expm1(log_weights - log_weights[:1])
        reward = -jnp.exp(log_weights[0]) * jnp.tensordot(scale, excess, axes=1)
        return Weights(coupled, _share(sample) * _centred(reward, sample))

    def surrogate(losses: Losses, lowers: Params, sigma: jax.Array):
        def penalty(upper):
            of_upper = jax.vmap(lambda lower: losses.upper(upper, lower))(lowers)
            of_lower = jax.vmap(lambda lower: losses.lower(upper, lower))(lowers)
            scale = coefficients.astype(of_lower.dtype) / sigma.astype(of_lower.dtype)
            return products.astype(of_upper.dtype) @ of_upper + scale @ of_lower

        return penalty

    return HypergradientRule(points, as_schedule(relative_sigma), weights, surrogate, sampling)


def forward(
    relative_sigma: float | SigmaSchedule | Balanced = 0.05, *, sampling: Sampling = "shared"
) -> HypergradientRule:
    """Returns the paper's rule: two policies, error O(sigma). See `stencil`."""
    return stencil(FORWARD, relative_sigma, sampling=sampling)


def central(
    relative_sigma: float | SigmaSchedule | Balanced = 0.2, *, sampling: Sampling = "shared"
) -> HypergradientRule:
    """Returns the default rule: three policies, error O(sigma^2). See `stencil`."""
    return stencil(CENTRAL, relative_sigma, sampling=sampling)


def five_point(
    relative_sigma: float | SigmaSchedule | Balanced = 0.4, *, sampling: Sampling = "shared"
) -> HypergradientRule:
    """Returns the fourth-order rule: five policies, error O(sigma^4). See `stencil`."""
    return stencil(FIVE_POINT, relative_sigma, sampling=sampling)


def boltzmann() -> HypergradientRule:
    """Returns the rule for a lower level solved by pi proportional to reference * exp(R / beta).

    Then d pi(y) / d phi = pi(y) (grad R(y) - E grad R) / beta and

        grad Phi = E[grad_phi cost] + (1 / beta) Cov_pi(dG/dpi, grad_phi R).

    A pair contributes its cost to dG/dpi at each of its policy responses, which is right for costs that are not
    symmetric too (an annotator that favours a position); a KL price contributes kappa log(pi / reference). Exact at
    the optimal policy, biased in proportion to the inner error otherwise. No second policy and no sigma. On a Markov
    decision process with per-step weights the same formula holds with the return from a step onwards in place of the
    cost; this rule is the one-step form and refuses T > 1.

    Raises:
        ValueError: at trace time, when responses have more than one step, or when prompts have a single pair (nothing
            to compare its cost with; where draws are counted, a single draw gives no coupling).
    """

    def weights(evidence: RuleInputs) -> Weights:
        sample, cost = evidence.sample, evidence.coupled_cost
        if evidence.log_weights.shape[-1] != 1:
            raise ValueError("boltzmann needs one-step responses (T = 1); use a stencil on longer trajectories.")
        if cost.shape[1] < 2:
            raise ValueError("boltzmann needs at least 2 pairs a prompt, to compare a pair's cost with its prompt's.")
        joint = jnp.exp(importance.pair_log_weights(evidence.log_weights[0]))
        single = jnp.exp(evidence.log_weights[0])
        through_cost = joint * (cost - importance.others_mean(joint * cost, sample))
        log_ratio = evidence.log_ratio
        through_price = single * (log_ratio - importance.others_mean_responses(single * log_ratio, sample))
        reward = (
            sample.from_policy[None, None, :, None] * through_cost[:, :, None, None]
            + evidence.kl_price * _share(sample) * through_price
        )
        # Here the baseline is part of the formula: a single draw has none, and says nothing about a covariance.
        return Weights(joint, jnp.where(sample.num_draws > 1, reward, 0.0) / evidence.beta)

    return HypergradientRule(ALONE, as_schedule(1.0), weights, None)


def implicit(
    *, iterations: int = 10, method: Literal["conjugate_gradient", "neumann"] = "conjugate_gradient",
    damping: float = 1e-3, neumann_rate: float = 1.0,
) -> HypergradientRule:  # fmt: skip
    """Returns the implicit-function rule of PARL (arXiv 2308.02585), for comparison: it needs second derivatives.

        grad Phi = grad_phi G + d/dphi [ d/dlambda J . v ],    (H + damping I) v = grad_lambda G,    H = - d2 J / dlambda2

    by Hessian-vector products only. Exact where lambda maximises J and the linear system is solved; on drawn samples the
    inverse of a noisy Hessian is biased.

    Args:
        iterations: of the linear solver.
        method: "conjugate_gradient", or "neumann" for the truncated series `rate sum_k (I - rate H)^k g`.
        damping: added to the Hessian, which is singular along directions that do not change the policy (a softmax's
            constant) and may be indefinite away from the optimum.
        neumann_rate: below 2 / (largest eigenvalue of H).

    Raises:
        ValueError: the method is unknown or iterations < 1.
    """
    if method not in ("conjugate_gradient", "neumann"):
        raise ValueError(f"implicit solves by conjugate_gradient or neumann, got {method!r}.")
    if iterations < 1:
        raise ValueError(f"implicit needs at least 1 iteration, got {iterations}.")

    def solve(lower_loss: Callable[[Params], jax.Array], lower: Params, slope: Params) -> Params:
        def curvature(vector):
            product = jax.jvp(jax.grad(lower_loss), (lower,), (vector,))[1]
            return optax.tree.add_scale(product, damping, vector)

        if method == "conjugate_gradient":
            # As many iterations as were asked for: its own tolerance stops short of double precision.
            return jax.scipy.sparse.linalg.cg(curvature, slope, tol=1e-12, maxiter=iterations)[0]

        def term(_, total):
            residual = optax.tree.sub(slope, curvature(total))
            return optax.tree.add_scale(total, neumann_rate, residual)

        return jax.lax.fori_loop(0, iterations, term, optax.tree.zeros_like(slope))

    def weights(evidence: RuleInputs) -> Weights:
        lower, sample = evidence.lower, evidence.sample
        slope = jax.grad(lambda lower: evidence.levels(lower).upper)(lower)
        answer = solve(lambda lower: -evidence.levels(lower).lower, lower, slope)
        log_weights, change = jax.jvp(evidence.log_weights_of, (lower,), (answer,))
        reward = jnp.exp(log_weights) * change
        joint = jnp.exp(importance.pair_log_weights(log_weights))
        return Weights(joint, _share(sample) * _centred(reward, sample))

    def answer(losses: Losses, upper: Params, lower: Params) -> Params:
        slope = jax.grad(losses.upper, argnums=1)(upper, lower)
        return solve(lambda lower: losses.lower(upper, lower), lower, slope)

    surrogate = implicit_from_direction(answer).surrogate
    return HypergradientRule(ALONE, as_schedule(1.0), weights, surrogate)


def implicit_from_direction(answer: Callable[[Losses, Params, Params], Params]) -> HypergradientRule:
    """Returns the implicit-function rule for two losses whose policy's answer is known without solving for it.

        grad Phi = grad_phi G + d/dphi [ d/dlambda J . v ],    v = H^-1 grad_lambda G,    H = - d2 J / dlambda2

    -v is how the policy moves as G is mixed into its loss, d lambda* / ds at s = 0; soft optima have it in closed form
    (`jaxrlhf.mdp.incentives.boltzmann`). Only the mixed derivative along v is taken.

    Args:
        answer: `(losses, upper, lower) -> v`, parameters like `lower`; taken at the policy of tilt 0.
    """

    def surrogate(losses: Losses, lowers: Params, sigma: jax.Array):
        del sigma
        lower = jax.tree.map(lambda leaf: leaf[0], lowers)

        def of_upper(upper):
            fixed = jax.lax.stop_gradient(upper)
            along = jax.lax.stop_gradient(answer(losses, fixed, lower))
            moved = jax.jvp(lambda lower: losses.lower(upper, lower), (lower,), (along,))[1]
            return losses.upper(upper, lower) - moved

        return of_upper

    return HypergradientRule(ALONE, as_schedule(1.0), None, surrogate)


def decoupled() -> HypergradientRule:
    """Returns the rule of iterated RLHF: grad_phi G with the policy held fixed, the coupling ignored."""

    def weights(evidence: RuleInputs) -> Weights:
        coupled = jnp.exp(importance.pair_log_weights(evidence.log_weights[0]))
        return Weights(coupled, jnp.zeros_like(evidence.log_weights[0]))

    def surrogate(losses: Losses, lowers: Params, sigma: jax.Array):
        del sigma
        lower = jax.tree.map(lambda leaf: leaf[0], lowers)
        return lambda upper: losses.upper(upper, lower)

    return HypergradientRule(ALONE, as_schedule(1.0), weights, surrogate)


def zero_order(radius: float | SigmaSchedule = 0.1, *, sampling: Sampling = "shared") -> HypergradientRule:
    """Returns the two-point rule, for comparison: `u [Phi(phi + radius u) - Phi(phi - radius u)] / (2 radius)`.

    u is a standard normal direction in the reward's parameters, a fresh one each step. Unbiased for grad Phi up to
    O(radius^2) where the lower problems at both points are solved; its variance grows with the number of reward
    parameters. The lower iterates restart from the policy at phi at every step, so a `gradient` solver needs enough
    steps to answer. The reward model runs at three points.

    Args:
        radius: length of the step a coordinate, in the units of the reward's parameters, or a schedule of it; positive.
        sampling: as in `stencil`.

    Raises:
        ValueError: the radius is not positive or follows an inner error, or the sampling is unknown.
    """
    _check_sampling(sampling)
    if isinstance(radius, Balanced):
        raise ValueError("zero_order has no tilt whose inner error Balanced could follow; give a radius.")
    return HypergradientRule(CENTRAL, as_schedule(radius), None, None, sampling)


def in_reward(rule: HypergradientRule) -> bool:
    """Returns whether the rule's stencil lies in the reward's parameters: `zero_order`."""
    return rule.weights is None and rule.surrogate is None


def _check_sampling(sampling: str) -> None:
    if sampling not in ("shared", "common", "independent"):
        raise ValueError(f"sampling is shared, common or independent, got {sampling!r}.")


def _share(sample: Sample) -> jax.Array:
    return importance.policy_share(sample)


def _centred(reward: jax.Array, sample: Sample) -> Any:
    return reward - importance.others_mean_responses(reward, sample)
