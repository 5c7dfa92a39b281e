"""The tasks of `frontier.py`: short stories by a pretrained model, under two hidden gold rewards.

- `words` is a function of the text: glad words less sorry ones (`online_rlhf_tasks.story_score`).
- `model` is a reward model larger than any learner's: the mean of three trunks of the policy's size, fitted to
  preferences for stories with speech in them and without repetition, then taken for the truth with whatever it has
  learned beside that.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from online_rlhf_tasks import OPENINGS, encode, left_padded, story_score

from jaxrlhf import bilevel, objectives, preferences
from jaxrlhf.algorithms.reward_learning import fit, reward_learning
from jaxrlhf.bilevel import Labelled, Sample
from jaxrlhf.lm.generate import generate
from jaxrlhf.lm.hugging_face.weights import load_decoder, load_tokenizer, special_ids
from jaxrlhf.lm.problem import LanguageFrozen, Prompts, Responses, language_problem, reward_of
from jaxrlhf.lm.reward import RewardModel, reward_model
from jaxrlhf.lm.transformer.model import DecoderConfig, LanguageModel, decoder
from jaxrlhf.preferences import buffer as preference_buffer

LEARNERS_RATE = {"whole": 1e-3, "small": 2e-2}
"""Rate of Adam for a learner's reward."""

CLASSES = 24
"""Of tokens, by their number modulo this: all that the small reward can tell apart."""

Gold = Callable[[Prompts, Responses], np.ndarray]
"""`(prompts [B, P], responses [B, M, K, L]) -> ` scores `[B, M, K]`, on the host."""


class World(NamedTuple):
    """A pretrained model and its openings, whoever judges it.

    Attributes:
        shape, policy, start: the decoder, and the parameters of the reference.
        stop_ids: tokens that end a story.
        openings: all prompts.
        max_new_tokens: of a continuation.
        texts: `(prompts, responses [B, M, K, L]) -> ` B M K texts.
    """

    shape: DecoderConfig
    policy: LanguageModel
    start: Any
    stop_ids: tuple[int, ...]
    openings: Prompts
    max_new_tokens: int
    texts: Callable[[Prompts, Responses], list[str]]


def open_world(directory: Path, *, max_new_tokens: int) -> World:
    """Returns the world of a Hugging Face directory.

    Raises:
        ValueError: the directory cannot be read as a decoder with a tokenizer.
    """
    shape, start = load_decoder(directory)
    tokenizer, special = load_tokenizer(directory), special_ids(directory)
    # A text that starts anew has ended: some models were trained with BOS alone between texts.
    ends = {*special.eos, *(() if special.bos is None else (special.bos,))}

    def texts(prompts, responses):
        tokens, mask = (np.asarray(part) for part in responses)
        count = tokens.shape[1] * tokens.shape[2]
        before = np.repeat(np.where(prompts.mask, prompts.tokens, -1), count, axis=0)
        rows = np.concatenate([before, np.where(mask, tokens, -1).reshape(len(before), -1)], axis=1)
        return tokenizer.decode_batch([row[row >= 0].tolist() for row in rows])

    openings = left_padded([encode(tokenizer, special.bos, text) for text in OPENINGS])
    return World(shape, decoder(shape), start, tuple(sorted(ends)), openings, max_new_tokens, texts)


def characters(world: World, prompts: Prompts, responses: Responses) -> np.ndarray:
    """Returns the characters of responses `[B, M, K, L]`, `[B, M, K]`: most texts here have as many tokens as they may."""
    shape = responses.tokens.shape[:3]
    whole = [len(text) for text in world.texts(prompts, responses)]
    given = [len(text) for text in world.texts(prompts, Responses(*(part[..., :0] for part in responses)))]
    return (np.array(whole) - np.array(given)).reshape(shape)


