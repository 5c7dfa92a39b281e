"""What a policy writes: `jaxrlhf sample`."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.annotation.functions import completions_of, real
from jaxrlhf.commands.models import Model, open_model
from jaxrlhf.data.batches import padded_prompts
from jaxrlhf.data.encode import encode_prompt
from jaxrlhf.data.records import Message
from jaxrlhf.lm.generate import generate
from jaxrlhf.lm.transformer.model import decoder


@dataclasses.dataclass(frozen=True)
class Sample:
    """Writes on from a prompt, to standard output."""

    policy: pathlib.Path
    """A Hugging Face directory, or a run's folder."""
    prompt: str = ""
    """Text to go on from; empty is the beginning of a text alone."""
    chat: bool = False
    """Puts the prompt to the model as a user's message, by its chat template."""
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Mass of the nucleus that is sampled from."""
    max_new_tokens: int = 128
    number: int = 1
    """How many completions."""
    seed: int = 0


def main(config: Sample) -> list[str]:
    """Prints the prompt with each completion; returns the completions.

    Raises:
        ValueError: the model cannot be read, or a setting is out of range.
    """
    if config.number < 1:
        raise ValueError(f"--number must be at least 1, got {config.number}.")
    model = open_model(config.policy, "policy")
    text = (Message("user", config.prompt),) if config.chat else config.prompt
    prompt = encode_prompt(model.words.codec(), text)
    if not len(prompt):
        if model.words.special.bos is None:
            raise ValueError("This model has no token that begins a text; give a --prompt.")
        prompt = np.array([model.words.special.bos], np.int32)
    texts = write_texts(
        model,
        [prompt] * config.number,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )
    for number, completion in enumerate(texts):
        if number:
            print("---")
        print((completion if config.chat else config.prompt + completion).strip("\n"))
    return texts


def write_texts(
    model: Model,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Returns a completion of each prompt `[P]`, as text."""
    length = max(len(prompt) for prompt in prompts)
    rows = padded_prompts(list(prompts), length)
    write = jax.jit(
        lambda params, key, tokens, mask: generate(
            decoder(model.config),
            params,
            key,
            tokens,
            mask,
            max_new_tokens=max_new_tokens,
            stop_ids=model.words.stop_ids,
            temperature=temperature,
            top_p=top_p,
            pad_id=model.words.pad_id,
        )
    )
    written = write(jax.tree.map(jnp.asarray, model.params), jax.random.key(seed), *rows)
    return completions_of(
        model.words.tokenizer, [prompt.tolist() for prompt in prompts], real(written.tokens, written.mask)
    )
