"""Replies to four requests, built from phrases: a language that can be read and enumerated, 256 replies a request.

A reply is a greeting, an answer, a reason and a closing, each one of four phrases. Two hidden gold rewards:

- "checklist" pays only for replies that tick every box: the answer is right, the reason is given, there is a courtesy, and
  the reply has at most `MOST_WORDS` words. No weighted sum of scores equals it.
- "weighted" is such a weighted sum: the control, in which the learner's reward can hold the truth.

The learner's reward is `scores @ weights` on four scores of a reply (`CRITERIA`). Everything is a table over the replies:
the best policy of a reward, its win rate and its KL have closed forms.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import bandit, exact

GREETINGS = ("", "Well.", "Hello!", "Dear customer, thank you so much for writing to us today!")
CLOSINGS = ("", "Bye.", "Have a nice day!", "We are always happy to help you, so please do write again!")
COURTESIES = (0, 0, 1, 1)
"""Whether each greeting, and each closing, is polite."""
REQUESTS = {
    "When do you open?": (
        ("We open at nine.", "We never close.", "That depends.", "No idea."),
        ("", "Deliveries come first.", "It is what it is.", "Everyone knows that."),
    ),
    "Can I return these shoes?": (
        ("Yes, within a month.", "No, never.", "That depends.", "No idea."),
        ("", "They can be sold again.", "It is what it is.", "Everyone knows that."),
    ),
    "Where is my parcel?": (
        ("It arrives on Monday.", "You have it.", "That depends.", "No idea."),
        ("", "Snow closed the road.", "It is what it is.", "Everyone knows that."),
    ),
    "Is the red one better?": (
        ("No, take the blue.", "Yes, it is red.", "That depends.", "No idea."),
        ("", "It lasts twice as long.", "It is what it is.", "Everyone knows that."),
    ),
}
"""For each request four answers, the first of them right, and four reasons, the second of them a reason."""
HABITS = ((0.4, 0.3, 0.2, 0.1), (0.3, 0.2, 0.3, 0.2), (0.3, 0.3, 0.2, 0.2), (0.4, 0.3, 0.2, 0.1))
"""Probability of each greeting, answer, reason and closing under the reference policy, independent of each other."""
CRITERIA = ("right answer", "reason", "courtesies", "words")
MOST_WORDS = 18
GOLDS = ("checklist", "weighted")
REFERENCE_UTILITY = 0.5
"""The reference wins half its comparisons with itself, at no KL."""


class Replies(NamedTuple):
    """A request's replies and what they are worth.

    Attributes:
        requests: C questions.
        texts: C lists of K replies.
        frozen: features `[C, K, 4]` (the criteria, words in tens), gold and reference.
        wins: `[C, K]`, probability that the annotator prefers a reply to one of the reference's.
    """

    requests: tuple[str, ...]
    texts: list[list[str]]
    frozen: bandit.Bandit
    wins: jax.Array


def make_replies(gold: str) -> Replies:
    """Returns the language with one of the `GOLDS`."""
    choices = list(itertools.product(range(4), repeat=4))
    texts, scores = [], []
    for answers, reasons in REQUESTS.values():
        phrases = [[GREETINGS[a], answers[b], reasons[c], CLOSINGS[d]] for a, b, c, d in choices]
        texts.append([" ".join(filter(None, parts)) for parts in phrases])
        words = np.array([len(text.split()) for text in texts[-1]])
        rows = [(b == 0, c == 1, COURTESIES[a] + COURTESIES[d]) for a, b, c, d in choices]
        scores.append(np.column_stack([np.array(rows, float), words / 10]))
    features = jnp.asarray(np.stack(scores))
    habits = np.log([[np.prod([HABITS[slot][part] for slot, part in enumerate(choice)]) for choice in choices]])
    reference = jax.nn.log_softmax(jnp.asarray(np.broadcast_to(habits, features.shape[:2])), axis=-1)
    frozen = bandit.Bandit(features, gold_reward(gold, features), reference)
    return Replies(tuple(REQUESTS), texts, frozen, jax.jit(exact.win_rates)(reference, frozen.gold))


def gold_reward(name: str, features: jax.Array) -> jax.Array:
    """Returns the annotator's hidden reward `[C, K]` of replies with these scores."""
    answer, reason, courtesies, words = jnp.moveaxis(features, -1, 0)
    if name == "weighted":
        return 1.2 * answer + 0.9 * reason + 0.5 * courtesies - 0.4 * words
    ticked = (answer > 0) & (reason > 0) & (courtesies > 0) & (10 * words <= MOST_WORDS + 0.5)
    return 4.0 * ticked


def reward(weights: jax.Array, features: jax.Array) -> jax.Array:
    """The learner's reward: `[C, K]`."""
    return features @ weights


def utility(
    log_policy: jax.Array, wins: jax.Array, reference: jax.Array, kl_price: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns E win - kappa KL, the win rate and the KL of a policy, all exact; every table is `[C, K]`."""
    win_rate = jnp.mean(exact.mean_under(log_policy, wins))
    kl = jnp.mean(exact.mean_under(log_policy, log_policy - reference))
    return win_rate - kl_price * kl, win_rate, kl


def optimum(replies: Replies, kl_price: float) -> float:
    """Returns the best utility of any policy, kappa log E_reference exp(win / kappa)."""
    return float(exact.soft_value(replies.wins, replies.frozen.reference, kl_price))


def best_in_class(
    replies: Replies, kl_price: float, *, restarts: int = 16, steps: int = 2000, seed: int = 0
) -> tuple[float, np.ndarray]:
    """Returns the best utility of a policy that is optimal for some reward of the learner's class, and those weights.

    By gradient ascent on the closed form from random weights, the best of all restarts. beta is 1: another beta only
    rescales the weights.
    """
    frozen = replies.frozen
    optimizer = optax.adam(optax.cosine_decay_schedule(0.5, steps))

    def loss(weights):
        log_policy = exact.soft_policy(reward(weights, frozen.features), frozen.reference, 1.0)
        return -utility(log_policy, replies.wins, frozen.reference, kl_price)[0]

    def ascend(weights):
        def step(carry, _):
            weights, state = carry
            updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
            return (optax.apply_updates(weights, updates), state), None

        (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), None, length=steps)
        return -loss(weights), weights

    starts = 2.0 * jax.random.normal(jax.random.key(seed), (restarts, frozen.features.shape[-1]))
    values, weights = jax.jit(jax.vmap(ascend))(starts)
    best = int(jnp.argmax(values))
    return float(values[best]), np.asarray(weights[best])


def draw_replies(
    log_policy: np.ndarray | jax.Array, replies: Replies, count: int = 2, seed: int = 0
) -> list[tuple[str, str]]:
    """Returns (request, reply) for replies drawn from a policy, the same random numbers for every policy."""
    key = jax.random.key(seed)
    chosen = jax.random.categorical(key, jnp.asarray(log_policy)[:, None], shape=(len(replies.requests), count))
    return [
        (request, replies.texts[row][int(reply)])
        for row, request in enumerate(replies.requests)
        for reply in chosen[row]
    ]
