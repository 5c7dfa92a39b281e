"""Contextual bandits in which a reward model is wrong in a known way, for the study of upper objectives.

Every bandit has the same number of contexts and arms, and its features are padded with zeros to the same width, so that
all structures run in one program. Free parameters of a structure were found by a random search for a large gain from
coupling, on bandits drawn from other seeds than the study's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CONTEXTS, ARMS = 4, 8
CELLS = CONTEXTS * ARMS


class Case(NamedTuple):
    """A bandit and its annotator; it serves as the `frozen` argument of `bandit.bandit_problem`.

    Attributes:
        features: `[C, K, C K]`, the arms' features in the learner's linear reward, padded with zeros.
        gold: `[C, K]`, the hidden reward that defines the true return.
        reference: `[C, K]`, log-probabilities.
        position: `[]`, the annotator's bias in favour of slot 0 (the policy's), in units of gold.
        mistake: `[]`, probability that a label is flipped.
    """

    features: jax.Array
    gold: jax.Array
    reference: jax.Array
    position: jax.Array
    mistake: jax.Array


class Structure(NamedTuple):
    """A family of bandits: `draw(random) -> Case`, and its description."""

    draw: Callable[[np.random.Generator], Case]
    description: str


def _case(features, gold, reference_logits, *, position: float = 0.0, mistake: float = 0.0) -> Case:
    padding = np.zeros((CONTEXTS, ARMS, CELLS - features.shape[-1]))
    reference = reference_logits - np.log(np.sum(np.exp(reference_logits), axis=-1, keepdims=True))
    tables = (np.concatenate([features, padding], axis=-1), gold, reference, position, mistake)
    return Case(*(jnp.asarray(table, jnp.float32) for table in tables))


def _normal(random, number):
    return random.standard_normal((number, CONTEXTS, ARMS))


def random_features(features: int, *, position: float = 0.0, mistake: float = 0.0):
    """Gold is standard normal; the reward is linear in random features, or in one per cell when there are enough."""

    def draw(random):
        gold, reference = _normal(random, 2)
        table = np.eye(CELLS).reshape(CONTEXTS, ARMS, CELLS)
        if features < CELLS:
            table = random.standard_normal((CONTEXTS, ARMS, features))
        return _case(table, gold, 0.5 * reference, position=position, mistake=mistake)

    return draw


def padded_responses(*, length_cost: float = 0.0):
    """Long responses are good; padded ones are longest, bad and rare. The reward sees length and a noisy quality."""

    def draw(random):
        length_noise, quality_noise, view_noise, reference_noise = _normal(random, 4)
        arm = np.arange(ARMS)
        kinds = [arm < 2, arm < 5]
        length = np.select(kinds, [1.5, 0.5], -1.0) + 0.3 * length_noise
        quality = np.select(kinds, [-1.0, 1.0], -1.0) + 0.5 * quality_noise
        features = np.stack([length, quality + 2.0 * view_noise], axis=-1)
        reference = np.where(kinds[0], -2.0, 0.0) + 0.3 * reference_noise
        return _case(features, quality - length_cost * length, reference)

    return draw


def correlated_length():
    """The reference's long responses are its good ones; length itself lowers gold slightly."""

    def draw(random):
        length, quality, view_noise, reference_noise = _normal(random, 4)
        features = np.stack([length, quality + 2.0 * view_noise], axis=-1)
        return _case(features, quality - 0.2 * length, 2.0 * length * quality + 0.3 * reference_noise)

    return draw


def gated(*, among_poor: float, among_good: float, level: float, reference_logit: float, blur: float):
    """Half the arms are good. Length raises gold among poor responses and lowers it among good ones.

    The reward sees length and a noisy indicator of good responses; it has one coefficient of length for both halves.
    """

    def draw(random):
        length, quality, blur_noise, reference_noise = _normal(random, 4)
        good = np.broadcast_to(np.arange(ARMS) < ARMS // 2, length.shape)
        effect = np.where(good, -among_good, among_poor)
        gold = level * good + effect * length + 0.35 * quality
        features = np.stack([good + blur * blur_noise, length], axis=-1)
        return _case(features, gold, reference_logit * good + 0.3 * reference_noise)

    return draw


def shared_across_prompts():
    """One feature helps in three prompts, where a marked arm beats all others anyway, and harms in the fourth."""

    def draw(random):
        feature, quality, reference_noise = _normal(random, 3)
        marked_context = (np.arange(CONTEXTS) < 3)[:, None]
        marked = ((np.arange(ARMS) == 0) & marked_context).astype(feature.dtype)
        elsewhere = np.where(marked_context, 1.4 * (1.0 - marked), -1.2)
        gold = 1.1 * marked + elsewhere * feature + 0.1 * quality
        return _case(np.stack([marked, feature], axis=-1), gold, 1.4 * marked + 0.3 * reference_noise)

    return draw


def structures() -> dict[str, Structure]:
    """Returns the structures by name, in the order of the tables."""
    moderate = gated(among_poor=1.55, among_good=0.57, level=0.69, reference_logit=-0.22, blur=0.2)
    strong = gated(among_poor=2.64, among_good=0.61, level=1.52, reference_logit=-0.62, blur=0.15)
    return {
        "realisable": Structure(random_features(CELLS), "one feature per cell: the reward can be right everywhere"),
        "random, 16 features": Structure(random_features(16), "16 random features for 32 cells"),
        "random, 8 features": Structure(random_features(8), "8 random features for 32 cells"),
        "random, 3 features": Structure(random_features(3), "3 random features for 32 cells"),
        "length, padding": Structure(
            padded_responses(),
            "long responses are good; padded ones are longest, bad and rare; length itself has no effect",
        ),
        "length, slight harm": Structure(
            correlated_length(), "the reference's long responses are good; length itself lowers gold by 0.2 per unit"
        ),
        "length, reversed": Structure(moderate, "length helps poor responses and harms good ones; moderate effects"),
        "gated": Structure(
            strong, "the same with large differences among poor responses and subtle ones among good ones"
        ),
        "shared across prompts": Structure(
            shared_across_prompts(), "a feature helps where a marked arm wins anyway, and harms where it is decisive"
        ),
        "position bias, realisable": Structure(
            random_features(CELLS, position=0.5), "realisable; labels favour slot 0, the policy's, by 0.5"
        ),
        "position bias, 8 features": Structure(random_features(8, position=0.5), "8 random features, slot 0 favoured"),
        "10% mistakes, 8 features": Structure(random_features(8, mistake=0.1), "8 random features, 10% wrong labels"),
    }


def draw_all(seed: int, number: int) -> Case:
    """Returns `number` bandits of every structure, leaves `[structures, number, ...]`; structures share their noise."""
    rows = [
        [structure.draw(np.random.default_rng([seed, bandit])) for bandit in range(number)]
        for structure in structures().values()
    ]
    of_structure = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *row) for row in rows]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_structure)
