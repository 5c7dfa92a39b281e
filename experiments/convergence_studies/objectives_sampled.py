"""The same methods from drawn labels, at equal labels.

Descending methods use `bilevel_descent` with the lower level in closed form: each batch of labelled pairs is used once,
for one Adam step. Likelihoods may also keep their labels and refit: offline RLHF once, iterated RLHF every round.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from convergence_studies.objectives_exact import (
    DEFAULT,
    ITERATED,
    OFFLINE,
    POLICY_GRADIENT,
    UTILITY,
    Method,
    divergence,
    methods,
)
from convergence_studies.objectives_structures import ARMS, CELLS, CONTEXTS, Case

from jaxrlhf import bandit, bilevel, exact, objectives
from jaxrlhf.bilevel import HypergradientRule, LowerSolver

PAIRS = 4
"""Pairs per context and step; a batch is `PAIRS * CONTEXTS` labels, twice that with two labels per pair."""

ROUNDS = 10
"""Number of refits of a method that keeps its labels."""

PRIOR = 4.0
"""Weight, in labels, of the reward's own prediction of an arm's win rate beside the kept labels of that arm."""

KEPT = "iterated RLHF, labels kept"
KEPT_DEFAULT = DEFAULT + ", labels kept"
STENCIL = DEFAULT + " (central stencil)"
GOLD_TILTS = DEFAULT + " (central stencil, tilts from the gold reward)"
RATES = (0.02, 0.05, 0.15, 0.4)
RIDGES = (0.03, 0.3, 1.0, 3.0)


class Learner(NamedTuple):
    """A method on drawn labels.

    Attributes:
        method: what is descended.
        rule: the hypergradient rule; None refits on all labels so far instead.
        tilts: what tilted policies are solved from: "labels", the batch's labels; "gold", the hidden reward.
        utility: weight of the coupled utility of a learner that refits.
    """

    method: Method
    rule: HypergradientRule | None = None
    tilts: str = "labels"
    utility: float = 0.0


def learners(beta: float) -> dict[str, Learner]:
    """Returns every sampled method by name; an exact method of the same name is its limit of infinitely many labels."""
    exact_methods = methods(beta)
    names = ("likelihood, policy-policy (the paper)", "likelihood, policy-reference", "brier, policy-reference")
    descending = (ITERATED, *names, UTILITY, DEFAULT)
    return {
        OFFLINE: Learner(exact_methods[OFFLINE]),
        KEPT: Learner(exact_methods[ITERATED]),
        KEPT_DEFAULT: Learner(exact_methods[ITERATED], utility=3.0),
        **{name: Learner(exact_methods[name], bilevel.boltzmann()) for name in descending},
        STENCIL: Learner(exact_methods[DEFAULT], bilevel.central(0.2)),
        GOLD_TILTS: Learner(exact_methods[DEFAULT], bilevel.central(0.2), tilts="gold"),
        # The Boltzmann rule on the utility of a table is policy gradient on the label: any policy, and no reward to fit.
        POLICY_GRADIENT: Learner(exact_methods[UTILITY], bilevel.boltzmann()),
    }


def grid(learner: Learner) -> tuple[float, ...]:
    """Returns the tuning grid: learning rates, or the ridge's weight in labels for methods that refit."""
    return RIDGES if learner.rule is None else RATES


@functools.partial(jax.jit, static_argnames=("learner_name", "beta"))
def _learn_all(keys, cases, features, values, labels, *, learner_name: str, beta: float):
    learner = learners(beta)[learner_name]
    learn = _refit if learner.rule is None else _descend

    def learn_one(key, case, features, value):
        case = case._replace(features=features)
        return case.features @ learn(key, case, value, labels, learner, beta)

    return jax.vmap(learn_one)(keys, cases, features, values)


