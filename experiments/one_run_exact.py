"""The exact problems of `one_run.py`: responses are listed, policies are tables, labels are drawn, results are exact.

A bandit has random arms; a language has all replies of three slots, whose features add up over the chosen words. The
learner's reward is linear in 4 features. The annotator's gold reward is one of

- `linear`: linear in the features, so that the reward can hold it;
- `confounded`: linear in three of them, the fourth follows the first and lowers the gold reward;
- `checklist`: worth something only where every feature passes a threshold;
- `gated`: linear where the first feature is positive, poor elsewhere;
- `saturating`: rises with a sum of the features up to a point, then falls.

Bilevel descent and iterated RLHF solve their lower level in closed form; RLOO, PPO and GRPO climb it by Adam on the table,
and online and offline DPO need no reward.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import bandit, bilevel, exact, known, objectives, preferences
from jaxrlhf.algorithms.actor_critic import actor_critic
from jaxrlhf.algorithms.direct_preference import direct_preference, dpo
from jaxrlhf.algorithms.group_relative import group_relative
from jaxrlhf.algorithms.target_kl import ramp, target_kl
from jaxrlhf.preferences.scale import learn_scale, scale_optimizer, scaled, with_scale

FAMILIES = ("linear", "confounded", "checklist", "gated", "saturating")
REALISABLE = ("linear", "confounded")
KINDS = ("bandit", "language")
SCALED, PLAIN, ITERATED, CONTROLLER = "bilevel, learned scale", "bilevel", "iterated RLHF", "KL controller"
METHODS = (SCALED, PLAIN, ITERATED, "RLOO", "PPO", "GRPO", "online DPO", "offline DPO", CONTROLLER)
BETAS = (0.1, 0.25, 0.6, 1.5, 4.0)
TARGETS = (0.25, 0.75, 1.5, 3.0, 4.0)
"""KLs in nats, the controller's setting in place of beta; the largest possible KL is log 64 = 4.2."""

CONTEXTS, RESPONSES, FEATURES = 8, 64, 4


class Budget(NamedTuple):
    """What every run may use: `steps` of `pairs` labelled pairs in each context, by `seeds` seeds; and the sizes."""

    seeds: int = 5
    steps: int = 200
    pairs: int = 16
    contexts: int = CONTEXTS
    features: int = FEATURES

    @property
    def labels(self) -> int:
        """Labels of one run."""
        return self.contexts * self.pairs * self.steps


class Rates(NamedTuple):
    """Adam's learning rates (cosine to 0), tuned on other instances, and the weight of the bilevel methods' utility."""

    reward: float = 0.02
    scale: float = 0.05
    policy: float = 0.05
    direct: float = 0.05
    weight: float = 40.0


