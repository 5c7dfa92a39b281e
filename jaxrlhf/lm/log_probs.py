"""Differentiable log-probabilities of given completions, under the sampler's distribution."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.interpreters.partial_eval import dce_jaxpr

from jaxrlhf.lm.microbatch import default_microbatches, in_microbatches
from jaxrlhf.lm.transformer.model import LanguageModel, pad_left

MAX_LOGITS = 2**25
"""Logits materialised at once where no chunk size is given: 128 MiB of float32."""

MAX_LOGITS_GPU = 2**28
"""The same on a GPU, 1 GiB: every chunk adds to the gradient of the whole output head, so that few are faster."""


class TokenScores(NamedTuple):
    """Scores of given tokens, each `[N, L]`.

    Attributes:
        log_prob: of the token, float32, nats.
        best: whether no token is more probable.
    """

    log_prob: jax.Array
    best: jax.Array


def completion_log_probs(
    model: LanguageModel,
    params: Any,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    completions: jax.Array,
    completion_mask: jax.Array,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    microbatches: int | None = None,
) -> jax.Array:
    """Returns `log softmax(logits / temperature)[y_t]` of every completion token.

    Logits are computed only where a completion token is predicted, a chunk of columns at a time, and recomputed in the
    backward pass, so that `[N, L, V]` is never materialised for a large vocabulary. Chunks split columns, not rows: a
    batch that is sharded over rows stays so.

    Args:
        model: the language model.
        params: its parameters; gradients flow to them.
        prompts: `[N, P]` int32, padded on either side, at least one real token a row.
        prompt_mask: `[N, P]`, True on real tokens.
        completions: `[N, L]` int32, padded on the right; or `[N, C, L]`, C of each prompt, which a model with
            `shared_prompts` then reads once for all of them.
        completion_mask: likewise, True on real tokens, the stop token included.
        temperature: the sampler's, so that both refer to the same distribution.
        chunk_size: columns whose logits are materialised at once; by default `default_chunk_size`.
        microbatches: into how many the rows are split, one after another, recomputed in the backward pass; by default
            `default_microbatches`.

    Returns:
        float32 of the completions' shape, nats, never positive; 0 where `completion_mask` is False.

    Raises:
        ValueError: `temperature` or `chunk_size` is not positive, the columns exceed the model's context, or the
            microbatches do not divide the rows.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jaxrlhf.lm import completion_log_probs, without_cache
        >>> model = without_cache(  # four tokens, all equally likely whatever came before
        ...     init=lambda key: {},
        ...     hidden=lambda params, tokens, mask: jnp.zeros((*tokens.shape, 1)),
        ...     logits=lambda params, hidden: jnp.zeros((*hidden.shape[:-1], 4)),
        ...     vocabulary_size=4, context_length=8,
        ... )  # fmt: skip
        >>> prompts, completions = jnp.array([[1, 2]]), jnp.array([[3, 0]])
        >>> masks = jnp.ones((1, 2), bool), jnp.array([[True, False]])  # the second token is padding
        >>> log_probs = jax.jit(completion_log_probs, static_argnums=0)
        >>> log_probs(model, {}, prompts, masks[0], completions, masks[1]).tolist()
        [[-1.39, 0.0]]
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive to have log-probabilities, got {temperature}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    rows, length, prompt_length = len(completions), completions.shape[-1], prompts.shape[1]
    if prompt_length + length > model.context_length:
        raise ValueError(
            f"{prompt_length} prompt columns and {length} completion columns exceed the model's context of "
            f"{model.context_length}."
        )

    def read(params, prompts, prompt_mask, completions, completion_mask):
        prompts, prompt_mask = pad_left(prompts, prompt_mask)
        shape, completion_mask = completions.shape, completion_mask.astype(bool)
        hidden = _predicting(model, params, prompts, prompt_mask, completions, completion_mask)
        completions = completions.reshape(-1, length)
        columns = chunk_size or default_chunk_size(len(completions), model.vocabulary_size)
        scores = token_log_probs(model, params, hidden, completions, temperature, columns)
        return jnp.where(completion_mask, scores.log_prob.reshape(shape), 0.0)

    if microbatches is None:
        microbatches = default_microbatches(rows, prompt_length + math.prod(completions.shape[1:]))
    return in_microbatches(read, microbatches)(params, prompts, prompt_mask, completions, completion_mask)


def _predicting(
    model: LanguageModel,
    params: Any,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    completions: jax.Array,
    completion_mask: jax.Array,
) -> jax.Array:
    """Returns the states that predict the completions' tokens, `[N, L, D]`, or `[N * C, L, D]` of C for each prompt.

    Arguments as of `completion_log_probs`, prompts padded on the left. The last token of a completion predicts no other.
    """
    before, before_mask = completions[..., :-1], completion_mask[..., :-1]
    if completions.ndim == 3 and model.shared_prompts is not None and before.size:
        last, states = model.shared_prompts.hidden(params, prompts, prompt_mask, before, before_mask)
        last = jnp.broadcast_to(last[:, None, -1:], (*completions.shape[:2], 1, last.shape[-1]))
        states = jnp.concatenate([last, states], axis=2)
        return states.reshape(-1, *states.shape[2:])
    if completions.ndim == 3:
        prompts, prompt_mask = (jnp.repeat(leaf, completions.shape[1], axis=0) for leaf in (prompts, prompt_mask))
        before, before_mask = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (before, before_mask))
    tokens = jnp.concatenate([prompts, before], axis=1)
    mask = jnp.concatenate([prompt_mask, before_mask], axis=1)
    return model.hidden(params, tokens, mask)[:, prompts.shape[1] - 1 :]


