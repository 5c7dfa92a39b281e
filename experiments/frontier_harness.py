"""One harness for every method of `frontier.py`: the same labels, responses, seeds, evaluation prompts and KL
estimator.

Seeds run side by side in one program (`vmap`). Labels are drawn on the host from the gold reward. What a method consumes
is counted from the samples it proposes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from frontier_methods import Method, Setup, problem_of
from frontier_tasks import Gold, response_lengths
from stories import StoryModel

from jaxrlhf import objectives, preferences
from jaxrlhf.algorithms.target_kl import ramp, target_kl
from jaxrlhf.bilevel import Labelled
from jaxrlhf.evaluation.frontier import length_controlled_win_rate
from jaxrlhf.evaluation.preferences import preference_accuracy
from jaxrlhf.evaluation.statistics import correlation
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.pairing import Prompts, Responses, flatten_pairs
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.lm.reward import score_responses


class Budget(NamedTuple):
    """What every method may use.

    Attributes:
        seeds: one run per seed and KL.
        kls: target KLs of the controller, in nats.
        steps: outer steps of a run.
        batch: prompts per step.
        evaluations: per run, evenly spaced.
    """

    seeds: tuple[int, ...]
    kls: tuple[float, ...]
    steps: int
    batch: int
    evaluations: int

    @property
    def runs(self) -> list[tuple[int, float]]:
        """The seed and the KL of each run, R of them."""
        return [(seed, kl) for seed in self.seeds for kl in self.kls]


class Spent(NamedTuple):
    """What a run consumed: labels, responses generated for labelling, their tokens, and tokens generated only to measure
    the KL.
    """

    labels: int
    responses: int
    tokens: int
    control_tokens: int


class Baseline(NamedTuple):
    """Responses of the reference that all policies are measured against.

    Attributes:
        openings: the prompts, `[O, P]`.
        base, other: two independent sets of the reference's responses, `[O, N, 1, L]`.
        base_gold, other_gold: their gold rewards `[O, N]`.
        offline_labels: labels `[O, N]` of base against other.
        fresh_uniforms: uniforms `[O, N]` that decide the labels of a policy's responses against base.
    """

    openings: Prompts
    base: Responses
    other: Responses
    base_gold: np.ndarray
    other_gold: np.ndarray
    offline_labels: np.ndarray
    fresh_uniforms: np.ndarray


def make_baseline(stories: StoryModel, gold: Gold, base: Responses, other: Responses, *, seed: int) -> Baseline:
    """Returns the baseline of a gold reward, from two sets of the reference's responses."""
    random = np.random.default_rng(seed)
    scores = [gold(stories.openings, each)[..., 0] for each in (base, other)]
    uniforms = random.uniform(size=(2, *scores[0].shape))
    labels = uniforms[0] < _sigmoid(scores[0] - scores[1])
    return Baseline(stories.openings, base, other, scores[0], scores[1], labels.astype(float), uniforms[1])


def _sigmoid(difference: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.sigmoid(jnp.asarray(difference)))


class Runner(NamedTuple):
    """A method compiled for a model, whatever the gold reward; compiled once and used under every gold reward.

    Attributes:
        init: `(keys [R], KLs [R], frozen) -> ` states.
        propose, update: the algorithm's two halves, over all runs.
        generate: `(states, key, frozen) -> ` responses to the openings `[R, O, N, 1, L]` and their log-ratios `[R, O, N]`.
        score: `(states, responses [R, O, N, 1, L], frozen) -> ` the predictor of preferences, `[R, O, N]`: the learned
            reward, or beta log(policy / reference), which is DPO's implicit reward and only a stand-in for other methods.
        method: the method.
    """

    init: Callable
    propose: Callable
    update: Callable
    generate: Callable
    score: Callable
    method: Method


