"""The interface between language models and this library, and a compact decoder that implements it.

A `LanguageModel` is a few pure functions over a pytree of parameters: another architecture is supported by writing those
functions. `decoder` builds them from a Flax NNX module, split once; `without_cache` builds the two that the sampler needs
from `hidden` alone.

Shapes: N rows, T columns, P prompt columns, C cache columns, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.lm.transformer.block import LINEAR_MAPS
from jaxrlhf.lm.transformer.cache import repeated
from jaxrlhf.lm.transformer.config import DecoderConfig, Experts
from jaxrlhf.lm.transformer.layers import capped, wide_einsum
from jaxrlhf.lm.transformer.modules import DROPOUT
from jaxrlhf.lm.transformer.trunk import REMAT, Attention, Trunk

__all__ = ["DecoderConfig", "LanguageModel", "SharedPrompts", "decoder", "pad_left", "without_cache"]


class SharedPrompts(NamedTuple):
    """Functions of a language model for several completions of each prompt, whose columns are then computed once.

    Attributes:
        hidden: `(params, prompts [N, P], prompt_mask, completions [N, C, L], mask) -> (states of the prompts [N, P, D], of
            the completions [N, C, L, D])`, those of `LanguageModel.hidden` for each completion after its prompt.
        repeat: `(cache of prefill, count) -> cache` with each row `count` times in a row.
    """

    hidden: Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    repeat: Callable[[Any, int], Any]


class LanguageModel(NamedTuple):
    """Pure functions: all that this library needs to know about a language model.

    `mask` is True on real tokens. Rows may be padded on either side, or in between: a token's position is the
    number of real tokens before it, and it attends to the real tokens at or before its own column. Where several texts
    are packed in a row, `hidden` gets segment ids in place of the mask: int32, 0 on padding, increasing along the row;
    texts do not attend to each other and each begins at position 0. Only packed supervised training needs that.

    Attributes:
        init: `(key) -> params`, random, float32; the key is consumed.
        hidden: `(params, tokens [N, T], mask [N, T]) -> [N, T, D]`, states after the final norm.
        logits: `(params, hidden [..., D]) -> [..., V]`, float32, nats.
        prefill: `(params, tokens [N, P], mask [N, P], cache_length) -> (last hidden [N, D], cache)`; rows are
            padded on the left, so that the last column is real; `cache_length` (static) counts the prompt's
            columns too.
        decode: `(params, tokens [N], cache) -> (hidden [N, D], cache)`, one more real token in every row.
        vocabulary_size: V.
        context_length: the largest number of columns that `hidden` and the cache may have.
        shared_prompts: the same functions for several completions of a prompt; None computes each with its prompt. Replace
            it together with `hidden`, or by None.
        routing: `(params, tokens [N, T], mask [N, T]) -> (hidden [N, T, D], routers' probabilities [L, N, T, E])` of a
            mixture of experts in L layers; None without.
        experts: of that mixture; None without.
    """

    init: Callable[[jax.Array], Any]
    hidden: Callable[[Any, jax.Array, jax.Array], jax.Array]
    logits: Callable[[Any, jax.Array], jax.Array]
    prefill: Callable[[Any, jax.Array, jax.Array, int], tuple[jax.Array, Any]]
    decode: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
    vocabulary_size: int
    context_length: int
    shared_prompts: SharedPrompts | None = None
    routing: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None
    experts: Experts | None = None


def pad_left(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns rows whose real tokens are moved to the end, in order.

    Args:
        tokens: `[N, P]` int32.
        mask: `[N, P]`, True on real tokens.

    Returns:
        `(tokens [N, P], mask [N, P])` with the padding on the left.
    """
    mask = mask.astype(bool)
    order = jnp.argsort(mask, axis=1, stable=True)
    return jnp.take_along_axis(tokens, order, axis=1), jnp.take_along_axis(mask, order, axis=1)


