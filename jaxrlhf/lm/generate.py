"""Sampling completions: one forward pass over the prompts, then one token a row and step from the cache."""

import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxrlhf.lm.microbatch import divided, in_microbatches, rows_of_a_cpu
from jaxrlhf.lm.transformer.model import LanguageModel, pad_left

PART = 2**22
"""Bytes of keys and values that rows written together on a CPU may take, if not the weights take more."""

LOOK = 8
"""Tokens from one look at whether every row has ended to the next: at each, devices wait for one another."""


class Completions(NamedTuple):
    """What a policy wrote.

    Attributes:
        tokens: `[N, L]` int32; `pad_id` after the end of a row.
        mask: `[N, L]` bool, True on every sampled token, the stop token included.
        log_prob: `[N, L]` float32, nats, of each token under the distribution it was drawn from; 0 after the
            end of a row.
    """

    tokens: jax.Array
    mask: jax.Array
    log_prob: jax.Array


def generate(
    model: LanguageModel,
    params: Any,
    key: jax.Array,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float = 1.0,
    top_p: float = 1.0,
    pad_id: int = 0,
    microbatches: int | None = None,
) -> Completions:
    """Samples one completion a prompt; the key is consumed.

    `y_t = min { v : sum_{w <= v} p(w) > u_t }`, with `p = softmax(logits / temperature)` cut to its nucleus
    and one uniform `u_t` a row and step. A row ends with its first stop token, which counts as part of it; the
    loop ends soon after the last row (`LOOK`). No row depends on another. The function may be jitted; keywords are static.

    Args:
        model: the language model.
        params: its parameters.
        key: PRNG key.
        prompts: `[N, P]` int32, padded on either side. Every row needs a real token: that cannot be checked
            under `jit`, where what follows an empty prompt means nothing.
        prompt_mask: `[N, P]`, True on real tokens.
        max_new_tokens: L, the largest length of a completion, stop token included.
        stop_ids: tokens that end a row; may be empty.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: mass of the nucleus, in (0, 1]; 1 samples from the whole distribution.
        pad_id: written after the end of a row.
        microbatches: pieces that the rows are written in, one after another; the cache of one is held at a time. All rows at
            once by default, but on a CPU `microbatches_of`.

    Returns:
        `Completions`. `log_prob` is that of the tempered, nucleus-renormalised distribution, or of the
        model's own (temperature 1) when `temperature` is 0. With `top_p` 1 it is what `completion_log_probs`
        gives at the same temperature.

    Raises:
        ValueError: a keyword is out of range, a stop or pad id lies outside the vocabulary, prompt and
            completion together exceed the model's context, the microbatches do not divide the rows, or (outside `jit`) a prompt
            is empty.
    """
    check_arguments(model, prompts, prompt_mask, max_new_tokens, stop_ids, temperature, top_p, pad_id)
    # All uniforms are drawn up front: nothing depends on which rows still run, or are written together.
    uniforms = jax.random.uniform(key, (max_new_tokens, len(prompts)), jnp.float32).T

    def write(params, prompts, prompt_mask, uniforms):
        rows = (prompts, prompt_mask, uniforms)
        return write_rows(model, params, *rows, stop_ids=stop_ids, temperature=temperature, top_p=top_p, pad_id=pad_id)

    microbatches = microbatches_of(model, params, prompts, max_new_tokens) if microbatches is None else microbatches
    return in_microbatches(write, microbatches)(params, prompts, prompt_mask, uniforms)


def microbatches_of(model: LanguageModel, params: Any, prompts: jax.Array, max_new_tokens: int) -> int:
    """Returns the number of microbatches that rows are written in on this machine: 1, but on a CPU.

    Every token reads the weights once, for however many rows, and the cache of every row. Rows whose caches outweigh the
    weights save no reading, and on a CPU push one another out of the processor's: twice the time a row. There a part has
    as many rows as divide all and whose caches take at most `PART`, or what the weights take; but at least 8.
    """
    held = rows_of_a_cpu(len(prompts))
    if held is None:
        return 1
    length = prompts.shape[1] + max_new_tokens

    def filled(params, tokens):
        return model.prefill(params, tokens, jnp.ones_like(tokens, bool), length)[1]

    def taken(rows):
        tokens = jax.ShapeDtypeStruct((rows, prompts.shape[1]), prompts.dtype)
        return _bytes(jax.eval_shape(filled, params, tokens))

    # What another row takes: a cache may hold what is the same for all.
    return divided(held, most=max(PART, _bytes(params)) // max(1, taken(3) - taken(2)), least=8)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def write_rows(
    model: LanguageModel,
    params: Any,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    uniforms: jax.Array,
    *,
    stop_ids: tuple[int, ...],
    temperature: float,
    top_p: float,
    pad_id: int,
) -> Completions:
    """As `generate`, all rows at once, from given uniforms `[N, L]`."""
    (rows, prompt_length), max_new_tokens = prompts.shape, uniforms.shape[1]
    prompts, prompt_mask = pad_left(prompts, prompt_mask)
    hidden, cache = model.prefill(params, prompts, prompt_mask, prompt_length + max_new_tokens)
    # Time comes first inside the loop, where a step writes one line.
    blank = Completions(
        tokens=jnp.full((max_new_tokens, rows), pad_id, jnp.int32),
        mask=jnp.zeros((max_new_tokens, rows), bool),
        log_prob=jnp.zeros((max_new_tokens, rows), jnp.float32),
    )

    def advance(step, carry):
        hidden, cache, ended, written = carry
        token, log_prob = choose(model.logits(params, hidden), uniforms[:, step], temperature, top_p)
        line = Completions(
            tokens=jnp.where(ended, pad_id, token),
            mask=~ended,
            log_prob=jnp.where(ended, 0.0, log_prob).astype(jnp.float32),
        )
        written = jax.tree.map(lambda lines, line: lines.at[step].set(line), written, line)
        for stop_id in stop_ids:
            ended = ended | (token == stop_id)
        hidden, cache = model.decode(params, line.tokens, cache)
        return hidden, cache, ended, written

    def running(carry):
        step, (_, _, ended, _) = carry
        return (step < max_new_tokens) & ~jnp.all(ended)

    def several(carry):
        step, rest = carry
        until = jnp.minimum(step + LOOK, max_new_tokens)
        return until, jax.lax.fori_loop(step, until, advance, rest)

    start = (jnp.int32(0), (hidden, cache, jnp.zeros(rows, bool), blank))
    _, (*_, written) = jax.lax.while_loop(running, several, start)
    return jax.tree.map(jnp.transpose, written)


