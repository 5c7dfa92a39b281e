"""Times sampling from the same weights: ours, transformers' `generate`, and Tunix's sampler.

    python -m benchmarks.generation --policy DIR

All sample the same number of tokens per row from the full distribution at temperature 1; no row stops early. Checked
first: that the greedy tokens of each are the most probable ones, recomputed without a cache, and that the
log-probabilities that our sampler returns are those that transformers assigns to its tokens.
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

from benchmarks.batches import as_prompts
from benchmarks.devices import data_parallel, use_all_cores
from benchmarks.libraries import LoadedPolicy, generate_texts, open_policy, torch_log_probs, torch_policy, tunix_policy
from benchmarks.reporting import check_notes, comparison_table, machine_info, write_results
from benchmarks.timing import Comparison, Implementation, check_close, if_installed, interleave
from jaxrlhf.lm.generate import Completions, generate
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.transformer.config import DecoderConfig


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
"""`(temperature) -> [N, L]`, the generated tokens; greedy at temperature 0."""


def our_sampler(loaded: LoadedPolicy, prompts: np.ndarray, new_tokens: int) -> Callable[[float], Completions]:
    """Returns our sampler, `(temperature) -> Completions`."""

    @functools.cache
    def compiled(temperature):
        def sample(params, *rows):
            key, settings = jax.random.key(1), {"max_new_tokens": new_tokens, "stop_ids": ()}
            return generate(loaded.policy, params, key, *rows, temperature=temperature, **settings)

        return data_parallel(sample, loaded.params, *as_prompts(prompts))

    return lambda temperature: compiled(temperature)()


def transformers_sampler(model: Any, prompts: np.ndarray, new_tokens: int) -> Sampler:
    """Returns the sampler of transformers with its default cache and attention."""
    import torch

    rows = torch.from_numpy(prompts).long()
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": new_tokens, "use_cache": True, "pad_token_id": 0}
    random = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def sample(temperature):
        decoding = random if temperature else {"do_sample": False}
        with torch.inference_mode():
            tokens = model.generate(rows, attention_mask=torch.ones_like(rows), **settings, **decoding)
        return tokens[:, rows.shape[1] :].numpy()

    return sample


class PromptTokenizer:
    """A tokenizer for Tunix's sampler: the text "3" encodes to row 3 of the prompts."""

    def __init__(self, prompts: np.ndarray):
        self.prompts = prompts.tolist()

    def encode(self, text: str) -> list[int]:
        """Returns the row with this index."""
        return self.prompts[int(text)]

    def decode(self, ids: list[int]) -> str:
        """Returns an empty text: only tokens are compared."""
        del ids
        return ""

    def bos_id(self) -> int:
        """Returns the token that every row begins with."""
        return self.prompts[0][0]

    def eos_id(self) -> int:
        """Returns an id that no token has."""
        return -1

    def pad_id(self) -> int:
        """Returns an id that no prompt contains."""
        return 0


def tunix_sampler(model: Any, config: DecoderConfig, prompts: np.ndarray, new_tokens: int) -> Sampler:
    """Returns the sampler of Tunix; `config` is the model's."""
    from tunix.generate import sampler as tunix  # pyright: ignore[reportMissingImports]

    rows, length = prompts.shape
    cache = tunix.CacheConfig(
        cache_size=length + new_tokens,
        num_layers=config.layers,
        num_kv_heads=config.key_value_heads,
        head_dim=config.head_size,
    )
    sampler = tunix.Sampler(model, PromptTokenizer(prompts), cache)
    texts = [str(index) for index in range(rows)]
    settings = {"max_prompt_length": length, "eos_tokens": [-1], "seed": 1}  # no token is -1: no row stops early

    def sample(temperature):
        decoding = {"temperature": 1.0, "top_p": 1.0} if temperature else {}
        return np.stack([np.asarray(row) for row in sampler(texts, new_tokens, **settings, **decoding).tokens])

    return sample