def decoder(
    config: DecoderConfig, *, dtype: Any = None, remat: str | None = None, attention: Attention = "xla"
) -> LanguageModel:
    """Returns the pure functions of a decoder.

    The same arguments give the same functions, and each is traced once for the shapes that it is given. The parameters are
    a nested dict: `embedding [V, D]`, `layers` (each array with the layers as its first axis),
    `final_norm`, `positions` where they are learned and, unless the embeddings are tied, `output_head [D, V]`, which only
    `logits` reads: the other functions accept parameters without it. Parameters with adapters (`lora.attach`) are accepted
    too. Norms, attention weights and logits are float32 at least. Up to `trunk.MAX_UNROLLED_LAYERS` layers are unrolled;
    more are one scan, so that compile time does not grow in proportion; decoding on a GPU, or of a single row on a CPU,
    unrolls more (`trunk.UNROLLED_DECODING`). In half precision the products of the backward pass are in half precision
    too, as with automatic mixed precision: cotangents of logits and attention are rounded to it.

    Args:
        config: the decoder's configuration.
        dtype: of the residual stream and the linear maps; None is the widest of the parameters', so that adapters in
            float32 on weights in bfloat16 give states in float32.
        remat: what the backward pass recomputes, to save memory: "layer", everything but each layer's input, or
            "products", everything but the results of linear maps; by default only attention scores, where they are large,
            and on a CPU with more than `trunk.MAX_UNROLLED_LAYERS` layers all but results of linear maps and attention.
        attention: what computes the attention of whole rows, "xla" or "cudnn" (NVIDIA GPUs, a dtype in half precision, no
            capped scores); cached decoding is the same for both.

    Returns:
        The `LanguageModel`. Its functions raise ValueError for parameters of another structure, and where cuDNN cannot
        compute this decoder's attention.

    Raises:
        ValueError: `remat` or `attention` is unknown.
    """
    if attention not in get_args(Attention):
        raise ValueError(f"A decoder's attention is one of {', '.join(get_args(Attention))}, not {attention!r}.")
    if remat is not None and remat not in REMAT:
        raise ValueError(f"A decoder's remat is one of {', '.join(REMAT)}, or None, not {remat!r}.")
    return functions_of(config, None if dtype is None else jnp.dtype(dtype), remat, attention)


# A run asks for the same decoder several times, and tracing one takes long.
@functools.cache
def functions_of(config: DecoderConfig, dtype: Any, remat: str | None, attention: Attention) -> LanguageModel:
    """Returns the functions of `decoder`, which has checked the arguments."""
    plain, _ = _structure(config, frozenset())

    def trunk(params) -> tuple[Trunk, Any]:
        params = {name: leaf for name, leaf in params.items() if name != "output_head"}
        # nnx.merge goes by order alone: parameters of other names would be accepted silently.
        expected, structure = _structure(config, _adapted(params))
        same = jax.tree.structure(params) == expected
        if not same or {len(leaf) for leaf in jax.tree.leaves(params["layers"])} != {config.layers}:
            raise ValueError(
                f"These are not the parameters of a decoder of {config.layers} layers: they have "
                f"{len(jax.tree.leaves(params))} arrays instead of {plain.num_leaves}, other names, or other layers."
            )
        stream = jnp.result_type(*jax.tree.leaves(params)) if dtype is None else dtype
        return nnx.merge(structure, params), stream

    def forward(params, tokens, mask, keep=None):
        module, stream = trunk(params)
        mask = mask if jnp.issubdtype(mask.dtype, jnp.integer) else mask.astype(bool)
        return module.forward(tokens, mask, stream, keep=keep, remat=remat, kernel=attention)

    def hidden(params, tokens, mask):
        return forward(params, tokens, mask)[0]

    def prefill(params, tokens, mask, cache_length):
        module, stream = trunk(params)
        return module.prefill(tokens, mask.astype(bool), cache_length, stream, kernel=attention)

    def decode(params, tokens, cache):
        module, stream = trunk(params)
        return module.decode(tokens, cache, stream)

    def hidden_completions(params, prompts, prompt_mask, completions, mask):
        module, stream = trunk(params)
        masks = prompt_mask.astype(bool), mask.astype(bool)
        return module.forward_completions(prompts, masks[0], completions, masks[1], stream, remat=remat)

    # Inlined: without a boundary in the programs that they are part of.
    traced_once = functools.partial(jax.jit, inline=True)
    # cuDNN's kernel takes whole rows.
    shared_prompts = SharedPrompts(traced_once(hidden_completions), repeated) if attention == "xla" else None
    sizes = config.vocabulary_size, config.context_length
    init, logits = functools.partial(_init, config), functools.partial(_logits, config)
    routing = traced_once(functools.partial(_routing, forward))
    mixture = {} if config.experts is None else {"routing": routing, "experts": config.experts}
    with_cache = traced_once(prefill, static_argnums=3), traced_once(decode)
    return LanguageModel(init, traced_once(hidden), logits, *with_cache, *sizes, shared_prompts, **mixture)


