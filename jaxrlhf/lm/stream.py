"""Sampling one completion token by token, so that it can be shown as it comes."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.base.types import Params
from jaxrlhf.lm.generate import choose
from jaxrlhf.lm.transformer.model import LanguageModel

SMALLEST = 64
"""Fewest columns that a prompt is padded to."""

Stream = Callable[[np.ndarray, np.random.Generator], Iterator[int]]
"""`(prompt [P], source of randomness) -> ` the tokens of a completion, the stop token left out."""


def open_stream(
    model: LanguageModel,
    params: Params,
    *,
    columns: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Stream:
    """Returns what samples completions one token at a time, from the distribution of `generate`.

    One token more is one program, whatever the prompt; prompts are padded to `SMALLEST`, doubled as often as needed, and
    the program that reads them is compiled once for each such length.

    Args:
        model: the language model.
        params: its parameters.
        columns: of the cache, at most the model's context; prompts of up to `columns - max_new_tokens` fit.
        max_new_tokens: of a completion.
        stop_ids: tokens that end it.
        temperature, top_p: as in `generate`.

    Raises:
        ValueError: from the stream, for an empty prompt or one that does not fit.
    """
    longest = columns - max_new_tokens

    @jax.jit
    def prefill(params, tokens, mask):
        return model.prefill(params, tokens, mask, columns)

    @functools.partial(jax.jit, donate_argnums=2)
    def advance(params, hidden, cache, uniform):
        token, _ = choose(model.logits(params, hidden), uniform, temperature, top_p)
        return token, model.decode(params, token, cache)

    def stream(prompt: np.ndarray, source: np.random.Generator) -> Iterator[int]:
        if not 0 < len(prompt) <= longest:
            raise ValueError(f"A prompt must have 1 to {longest} tokens, got {len(prompt)}.")
        length = SMALLEST
        while length < len(prompt):
            length *= 2
        length = min(length, longest)
        tokens, mask = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
        tokens[0, length - len(prompt) :], mask[0, length - len(prompt) :] = prompt, True
        hidden, cache = prefill(params, tokens, mask)
        for _ in range(max_new_tokens):
            uniform = jnp.asarray(source.uniform(size=1), jnp.float32)
            chosen, (hidden, cache) = advance(params, hidden, cache, uniform)
            token = int(chosen[0])
            if token in stop_ids:
                return
            yield token

    return stream


def text_pieces(tokens: Iterator[int], prompt: list[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Returns the text of tokens as they come, each piece once its characters are whole.

    Args:
        tokens: of a completion.
        prompt: tokens before it; some tokenizers drop the space that a text begins with.
        decode: `(tokens) -> text`.
    """
    before, seen, shown = decode(prompt), list(prompt), ""
    for token in tokens:
        seen.append(token)
        text = decode(seen).removeprefix(before)
        # The replacement character stands for the first bytes of a character of several.
        if not text.endswith("�") and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    rest = decode(seen).removeprefix(before)
    if rest != shown:
        yield rest[len(shown) :]