def default_chunk_size(rows: int, vocabulary_size: int) -> int:
    """Returns how many columns of `rows` rows have their logits materialised at once by default, at least 1."""
    largest = MAX_LOGITS_GPU if jax.default_backend() == "gpu" else MAX_LOGITS
    return max(1, largest // (rows * vocabulary_size))


def token_log_probs(
    model: LanguageModel,
    params: Any,
    hidden: jax.Array,
    tokens: jax.Array,
    temperature: float,
    chunk_size: int,
) -> TokenScores:
    """Returns `log softmax(logits(hidden) / temperature)[tokens]`, at most `chunk_size` columns at a time.

    Args:
        model: the language model.
        params: its parameters.
        hidden: `[N, L, D]`, states that predict `tokens`.
        tokens: `[N, L]` int32.
        temperature: divides the logits.
        chunk_size: columns whose logits are materialised at once.

    Returns:
        `TokenScores`.
    """
    rows, length = tokens.shape
    chunks = -(-length // chunk_size)
    score = _scorer(model, params, hidden, temperature, recompute=chunks > 1)
    if chunks == 1:
        return score(hidden, tokens)
    chunk_size = -(-length // chunks)  # equal chunks: the last is padded to the size of the others
    padding = chunks * chunk_size - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(rows, chunks, chunk_size, -1)
    tokens = jnp.pad(tokens, ((0, 0), (0, padding))).reshape(rows, chunks, chunk_size)
    by_chunk = (jnp.swapaxes(hidden, 0, 1), jnp.swapaxes(tokens, 0, 1))
    scores = jax.lax.map(lambda chunk: score(*chunk), by_chunk)
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(rows, -1)[:, :length], scores)


def _scorer(
    model: LanguageModel, params: Any, hidden: jax.Array, temperature: float, *, recompute: bool
) -> Callable[[jax.Array, jax.Array], TokenScores]:
    """Returns `(hidden [N, L, D], tokens [N, L]) -> TokenScores`.

    A token's log-probability depends on its own state alone. Where the output head is frozen, as under adapters, the
    gradient in the state is therefore computed with the value, before the cotangent is known: two products with the head
    in place of three, and no logits are kept for the backward pass.

    Args:
        model, params, temperature: of `token_log_probs`.
        hidden: for its shape.
        recompute: whether a head that is trained has its logits computed again in the backward pass.
    """
    leaves, structure = jax.tree.flatten(params)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    read = _leaves_read(model, params, hidden)

    def score(head: list[jax.Array], hidden: jax.Array, tokens: jax.Array) -> TokenScores:
        of_head = iter(head)
        # What is not read may be traced by a transformation that this function must not close over.
        given = [next(of_head) if used else jnp.zeros_like(leaf) for leaf, used in zip(shapes, read, strict=True)]
        params = structure.unflatten(given)
        logits = model.logits(params, hidden) / temperature
        # A masked sum instead of a gather: its gradient is elementwise instead of a scatter.
        vocabulary = jnp.arange(model.vocabulary_size, dtype=tokens.dtype)[None, None, :]
        chosen = jnp.sum(jnp.where(tokens[..., None] == vocabulary, logits, 0.0), axis=-1)
        log_prob = chosen - jax.nn.logsumexp(logits, axis=-1)
        return TokenScores(log_prob, chosen >= jnp.max(logits, axis=-1))

    def derivative(primals: tuple, tangents: tuple) -> tuple[TokenScores, TokenScores]:
        (head, hidden, tokens), (along_head, along_hidden, _) = primals, tangents
        if not all(isinstance(along, SymbolicZero) for along in along_head):
            function = jax.checkpoint(score) if recompute else score
            along = map(_instantiated, (*head, hidden), (*along_head, along_hidden))
            return jax.jvp(
                lambda *inputs: function(list(inputs[:-1]), inputs[-1], tokens), (*head, hidden), tuple(along)
            )

        def total(hidden):
            scores = score(head, hidden, tokens)
            return jnp.sum(scores.log_prob), scores

        slope, scores = jax.grad(total, has_aux=True)(hidden)
        along = jnp.sum((slope * along_hidden).astype(scores.log_prob.dtype), axis=-1)
        without_derivative: Any = np.zeros(scores.best.shape, jax.dtypes.float0)
        return scores, TokenScores(along, without_derivative)

    differentiable = jax.custom_jvp(score)
    differentiable.defjvp(derivative, symbolic_zeros=True)
    head = [leaf for leaf, used in zip(leaves, read, strict=True) if used]
    return lambda hidden, tokens: differentiable(head, hidden, tokens)


def _instantiated(primal: jax.Array, tangent: Any) -> Any:
    if not isinstance(tangent, SymbolicZero):
        return tangent
    if not jnp.issubdtype(primal.dtype, jnp.inexact):
        return np.zeros(primal.shape, jax.dtypes.float0)
    return jnp.zeros_like(primal)


def _leaves_read(model: LanguageModel, params: Any, hidden: jax.Array) -> list[bool]:
    """Returns which leaves of the parameters `model.logits` reads."""
    program = jax.make_jaxpr(model.logits)(params, hidden).jaxpr
    _, read = dce_jaxpr(program, [True] * len(program.outvars))
    return read[:-1]