def greedy_shortfall(loaded: LoadedPolicy, prompts: np.ndarray, completions: np.ndarray) -> float:
    """Returns the largest difference between the best and the chosen token's log-probability, in nats, without a cache."""
    tokens = jnp.asarray(np.concatenate([prompts, completions], axis=1))
    hidden = loaded.policy.hidden(loaded.params, tokens, jnp.ones(tokens.shape, bool))
    logits = loaded.policy.logits(loaded.params, hidden[:, prompts.shape[1] - 1 : -1])
    chosen = jnp.take_along_axis(logits, tokens[:, prompts.shape[1] :, None], axis=-1)[..., 0]
    return float(jnp.max(jnp.max(logits, axis=-1) - chosen))


def check(
    loaded: LoadedPolicy, others: dict[str, Sampler], torch_model: Any, prompts: np.ndarray, new_tokens: int
) -> str:
    """Checks the greedy tokens of all, and our log-probabilities against a pass without a cache and transformers.

    Args:
        loaded: our model.
        others: samplers of the other libraries by name.
        torch_model: transformers' model; None where it is not installed.
        prompts: `[N, P]`.
        new_tokens: to sample.
    """
    ours = our_sampler(loaded, prompts, new_tokens)
    agreed = []
    for name, sampler in {"ours": lambda temperature: np.asarray(ours(temperature).tokens), **others}.items():
        shortfall = greedy_shortfall(loaded, prompts, sampler(0.0))
        agreed.append(check_close(f"greedy tokens ({name}) are the most probable ones", shortfall, 0.0, tolerance=1e-4))
    sampled = ours(1.0)
    uncached = completion_log_probs(loaded.policy, loaded.params, *as_prompts(prompts), sampled.tokens, sampled.mask)
    what = "log-probabilities of sampled tokens are those without a cache"
    agreed.append(check_close(what, sampled.log_prob, uncached, tolerance=1e-4))
    if torch_model is not None:
        import torch

        tokens = np.concatenate([prompts, np.asarray(sampled.tokens)], axis=1)
        with torch.no_grad():
            theirs = torch_log_probs(torch_model, torch.from_numpy(tokens).long(), prompts.shape[1])
        agreed.append(check_close("and those of transformers", sampled.log_prob, theirs.numpy(), tolerance=1e-4))
    return ", ".join(agreed)


def compare(config: Config, loaded: LoadedPolicy, batch_size: int) -> Comparison:
    """Checks and times one batch size."""
    prompts = generate_texts(loaded, batch_size, config.prompt_length)
    models, samplers = {}, {}

    def transformers():
        models["torch"] = torch_policy(config.policy)
        samplers["transformers"] = transformers_sampler(models["torch"], prompts, config.new_tokens)
        return lambda: samplers["transformers"](1.0)

    def tunix():
        model = tunix_policy(config.policy, loaded.model.config)
        samplers["tunix"] = tunix_sampler(model, loaded.model.config, prompts, config.new_tokens)
        return lambda: samplers["tunix"](1.0)

    ours = our_sampler(loaded, prompts, config.new_tokens)
    implementations = (
        Implementation("ours", lambda: ours(1.0)),
        if_installed("transformers generate", transformers),
        if_installed("Tunix sampler", tunix),
    )
    agreed = check(loaded, samplers, models.get("torch"), prompts, config.new_tokens)
    task = f"batch {batch_size}, {config.prompt_length} + {config.new_tokens} tokens"
    timings = interleave(implementations, rounds=config.rounds)
    return Comparison(task, timings, agreed, goal=3.0 if batch_size >= 64 else 2.0)


def main(config: Config) -> pathlib.Path:
    """Prints and writes the table; returns its folder."""
    use_all_cores(device_per_core=True)
    machine, loaded = machine_info(), open_policy(config.policy)
    comparisons = [compare(config, loaded, size) for size in config.batch_sizes]
    tables = [comparison_table("Sampling", comparisons)]
    return write_results(config, "generation", tables, comparisons, machine, notes=check_notes(comparisons))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