def features_of(kind: str, key: jax.Array) -> jax.Array:
    """Returns features `[C, N, F]`, of unit variance."""
    if kind == "bandit":
        return jax.random.normal(key, (CONTEXTS, RESPONSES, FEATURES))
    word_key, context_key = jax.random.split(key)
    words = jax.random.normal(word_key, (3, 4, FEATURES))
    slots = jnp.stack(jnp.meshgrid(*[jnp.arange(4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    replies = jnp.sum(words[jnp.arange(3), slots], axis=1)
    shifts = 0.5 * jax.random.normal(context_key, (CONTEXTS, 1, FEATURES))
    replies = jnp.broadcast_to(replies, (CONTEXTS, RESPONSES, FEATURES)) + shifts
    mean, spread = (function(replies, axis=(0, 1), keepdims=True) for function in (jnp.mean, jnp.std))
    return (replies - mean) / spread


def problem_of(family: str, kind: str, instance: int) -> bandit.Bandit:
    """Returns an instance of a family; the reference is uniform.

    Raises:
        ValueError: there is no such family or kind.
    """
    if kind not in KINDS or family not in FAMILIES:
        raise ValueError(f"A problem is one of {', '.join(FAMILIES)} on one of {', '.join(KINDS)}: {family}, {kind}.")
    feature_key, weight_key = jax.random.split(jax.random.key(instance))
    features = features_of(kind, feature_key)
    weights = jnp.abs(jax.random.normal(weight_key, (FEATURES,))) + 0.3
    weights = 2.0 * weights / jnp.linalg.norm(weights)
    if family == "confounded":
        features = features.at[..., 3].set(0.8 * features[..., 0] + 0.6 * features[..., 3])
    linear = features @ weights
    gold = {
        "linear": linear,
        "confounded": linear - weights[3] * features[..., 3] - 2.0 * weights[3] * jnp.maximum(features[..., 3], 0.0),
        "checklist": 4.0 * jnp.all(features > -0.2, axis=-1),
        "gated": jnp.where(features[..., 0] > 0, 1.5 * (linear - weights[0] * features[..., 0]), -1.5),
        "saturating": 3.0 * jnp.tanh(linear) - 2.0 * jnp.maximum(linear - 2.0, 0.0),
    }[family]
    reference = jnp.full((CONTEXTS, RESPONSES), -jnp.log(1.0 * RESPONSES))
    return bandit.Bandit(features, gold.astype(features.dtype), reference)


class Bounds(NamedTuple):
    """Utilities, exact: of the reference, of the best policy, and the best found in the reward's class."""

    reference: float
    optimum: float
    best_in_class: float


def bounds_of(frozen: bandit.Bandit, kl_price: float, *, restarts: int = 16, steps: int = 1500) -> Bounds:
    """Returns the bounds at a price; the class's best by exact ascent from random starts."""
    wins = exact.win_rates(frozen.reference, frozen.gold)

    def ascend(start):
        optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))

        def step(carry, _):
            reward, state = carry
            gradient = jax.grad(lambda reward: -utility_of_reward(reward, frozen, kl_price))(reward)
            updates, state = optimizer.update(gradient, state, reward)
            return (optax.apply_updates(reward, updates), state), None

        (reward, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
        return utility_of_reward(reward, frozen, kl_price)

    starts = 1.5 * jax.random.normal(jax.random.key(2), (restarts, frozen.features.shape[-1]))
    best = jnp.max(jax.jit(jax.vmap(ascend))(starts))
    return Bounds(0.5, float(exact.soft_value(wins, frozen.reference, kl_price)), float(best))


def utility_of_reward(reward: Any, frozen: bandit.Bandit, kl_price: float) -> jax.Array:
    """Returns the utility of the best response to a linear reward, at beta 1."""
    log_policy = exact.soft_policy(known.linear_reward(reward, frozen.features), frozen.reference, 1.0)
    result = exact.evaluate_policy(log_policy, frozen.reference, frozen.gold, 1.0)
    return result.win_rate - kl_price * result.kl


def closed_form(reward: Callable, beta: Any) -> bilevel.LowerSolver:
    """Returns the exact solver of the lower level at tilt 0."""
    return bilevel.closed_form(
        lambda task, index: task.frozen.reference + reward(task.upper, task.frozen.features) / beta
    )


def bilevel_method(name: str, beta: Any, kl_price: float, budget: Budget, rates: Rates) -> Any:
    """Returns bilevel descent by the Boltzmann rule, with or without a learned scale, and its first reward."""
    objective = objectives.add(
        objectives.likelihood(coupled=False), objectives.utility(kl_price=kl_price, weight=rates.weight)
    )
    problem = bandit.bandit_problem(known.linear_reward, objective, pairs=budget.pairs)
    optimizer, reward, first = cosine(rates.reward, budget), known.linear_reward, first_reward(budget)
    if name == SCALED:
        problem, reward, first = learn_scale(problem, beta=beta), scaled(reward), with_scale(first)
        optimizer = scale_optimizer(optimizer, cosine(rates.scale, budget))
    solver = closed_form(reward, beta)
    return bilevel.bilevel_descent(
        problem, bilevel.boltzmann(), solver, optimizer, beta=beta, annotate=annotator()
    ), first


def iterated_method(name: str, beta: Any, budget: Budget, rates: Rates) -> Any:
    """Returns iterated RLHF: the reward fits the step's labels, the policy is solved for it or climbs it."""
    problem = bandit.bandit_problem(known.linear_reward, objectives.likelihood(coupled=False), pairs=budget.pairs)
    if name == ITERATED:
        solver = closed_form(known.linear_reward, beta)
    else:
        gradient = {
            "RLOO": bilevel.loss_gradient,
            "GRPO": lambda: group_relative(problem, beta=beta),
            "PPO": lambda: actor_critic(
                problem, state_value, jnp.zeros(budget.contexts), optax.adam(0.1), beta=beta, trace=1.0
            ),
        }[name]()
        solver = bilevel.tangent(cosine(rates.policy, budget), optax.set_to_zero(), steps=4, policy_gradient=gradient)
    return bilevel.bilevel_descent(
        problem, bilevel.decoupled(), solver, cosine(rates.reward, budget), beta=beta, annotate=annotator()
    ), first_reward(budget)


def direct_method(name: str, beta: Any, budget: Budget, rates: Rates) -> Any:
    """Returns DPO on pairs of the policy, or of the reference."""
    problem = bandit.bandit_problem(
        known.linear_reward, objectives.likelihood(), pairs=budget.pairs, against_reference=False
    )
    sampler = (lambda policy, frozen: frozen.reference) if name == "offline DPO" else (lambda policy, frozen: policy)
    optimizer = cosine(rates.direct, budget)
    return direct_preference(problem, dpo(beta=beta), optimizer, annotate=annotator(), sampler=sampler), ()


def method_of(name: str, start: Any, kl_price: float, budget: Budget, rates: Rates) -> Any:
    """Returns `(algorithm, first upper parameters)` of a method in `METHODS` at a beta, or at the controller's target."""
    if name in (SCALED, PLAIN):
        return bilevel_method(name, start, kl_price, budget, rates)
    if name == CONTROLLER:
        target = ramp(start, steps=budget.steps // 2)
        make = lambda beta: iterated_method(ITERATED, beta, budget, rates)[0]  # noqa: E731
        return target_kl(make, target=target, beta=0.6, gain=0.05), first_reward(budget)
    if name.endswith("DPO"):
        return direct_method(name, start, budget, rates)
    return iterated_method(name, start, budget, rates)


def state_value(critic: jax.Array, sample: Any, frozen: bandit.Bandit) -> jax.Array:
    """The value of a context, `[B, M, 2, 1]`."""
    del frozen
    return jnp.broadcast_to(critic[sample.prompts][:, None, None, None], sample.behaviour_log_prob.shape)


def first_reward(budget: Budget) -> jax.Array:
    """Returns the first reward, nearly 0."""
    return jnp.full(budget.features, 0.01)


def annotator() -> Any:
    """Returns the annotator: one label a pair, drawn by Bradley-Terry on gold."""
    return preferences.gold_annotator(bandit.gold_score)


def cosine(rate: float, budget: Budget) -> optax.GradientTransformation:
    """Returns Adam at a learning rate that falls to 0."""
    return optax.adam(optax.cosine_decay_schedule(rate, budget.steps))


class Outcome(NamedTuple):
    """What a method reached.

    Attributes:
        starts: beta, or the target KL, of each column.
        utility, win_rate, kl, scale: `[seeds, starts]`, exact; the scale is 1 where none is learned.
        labels_to_95: `[seeds, starts]`, labels after which a run kept 95% of its final gain; NaN where it gained nothing.
    """

    starts: tuple[float, ...]
    utility: np.ndarray
    win_rate: np.ndarray
    kl: np.ndarray
    scale: np.ndarray
    labels_to_95: np.ndarray


def run_method(
    name: str, frozen: bandit.Bandit, kl_price: float, budget: Budget, rates: Rates, *, first_seed: int = 1
) -> Outcome:
    """Runs a method from every start, by every seed, in one program."""
    starts = TARGETS if name == CONTROLLER else BETAS
    run = functools.partial(_run, name, kl_price, budget, rates, frozen)
    over_starts = jax.vmap(run, in_axes=(0, None))
    keys = jax.random.split(jax.random.key(first_seed), budget.seeds)
    results = jax.jit(jax.vmap(over_starts, in_axes=(None, 0)))(jnp.asarray(starts), keys)
    return Outcome(starts, *(np.asarray(leaf, float) for leaf in results))


def _run(name: str, kl_price: float, budget: Budget, rates: Rates, frozen: bandit.Bandit, start: Any, key: jax.Array):
    """Returns utility, win rate, KL and scale of one run, and its labels to 95% of its gain."""
    algorithm, first = method_of(name, start, kl_price, budget, rates)

    def evaluate(state):
        log_policy = jax.nn.log_softmax(state.policy, axis=-1)
        return exact.evaluate_policy(log_policy, frozen.reference, frozen.gold, 1.0)

    def step(state, key):
        state, _ = algorithm.step(key, state, None, frozen)
        result = evaluate(state)
        return state, result.win_rate - kl_price * result.kl

    state = algorithm.init(key, first, frozen.reference)
    state, utilities = jax.lax.scan(step, state, jax.random.split(key, budget.steps))
    result = evaluate(state)
    scale = jnp.exp(state.upper.log_scale) if name == SCALED else jnp.ones(())
    steps = steps_to(0.95, utilities - 0.5)
    return utilities[-1], result.win_rate, result.kl, scale, steps * budget.labels / budget.steps


def steps_to(fraction: float, gains: jax.Array) -> jax.Array:
    """Returns the steps after which gains `[T]` stay at or above a fraction of the last; NaN where it is not positive."""
    below = gains < fraction * gains[-1]
    last = jnp.max(jnp.where(below, jnp.arange(1, len(gains) + 1), 0))
    return jnp.where(gains[-1] > 0, last + 1.0, jnp.nan)