def choose(logits: jax.Array, uniforms: jax.Array, temperature: float, top_p: float) -> tuple[jax.Array, jax.Array]:
    """One token a row, and its log-probability under the distribution it was drawn from.

    Args:
        logits: `[N, V]`, nats.
        uniforms: `[N]` in [0, 1); not read when `temperature` is 0.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: mass of the nucleus, in (0, 1].

    Returns:
        `(token [N] int32, log_prob [N])`.
    """
    scaled = logits / (temperature or 1.0)
    shifted = scaled - jnp.max(scaled, axis=-1, keepdims=True)
    weights = jnp.exp(shifted)
    if temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        if top_p < 1:
            weights = jnp.where(nucleus(weights, top_p), weights, 0.0)
        token = inverse_cdf(weights, uniforms)
    chosen = jnp.take_along_axis(shifted, token[:, None], axis=-1)[:, 0]
    return token, chosen - jnp.log(jnp.sum(weights, axis=-1))


def nucleus(weights: jax.Array, top_p: float) -> jax.Array:
    """The smallest set of most probable tokens whose mass reaches `top_p`; ties at its edge are all in it.

    Args:
        weights: `[N, V]`, not negative, of any total.
        top_p: in (0, 1).

    Returns:
        `[N, V]` bool (Holtzman et al., arXiv 1904.09751).
    """
    descending = -jnp.sort(-weights, axis=-1)
    mass_before = jnp.cumsum(descending, axis=-1) - descending
    inside = mass_before < top_p * jnp.sum(weights, axis=-1, keepdims=True)
    edge = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
    return weights >= edge


def inverse_cdf(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """First token whose cumulative weight exceeds `uniform * total`; never a token of weight zero.

    The search goes by blocks, then by the tokens of one block: a cumulative sum over a whole vocabulary costs
    more than all the rest of a small model's step.

    Args:
        weights: `[N, V]`, not negative, not all zero in a row.
        uniforms: `[N]` in [0, 1).

    Returns:
        `[N]` int32.
    """
    rows, size = weights.shape
    block = math.isqrt(size - 1) + 1 if size > 1 else 1
    blocks = -(-size // block)
    table = jnp.pad(weights, ((0, 0), (0, blocks * block - size))).reshape(rows, blocks, block)
    sums = jnp.sum(table, axis=-1)
    target = uniforms * jnp.sum(sums, axis=-1)
    chosen_block, before = first_above(sums, target)
    line = jnp.take_along_axis(table, chosen_block[:, None, None], axis=1)[:, 0]
    chosen, _ = first_above(line, target - before)
    return chosen_block * block + chosen


def first_above(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the cumulative weight first exceeds a target, and the weight before that.

    Args:
        weights: `[N, M]`, not negative.
        target: `[N]`.

    Returns:
        `(index [N] int32 of a positive weight, weight before it [N])`.
    """
    size = weights.shape[-1]
    columns = jnp.arange(size, dtype=jnp.int32)[None, :]
    # In full precision: accelerators would round the weights, and draw from others than those reported.
    cumulative = jnp.matmul(weights, jnp.triu(jnp.ones((size, size), weights.dtype)), precision="highest")
    above = (weights > 0) & (cumulative > target[:, None])
    # Rounding can leave every cumulative weight at or below the target: the last positive one is meant then.
    last = jnp.max(jnp.where(weights > 0, columns, 0), axis=-1)
    index = jnp.minimum(jnp.min(jnp.where(above, columns, size), axis=-1), last)
    return index, jnp.sum(jnp.where(columns < index[:, None], weights, 0.0), axis=-1)


def check_arguments(model, prompts, prompt_mask, max_new_tokens, stop_ids, temperature, top_p, pad_id) -> None:
    """Raises ValueError for what `generate` cannot do; it runs while tracing."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if not temperature >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}.")
    if prompts.shape[1] + max_new_tokens > model.context_length:
        raise ValueError(
            f"{prompts.shape[1]} prompt columns and {max_new_tokens} new tokens exceed the model's context "
            f"of {model.context_length}."
        )
    for token in (*stop_ids, pad_id):
        if not 0 <= token < model.vocabulary_size:
            raise ValueError(f"Token id {token} lies outside the vocabulary of {model.vocabulary_size}.")
    if not isinstance(prompt_mask, jax.core.Tracer) and not np.all(np.any(np.asarray(prompt_mask), axis=1)):
        raise ValueError("A prompt is empty; give every row at least one real token, such as BOS.")
