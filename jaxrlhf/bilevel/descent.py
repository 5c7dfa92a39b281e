"""Bilevel descent: the algorithm, assembled from a problem, a hypergradient rule and a lower solver.

One outer step:

1. sample pairs from the lower iterate at tilt 0, and have them labelled (`propose`, then the annotator);
2. move every lower iterate lambda_i towards argmin s_i G - J on that labelled sample (the solver);
3. weigh the same sample by the rule and take one backward pass through the reward (the hypergradient);
4. apply the upper optimiser.

The lower iterates are one pytree, stacked on a leading axis S. One inner step makes the single-loop method,
many the double loop; the carried state is the warm start.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from jaxrlhf.base.problem import BilevelProblem, Labelled, Sample
from jaxrlhf.base.types import Batch, Key, Params
from jaxrlhf.bilevel.hypergradient import HypergradientRule, in_reward
from jaxrlhf.bilevel.levels import Levels, Points, loss_levels, over_tilts, sampled_levels
from jaxrlhf.bilevel.lower import LowerSolver, LowerTask
from jaxrlhf.bilevel.schedules import Balanced


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
        return jax.tree.map(lambda leaf: leaf[0], self.lowers)


class BilevelInfo(NamedTuple):
    """Diagnostics of one outer step, all scalars. What to do about each is in `docs/diagnostics.md`.

    Attributes:
        upper_loss: G at tilt 0, coupled and uncoupled parts, KL price included.
        value_gap: smallest J(lambda_0) - J(lambda_i) over the tilted iterates, at least 0 when the inner problems are
            solved on a shared sample; 0 for one-policy rules and for `zero_order`.
        residual_over_sigma: largest residual of the lower solver over the iterates, divided by sigma (by beta for
            one-policy rules). On drawn samples it contains the gradients' noise.
        hypergradient_norm: norm of the gradient that the upper optimiser receives.
        coupling_share: |coupling| / (|coupling| + |rest|) in [0, 1], where the two parts of the hypergradient, with and
            without the policy's answer, are compared at the reward model's outputs (in its parameters where every tilt
            has a sample of its own, along the direction under `zero_order`).
        ess_fraction: smallest (sum w)^2 / sum w^2 over the iterates, as a share of the sample in (0, 1].
        kl: KL(tilt 0 || reference) in nats, the estimator of the loss.
        entropy: - E log pi of tilt 0, in nats a response.
        collision_rate: share of pairs whose two responses coincide.
        labels: labels consumed by the step, pairs that the annotator skipped left out; an enumerated expectation
            consumes none.
    """

    upper_loss: jax.Array
    value_gap: jax.Array
    residual_over_sigma: jax.Array
    hypergradient_norm: jax.Array
    coupling_share: jax.Array
    ess_fraction: jax.Array
    kl: jax.Array
    entropy: jax.Array
    collision_rate: jax.Array
    labels: jax.Array


class BilevelAlgorithm(NamedTuple):
    """Pure functions.

    Attributes:
        init: `(key, upper, lower) -> BilevelState`. Copies its arguments, so that the state may be donated. Raises
            ValueError for policies in half precision.
        step: `(key, state, data, frozen) -> (BilevelState, BilevelInfo)`: propose, annotate, update.
        propose: `(key, state, data, frozen) -> Sample`, drawn from tilt 0; one sample a tilt, leaves `[S, ...]`, for rules
            that ask for it.
        update: `(key, state, labelled, frozen) -> (BilevelState, BilevelInfo)`, for labels that come from outside.
    """

    init: Callable[[Key, Params, Params], BilevelState]
    step: Callable[[Key, BilevelState, Batch, Params], tuple[BilevelState, BilevelInfo]]
    propose: Callable[[Key, BilevelState, Batch, Params], Sample]
    update: Callable[[Key, BilevelState, Labelled, Params], tuple[BilevelState, BilevelInfo]]


def bilevel_descent(
    problem: BilevelProblem,
    rule: HypergradientRule,
    solver: LowerSolver,
    upper_optimizer: optax.GradientTransformation,
    *,
    beta: float | jax.Array,
    annotate: Callable[[Key, Sample, Params], jax.Array] | None = None,
    max_importance_weight: float | None = None,
    sequential: bool = False,
) -> BilevelAlgorithm:
    """Descends Phi(phi) = G(phi, argmax_lambda J(phi, lambda)) with first-order gradients only.

    Args:
        problem: the four functions.
        rule: the hypergradient estimator, such as `central(relative_sigma=0.2)`.
        solver: the lower solver.
        upper_optimizer: optimiser of the reward parameters.
        beta: weight of the lower level's KL, positive; a traced value is not checked (`jaxrlhf.algorithms.target_kl` moves it).
        annotate: `(key, sample, frozen) -> labels [B, M, L]`, traceable; without it `step` is refused and the two halves
            remain.
        max_importance_weight: truncates importance weights to this value, at least 1; off by default. It trades variance for
            bias where an iterate strays from the sample, in the reported KL too, whose control variate is flat beyond
            the bound; watch `BilevelInfo.ess_fraction` first.
        sequential: whether the iterates are differentiated one after another, in the memory of one, in place of all at once.
            Right for large models; not where a mesh splits the iterates, nor for problems so small that loops cost.

    Raises:
        ValueError: beta, the KL price or the largest weight is out of range, or sigma is too large: with
            |s| kappa >= beta a tilted problem pays the policy for leaving the reference and has no minimiser. A schedule
            is checked at step 0.

    References:
        arXiv 2410.15610 (the forward stencil); arXiv 2309.01753 (F2SA). Departures: the stencil and the rule
        are free, tilts share one sample, and tilt 0 is always kept.
    """
    _check_beta(beta)
    _check_price(problem.kl_price, rule)
    if max_importance_weight is not None and not max_importance_weight >= 1:
        raise ValueError(
            f"max_importance_weight must be at least 1, got {max_importance_weight:g}: 1 is the weight on policy."
        )
    if rule.weights is None and not in_reward(rule):
        raise ValueError(
            "implicit_from_direction is for problems given as two losses; use a stencil, boltzmann or implicit here."
        )
    separate = rule.sampling != "shared"

    def keys_of(key):
        # The same random numbers for every tilt, or fresh ones.
        size = len(rule.stencil.offsets)
        return jnp.broadcast_to(key, (size, *key.shape)) if rule.sampling == "common" else jax.random.split(key, size)

    def propose(key, state, data, frozen):
        if separate:
            draw = over_tilts(lambda key, lower: problem.sample(key, lower, data, frozen))
            return draw(keys_of(key), state.lowers)
        return problem.sample(key, state.policy, data, frozen)

    def label(key, sample, frozen):
        if annotate is None:
            raise ValueError("step needs an annotator: give bilevel_descent one, or use propose and update.")
        ask = annotate
        if separate:
            return Labelled(sample, over_tilts(lambda key, sample: ask(key, sample, frozen))(keys_of(key), sample))
        return Labelled(sample, annotate(key, sample, frozen))

    def levels(points, labelled, frozen):
        return sampled_levels(
            problem,
            rule,
            beta,
            points,
            labelled,
            frozen,
            max_importance_weight=max_importance_weight,
            sequential=sequential,
        )

    def over(function):
        return over_tilts(function, sequential=sequential)

    return _assemble(levels, rule, solver, upper_optimizer, beta, propose, label, over)


def bilevel_descent_on_losses(
    upper_loss: Callable[[Params, Params, Batch, Params], jax.Array],
    lower_loss: Callable[[Params, Params, Batch, Params], jax.Array],
    rule: HypergradientRule,
    solver: LowerSolver,
    upper_optimizer: optax.GradientTransformation,
    *,
    beta: float = 1.0,
) -> BilevelAlgorithm:
    """As `bilevel_descent`, for a problem without samples: two losses `(upper, lower, data, frozen) -> []`.

    `lower_loss` is minimised in `lower`; `beta` only sets the unit of sigma. `propose` hands `data` through.

    Raises:
        ValueError: beta is out of range, or the rule is a formula for policies (`boltzmann`) or for samples of their own.
    """
    _check_beta(beta)
    if rule.surrogate is None and not in_reward(rule):
        raise ValueError("A problem given as two losses has no policy for boltzmann; use a stencil rule.")
    if rule.sampling != "shared":
        raise ValueError("A problem given as two losses has no samples; leave the rule's sampling shared.")

    def levels(points, data, frozen):
        return loss_levels(upper_loss, lower_loss, rule, points, data, frozen)

    return _assemble(
        levels,
        rule,
        solver,
        upper_optimizer,
        beta,
        propose=lambda key, state, data, frozen: data,
        label=lambda key, data, frozen: data,
    )


def _assemble(
    levels: Callable[[Points, Any, Params], Levels],
    rule: HypergradientRule,
    solver: LowerSolver,
    upper_optimizer: optax.GradientTransformation,
    beta: float | jax.Array,
    propose: Callable,
    label: Callable,
    over: Callable[[Callable], Callable] = over_tilts,
) -> BilevelAlgorithm:
    offsets = rule.stencil.offsets

    def init(key: Key, upper: Params, lower: Params) -> BilevelState:
        del key
        _check_precision(lower)
        # The dtype is said, so that a weakly typed leaf becomes a strong one and the step is not compiled twice.
        upper = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.asarray(leaf).dtype, copy=True), upper)
        lower = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.asarray(leaf).dtype), lower)
        lowers = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(offsets), axis=0), lower)
        return BilevelState(
            step=jnp.zeros((), jnp.int32),
            upper=upper,
            lowers=lowers,
            upper_optimizer=upper_optimizer.init(upper),
            solver=solver.init(lowers),
            inner_error=jnp.full((), jnp.inf, jnp.result_type(float)),
        )

    def update(key: Key, state: BilevelState, labelled: Any, frozen: Params) -> tuple[BilevelState, BilevelInfo]:
        schedule = rule.relative_sigma
        balanced = isinstance(schedule, Balanced)
        relative_sigma = jnp.asarray(schedule.best(state.inner_error) if balanced else schedule(state.step))
        lowers, direction = state.lowers, None
        # A tilt is measured against beta, a step of zero_order in the reward's own units.
        sigma = relative_sigma if in_reward(rule) else beta * relative_sigma
        if in_reward(rule):
            key, direction_key = jax.random.split(key)
            direction = optax.tree.random_like(direction_key, state.upper, jax.random.normal)
            # The direction is new, so what the other iterates knew is not: all start from the policy of phi.
            lowers = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), lowers)
        points = Points(state.upper, sigma * jnp.asarray(offsets), direction)
        both = levels(points, labelled, frozen)

        task = LowerTask(
            loss=both.tilted_loss,
            proximal_loss=both.proximal_loss,
            upper_of=points.upper_of,
            tilt_of=points.tilt_of,
            stencil=rule.stencil,
            sigma=sigma,
            labelled=labelled,
            frozen=frozen,
            over=over,
        )
        lowers, solver_state, residuals = solver.step(key, lowers, state.solver, task)
        inner_error = state.inner_error
        if balanced:
            slope = beta * _slope_of_upper(both, points, lowers)
            # Nothing to answer: there is no error to balance, and the largest sigma will do.
            measured = jnp.where(slope > 0, jnp.max(residuals) / jnp.where(slope > 0, slope, 1.0), jnp.inf)
            inner_error = measured.astype(inner_error.dtype)
        gradient, report = both.hypergradient(lowers, sigma)
        updates, upper_state = upper_optimizer.update(gradient, state.upper_optimizer, state.upper)
        info = BilevelInfo(
            residual_over_sigma=jnp.max(residuals) / sigma,
            hypergradient_norm=optax.tree.norm(gradient),
            **report,
        )
        upper = optax.apply_updates(state.upper, updates)
        return BilevelState(state.step + 1, upper, lowers, upper_state, solver_state, inner_error), info

    def step(key: Key, state: BilevelState, data: Batch, frozen: Params) -> tuple[BilevelState, BilevelInfo]:
        sample_key, label_key, update_key = jax.random.split(key, 3)
        sample = propose(sample_key, state, data, frozen)
        return update(update_key, state, label(label_key, sample, frozen), frozen)

    return BilevelAlgorithm(init, step, propose, update)


def _slope_of_upper(both: Levels, points: Points, lowers: Params) -> jax.Array:
    """Returns |grad_lambda G| at tilt 0, from two tilts of one function."""

    def difference(lower):
        return both.tilted_loss(lower, 1) - both.tilted_loss(lower, 0)

    slope = jax.grad(difference)(jax.tree.map(lambda leaf: leaf[0], lowers))
    return optax.tree.norm(slope) / jnp.abs(points.tilts[1])


def _check_precision(lower: Params) -> None:
    for leaf in jax.tree.leaves(lower):
        dtype = jnp.asarray(leaf).dtype
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            raise ValueError(
                f"The policy's parameters are {dtype}, in which a tilt rounds to nothing; keep them in float32 and cast "
                "inside log_prob."
            )


def _check_beta(beta: float | jax.Array) -> None:
    # A traced one, a controller's, cannot be looked at.
    if not isinstance(beta, jax.core.Tracer) and not beta > 0:
        raise ValueError(f"beta must be positive, got {beta:g}: it keeps the policy near the reference.")


def _check_price(kl_price: float | jax.Array, rule: HypergradientRule) -> None:
    if isinstance(kl_price, jax.core.Tracer):
        return
    if kl_price < 0:
        raise ValueError(f"The KL price must not be negative, got {kl_price:g}.")
    if in_reward(rule):
        return
    schedule = rule.relative_sigma
    with jax.ensure_compile_time_eval():
        first = schedule.largest if isinstance(schedule, Balanced) else schedule(jnp.zeros((), jnp.int32))
    relative_sigma = float(first)
    reach = max(-offset for offset in rule.stencil.offsets) * relative_sigma
    if reach * kl_price >= 1:
        raise ValueError(
            f"relative_sigma {relative_sigma:g} is too large for an objective with KL price {kl_price:g}: a tilted "
            f"policy would be paid for leaving the reference. Keep it below {relative_sigma / (reach * kl_price):g}."
        )
