"""The tasks of `frontier.py`: short stories by a pretrained model, under two hidden gold rewards.

- `words` is a function of the text: glad words less sorry ones (`stories.story_score`).
- `model` is a reward model larger than any learner's: the mean of three trunks of the policy's size, fitted to
  preferences for stories with speech and without repetition. Its scores are the gold reward, including whatever else the
  fit has learned.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from stories import StoryModel

from jaxrlhf import bilevel, objectives, preferences
from jaxrlhf.algorithms.reward_learning import fit, reward_learning
from jaxrlhf.bilevel import Labelled, Sample
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import RewardModel, reward_model, score_responses
from jaxrlhf.preferences import buffer as preference_buffer

REWARD_LEARNING_RATES = {"whole": 1e-3, "small": 2e-2}
"""Adam's learning rate for the learner's reward, by the reward's size."""

CLASSES = 24
"""Number of token classes (token id modulo this) that the small reward distinguishes."""

Gold = Callable[[Prompts, Responses], np.ndarray]
"""`(prompts [B, P], responses [B, M, K, L]) -> ` gold rewards `[B, M, K]`, on the host."""


def response_lengths(stories: StoryModel, prompts: Prompts, responses: Responses) -> np.ndarray:
    """Returns the length of responses `[B, M, K, L]` in characters, `[B, M, K]`.

    Token counts would not do: most responses here reach the maximum number of tokens.
    """
    texts = stories.texts(prompts, responses)
    prompt_texts = stories.texts(prompts, Responses(*(leaf[..., :0] for leaf in responses)))
    lengths = np.array([len(text) for text in texts]) - np.array([len(text) for text in prompt_texts])
    return lengths.reshape(responses.tokens.shape[:3])


def learners_reward(stories: StoryModel, size: str) -> tuple[RewardModel, Callable[[jax.Array], Any]]:
    """Returns a learner's reward model and `key -> ` its initial parameters.

    Args:
        stories: whose policy gives the trunk.
        size: "whole", the policy's own pretrained trunk; or "small", one parameter for each of `CLASSES` token classes.

    Raises:
        ValueError: there is no such size.
    """
    if size == "whole":
        whole = reward_model(stories.policy, pooling="mean")
        return whole, lambda key: whole.from_trunk(stories.start)
    if size != "small":
        raise ValueError(f"A learner's reward is whole or small, got {size!r}.")

    def score(params, tokens, mask):
        return jnp.sum(params[tokens % CLASSES] * mask, axis=-1)

    small = RewardModel(init=lambda key: jnp.zeros(CLASSES), score=score, from_trunk=lambda params: jnp.zeros(CLASSES))
    return small, small.init


SPEECH = re.compile(r'"[^"]+"?')


def craft_score(text: str) -> float:
    """The score that the gold model is fitted to: points for speech and new words, less points for repeated words."""
    words = re.findall(r"[a-z']+", text.lower())
    return 1.5 * bool(SPEECH.search(text)) + 0.4 * len(set(words)) - 0.4 * (len(words) - len(set(words)))


class GoldModel(NamedTuple):
    """The gold reward model: scores are `scale * (mean score of the members - offset)`; `params` stacks the members."""

    params: Any
    offset: float
    scale: float


def reference_problem(stories: StoryModel, reward: RewardModel, *, pairs: int) -> bilevel.BilevelProblem:
    """Returns the problem of a reward's fit to pairs of one policy, drawn for the reference."""
    return language_problem(
        stories.policy,
        reward,
        objectives.likelihood(coupled=False),
        pairs=pairs,
        generation=Generation(stories.max_new_tokens, stories.stop_ids),
        against="policy",
    )


def labelled_pairs(
    stories: StoryModel,
    problem: bilevel.BilevelProblem,
    annotate: Callable[[jax.Array, Sample], jax.Array],
    keys: Iterator[tuple[jax.Array, jax.Array]],
    *,
    prompts: int,
    batch: int,
) -> preference_buffer.PreferenceBuffer:
    """Returns labelled pairs of the reference.

    Args:
        stories, problem: model and problem.
        annotate: `(key, sample) -> labels`.
        keys: of a batch's sample and of its labels.
        prompts: prompts in all; the openings are used in turn.
        batch: prompts per batch.
    """
    frozen, sample = LanguageFrozen(stories.start), jax.jit(problem.sample)
    buffer = preference_buffer.empty(proposed_shapes(stories, problem, batch), labels=1, capacity=prompts)
    for begin in range(0, prompts, batch):
        rows = (begin + np.arange(batch)) % len(stories.openings.tokens)
        sample_key, label_key = next(keys)
        drawn = sample(sample_key, stories.start, Prompts(*(leaf[rows] for leaf in stories.openings)), frozen)
        buffer = preference_buffer.add(buffer, Labelled(drawn, annotate(label_key, drawn)))
    return buffer


