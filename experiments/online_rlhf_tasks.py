"""The two tasks of `online_rlhf.py`: a language that can be enumerated, and a pretrained model from a directory.

A task holds the models, prompts, annotator and evaluation; everything else is shared.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from stories import OPENINGS, StoryModel, load_stories

from jaxrlhf import exact, preferences
from jaxrlhf.bilevel import BilevelProblem, BilevelState
from jaxrlhf.lm.generate import Generation, generate
from jaxrlhf.lm.language import (
    STOP,
    alphabet_gold,
    alphabet_language,
    evaluate_language,
    policy_table,
    reward_table,
    table_of,
)
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import DecoderConfig, decoder
from jaxrlhf.objectives import Objective


class Task(NamedTuple):
    """The models, prompts, annotator and evaluation of a run.

    Attributes:
        problem: the bilevel problem of an objective.
        upper: the reward model's initial parameters.
        frozen: the reference policy, which is also the initial policy.
        batches: `() -> ` endless batches of prompts, the same at every call.
        traced_annotator: for tasks whose gold reward JAX can trace, else None.
        host_annotator: `(key, sample) -> labels` in plain Python, else None.
        evaluate: `(state) -> measurements` at tilt 0: true_return, win_rate, kl, value and, where exact, more.
        optimum: best value E gold - beta KL; exact, or estimated from the reference's completions, where it is biased low
            (Jensen), so that a measured value may exceed it.
        spread: standard deviation of the reference's gold rewards.
        complete: `(policy) -> [(prompt, completion)]`.
    """

    problem: Callable[[Objective], BilevelProblem]
    upper: Any
    frozen: LanguageFrozen
    batches: Callable[[], Iterator[Prompts]]
    traced_annotator: preferences.Annotator | None
    host_annotator: Callable | None
    evaluate: Callable[[BilevelState], dict[str, float]]
    optimum: float
    spread: float
    complete: Callable[[Any], list[tuple[str, str]]]


MAX_LETTERS = 4
"""Longest word of the enumerable language."""
LAYERS = 2
"""Layers of its policy and reward."""


def enumerable_task(seed: int, objective: Objective, *, beta: float, pairs: int) -> Task:
    """Returns the language of words over seven letters, at most four long: 2,801 completions for each of four prompts.

    Policy and reward are small decoders; the reference is the policy's random initialisation. Evaluation enumerates
    every completion, so it has no sampling error.
    """
    language = alphabet_language(length=MAX_LETTERS)
    shape = DecoderConfig(
        vocabulary_size=8,
        width=32,
        layers=LAYERS,
        query_heads=2,
        key_value_heads=1,
        head_size=16,
        mlp_width=64,
        context_length=8,
    )
    policy, reward = decoder(shape), reward_model(decoder(shape))
    policy_key, reward_key = jax.random.split(jax.random.key(seed))
    start = policy.init(policy_key)
    gold = jax.jit(lambda: table_of(alphabet_gold, language))()
    table = jax.jit(lambda params: policy_table(policy, params, language))
    rewards = jax.jit(lambda params: reward_table(reward, params, language))
    reference = table(start)
    evaluate_tables = jax.jit(
        lambda policy, reward: evaluate_language(policy, reference, reward, gold, objective, beta=beta)
    )

    def evaluate(state):
        evaluation = evaluate_tables(table(state.policy), rewards(state.upper))
        measured = {name: float(value) for name, value in evaluation.policy._asdict().items()}
        return measured | {
            "value": measured["true_return"] - beta * measured["kl"],
            "upper_loss": float(evaluation.upper_loss),
            "phi": float(evaluation.phi),
        }

    @jax.jit
    def generate_from(params, rows):
        return generate(policy, params, jax.random.key(0), *rows, max_new_tokens=MAX_LETTERS, stop_ids=(STOP,))

    def complete(params):
        rows = Prompts(*(jnp.repeat(leaf, 4, axis=0) for leaf in language.prompts))
        generated = generate_from(params, rows)
        return [
            (spell(prompt), spell(tokens))
            for prompt, tokens in zip(np.asarray(rows.tokens), np.asarray(generated.tokens), strict=True)
        ]

    @jax.jit
    def spread_of(reference, gold):
        return jnp.mean(exact.mean_under(reference, gold**2) - exact.mean_under(reference, gold) ** 2) ** 0.5

    return Task(
        problem=lambda objective: language_problem(
            policy, reward, objective, pairs=pairs, generation=Generation(MAX_LETTERS, (STOP,))
        ),
        upper=reward.init(reward_key),
        frozen=LanguageFrozen(start),
        batches=lambda: itertools.repeat(language.prompts),
        traced_annotator=preferences.gold_annotator(
            lambda sample, frozen: alphabet_gold(sample.prompts, sample.responses), labels=objective.labels
        ),
        host_annotator=None,
        evaluate=evaluate,
        optimum=float(exact.soft_value(gold, reference, beta)),
        spread=float(spread_of(reference, gold)),
        complete=complete,
    )


def spell(tokens: np.ndarray) -> str:
    """Returns letters for tokens, up to the stop."""
    return "".join(chr(ord("a") + token - 1) for token in itertools.takewhile(lambda token: token != STOP, tokens))


def story_annotator(stories: StoryModel, labels: int) -> Callable:
    """Returns `(key, sample) -> labels`, Bradley-Terry on the gold reward."""

    def annotate(key, sample):
        return preferences.draw_labels(key, jnp.asarray(stories.score(sample.prompts, sample.responses)), labels=labels)

    return annotate


def story_evaluator(stories: StoryModel, prompts: Prompts) -> Callable[[Any, int], tuple[np.ndarray, np.ndarray]]:
    """Returns `(params, seed) -> ` gold rewards and log-ratios to the reference of fresh completions of the prompts."""

    @jax.jit
    def generate_with_log_ratio(params, reference, prompts: Prompts, key):
        generated = stories.generate(params, key, prompts)
        log_probs = completion_log_probs(stories.policy, reference, *prompts, generated.tokens, generated.mask)
        return generated, jnp.sum(generated.log_prob, axis=-1) - jnp.sum(log_probs, axis=-1)

    def evaluate(params, seed):
        generated, log_ratio = generate_with_log_ratio(params, stories.start, prompts, jax.random.key(seed))
        return stories.score(prompts, Responses(generated.tokens, generated.mask)), np.asarray(log_ratio)

    return evaluate


def sampled_measurements(
    gold: np.ndarray, log_ratio: np.ndarray, baseline: np.ndarray, *, beta: float
) -> dict[str, float]:
    """Returns what `Task.evaluate` estimates from samples.

    Args:
        gold, log_ratio: gold rewards of the policy's completions and their log-ratios to the reference.
        baseline: gold rewards of the reference's completions of the same prompts.
        beta: weight of the KL.
    """
    win_rate = np.mean(preferences.preference(jnp.stack([gold, baseline], axis=-1)))
    kl = float(log_ratio.mean())
    return {
        "true_return": float(gold.mean()),
        "true_return_error": float(gold.std() / len(gold) ** 0.5),
        "win_rate": float(win_rate),
        "kl": kl,
        "kl_error": float(log_ratio.std() / len(gold) ** 0.5),
        "value": float(gold.mean()) - beta * kl,
        "gain_in_spreads": float((gold.mean() - baseline.mean()) / baseline.std()),
    }


def pretrained_task(
    directory: pathlib.Path,
    seed: int,
    objective: Objective,
    *,
    beta: float,
    batch: int,
    pairs: int,
    max_new_tokens: int,
    evaluation_completions: int = 512,
) -> Task:
    """Returns the task of a Hugging Face directory: short stories with gold reward `story_score`.

    The gold reward is a Python function of the text: the learner sees it only through labels. Evaluation generates
    `evaluation_completions` fresh completions and compares them with as many of the reference.
    """
    stories = load_stories(directory, max_new_tokens=max_new_tokens)
    reward = reward_model(stories.policy)
    repeats = -(-evaluation_completions // len(OPENINGS))
    evaluate = story_evaluator(stories, Prompts(*(jnp.repeat(leaf, repeats, axis=0) for leaf in stories.openings)))
    baseline, _ = evaluate(stories.start, 1_000_001)
    by_prompt = baseline.reshape(len(OPENINGS), repeats)
    source = grain.MapDataset.source(range(len(OPENINGS))).shuffle(seed=seed).repeat()

    def batches():
        for first in itertools.count(step=batch):
            chosen = np.array([source[first + offset] for offset in range(batch)])
            yield Prompts(*(leaf[chosen] for leaf in stories.openings))

    def complete(params):
        generated = stories.generate(params, jax.random.key(0), stories.openings)
        texts = stories.texts(stories.openings, Responses(generated.tokens, generated.mask))
        return [(opening, text.removeprefix(opening)) for opening, text in zip(OPENINGS, texts, strict=True)]

    return Task(
        problem=lambda objective: language_problem(
            stories.policy, reward, objective, pairs=pairs, generation=Generation(max_new_tokens, stories.stop_ids)
        ),
        upper=reward.from_trunk(stories.start),
        frozen=LanguageFrozen(stories.start),
        batches=batches,
        traced_annotator=None,
        host_annotator=story_annotator(stories, objective.labels),
        evaluate=lambda state: sampled_measurements(*evaluate(state.policy, 1_000_000), baseline, beta=beta),
        optimum=float(np.mean(beta * (np.asarray(jax.nn.logsumexp(by_prompt / beta, axis=1)) - np.log(repeats)))),
        spread=float(baseline.std()),
        complete=complete,
    )
