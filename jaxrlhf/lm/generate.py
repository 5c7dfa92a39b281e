"""Sampling completions: prefill the cache with the prompts, then decode one token a row and step."""

import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxrlhf.lm.memory import tree_bytes
from jaxrlhf.lm.microbatch import completions_together, fewest_microbatches, in_microbatches, rows_per_cpu_device
from jaxrlhf.lm.transformer.model import LanguageModel, pad_left

CPU_CACHE_BYTES = 2**22
"""Limit on the key/value cache of one microbatch on a CPU; where the weights are larger, their size is the limit."""

STOP_CHECK_INTERVAL = 8
"""Tokens between checks whether every row has ended: each check synchronises the devices."""


class Generation(NamedTuple):
    """Sampling settings of a problem; arguments of `generate`.

    Attributes:
        max_new_tokens: largest length of a completion, stop token included.
        stop_ids: tokens that end a completion.
        temperature: divides the logits.
        pad_id: fills rows after the end of a completion.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    pad_id: int = 0


class Completions(NamedTuple):
    """Sampled completions.

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
    completions: int = 1,
    drawn_rows: int | None = None,
    microbatches: int | None = None,
) -> Completions:
    """Samples one completion a prompt, or several; the key is consumed.

    `y_t = min { v : sum_{w <= v} p(w) > u_t }`, with `p = softmax(logits / temperature)` cut to its nucleus
    and one uniform `u_t` a row and step. A row ends with its first stop token, which is part of the completion; the loop
    ends within `STOP_CHECK_INTERVAL` steps of the last row's end. Rows are independent. The function may be jitted, with
    its keywords static.

    Args:
        model: the language model.
        params: its parameters.
        key: PRNG key.
        prompts: `[N, P]` int32, padded on either side. Every row needs a real token; under `jit` that cannot be checked,
            and the completion of an empty prompt is meaningless.
        prompt_mask: `[N, P]`, True on real tokens.
        max_new_tokens: L, the largest length of a completion, stop token included.
        stop_ids: tokens that end a row; may be empty.
        temperature: divides the logits; 0 is greedy decoding.
        top_p: mass of the nucleus, in (0, 1]; 1 samples from the whole distribution.
        pad_id: fills a row after its end.
        completions: C, of each prompt, in `N C` rows. They are those of prompts repeated C times each, up to rounding; a
            model with `shared_prompts` computes each prompt once.
        drawn_rows: number of rows that uniforms are drawn for, at least `N C`, which is the default. With the same number,
            a row's completion does not depend on how many rows follow it.
        microbatches: into how many the rows are split, sampled one after another; only one's cache is held at a time.
            Default `sampling_microbatches`: 1, except on a CPU.

    Returns:
        `Completions`. `log_prob` is that of the tempered, nucleus-renormalised distribution, or of the
        model's own (temperature 1) when `temperature` is 0. With `top_p` 1 it is what `completion_log_probs`
        gives at the same temperature.

    Raises:
        ValueError: a keyword is out of range, a stop or pad id lies outside the vocabulary, prompt and
            completion together exceed the model's context, the microbatches do not divide the rows, or (outside `jit`) a
            prompt is empty.
    """
    check_arguments(model, prompts, prompt_mask, max_new_tokens, stop_ids, temperature, top_p, pad_id)
    if completions < 1:
        raise ValueError(f"completions must be at least 1, got {completions}.")
    rows = len(prompts) * completions
    if drawn_rows is not None and drawn_rows < rows:
        raise ValueError(f"drawn_rows must be at least the number of rows, {rows}, got {drawn_rows}.")
    # All uniforms are drawn up front: samples depend neither on which rows have ended nor on the microbatches.
    uniforms = jax.random.uniform(key, (max_new_tokens, drawn_rows or rows), jnp.float32)[:, :rows].T

    together = 1 if model.shared_prompts is None else completions
    if microbatches is None:
        many = jax.ShapeDtypeStruct((rows // together, prompts.shape[1]), prompts.dtype)
        microbatches = sampling_microbatches(model, params, many, max_new_tokens, together=together)
    together = completions_together(together, prompts=rows // together, microbatches=microbatches)
    if together < completions:
        prompts, prompt_mask = (jnp.repeat(leaf, completions // together, axis=0) for leaf in (prompts, prompt_mask))

    def sample(params, prompts, prompt_mask, uniforms):
        settings: Any = {"stop_ids": stop_ids, "temperature": temperature, "top_p": top_p, "pad_id": pad_id}
        rows = sample_rows(model, params, prompts, prompt_mask, uniforms.reshape(-1, max_new_tokens), **settings)
        return jax.tree.map(lambda leaf: leaf.reshape(uniforms.shape), rows)

    sampled = in_microbatches(sample, microbatches)(
        params, prompts, prompt_mask, uniforms.reshape(len(prompts), together, -1)
    )
    return jax.tree.map(lambda leaf: leaf.reshape(-1, max_new_tokens), sampled)


def sampling_microbatches(
    model: LanguageModel,
    params: Any,
    prompts: jax.Array | jax.ShapeDtypeStruct,
    max_new_tokens: int,
    *,
    together: int = 1,
) -> int:
    """Returns the default number of microbatches of a sampler: 1, except on a CPU.

    Each step reads the weights once, however many rows there are, and the cache of every row. Once the caches outweigh the
    weights, more rows save no traffic; on a CPU they evict one another from the processor's caches, at twice the time a
    row. There a microbatch has as many rows as divide all and fit `CPU_CACHE_BYTES` or the size of the weights, but at
    least 8. `together` completions of a prompt stay in one microbatch.
    """
    per_device = rows_per_cpu_device(prompts.shape[0])
    if per_device is None:
        return 1
    length = prompts.shape[1] + max_new_tokens

    def prefilled(params, tokens):
        return model.prefill(params, tokens, jnp.ones_like(tokens, bool), length)[1]

    def cache_bytes(rows):
        tokens = jax.ShapeDtypeStruct((rows, prompts.shape[1]), prompts.dtype)
        return tree_bytes(jax.eval_shape(prefilled, params, tokens))

    # A difference: a cache may also hold arrays that do not grow with the rows.
    row_bytes = max(1, cache_bytes(3) - cache_bytes(2))
    max_rows = max(CPU_CACHE_BYTES, tree_bytes(params)) // row_bytes
    return fewest_microbatches(per_device, max_rows=max(1, max_rows // together), min_rows=-(-8 // together))


def sample_rows(
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
    """Does as `generate`, for all rows at once and with the uniforms `[N C, L]` as an argument, C rows of each prompt."""
    (rows, max_new_tokens), prompt_length = uniforms.shape, prompts.shape[1]
    prompts, prompt_mask = pad_left(prompts, prompt_mask)
    hidden, cache = model.prefill(params, prompts, prompt_mask, prompt_length + max_new_tokens)
    if rows > len(prompts):
        assert model.shared_prompts is not None
        count = rows // len(prompts)
        hidden, cache = jnp.repeat(hidden, count, axis=0), model.shared_prompts.repeat(cache, count)
    # Time is the first axis inside the loop, so that a step writes one contiguous row.
    empty = Completions(
        tokens=jnp.full((max_new_tokens, rows), pad_id, jnp.int32),
        mask=jnp.zeros((max_new_tokens, rows), bool),
        log_prob=jnp.zeros((max_new_tokens, rows), jnp.float32),
    )

    def advance(step, carry):
        hidden, cache, ended, completions = carry
        token, log_prob = choose(model.logits(params, hidden), uniforms[:, step], temperature, top_p)
        column = Completions(
            tokens=jnp.where(ended, pad_id, token),
            mask=~ended,
            log_prob=jnp.where(ended, 0.0, log_prob).astype(jnp.float32),
        )
        completions = jax.tree.map(lambda rows, new: rows.at[step].set(new), completions, column)
        for stop_id in stop_ids:
            ended = ended | (token == stop_id)
        hidden, cache = model.decode(params, column.tokens, cache)
        return hidden, cache, ended, completions

    def running(carry):
        step, (_, _, ended, _) = carry
        return (step < max_new_tokens) & ~jnp.all(ended)

    def advance_to_check(carry):
        step, state = carry
        until = jnp.minimum(step + STOP_CHECK_INTERVAL, max_new_tokens)
        return until, jax.lax.fori_loop(step, until, advance, state)

    start = (jnp.int32(0), (hidden, cache, jnp.zeros(rows, bool), empty))
    _, (*_, completions) = jax.lax.while_loop(running, advance_to_check, start)
    return jax.tree.map(jnp.transpose, completions)


def choose(logits: jax.Array, uniforms: jax.Array, temperature: float, top_p: float) -> tuple[jax.Array, jax.Array]:
    """Returns one token a row, and its log-probability under the distribution it was drawn from.

    Args:
        logits: `[N, V]`, nats.
        uniforms: `[N]` in [0, 1); not read when `temperature` is 0.
        temperature: divides the logits; 0 is greedy decoding.
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
    """Returns the smallest set of most probable tokens whose mass reaches `top_p`; ties at its edge are all in it.

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
    """Returns the first token whose cumulative weight exceeds `uniform * total`; never a token of weight zero.

    Searches blocks first, then the tokens of one block: a cumulative sum over the whole vocabulary would cost more than
    the rest of a small model's step.

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
    chosen_block, before = first_exceeding(sums, target)
    tokens = jnp.take_along_axis(table, chosen_block[:, None, None], axis=1)[:, 0]
    chosen, _ = first_exceeding(tokens, target - before)
    return chosen_block * block + chosen


def first_exceeding(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where the cumulative weight first exceeds a target, and the cumulative weight before that.

    Args:
        weights: `[N, M]`, not negative.
        target: `[N]`.

    Returns:
        `(index [N] int32 of a positive weight, weight before it [N])`.
    """
    size = weights.shape[-1]
    columns = jnp.arange(size, dtype=jnp.int32)[None, :]
    # In full precision: accelerators would round the weights, and sample from others than log_prob reports.
    cumulative = jnp.matmul(weights, jnp.triu(jnp.ones((size, size), weights.dtype)), precision="highest")
    above = (weights > 0) & (cumulative > target[:, None])
    # Rounding can leave every cumulative weight at or below the target: then take the last positive one.
    last = jnp.max(jnp.where(weights > 0, columns, 0), axis=-1)
    index = jnp.minimum(jnp.min(jnp.where(above, columns, size), axis=-1), last)
    return index, jnp.sum(jnp.where(columns < index[:, None], weights, 0.0), axis=-1)


def check_arguments(model, prompts, prompt_mask, max_new_tokens, stop_ids, temperature, top_p, pad_id) -> None:
    """Raises ValueError for arguments that `generate` cannot serve; runs at trace time."""
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