def fit_gold_model(
    stories: StoryModel, *, seed: int = 0, prompts: int = 1024, steps: int = 150, members: int = 3
) -> GoldModel:
    """Fits the gold reward model; its scores are scaled to a standard deviation of 2 at the reference.

    Args:
        stories: whose completions it scores.
        seed: of its data and fit.
        prompts: number of prompts in its preference data, two pairs each.
        steps: of the fit, on 32 prompts each.
        members: number of trunks.
    """
    model = reward_model(stories.policy, pooling="mean")
    problem = reference_problem(stories, model, pairs=2)
    sample_key, label_key, fit_key = jax.random.split(jax.random.key(seed), 3)

    def annotate(key, sample):
        craft = [craft_score(text) for text in stories.texts(sample.prompts, sample.responses)]
        scores = jnp.asarray(np.array(craft, np.float32).reshape(sample.responses.tokens.shape[:3]))
        return preferences.draw_labels(key, scores)

    keys = ((jax.random.fold_in(sample_key, turn), jax.random.fold_in(label_key, turn)) for turn in itertools.count())
    buffer = labelled_pairs(stories, problem, annotate, keys, prompts=prompts, batch=128)
    learning = reward_learning(problem, optax.adam(optax.cosine_decay_schedule(1e-3, steps)))
    first, frozen = learning.init(model.from_trunk(stories.start)), LanguageFrozen(stories.start)
    fit_members = jax.jit(
        jax.vmap(lambda key: fit(key, learning, first, buffer, frozen, size=32, steps=steps)[0].upper)
    )
    params = fit_members(jax.random.split(fit_key, members))
    sample = buffer.pairs.sample
    scores = _mean_score(stories)(params, Prompts(*sample.prompts), Responses(*sample.responses))
    return GoldModel(jax.device_get(params), float(scores.mean()), 2.0 / float(scores.std()))


def model_gold(stories: StoryModel, fitted: GoldModel) -> Gold:
    """Returns the gold reward of a fitted model."""
    mean_score = _mean_score(stories)

    def score(prompts, responses):
        return fitted.scale * (np.asarray(mean_score(fitted.params, prompts, responses)) - fitted.offset)

    return score


def _mean_score(stories: StoryModel) -> Callable[..., jax.Array]:
    model = reward_model(stories.policy, pooling="mean")
    return jax.jit(
        lambda params, prompts, responses: jnp.mean(
            jax.vmap(lambda member: score_responses(model, member, prompts, responses))(params), axis=0
        )
    )


def reference_pool(stories: StoryModel, size: int, *, seed: int) -> Responses:
    """Returns `size` completions of each opening by the reference, `[openings, size, 1, L]`."""
    batch, count = min(size, 16), len(stories.openings.tokens)
    prompts = Prompts(*(jnp.repeat(leaf, batch, axis=0) for leaf in stories.openings))
    generate = jax.jit(stories.generate)
    keys = jax.random.split(jax.random.key(seed), -(-size // batch))
    batches = [generate(stories.start, key, prompts) for key in keys]
    tokens, mask = (
        jnp.concatenate([getattr(each, name).reshape(count, batch, 1, -1) for each in batches], axis=1)[:, :size]
        for name in ("tokens", "mask")
    )
    return Responses(tokens, mask)


def host_annotator(gold: Gold) -> Callable[[jax.Array, Sample], jax.Array]:
    """Returns `(key, sample) -> labels [B, M, 1]`, Bradley-Terry on the gold reward."""

    def annotate(key, sample):
        return preferences.draw_labels(key, jnp.asarray(gold(sample.prompts, sample.responses)))

    return annotate


def proposed_shapes(stories: StoryModel, problem: bilevel.BilevelProblem, batch: int) -> Sample:
    """Returns the shapes of a problem's sample for `batch` prompts; nothing is run."""
    prompts = Prompts(*(jnp.repeat(leaf[:1], batch, axis=0) for leaf in stories.openings))
    frozen = LanguageFrozen(stories.start)
    return jax.eval_shape(lambda: problem.sample(jax.random.key(0), stories.start, prompts, frozen))


def proxy_scores(
    stories: StoryModel, gold: Gold, pool: Responses, size: str, *, prompts: int, pairs: int, seeds: tuple[int, ...]
) -> np.ndarray:
    """Returns a learned reward's scores of a pool, by which best-of-n without the gold reward chooses.

    The reward is fitted to as many labels as any method pays for, all of them for pairs of the reference.

    Args:
        stories, gold: model and gold reward.
        pool: `[openings, pool, 1, L]`.
        size: of the reward, see `learners_reward`.
        prompts, pairs: number of labelled prompts, and pairs for each of them.
        seeds: of the fits.

    Returns:
        `[seeds, openings, pool]`.
    """
    reward, first = learners_reward(stories, size)
    problem = reference_problem(stories, reward, pairs=pairs)
    frozen, batch = LanguageFrozen(stories.start), math.gcd(prompts, 64)
    annotate = host_annotator(gold)
    learning = reward_learning(problem, optax.adam(REWARD_LEARNING_RATES[size]))
    updates = 3 * prompts // 8
    learn = jax.jit(
        lambda key, state, buffer: fit(key, learning, state, buffer, frozen, size=8, steps=updates)[0].upper
    )
    score = jax.jit(lambda params: score_responses(reward, params, stories.openings, pool)[..., 0])
    scores = []
    for seed in seeds:
        keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(seed), 7), 2 + 2 * (prompts // batch + 1)))
        buffer = labelled_pairs(stories, problem, annotate, zip(keys, keys, strict=False), prompts=prompts, batch=batch)
        scores.append(np.asarray(score(learn(next(keys), learning.init(first(next(keys))), buffer))))
    return np.stack(scores)
