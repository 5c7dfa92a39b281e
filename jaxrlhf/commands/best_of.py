"""The best of several completions by a reward model."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.base.types import Params
from jaxrlhf.commands.comparison import Comparer, Respond
from jaxrlhf.commands.models import Model, TokenizerBundle, check_tokens, open_model
from jaxrlhf.lm.generate import Completions
from jaxrlhf.lm.pairing import Prompts
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.processes import gathered

LARGEST = 1024
"""Most completions of a prompt among which the best is chosen."""


def best_of_kl(number: int) -> float:
    """Returns `log n - (n-1)/n` nats, the KL of the best of n to the policy that it is drawn from.

    It is exact where no two completions have the same reward, and else an upper bound (arXiv 2401.01879).
    """
    return math.log(number) - (number - 1) / number


def open_chooser(path: pathlib.Path, policy: TokenizerBundle) -> Model:
    """Returns the reward model at a path.

    Raises:
        ValueError: it reads other tokens than the policy writes.
    """
    reward = open_model(path, "reward")
    check_tokens(policy, reward.bundle, "--reward")
    return reward


Score = Callable[[Prompts, Any], np.ndarray]
"""`(prompts, completions) -> ` rewards `[N]`; completions have `tokens` and `mask`."""


def reward_scorer(reward: Model) -> Score:
    """Returns `(prompts, completions) -> ` the rewards `[N]` of completions, on the host; one compiled program a shape."""
    model = reward_model(decoder(reward.config, dtype=jnp.float32))
    params = jax.tree.map(jnp.asarray, reward.params)

    @jax.jit
    def score(params: Params, prompts: Prompts, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        joined = (jnp.concatenate(parts, axis=1) for parts in ((prompts.tokens, tokens), (prompts.mask, mask)))
        return model.score(params, *joined)

    return lambda prompts, completions: np.asarray(score(params, prompts, completions.tokens, completions.mask))


def best_of_responders(
    comparer: Comparer, reference_params: Params, score: Score, numbers: tuple[int, ...]
) -> dict[int, Respond]:
    """Returns, for each n, what gives the best of the reference's first n completions by the reward.

    As many completions as the largest n needs are drawn once, and are the same for all n. Log-ratios are `best_of_kl`.
    """
    pools: dict[int, tuple[Completions, np.ndarray]] = {}

    def pool_of(start: int, key: jax.Array, rows: Prompts) -> tuple[Completions, np.ndarray]:
        if start not in pools:
            drawn, rewards = [], []
            for number in range(max(numbers)):
                own_key = jax.random.fold_in(key, number)
                completions, _ = gathered(comparer.complete(reference_params, reference_params, own_key, rows))
                drawn.append(completions)
                rewards.append(score(rows, completions))
            pools[start] = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn), np.stack(rewards)
        return pools[start]

    def responder(number: int) -> Respond:
        def respond(start: int, key: jax.Array, rows: Prompts) -> tuple[Completions, np.ndarray]:
            completions, rewards = pool_of(start, key, rows)
            best = np.argmax(rewards[:number], axis=0)
            chosen = jax.tree.map(lambda leaf: leaf[best, np.arange(len(best))], completions)
            return chosen, np.full(len(best), best_of_kl(number))

        return respond

    return {number: responder(number) for number in numbers}