def _init(config: DecoderConfig, key: jax.Array) -> Any:
    """Returns random parameters of a decoder."""
    trunk_key, head_key = jax.random.split(key)
    params = nnx.to_pure_dict(nnx.state(Trunk(config, nnx.Rngs(trunk_key))))
    if not config.tied_embeddings:
        shape = (config.width, config.vocabulary_size)
        params["output_head"] = config.width**-0.5 * jax.random.normal(head_key, shape)
    return params


def _logits(config: DecoderConfig, params: Any, hidden: jax.Array) -> jax.Array:
    weights = params["embedding"].T if config.tied_embeddings else params["output_head"]
    return capped(wide_einsum("...d,dv->...v", hidden, weights.astype(hidden.dtype)), config.logit_cap)


def _routing(forward: Callable, params: Any, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns states, and what `forward` keeps of each layer's router as one array."""
    states, kept = forward(params, tokens, mask, keep="routing")
    return states, jnp.stack(kept) if isinstance(kept, list) else kept


def _adapted(params: Any) -> frozenset[str]:
    """Returns the names of a layer's linear maps that have an adapter, and `DROPOUT` if those have one."""
    layers = params.get("layers")
    factors = {name: layers.get(name) for name in LINEAR_MAPS} if isinstance(layers, dict) else {}
    adapters = {name: leaf for name, leaf in factors.items() if isinstance(leaf, dict) and "down" in leaf}
    return frozenset(adapters) | {DROPOUT for leaf in adapters.values() if "dropout_key" in leaf}


# Building a module takes long, even abstractly. Precision is no part of a structure.
@functools.cache
def _structure(config: DecoderConfig, adapted: frozenset[str]) -> tuple[Any, Any]:
    """Returns the structure of a decoder's parameters, with adapters on those maps, and its module without them."""
    module, state = nnx.split(nnx.eval_shape(lambda: Trunk(config, nnx.Rngs(0), adapted)))
    return jax.tree.structure(nnx.to_pure_dict(state)), module


def without_cache(
    init: Callable[[jax.Array], Any],
    hidden: Callable[[Any, jax.Array, jax.Array], jax.Array],
    logits: Callable[[Any, jax.Array], jax.Array],
    *,
    vocabulary_size: int,
    context_length: int,
) -> LanguageModel:
    """Returns a language model from its forward pass alone: the sampler recomputes the whole row at every token.

    For models without a cache in the form of `prefill` and `decode`: slower by about the length of a completion, and
    otherwise equivalent. Arguments as `LanguageModel`'s.
    """

    def prefill(params, tokens, mask, cache_length):
        room = ((0, 0), (0, cache_length - tokens.shape[1]))
        cache = (jnp.pad(tokens, room), jnp.pad(mask.astype(bool), room), jnp.int32(tokens.shape[1]))
        return hidden(params, tokens, mask.astype(bool))[:, -1], cache

    def decode(params, tokens, cache):
        row, mask, column = cache
        update = jax.lax.dynamic_update_slice_in_dim
        row = update(row, tokens[:, None].astype(row.dtype), column, axis=1)
        mask = update(mask, jnp.ones((len(tokens), 1), bool), column, axis=1)
        states = hidden(params, row, mask)
        return jax.lax.dynamic_index_in_dim(states, column, axis=1, keepdims=False), (row, mask, column + 1)

    return LanguageModel(init, hidden, logits, prefill, decode, vocabulary_size, context_length)
