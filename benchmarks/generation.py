"""Sampling from the same weights: ours, transformers' `generate`, and Tunix's sampler.

    python -m benchmarks.generation --policy DIR

All write the same number of tokens a row from the whole distribution at temperature 1: nothing ends a row before. What is
checked first: that the most probable tokens of each are so under the weights, recomputed without a cache, and that the
log-probabilities that our sampler reports are those that transformers gives its tokens.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.peers import Opened, open_policy, texts_of, torch_log_probs, torch_policy, tunix_policy, without_padding
from benchmarks.sides import (
    Compared,
    Side,
    agree,
    alternate,
    by_rows,
    checks,
    machine,
    report,
    side,
    table_of,
    use_all_cores,
)
from jaxrlhf.lm.generate import Completions, generate
from jaxrlhf.lm.log_probs import completion_log_probs


@dataclasses.dataclass(frozen=True)
class Config:
    """What to sample."""

    policy: pathlib.Path
    """A Llama in a Hugging Face directory."""
    batch_sizes: tuple[int, ...] = (1, 16, 64, 256)
    new_tokens: int = 128
    prompt_length: int = 16
    rounds: int = 9
    output: pathlib.Path = pathlib.Path("runs")


Sampler = Callable[[float], np.ndarray]
"""`(temperature) -> ` the tokens written after the prompts, `[N, L]`; 0 takes the most probable ones."""


def ours(opened: Opened, prompts: np.ndarray, new_tokens: int) -> tuple[Sampler, Callable[[float], Completions]]:
    """Returns our sampler, and the same with log-probabilities."""

    @functools.cache
    def compiled(temperature):
        def write(params, *rows):
            key, settings = jax.random.key(1), {"max_new_tokens": new_tokens, "stop_ids": ()}
            return generate(opened.policy, params, key, *rows, temperature=temperature, **settings)

        return by_rows(write, opened.params, *without_padding(prompts))

    return lambda temperature: np.asarray(compiled(temperature)().tokens), lambda temperature: compiled(temperature)()


def of_transformers(model: Any, prompts: np.ndarray, new_tokens: int) -> Sampler:
    """Returns transformers' sampler with its default cache and attention."""
    import torch

    rows = torch.from_numpy(prompts).long()
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": new_tokens, "use_cache": True, "pad_token_id": 0}

    def sample(temperature):
        drawn = (
            {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        )
        with torch.inference_mode():
            written = model.generate(rows, attention_mask=torch.ones_like(rows), **settings, **drawn)
        return written[:, rows.shape[1] :].numpy()

    return sample


class Numbered:
    """What Tunix's sampler takes for a tokenizer: the text "3" is the third row of prompts."""

    def __init__(self, prompts: np.ndarray):
        self.prompts = prompts.tolist()

    def encode(self, text: str) -> list[int]:
        """Returns a row."""
        return self.prompts[int(text)]

    def decode(self, ids: list[int]) -> str:
        """Returns nothing: tokens are what is compared."""
        del ids
        return ""

    def bos_id(self) -> int:
        """Returns the token that every row begins with."""
        return self.prompts[0][0]

    def eos_id(self) -> int:
        """Returns no token."""
        return -1

    def pad_id(self) -> int:
        """Returns no token of the prompts."""
        return 0


def of_tunix(model: Any, opened: Opened, prompts: np.ndarray, new_tokens: int) -> Sampler:
    """Returns Tunix's sampler."""
    from tunix.generate import sampler as tunix  # pyright: ignore[reportMissingImports]

    shape, (rows, length) = opened.model.config, prompts.shape
    cache = tunix.CacheConfig(
        cache_size=length + new_tokens,
        num_layers=shape.layers,
        num_kv_heads=shape.key_value_heads,
        head_dim=shape.head_size,
    )
    sampler = tunix.Sampler(model, Numbered(prompts), cache)
    texts = [str(number) for number in range(rows)]

    settings = {"max_prompt_length": length, "eos_tokens": [-1], "seed": 1}  # an end that is never met

    def sample(temperature):
        drawn = {"temperature": 1.0, "top_p": 1.0} if temperature else {}
        return np.stack([np.asarray(row) for row in sampler(texts, new_tokens, **settings, **drawn).tokens])

    return sample


def distance_from_best(opened: Opened, prompts: np.ndarray, completions: np.ndarray) -> float:
    """Returns by how many nats the tokens fall short of the most probable ones at most, without a cache."""
    whole = jnp.asarray(np.concatenate([prompts, completions], axis=1))
    hidden = opened.policy.hidden(opened.params, whole, jnp.ones(whole.shape, bool))
    logits = opened.policy.logits(opened.params, hidden[:, prompts.shape[1] - 1 : -1])
    chosen = jnp.take_along_axis(logits, whole[:, prompts.shape[1] :, None], axis=-1)[..., 0]
    return float(jnp.max(jnp.max(logits, axis=-1) - chosen))


def check(opened: Opened, peers: dict[str, Sampler], torch_model: Any, prompts: np.ndarray, new_tokens: int) -> str:
    """Returns what agrees: greedy tokens of all, and our log-probabilities with the slow path and with transformers."""
    sample, whole = ours(opened, prompts, new_tokens)
    told = []
    for name, greedy in {"ours": sample, **peers}.items():
        short = distance_from_best(opened, prompts, greedy(0.0))
        told.append(agree(f"greedy tokens ({name}) are the most probable ones", short, 0.0, tolerance=1e-4))
    drawn = whole(1.0)
    again = completion_log_probs(opened.policy, opened.params, *without_padding(prompts), drawn.tokens, drawn.mask)
    told.append(
        agree("log-probabilities of drawn tokens are those without a cache", drawn.log_prob, again, tolerance=1e-4)
    )
    if torch_model is not None:
        import torch

        tokens = np.concatenate([prompts, np.asarray(drawn.tokens)], axis=1)
        with torch.no_grad():
            theirs = torch_log_probs(torch_model, torch.from_numpy(tokens).long(), prompts.shape[1])
        told.append(agree("and those of transformers", drawn.log_prob, theirs.numpy(), tolerance=1e-4))
    return ", ".join(told)


def compare(config: Config, opened: Opened, batch_size: int) -> Compared:
    """Checks and times one batch size."""
    prompts = texts_of(opened, batch_size, config.prompt_length)
    new, models, peers = config.new_tokens, {}, {}

    def transformers():
        models["torch"] = torch_policy(config.policy)
        peers["transformers"] = of_transformers(models["torch"], prompts, new)
        return lambda: peers["transformers"](1.0)

    def tunix():
        model = tunix_policy(config.policy, opened.model.config)
        peers["tunix"] = of_tunix(model, opened, prompts, new)
        return lambda: peers["tunix"](1.0)

    _, whole = ours(opened, prompts, new)
    sides = (
        Side("ours", lambda: whole(1.0)),
        side("transformers generate", transformers),
        side("Tunix sampler", tunix),
    )
    agreed = check(opened, peers, models.get("torch"), prompts, new)
    what = f"batch {batch_size}, {config.prompt_length} + {new} tokens"
    return Compared(what, alternate(sides, rounds=config.rounds), agreed, goal=3.0 if batch_size >= 64 else 2.0)


def main(config: Config) -> pathlib.Path:
    """Prints and writes the table; returns its folder."""
    use_all_cores(devices=True)
    seen, opened = machine(), open_policy(config.policy)
    found = [compare(config, opened, size) for size in config.batch_sizes]
    tables = [table_of("Sampling", found)]
    return report(config, "generation", tables, found, seen, notes=checks(found))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