def learners_reward(world: World, size: str) -> tuple[RewardModel, Callable[[jax.Array], Any]]:
    """Returns a learner's reward model and `key -> ` its first parameters.

    Args:
        world: whose policy gives the trunk.
        size: "whole", the policy's own trunk, pretrained; or "small", one number for each of `CLASSES` classes of tokens.

    Raises:
        ValueError: there is no such size.
    """
    if size == "whole":
        whole = reward_model(world.policy, pooling="mean")
        return whole, lambda key: whole.from_trunk(world.start)
    if size != "small":
        raise ValueError(f"A learner's reward is whole or small, got {size!r}.")

    def score(params, tokens, mask):
        return jnp.sum(params[tokens % CLASSES] * mask, axis=-1)

    small = RewardModel(init=lambda key: jnp.zeros(CLASSES), score=score, from_trunk=lambda params: jnp.zeros(CLASSES))
    return small, small.init


def words_gold(world: World) -> Gold:
    """Returns the gold reward that counts words."""

    def score(prompts, responses):
        scores = np.array([story_score(text) for text in world.texts(prompts, responses)], np.float32)
        return scores.reshape(responses.tokens.shape[:3])

    return score


SPEECH = re.compile(r'"[^"]+"?')


def craft_score(text: str) -> float:
    """What the gold model is fitted to: points for speech, and for every word that the text has not used yet."""
    words = re.findall(r"[a-z']+", text.lower())
    return 1.5 * bool(SPEECH.search(text)) + 0.4 * len(set(words)) - 0.4 * (len(words) - len(set(words)))


class GoldModel(NamedTuple):
    """Parameters of the gold reward model, stacked, and what its scores are shifted and scaled by."""

    params: Any
    middle: float
    scale: float