def learn_all(key: jax.Array, cases: Case, values: jax.Array, labels: int, *, name: str, beta: float) -> jax.Array:
    """Returns the rewards `[runs, C, K]` of one method after so many labels; `values` `[runs]` are of its grid."""
    runs = cases.gold.shape[0]
    features = cases.features
    if name == POLICY_GRADIENT:
        # One parameter per cell whatever the reward's features; otherwise it is the utility, whose program is reused.
        features = jnp.broadcast_to(jnp.eye(CELLS).reshape(CONTEXTS, ARMS, CELLS), features.shape)
        name = UTILITY
    keys = jax.random.split(key, runs)
    return _learn_all(keys, cases, features, values, jnp.asarray(labels), learner_name=name, beta=beta)


def _reward(upper: jax.Array, features: jax.Array) -> jax.Array:
    return features @ upper


def _annotator(labels: int):
    """Draws labels with the case's position bias and mistakes, which differ between the cases of one program."""

    def annotate(key, sample, frozen):
        scores = bandit.gold_score(sample, frozen)
        unflipped = jax.nn.sigmoid(scores[..., 0] - scores[..., 1] + frozen.position)
        probability = frozen.mistake + (1.0 - 2.0 * frozen.mistake) * unflipped
        uniform = jax.random.uniform(key, (*probability.shape, labels))
        return (uniform < probability[..., None]).astype(probability.dtype)

    return annotate


def _solver(objective: objectives.Objective, beta: float) -> LowerSolver:
    """Solves every tilt in closed form from the batch's labels alone.

    The minimiser of s G - J is proportional to reference * exp((R - s dG/dpi) / (beta + s kappa)); dG/dpi at an arm is
    the mean coupled cost of its pairs in the batch less the context's mean, and 0 at arms without pairs.
    `bandit.best_response` instead takes dG/dpi from the gold reward, which an experiment at equal labels may not see.
    """

    def solution(task, index):
        frozen, sample, upper = task.frozen, task.labelled.sample, task.upper
        rewards = bandit.at_arms(_reward(upper, frozen.features), sample.responses)
        cost = objective.cost(upper, rewards, task.labelled, frozen).coupled
        chosen = jax.nn.one_hot(sample.responses[..., 0], ARMS)
        mean = jnp.mean(cost, axis=-1, keepdims=True)
        gradient = jnp.einsum("cmk,cm->ck", chosen, cost - mean) / jnp.maximum(jnp.sum(chosen, axis=1), 1.0)
        price = beta + task.tilts[index] * objective.kl_price
        return frozen.reference + (_reward(upper, frozen.features) - task.tilts[index] * gradient) / price

    return bilevel.closed_form(solution)


