"""Samples completions from a policy: `jaxrlhf sample`."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.annotation.functions import completions_of, unpadded
from jaxrlhf.base.types import Key, Params
from jaxrlhf.commands.best_of import open_chooser, reward_scorer
from jaxrlhf.commands.compilation import CompilationConfig
from jaxrlhf.commands.flags import check_flags
from jaxrlhf.commands.models import Model, open_model
from jaxrlhf.commands.options import Groups
from jaxrlhf.data.batches import padded_prompts
from jaxrlhf.data.encode import encode_prompt
from jaxrlhf.data.records import Message
from jaxrlhf.lm.generate import Completions, Generation, generate
from jaxrlhf.lm.pairing import Prompts
from jaxrlhf.lm.transformer.model import LanguageModel, decoder


@dataclasses.dataclass(frozen=True)
class Sample(CompilationConfig):
    """Generates completions of a prompt and prints them."""

    GROUPS: ClassVar[Groups] = {
        "main settings": (
            *("policy", "prompt", "chat", "number", "max_new_tokens", "temperature", "top_p"),
            *("best_of", "reward", "seed"),
        )
    }

    policy: pathlib.Path
    """Model to sample from: a Hugging Face directory, or a run's folder."""
    prompt: str = ""
    """Text to complete; if empty, generation starts from the BOS token."""
    chat: bool = False
    """Sends the prompt as a user message, formatted with the model's chat template."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = 1.0
    """Probability mass of nucleus sampling; 1 samples from all tokens."""
    max_new_tokens: int = 128
    """Maximum length of a completion in tokens."""
    number: int = 1
    """Number of completions."""
    best_of: int = 1
    """Completions among which each is the best by --reward."""
    reward: pathlib.Path | None = None
    """Reward model for --best-of: a Hugging Face directory, or a run's folder."""
    seed: int = 0
    """Random seed."""


def main(config: Sample) -> list[str]:
    """Prints the prompt with each completion; returns the completions.

    Raises:
        ValueError: the model cannot be read, or a setting is out of range.
    """
    check_flags(config)
    if config.number < 1:
        raise ValueError(f"--number must be at least 1, got {config.number}.")
    if (config.best_of == 1) != (config.reward is None):
        raise ValueError("Give --best-of with --reward: the reward model chooses among so many completions.")
    if config.best_of > 1 and config.temperature == 0:
        raise ValueError("--temperature 0 gives the same completion each time; give a positive one with --best-of.")
    model = open_model(config.policy, "policy")
    chooser = None if config.reward is None else open_chooser(config.reward, model.bundle)
    for note in (*model.notes, *model.bundle.found.notes):
        print(note, file=sys.stderr)
    text = (Message("user", config.prompt),) if config.chat else config.prompt
    prompt = encode_prompt(model.bundle.chat_tokenizer(), text)
    if not len(prompt):
        if model.bundle.special.bos is None:
            raise ValueError("This model has no token that begins a text; give a --prompt.")
        prompt = np.array([model.bundle.special.bos], np.int32)
    room = model.config.context_length - len(prompt)
    if config.max_new_tokens > room:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens} is more than the {room} that the model's context of "
            f"{model.config.context_length} leaves after the prompt."
        )
    rows, completions = generate_rows(
        model,
        [prompt] * (config.number * config.best_of),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )
    texts = completion_texts(model, rows, completions)
    if chooser is not None:
        rewards = reward_scorer(chooser)(rows, completions).reshape(config.number, config.best_of)
        best = np.argmax(rewards, axis=1)
        texts = [texts[number * config.best_of + chosen] for number, chosen in enumerate(best)]
        for row, chosen in zip(rewards, best, strict=True):
            print(f"Reward {row[chosen]:.3f}, the best of {len(row)} with a mean of {row.mean():.3f}", file=sys.stderr)
    for number, completion in enumerate(texts):
        if number:
            print("---")
        print((completion if config.chat else config.prompt + completion).strip("\n"))
    return texts


def generate_texts(
    model: Model,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Returns a completion of each prompt `[P]`, as text."""
    settings: Any = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    return completion_texts(model, *generate_rows(model, prompts, **settings))


def generate_rows(
    model: Model,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> tuple[Prompts, Completions]:
    """Returns the prompts `[P]` as rows, and a completion of each."""
    length = max(len(prompt) for prompt in prompts)
    rows = Prompts(*map(jnp.asarray, padded_prompts(list(prompts), length)))
    generation = Generation(max_new_tokens, model.bundle.stop_ids, temperature, model.bundle.pad_id)
    params = jax.tree.map(jnp.asarray, model.params)
    return rows, complete(decoder(model.config), params, jax.random.key(seed), rows, generation, top_p)


# Compiled once for a decoder, its settings and the shapes of the prompts.
@functools.partial(jax.jit, static_argnames=("model", "generation", "top_p"))
def complete(
    model: LanguageModel, params: Params, key: Key, prompts: Prompts, generation: Generation, top_p: float
) -> Completions:
    """Returns a completion of each prompt."""
    return generate(model, params, key, *prompts, **generation._asdict(), top_p=top_p)


def completion_texts(model: Model, prompts: Prompts, completions: Completions) -> list[str]:
    """Returns completions as text, as they continue their prompts."""
    return completions_of(
        model.bundle.tokenizer,
        unpadded(prompts.tokens, prompts.mask),
        unpadded(completions.tokens, completions.mask),
    )