def compile_method(
    stories: StoryModel, setup: Setup, method: Method, first_reward: Callable, budget: Budget, repeats: int
) -> Runner:
    """Returns the method under the KL controller, compiled for all runs at once.

    Args:
        stories: model and prompts.
        setup: what the method was built from.
        method: the method.
        first_reward: `key -> ` initial parameters of the learner's reward.
        budget: what it may use.
        repeats: responses per opening in an evaluation.
    """
    algorithm = target_kl(
        method.make,
        # The KL is held constant over the last third of a run.
        target=ramp(1.0, steps=2 * budget.steps // 3, begin=setup.hold if method.has_reward else 0),
        beta=method.rates.beta,
        gain=0.03,
        proportional=1.5,
        measure=kl_probe(setup) if method.offline else None,
    )

    def init(key, kl, frozen):
        # Methods without a reward model use the policy's log-ratio, or nothing, as their reward.
        upper = first_reward(key) if method.has_reward else frozen.reference
        state = algorithm.init(key, upper, frozen.reference)
        # The KL of a soft optimum is proportional to 1 / beta^2 while it is small.
        log_beta = state.log_beta - 0.5 * jnp.log(kl)
        return state._replace(scale=kl, integral=log_beta, log_beta=log_beta)

    generate, score = evaluation_functions(stories, setup, method, repeats)
    return Runner(
        init=jax.jit(jax.vmap(init, in_axes=(0, 0, None))),
        propose=jax.jit(jax.vmap(algorithm.propose, in_axes=(0, 0, 0, None))),
        update=jax.jit(jax.vmap(algorithm.update, in_axes=(0, 0, 0, None)), donate_argnums=1),
        generate=jax.jit(jax.vmap(generate, in_axes=(0, None, None))),
        score=jax.jit(jax.vmap(score, in_axes=(0, 0, None))),
        method=method,
    )


def kl_probe(setup: Setup) -> Callable:
    """Returns the measurement of the KL for methods that train on the reference's samples: two responses per prompt."""
    probe = problem_of(setup._replace(pairs=1), objectives.likelihood(), against="policy")

    def measured(key, state, labelled, frozen):
        sample = probe.sample(key, state.policy, labelled.sample.prompts, frozen)
        return jnp.mean(sample.behaviour_log_prob - sample.reference_log_prob)

    return measured


def evaluation_functions(stories: StoryModel, setup: Setup, method: Method, repeats: int) -> tuple[Callable, Callable]:
    """Returns `generate` and `score` of a `Runner`, for a single run."""
    generate = functools.partial(respond_to_openings, stories, repeats)

    def score(state, responses, frozen):
        if method.has_reward:
            return score_responses(setup.reward, state.upper, stories.openings, responses)[..., 0]
        prompts, (tokens, mask) = flatten_pairs(stories.openings, responses)
        policy, reference = (
            jnp.sum(completion_log_probs(stories.policy, params, *prompts, tokens, mask), axis=-1)
            for params in (state.policy, frozen.reference)
        )
        return (jnp.exp(state.log_beta) * (policy - reference)).reshape(responses.tokens.shape[:2])

    return generate, score


def respond_to_openings(
    stories: StoryModel, repeats: int, state: Any, key: jax.Array, frozen: LanguageFrozen
) -> tuple[Responses, jax.Array]:
    """Returns responses `[O, N, 1, L]` of a state's policy to the openings, and their log-ratios `[O, N]`."""
    prompts = Prompts(*(jnp.repeat(leaf, repeats, axis=0) for leaf in stories.openings))
    generated = stories.generate(state.policy, key, prompts)
    reference = completion_log_probs(stories.policy, frozen.reference, *prompts, generated.tokens, generated.mask)
    ratio = jnp.sum(generated.log_prob - reference, axis=-1)
    shape = (len(stories.openings.tokens), repeats)
    tokens, mask = (leaf.reshape(*shape, 1, -1) for leaf in (generated.tokens, generated.mask))
    return Responses(tokens, mask), ratio.reshape(shape)


def prompt_order(count: int, budget: Budget, seed: int) -> np.ndarray:
    """Returns the prompts of every step, `[steps, batch]`; every opening is used equally often."""
    random, needed = np.random.default_rng(seed), budget.steps * budget.batch
    order = np.concatenate([random.permutation(count) for _ in range(-(-needed // count))])
    return order[:needed].reshape(budget.steps, budget.batch)


def run(
    runner: Runner, stories: StoryModel, gold: Gold, baseline: Baseline, budget: Budget
) -> tuple[list[dict[str, np.ndarray]], Spent, Any]:
    """Trains a method in all runs; returns its evaluations (fields `[R]`), what one run spent, and the states."""
    seeds, kls = (np.array(each) for each in zip(*budget.runs, strict=True))
    keys = jax.vmap(jax.random.key)(seeds)
    frozen = LanguageFrozen(stories.start)
    orders = np.stack([prompt_order(len(stories.openings.tokens), budget, int(seed)) for seed in seeds], axis=1)
    state, history = runner.init(keys, jnp.asarray(kls, jnp.float32), frozen), []
    spent = Spent(0, 0, 0, 0)
    due = {round(budget.steps * number / budget.evaluations) for number in range(1, budget.evaluations + 1)}
    for step in range(budget.steps):
        step_keys = jax.vmap(lambda key, step=step: jax.random.fold_in(key, step))(keys)
        propose_key, label_key, update_key = jnp.moveaxis(
            jax.vmap(lambda key: jax.random.split(key, 3))(step_keys), 1, 0
        )
        prompts = Prompts(*(leaf[orders[step]] for leaf in stories.openings))
        sample = runner.propose(propose_key, state, prompts, frozen)
        scores = gold_of_runs(gold, sample.prompts, sample.responses)
        labels = jax.vmap(preferences.draw_labels)(label_key, jnp.asarray(scores))
        state, _ = runner.update(update_key, state, Labelled(sample, labels), frozen)
        control_tokens = 2 * budget.batch * stories.max_new_tokens if runner.method.offline else 0
        spent = Spent(
            labels=spent.labels + int(np.sum(np.asarray(labels) >= 0)) // len(seeds),
            responses=spent.responses + int(np.prod(sample.responses.tokens.shape[1:4])),
            tokens=spent.tokens + int(np.sum(np.asarray(sample.responses.mask))) // len(seeds),
            control_tokens=spent.control_tokens + control_tokens,
        )
        if step + 1 in due:
            row = evaluate(runner, state, stories, gold, baseline)
            history.append(row | {"step": np.full(len(seeds), step + 1), "labels": np.full(len(seeds), spent.labels)})
    return history, spent, state


def gold_of_runs(gold: Gold, prompts: Prompts, responses: Responses) -> np.ndarray:
    """Returns gold rewards `[R, B, M, K]` of responses `[R, B, M, K, L]`."""
    flat_prompts = Prompts(*(leaf.reshape(-1, leaf.shape[-1]) for leaf in prompts))
    flat_responses = Responses(*(leaf.reshape(-1, *leaf.shape[2:]) for leaf in responses))
    return gold(flat_prompts, flat_responses).reshape(responses.tokens.shape[:4])


def evaluate(runner: Runner, state: Any, stories: StoryModel, gold: Gold, baseline: Baseline) -> dict[str, np.ndarray]:
    """Returns the evaluation of every run's policy and of its predictor of preferences, fields `[R]`; see `_row`."""
    frozen = LanguageFrozen(stories.start)
    responses, ratio = runner.generate(state, jax.random.key(1_000_000), frozen)
    runs = len(ratio)
    predicted_base, predicted_other = (
        runner.score(state, Responses(*(jnp.broadcast_to(leaf, (runs, *leaf.shape)) for leaf in each)), frozen)
        for each in (baseline.base, baseline.other)
    )
    predicted = runner.score(state, responses, frozen)
    rows = []
    for number in range(runs):
        of_run = Responses(*(leaf[number] for leaf in responses))
        predictions = (np.asarray(each[number], float) for each in (predicted, predicted_base, predicted_other))
        row = _row(stories, gold, baseline, of_run, np.asarray(ratio[number], float), *predictions)
        rows.append(row | {"beta": float(np.exp(state.log_beta[number]))})
    return {name: np.array([row[name] for row in rows], float) for name in rows[0]}


def _row(
    stories: StoryModel,
    gold: Gold,
    baseline: Baseline,
    responses: Responses,
    log_ratio: np.ndarray,
    predicted: np.ndarray,
    predicted_base: np.ndarray,
    predicted_other: np.ndarray,
) -> dict[str, Any]:
    """Returns the evaluation of one run.

    Fields: gold and gain (over the reference's), and the gain's standard error; kl by k1 and by k3; win_rate,
    controlled_win_rate (at equal length) and its half interval; length in characters; proxy (the predictor's gain, in its
    own units), the predictor's correlation with length and with the gold reward; calibration and accuracy of the
    predictor offline (on two of the reference's responses) and fresh (on one of the policy's).

    Args:
        stories, gold, baseline: what is measured with.
        responses, log_ratio: of the policy, `[O, N, 1, L]`, and their log-ratios to the reference `[O, N]`.
        predicted, predicted_base, predicted_other: predictor's scores `[O, N]` of those and of the baseline's two sets.
    """
    scores = gold(baseline.openings, responses)[..., 0]
    wins = _sigmoid(scores - baseline.base_gold)
    lengths, base_lengths = (
        response_lengths(stories, baseline.openings, each)[..., 0] for each in (responses, baseline.base)
    )
    controlled = length_controlled_win_rate(wins.ravel(), (lengths - base_lengths).ravel().astype(float))
    offline = preference_accuracy((predicted_base - predicted_other).ravel(), baseline.offline_labels.ravel())
    fresh_labels = (baseline.fresh_uniforms < wins).astype(float)
    fresh = preference_accuracy((predicted - predicted_base).ravel(), fresh_labels.ravel())
    return {
        "gold": scores.mean(),
        "gain": scores.mean() - baseline.base_gold.mean(),
        "gain_error": _standard_error(scores - scores.mean(axis=1, keepdims=True)),
        "kl": log_ratio.mean(),
        "kl_k3": np.mean(log_ratio + np.expm1(np.clip(-log_ratio, None, 30.0))),
        "kl_error": _standard_error(log_ratio),
        "win_rate": wins.mean(),
        "controlled_win_rate": controlled.rate,
        "controlled_half_interval": (controlled.high - controlled.low) / 2,
        "length": lengths.mean(),
        "proxy": predicted.mean() - predicted_base.mean(),
        "proxy_length_correlation": correlation(predicted.ravel(), lengths.ravel().astype(float)).value,
        "proxy_gold_correlation": correlation(predicted.ravel(), scores.ravel()).value,
        "offline_accuracy": offline.accuracy,
        "offline_calibration": offline.calibration_error,
        "fresh_accuracy": fresh.accuracy,
        "fresh_calibration": fresh.calibration_error,
    }


def _standard_error(values: np.ndarray) -> float:
    return float(np.std(values) / np.sqrt(values.size))