def _descend(key, case: Case, rate, labels, learner: Learner, beta: float) -> jax.Array:
    """Returns the mean of the last half of the iterates, starting at a flat reward."""
    objective, against_reference = learner.method.objective, learner.method.against_reference
    assert objective is not None and learner.rule is not None  # a learner without a rule refits
    steps = labels // (PAIRS * CONTEXTS * objective.labels)
    solver = _solver(objective, beta)
    if learner.tilts == "gold":
        solver = bandit.best_response(_reward, objective, beta=beta, against_reference=against_reference)
    algorithm = bilevel.bilevel_descent(
        bandit.bandit_problem(_reward, objective, against_reference=against_reference, pairs=PAIRS),
        learner.rule,
        solver,
        optax.adam(lambda count: rate * 0.5 * (1.0 + jnp.cos(jnp.pi * count / steps))),
        beta=beta,
        annotate=_annotator(objective.labels),
    )

    def step(number, carry):
        state, total = carry
        # The solver is exact, so solving before sampling makes the sample on-policy.
        policy = exact.soft_policy(_reward(state.upper, case.features), case.reference, beta)
        state = state._replace(lowers=jnp.broadcast_to(policy, state.lowers.shape))
        state, _ = algorithm.step(jax.random.fold_in(key, number), state, None, case)
        return state, total + jnp.where(number >= steps // 2, state.upper, 0.0)

    state = algorithm.init(key, jnp.zeros(case.features.shape[-1]), case.reference)
    _, total = jax.lax.fori_loop(0, steps, step, (state, jnp.zeros_like(state.upper)))
    return total / (steps - steps // 2)


def _refit(key, case: Case, ridge, labels, learner: Learner, beta: float, *, largest: int = 10_000) -> jax.Array:
    """Returns the fit to all labels, with sampling and refitting in rounds, starting at a flat reward."""
    pairs = labels // (ROUNDS * CONTEXTS)
    contexts = jnp.arange(CONTEXTS)[:, None]
    annotate = _annotator(1)

    def draw(key, log_policy):
        uniform = jax.random.uniform(key, (CONTEXTS, largest // (ROUNDS * CONTEXTS), 1))
        below = uniform > jnp.cumsum(jnp.exp(log_policy), axis=-1)[:, None, :]
        return jnp.minimum(jnp.sum(below, axis=-1), ARMS - 1)

    def one_round(number, carry):
        upper, counts, won = carry
        first_key, second_key, label_key = jax.random.split(jax.random.fold_in(key, number), 3)
        policy = exact.soft_policy(_reward(upper, case.features), case.reference, beta)
        first = draw(first_key, case.reference if learner.method.from_reference else policy)
        second = draw(second_key, case.reference)
        drawn = jnp.broadcast_to(jnp.arange(first.shape[1]) < pairs, first.shape).astype(policy.dtype)
        sampled = _Pairs(jnp.arange(CONTEXTS), jnp.stack([first, second], axis=-1))
        wins = drawn * annotate(label_key, sampled, case)[..., 0]
        counts, won = counts.at[contexts, first, second].add(drawn), won.at[contexts, first, second].add(wins)
        return _fit(upper, _kept_loss(counts, won, case, ridge, learner.utility, beta)), counts, won

    zeros = jnp.zeros((CONTEXTS, ARMS, ARMS))
    return jax.lax.fori_loop(0, ROUNDS, one_round, (jnp.zeros(case.features.shape[-1]), zeros, zeros))[0]


class _Pairs(NamedTuple):
    """The fields of a sample that the annotator reads."""

    prompts: jax.Array
    responses: jax.Array


def _kept_loss(counts, won, case: Case, ridge, utility: float, beta: float):
    """Returns the negative log-likelihood of `won` wins in `counts` labels, `[C, K, K]`, with ridge and coupled utility.

    The policy's win rate is estimated arm by arm from all labels, whichever policy drew the pair: this is self-normalised
    importance weighting of old labels, shrunk towards the reward's own prediction.
    """

    def loss(upper):
        rewards = _reward(upper, case.features)
        difference = rewards[:, :, None] - rewards[:, None, :]
        fit = jnp.sum(counts * jax.nn.softplus(difference) - won * difference)
        uncoupled = (fit + 0.5 * ridge * jnp.sum(jnp.square(upper))) / jnp.sum(counts)
        if not utility:
            return uncoupled
        predicted = jnp.einsum("cij,cj->ci", jax.nn.sigmoid(jax.lax.stop_gradient(difference)), jnp.exp(case.reference))
        wins = (jnp.sum(won, axis=-1) + PRIOR * predicted) / (jnp.sum(counts, axis=-1) + PRIOR)
        policy = exact.soft_policy(rewards, case.reference, beta)
        kl = divergence(policy, case.reference)
        return uncoupled + utility * (0.25 * beta * kl - jnp.mean(exact.mean_under(policy, wins)))

    return loss


def _fit(upper, loss, *, steps: int = 100):
    """Minimises the loss by Adam, starting at `upper`."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def step(_, carry):
        upper, state = carry
        updates, state = optimizer.update(jax.grad(loss)(upper), state)
        return optax.apply_updates(upper, updates), state

    return jax.lax.fori_loop(0, steps, step, (upper, optimizer.init(upper)))[0]
