"""Bilevel descent: the algorithm, assembled from a problem, a hypergradient rule and a lower solver.

One outer step:

1. sample pairs from the lower iterate at tilt 0 (`propose`), and have them labelled (the annotator);
2. move every lower iterate lambda_i towards argmin s_i G - J on that labelled sample (the solver);
3. weight the same sample by the rule and take one backward pass through the reward (the hypergradient);
4. apply the upper optimiser.

Steps 2 to 4 are `update`. The lower iterates are one pytree, stacked on a leading axis S (`iterates`). One inner step
makes the single-loop method, many the double loop; the carried state is the warm start.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.base.algorithm import Algorithm, Annotator, compose, owned
from jaxrlhf.base.problem import BilevelProblem
from jaxrlhf.base.types import Batch, Key, Params
from jaxrlhf.bilevel import iterates
from jaxrlhf.bilevel.checks import check_beta, check_precision, check_problem, check_reach
from jaxrlhf.bilevel.estimate.interface import Levels, Setting
from jaxrlhf.bilevel.estimate.own_samples import on_own_samples
from jaxrlhf.bilevel.estimate.shared_sample import on_shared_sample
from jaxrlhf.bilevel.estimate.two_losses import on_two_losses
from jaxrlhf.bilevel.rules.rule import HypergradientRule, Losses
from jaxrlhf.bilevel.sampling import labeller, proposer
from jaxrlhf.bilevel.schedules import Balanced, SigmaSchedule
from jaxrlhf.bilevel.solvers.solver import LowerSolver, LowerTask


class BilevelState(NamedTuple):
    """Everything that is carried from one outer step to the next.

    Attributes:
        step: `[]` int32, outer steps taken.
        upper: reward parameters phi.
        lowers: policy parameters lambda_i, leaves `[S, ...]`, tilt 0 first.
        upper_optimizer: the upper optimiser's state.
        solver: the lower solver's state.
        inner_error: `[]`, what `schedules.Balanced` chooses the next sigma by; infinite at first, and unused otherwise.
    """

    step: jax.Array
    upper: Params
    lowers: Params
    upper_optimizer: Any
    solver: Any
    inner_error: jax.Array

    @property
    def policy(self) -> Params:
        """The policy at tilt 0: the one that samples, is reported and is deployed."""
        return iterates.first(self.lowers)


class BilevelInfo(NamedTuple):
    """Diagnostics of one outer step, all scalars. What to do about each is in `docs/diagnostics.md`.

    Attributes:
        upper_loss: G at tilt 0, coupled and uncoupled parts, KL price included.
        value_gap: smallest J(lambda_0) - J(lambda_i) over the tilted iterates, at least 0 when the inner problems are
            solved on a shared sample; 0 for one-policy rules and for zero-order descent.
        residual_over_sigma: largest residual of the lower solver over the iterates, divided by sigma (by beta for
            one-policy rules). On drawn samples it contains the gradients' noise.
        hypergradient_norm: norm of the gradient that the upper optimiser receives.
        coupling_fraction: |coupling| / (|coupling| + |fixed-policy gradient|) in [0, 1]: how much of the hypergradient
            comes from the best response's dependence on the reward. Compared at the reward model's outputs; in its
            parameters where every tilt has a sample of its own, along the direction in zero-order descent.
        ess_fraction: smallest effective sample size (sum w)^2 / sum w^2 over the iterates, as a fraction of the sample.
        kl: KL(tilt 0 || reference) in nats per response, discounted over steps, after the solver's step; by the estimator
            of the loss.
        entropy: - E log pi of tilt 0, in nats per response, likewise.
        collision_rate: fraction of pairs whose two responses coincide.
        labels: labels consumed by the step, pairs that the annotator skipped left out; an enumerated expectation
            consumes none.
        coupled_slope: d E[coupled cost] / d alpha along reference * (policy / reference)^exp(alpha), at tilt 0
            (`importance.tempering_slopes`). `coupled_slope + kappa kl_slope` drives a learned scale (`preferences.scale`).
        kl_slope: d KL / d alpha, likewise, in nats. `-coupled_slope / kl_slope`, both averaged over steps, is the
            marginal price of KL: what the next nat buys, in the unit of the cost.
    """

    upper_loss: jax.Array
    value_gap: jax.Array
    residual_over_sigma: jax.Array
    hypergradient_norm: jax.Array
    coupling_fraction: jax.Array
    ess_fraction: jax.Array
    kl: jax.Array
    entropy: jax.Array
    collision_rate: jax.Array
    labels: jax.Array
    coupled_slope: jax.Array
    kl_slope: jax.Array


def bilevel_descent(
    problem: BilevelProblem,
    rule: HypergradientRule,
    solver: LowerSolver,
    upper_optimizer: optax.GradientTransformation,
    *,
    beta: float | jax.Array,
    annotate: Annotator | None = None,
    max_importance_weight: float | None = None,
    sequential: bool = False,
) -> Algorithm:
    """Descends Phi(phi) = G(phi, argmax_lambda J(phi, lambda)); first-order gradients only, but for `implicit`.

    Args:
        problem: sample, log_prob, reward, cost, and the KL price.
        rule: the hypergradient estimator, such as `central(relative_sigma=0.2)`.
        solver: the lower solver: `tangent` for networks, `closed_form` for tables, `gradient` for anything.
        upper_optimizer: optimiser of the reward parameters.
        beta: weight of the lower level's KL, positive; a traced value is not checked (`algorithms.target_kl` moves it).
        annotate: `(key, sample, frozen) -> labels [B, M, L]`, traceable; without it `step` raises ValueError and
            only `propose` and `update` remain.
        max_importance_weight: truncates importance weights to this value, at least 1; off by default. It trades variance
            for bias where an iterate strays from the sample, in the reported KL too, whose control variate is flat beyond
            the bound; watch `BilevelInfo.ess_fraction` first.
        sequential: computes the iterates one after another instead of with `vmap`, in the memory of one. For large models;
            not for tiny problems, nor where a mesh shards the iterates.

    Returns:
        The algorithm, with `BilevelState` and `BilevelInfo`. `init` raises ValueError for policies in half precision.

    Raises:
        ValueError: beta, the KL price or max_importance_weight is out of range; the rule is for two losses only; or sigma
            is too large: with -s kappa >= beta at a negative tilt s, the tilted problem pays the policy for leaving the
            reference and has no minimiser. A schedule is checked at step 0.

    References:
        arXiv 2410.15610 (the forward stencil); arXiv 2309.01753 (F2SA). Departures: the stencil and the rule
        are free, tilts share one sample, and tilt 0 is always kept.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxrlhf import bandit, bilevel, objectives, preferences
        >>> gold, reference = jnp.array([[2.0, 0.0, 1.0]]), jnp.full((1, 3), -jnp.log(3.0))
        >>> frozen = bandit.Bandit(jnp.eye(3)[None], gold, reference)
        >>> reward, objective = (lambda phi, features: features @ phi), objectives.utility(kl_price=0.1)
        >>> problem = bandit.bandit_problem(reward, objective)
        >>> solver = bilevel.closed_form(lambda task, index: reference + reward(task.upper, frozen.features) / 0.4)
        >>> annotate = preferences.expected_annotator(bandit.gold_score)
        >>> algorithm = bilevel.bilevel_descent(
        ...     problem, bilevel.boltzmann(), solver, optax.sgd(1.0), beta=0.4, annotate=annotate
        ... )
        >>> state, step = algorithm.init(jax.random.key(0), jnp.zeros(3), reference), jax.jit(algorithm.step)
        >>> for number in range(30):
        ...     state, info = step(jax.random.key(number), state, None, frozen)
        >>> jax.nn.softmax(state.policy).tolist()  # the best one: reference * exp(win rate / 0.1)
        [[0.86, 0.03, 0.1]]
    """
    check_problem(problem, beta, max_importance_weight)
    check_reach(problem.kl_price, rule)
    if "policies" not in rule.applies_to:
        raise ValueError(f"{rule.name} is for problems given as two losses; use a stencil, boltzmann or implicit here.")
    setting = Setting(problem, rule, beta, max_importance_weight, sequential)
    on_samples = on_shared_sample if rule.sampling == "shared" else on_own_samples
    count = len(rule.stencil.offsets)

    def levels_at(upper: Params, tilts: jax.Array, labelled: Any, frozen: Params) -> Levels:
        return on_samples(setting, upper, tilts, labelled, frozen)

    return _descent(
        levels_at, rule, solver, upper_optimizer, beta, sequential,
        propose=proposer(problem, rule.sampling, count), label=labeller(annotate, rule.sampling, count),
    )  # fmt: skip


def bilevel_descent_on_losses(
    upper_loss: Callable[[Params, Params, Batch, Params], jax.Array],
    lower_loss: Callable[[Params, Params, Batch, Params], jax.Array],
    rule: HypergradientRule,
    solver: LowerSolver,
    upper_optimizer: optax.GradientTransformation,
    *,
    beta: float = 1.0,
) -> Algorithm:
    """As `bilevel_descent`, for a problem without samples: two losses `(upper, lower, data, frozen) -> []`.

    `lower_loss` is minimised in `lower`; `beta` only sets the unit of sigma. `propose` hands `data` through.

    Raises:
        ValueError: beta is out of range, or the rule is a formula for policies (`boltzmann`) or for samples of their own.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxrlhf import bilevel
        >>> def upper(phi, x, data, frozen):
        ...     return (x - 3.0) ** 2
        >>> def lower(phi, x, data, frozen):  # so that x*(phi) = 2 phi, and the best phi is 1.5
        ...     return (x - 2.0 * phi) ** 2
        >>> solver = bilevel.gradient(bilevel.shared_adam(0.1), steps=5)
        >>> rule, optimizer = bilevel.central(0.1), optax.adam(0.1)
        >>> algorithm = bilevel.bilevel_descent_on_losses(upper, lower, rule, solver, optimizer)
        >>> state, step = algorithm.init(jax.random.key(0), jnp.zeros(()), jnp.zeros(())), jax.jit(algorithm.step)
        >>> for number in range(200):
        ...     state, info = step(jax.random.key(number), state, None, None)
        >>> round(float(state.upper), 1)
        1.5
    """
    check_beta(beta)
    if "losses" not in rule.applies_to:
        raise ValueError(f"A problem given as two losses has no policy for {rule.name}; use a stencil rule.")
    if rule.sampling != "shared":
        raise ValueError("A problem given as two losses has no samples; leave the rule's sampling shared.")

    def levels_at(upper: Params, tilts: jax.Array, data: Batch, frozen: Params) -> Levels:
        return on_two_losses(losses_on(upper_loss, lower_loss, data, frozen), rule, upper, tilts)

    return _descent(
        levels_at, rule, solver, upper_optimizer, beta, sequential=False, propose=pass_data, label=unlabelled
    )


def _descent(
    levels_at: Callable[[Params, jax.Array, Any, Params], Levels],
    rule: HypergradientRule,
    solver: LowerSolver,
    upper_optimizer: optax.GradientTransformation,
    beta: float | jax.Array,
    sequential: bool,
    *,
    propose: Callable,
    label: Callable | None,
) -> Algorithm:
    """Assembles the algorithm.

    Args:
        levels_at: `(upper, tilts, labelled, frozen) -> Levels`.
        rule, solver, upper_optimizer, beta, sequential: of `bilevel_descent`.
        propose, label: the first two stages of `step`.
    """
    offsets = rule.stencil.offsets

    def init(key: Key, upper: Params, lower: Params) -> BilevelState:
        del key
        return first_state(upper, lower, upper_optimizer, solver.init, len(offsets))

    def update(key: Key, state: BilevelState, labelled: Any, frozen: Params) -> tuple[BilevelState, BilevelInfo]:
        sigma = beta * _relative_sigma(rule.relative_sigma, state)
        tilts = sigma * jnp.asarray(offsets)
        # The reward model's forward pass; its backward pass is levels.hypergradient.
        levels = levels_at(state.upper, tilts, labelled, frozen)
        task = LowerTask(
            loss=levels.tilted_loss,
            upper=state.upper,
            tilts=tilts,
            stencil=rule.stencil,
            sigma=sigma,
            labelled=labelled,
            frozen=frozen,
            shared=levels.shared,
            map=lambda function: iterates.map_iterates(function, sequential=sequential),
        )
        lowers, solver_state, residuals = solver.step(key, state.lowers, state.solver, task)
        inner_error = state.inner_error
        if isinstance(rule.relative_sigma, Balanced):
            inner_error = _measured_error(levels, tilts, lowers, residuals, beta).astype(inner_error.dtype)
        gradient, report = levels.hypergradient(lowers, sigma)
        updates, upper_state = upper_optimizer.update(gradient, state.upper_optimizer, state.upper)
        upper = optax.apply_updates(state.upper, updates)
        info = BilevelInfo(
            residual_over_sigma=jnp.max(residuals) / sigma,
            hypergradient_norm=optax.tree.norm(gradient),
            **report._asdict(),
        )
        return BilevelState(state.step + 1, upper, lowers, upper_state, solver_state, inner_error), info

    return Algorithm(init, compose(propose, label, update), propose, update)


def first_state(
    upper: Params, lower: Params, upper_optimizer: optax.GradientTransformation, init_solver: Callable, count: int
) -> BilevelState:
    """Returns the state before the first step, with `count` copies of the policy.

    Raises:
        ValueError: the policy's parameters are in half precision.
    """
    check_precision(lower)
    upper, lowers = owned(upper), iterates.stack(owned(lower), count)
    return BilevelState(
        step=jnp.zeros((), jnp.int32),
        upper=upper,
        lowers=lowers,
        upper_optimizer=upper_optimizer.init(upper),
        solver=init_solver(lowers),
        inner_error=jnp.full((), jnp.inf, jnp.result_type(float)),
    )


def losses_on(upper_loss: Callable, lower_loss: Callable, data: Batch, frozen: Params) -> Losses:
    """Returns two losses on one batch."""
    return Losses(
        upper_loss=lambda upper, lower: upper_loss(upper, lower, data, frozen),
        lower_loss=lambda upper, lower: lower_loss(upper, lower, data, frozen),
        data=data,
        frozen=frozen,
    )


def pass_data(key: Key, state: Any, data: Batch, frozen: Params) -> Batch:
    """The `propose` of a problem without samples."""
    return data


def unlabelled(key: Key, data: Batch, frozen: Params) -> Batch:
    """Returns the batch unchanged: a problem without samples has nothing to label."""
    return data


def _relative_sigma(schedule: SigmaSchedule | Balanced, state: BilevelState) -> jax.Array:
    return jnp.asarray(schedule.best(state.inner_error) if isinstance(schedule, Balanced) else schedule(state.step))


def _measured_error(
    levels: Levels, tilts: jax.Array, lowers: Params, residuals: jax.Array, beta: float | jax.Array
) -> jax.Array:
    """Returns the largest residual over beta |grad_lambda G| at tilt 0, for `Balanced`; infinite where G has no gradient.

    The gradient is a difference of two tilted losses, on samples of their own a noisy one. Where it vanishes there is no
    error to balance, and the largest sigma will do.
    """

    def difference(lower: Params) -> jax.Array:
        return levels.tilted_loss(lower, 1) - levels.tilted_loss(lower, 0)

    norm = beta * (optax.tree.norm(jax.grad(difference)(iterates.first(lowers))) / jnp.abs(tilts[1]))
    return jnp.where(norm > 0, jnp.max(residuals) / jnp.where(norm > 0, norm, 1.0), jnp.inf)
