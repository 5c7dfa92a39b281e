"""One harness for every method of `frontier.py`: the same labels, responses, seeds, evaluation prompts and KL
estimator.

Seeds run side by side in one program (`vmap`). Labels come from the host, drawn by the gold reward; what a method
consumes is counted by what it proposes, not by what it says.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from frontier_methods import Method, Parts, problem_of
from frontier_tasks import Gold, World, characters

from jaxrlhf import objectives, preferences
from jaxrlhf.algorithms.target_kl import ramp, target_kl
from jaxrlhf.bilevel import Labelled
from jaxrlhf.evaluation.frontier import correlation, length_controlled_win_rate
from jaxrlhf.evaluation.preferences import preference_accuracy
from jaxrlhf.lm.generate import generate
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.problem import LanguageFrozen, Prompts, Responses, flat, reward_of


class Budget(NamedTuple):
    """What every method may use.

    Attributes:
        seeds: a run of each leads to each KL.
        kls: that the controller leads to, in nats.
        steps: outer steps of a run.
        batch: prompts a step.
        evaluations: of a run, evenly spaced.
        judged: responses of each policy that are judged.
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
    """What a run consumed: labels, responses written to be labelled, their tokens, and tokens of the controller's
    own.
    """

    labels: int
    responses: int
    tokens: int
    control_tokens: int


class Yard(NamedTuple):
    """What all policies are measured with.

    Attributes:
        openings: the prompts, `[O, P]`.
        base, other: two independent sets of the reference's responses, `[O, N, 1, L]`.
        base_gold, other_gold: their gold rewards `[O, N]`.
        offline_labels, fresh_uniforms: labels `[O, N]` of base against other, and the uniforms that decide the others.
    """

    openings: Prompts
    base: Responses
    other: Responses
    base_gold: np.ndarray
    other_gold: np.ndarray
    offline_labels: np.ndarray
    fresh_uniforms: np.ndarray


def make_yard(world: World, gold: Gold, base: Responses, other: Responses, *, seed: int) -> Yard:
    """Returns the measures of a gold reward, from two sets of the reference's responses."""
    random = np.random.default_rng(seed)
    scores = [gold(world.openings, each)[..., 0] for each in (base, other)]
    uniforms = random.uniform(size=(2, *scores[0].shape))
    labels = uniforms[0] < _probability(scores[0] - scores[1])
    return Yard(world.openings, base, other, scores[0], scores[1], labels.astype(float), uniforms[1])


def _probability(difference: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.sigmoid(jnp.asarray(difference)))


class Runner(NamedTuple):
    """A method compiled for a world, whoever judges; made once and used under every gold reward.

    Attributes:
        init: `(keys [R], KLs [R], frozen) -> ` states.
        propose, update: the algorithm's halves over all runs.
        write: `(states, key, frozen) -> ` responses to the openings `[R, O, N, 1, L]` and their log-ratios `[R, O, N]`.
        score: `(states, responses [R, O, N, 1, L], frozen) -> ` what the method predicts preferences by, `[R, O, N]`: its
            reward, or beta log(policy / reference), which is DPO's own and for others only a stand-in.
        method: what it was made of.
    """

    init: Callable
    propose: Callable
    update: Callable
    write: Callable
    score: Callable
    method: Method