def fit_gold_model(
    world: World, *, seed: int = 0, prompts: int = 1024, steps: int = 150, members: int = 3
) -> GoldModel:
    """Fits the gold reward model; its scores are scaled to a standard deviation of 2 at the reference.

    Args:
        world: whose stories it judges.
        seed: of its data and fit.
        prompts: of the preferences that it is fitted to, two pairs each.
        steps: of the fit, on 32 prompts each.
        members: trunks.
    """
    model = reward_model(world.policy, pooling="mean")
    problem = language_problem(
        world.policy,
        model,
        objectives.likelihood(coupled=False),
        pairs=2,
        max_new_tokens=world.max_new_tokens,
        stop_ids=world.stop_ids,
        against_reference=False,
    )
    frozen, key = LanguageFrozen(world.start), jax.random.key(seed)
    sample_key, label_key, fit_key = jax.random.split(key, 3)
    some = np.arange(128) % len(world.openings.tokens)
    sample = jax.jit(problem.sample)
    buffer = None
    for turn in range(-(-prompts // len(some))):
        asked = Prompts(*(part[some] for part in world.openings))
        drawn = sample(jax.random.fold_in(sample_key, turn), world.start, asked, frozen)
        craft = [craft_score(text) for text in world.texts(drawn.prompts, drawn.responses)]
        scores = jnp.asarray(np.array(craft, np.float32).reshape(drawn.responses.tokens.shape[:3]))
        labels = preferences.draw_labels(jax.random.fold_in(label_key, turn), scores)
        if buffer is None:
            buffer = preference_buffer.empty(drawn, labels=1, capacity=prompts)
        buffer = preference_buffer.add(buffer, Labelled(drawn, labels))
    assert buffer is not None
    learner = reward_learning(problem, optax.adam(optax.cosine_decay_schedule(1e-3, steps)))
    first = learner.init(model.from_trunk(world.start))
    together = jax.jit(jax.vmap(lambda key: fit(key, learner, first, buffer, frozen, size=32, steps=steps)[0].upper))(
        jax.random.split(fit_key, members)
    )

    held = buffer.pairs.sample
    every = _mean_score(world)(together, Prompts(*held.prompts), Responses(*held.responses))
    return GoldModel(jax.device_get(together), float(every.mean()), 2.0 / float(every.std()))


def model_gold(world: World, fitted: GoldModel) -> Gold:
    """Returns the gold reward of a fitted model."""
    mean_score = _mean_score(world)

    def score(prompts, responses):
        return fitted.scale * (np.asarray(mean_score(fitted.params, prompts, responses)) - fitted.middle)

    return score


def _mean_score(world: World) -> Callable[..., jax.Array]:
    model = reward_model(world.policy, pooling="mean")
    return jax.jit(
        lambda params, prompts, responses: jnp.mean(
            jax.vmap(lambda one: reward_of(model, one, prompts, responses))(params), axis=0
        )
    )


def pool(world: World, size: int, *, seed: int) -> tuple[Prompts, Responses]:
    """Returns `size` continuations of each opening by the reference, `[openings, size, 1, L]`."""
    write = jax.jit(
        lambda params, key, rows: generate(
            world.policy, params, key, *rows, max_new_tokens=world.max_new_tokens, stop_ids=world.stop_ids
        )
    )
    at_once = min(size, 16)
    rows = Prompts(*(jnp.repeat(part, at_once, axis=0) for part in world.openings))
    written = [write(world.start, key, rows) for key in jax.random.split(jax.random.key(seed), -(-size // at_once))]
    count = len(world.openings.tokens)
    tokens, mask = (
        jnp.concatenate([getattr(each, name).reshape(count, at_once, 1, -1) for each in written], axis=1)[:, :size]
        for name in ("tokens", "mask")
    )
    return world.openings, Responses(tokens, mask)


def host_annotator(gold: Gold) -> Callable[[jax.Array, Sample], jax.Array]:
    """Returns `(key, sample) -> labels [B, M, 1]`, Bradley-Terry on the gold reward."""

    def annotate(key, sample):
        return preferences.draw_labels(key, jnp.asarray(gold(sample.prompts, sample.responses)))

    return annotate


def proposed_shapes(world: World, problem: bilevel.BilevelProblem, batch: int) -> Sample:
    """Returns the shapes of a problem's sample for `batch` prompts; nothing is run."""
    asked = Prompts(*(jnp.repeat(part[:1], batch, axis=0) for part in world.openings))
    frozen = LanguageFrozen(world.start)
    return jax.eval_shape(lambda: problem.sample(jax.random.key(0), world.start, asked, frozen))


def best_by_reward(
    world: World, gold: Gold, many: Responses, size: str, *, prompts: int, pairs: int, seeds: tuple[int, ...]
) -> np.ndarray:
    """Returns by which score the best of n is chosen where the gold reward is not to be had, `[seeds, openings, pool]`.

    A learner's reward fitted to as many labels as any method pays for, all of them of pairs of the reference.

    Args:
        world, gold: who writes and who judges.
        many: the pool, `[openings, pool, 1, L]`.
        size: of the reward, see `learners_reward`.
        prompts, pairs: prompts with so many pairs each that are labelled.
        seeds: of the fits.
    """
    reward, first = learners_reward(world, size)
    problem = language_problem(
        world.policy,
        reward,
        objectives.likelihood(coupled=False),
        pairs=pairs,
        max_new_tokens=world.max_new_tokens,
        stop_ids=world.stop_ids,
        against_reference=False,
    )
    frozen, at_once = LanguageFrozen(world.start), math.gcd(prompts, 64)
    annotate, sample = host_annotator(gold), jax.jit(problem.sample)
    learning = reward_learning(problem, optax.adam(LEARNERS_RATE[size]))
    updates = 3 * prompts // 8
    learn = jax.jit(
        lambda key, state, buffer: fit(key, learning, state, buffer, frozen, size=8, steps=updates)[0].upper
    )
    score = jax.jit(lambda params: reward_of(reward, params, world.openings, many)[..., 0])
    scores = []
    for seed in seeds:
        keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(seed), 7), 2 + 2 * (prompts // at_once + 1)))
        buffer = preference_buffer.empty(proposed_shapes(world, problem, at_once), labels=1, capacity=prompts)
        for begin in range(0, prompts, at_once):
            some = (begin + np.arange(at_once)) % len(world.openings.tokens)
            drawn = sample(next(keys), world.start, Prompts(*(part[some] for part in world.openings)), frozen)
            buffer = preference_buffer.add(buffer, Labelled(drawn, annotate(next(keys), drawn)))
        scores.append(np.asarray(score(learn(next(keys), learning.init(first(next(keys))), buffer))))
    return np.stack(scores)