def compile_method(
    world: World, parts: Parts, method: Method, first_reward: Callable, budget: Budget, repeats: int
) -> Runner:
    """Returns the method under the controller, compiled for all runs at once.

    Args:
        world: models and prompts.
        parts: what the method was made of.
        method: the method.
        first_reward: `key -> ` first parameters of the learner's reward.
        budget: what it may use.
        repeats: responses an opening in an evaluation.
    """
    # Methods whose samples are the reference's do not see their own KL: two responses a prompt are written to measure it.
    probe = problem_of(parts._replace(pairs=1), objectives.likelihood(), against_reference=False)

    def measured(key, state, labelled, frozen):
        sample = probe.sample(key, state.policy, labelled.sample.prompts, frozen)
        return jnp.mean(sample.behaviour_log_prob - sample.reference_log_prob)

    algorithm = target_kl(
        method.make,
        # The last third of a run stays at its KL.
        target=ramp(1.0, steps=2 * budget.steps // 3, begin=parts.hold if method.has_reward else 0),
        beta=method.rates.beta,
        gain=0.03,
        proportional=1.5,
        measure=measured if method.offline else None,
    )

    def write(state, key, frozen):
        rows = Prompts(*(jnp.repeat(part, repeats, axis=0) for part in world.openings))
        sizes: dict[str, Any] = {"max_new_tokens": parts.max_new_tokens, "stop_ids": parts.stop_ids}
        written = generate(world.policy, state.policy, key, *rows, **sizes)
        theirs = completion_log_probs(world.policy, frozen.reference, *rows, written.tokens, written.mask)
        ratio = jnp.sum(written.log_prob - theirs, axis=-1)
        shape = (len(world.openings.tokens), repeats)
        tokens, mask = (part.reshape(*shape, 1, -1) for part in (written.tokens, written.mask))
        return Responses(tokens, mask), ratio.reshape(shape)

    def score(state, responses, frozen):
        if method.has_reward:
            return reward_of(parts.reward, state.upper, world.openings, responses)[..., 0]
        rows, (tokens, mask) = flat(world.openings, responses)
        own, theirs = (
            jnp.sum(completion_log_probs(world.policy, params, *rows, tokens, mask), axis=-1)
            for params in (state.policy, frozen.reference)
        )
        return (jnp.exp(state.log_beta) * (own - theirs)).reshape(responses.tokens.shape[:2])

    def init(key, kl, frozen):
        # What is no reward model is the policy's own log-ratio, if it is anything.
        upper = first_reward(key) if method.has_reward else frozen.reference
        state = algorithm.init(key, upper, frozen.reference)
        # A soft optimum's KL goes as 1 / beta^2 while it is small.
        log_beta = state.log_beta - 0.5 * jnp.log(kl)
        return state._replace(scale=kl, integral=log_beta, log_beta=log_beta)

    return Runner(
        init=jax.jit(jax.vmap(init, in_axes=(0, 0, None))),
        propose=jax.jit(jax.vmap(algorithm.propose, in_axes=(0, 0, 0, None))),
        update=jax.jit(jax.vmap(algorithm.update, in_axes=(0, 0, 0, None)), donate_argnums=1),
        write=jax.jit(jax.vmap(write, in_axes=(0, None, None))),
        score=jax.jit(jax.vmap(score, in_axes=(0, 0, None))),
        method=method,
    )


def prompt_order(count: int, budget: Budget, seed: int) -> np.ndarray:
    """Returns the prompts of every step, `[steps, batch]`: each opening comes as often as any other."""
    random, needed = np.random.default_rng(seed), budget.steps * budget.batch
    order = np.concatenate([random.permutation(count) for _ in range(-(-needed // count))])
    return order[:needed].reshape(budget.steps, budget.batch)


def run(
    runner: Runner, world: World, gold: Gold, yard: Yard, budget: Budget
) -> tuple[list[dict[str, np.ndarray]], Spent, Any]:
    """Trains a method in all runs; returns its evaluations (fields `[R]`), what one run spent, and the states."""
    seeds, kls = (np.array(each) for each in zip(*budget.runs, strict=True))
    keys = jax.vmap(jax.random.key)(seeds)
    frozen = LanguageFrozen(world.start)
    orders = np.stack([prompt_order(len(world.openings.tokens), budget, int(seed)) for seed in seeds], axis=1)
    state, history = runner.init(keys, jnp.asarray(kls, jnp.float32), frozen), []
    labels = responses = tokens = control = 0
    due = {round(budget.steps * part / budget.evaluations) for part in range(1, budget.evaluations + 1)}
    for step in range(budget.steps):
        own = jax.vmap(lambda key, step=step: jax.random.fold_in(key, step))(keys)
        propose_key, label_key, update_key = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(own), 1, 0)
        asked = Prompts(*(part[orders[step]] for part in world.openings))
        sample = runner.propose(propose_key, state, asked, frozen)
        scores = _gold_of_runs(gold, sample.prompts, sample.responses)
        answers = jax.vmap(preferences.draw_labels)(label_key, jnp.asarray(scores))
        state, _ = runner.update(update_key, state, Labelled(sample, answers), frozen)
        labels += int(np.sum(np.asarray(answers) >= 0)) // len(seeds)
        responses += int(np.prod(sample.responses.tokens.shape[1:4]))
        tokens += int(np.sum(np.asarray(sample.responses.mask))) // len(seeds)
        control += 2 * budget.batch * world.max_new_tokens if runner.method.offline else 0
        if step + 1 in due:
            row = evaluate(runner, state, world, gold, yard)
            history.append(row | {"step": np.full(len(seeds), step + 1), "labels": np.full(len(seeds), labels)})
    return history, Spent(labels, responses, tokens, control), state


def _gold_of_runs(gold: Gold, prompts: Prompts, responses: Responses) -> np.ndarray:
    """Returns gold rewards `[R, B, M, K]` of responses `[R, B, M, K, L]`."""
    rows = Prompts(*(part.reshape(-1, part.shape[-1]) for part in prompts))
    flat_responses = Responses(*(part.reshape(-1, *part.shape[2:]) for part in responses))
    return gold(rows, flat_responses).reshape(responses.tokens.shape[:4])


def evaluate(runner: Runner, state: Any, world: World, gold: Gold, yard: Yard) -> dict[str, np.ndarray]:
    """Returns what the policies and what they predict preferences by are worth, a number a run, `[R]`.

    Attributes of a row: gold and gain (over the reference's), their standard error; kl by k1 and by k3; beta; win_rate,
    controlled_win_rate (at equal length) and its half interval; length in characters; proxy (its predictor's gain, in its
    own units), the correlation of the predictor with length and with the gold reward; calibration and accuracy of the
    predictor offline (two of the reference's responses) and fresh (one of the policy's).
    """
    frozen = LanguageFrozen(world.start)
    written, ratio = runner.write(state, jax.random.key(1_000_000), frozen)
    runs = len(ratio)
    score_base, score_other = (
        runner.score(state, Responses(*(jnp.broadcast_to(part, (runs, *part.shape)) for part in each)), frozen)
        for each in (yard.base, yard.other)
    )
    score_own = runner.score(state, written, frozen)
    rows = []
    for number in range(runs):
        own = Responses(*(part[number] for part in written))
        scores = gold(yard.openings, own)[..., 0]
        learned, base, other = (np.asarray(each[number], float) for each in (score_own, score_base, score_other))
        logs = np.asarray(ratio[number], float)
        chances = _probability(scores - yard.base_gold)
        lengths, base_lengths = (characters(world, yard.openings, each)[..., 0] for each in (own, yard.base))
        controlled = length_controlled_win_rate(chances.ravel(), (lengths - base_lengths).ravel().astype(float))
        offline = preference_accuracy((base - other).ravel(), yard.offline_labels.ravel())
        fresh = preference_accuracy((learned - base).ravel(), (yard.fresh_uniforms < chances).astype(float).ravel())
        rows.append(
            {
                "gold": scores.mean(),
                "gain": scores.mean() - yard.base_gold.mean(),
                "gain_error": _error(scores - scores.mean(axis=1, keepdims=True)),
                "kl": logs.mean(),
                "kl_k3": np.mean(logs + np.expm1(np.clip(-logs, None, 30.0))),
                "kl_error": _error(logs),
                "beta": float(np.exp(state.log_beta[number])),
                "win_rate": chances.mean(),
                "controlled_win_rate": controlled.rate,
                "controlled_half_interval": (controlled.high - controlled.low) / 2,
                "length": lengths.mean(),
                "proxy": learned.mean() - base.mean(),
                "proxy_length_correlation": correlation(learned.ravel(), lengths.ravel().astype(float)).value,
                "proxy_gold_correlation": correlation(learned.ravel(), scores.ravel()).value,
                "offline_accuracy": offline.accuracy,
                "offline_calibration": offline.calibration_error,
                "fresh_accuracy": fresh.accuracy,
                "fresh_calibration": fresh.calibration_error,
            }
        )
    return {name: np.array([row[name] for row in rows], float) for name in rows[0]}


def _error(values: np.ndarray) -> float:
    return float(np.std(values) / np.sqrt(values.size))
