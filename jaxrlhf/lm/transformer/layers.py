"""The arithmetic of a decoder's layer as pure functions: norms, products, grouped-query attention.

Attention scores, norms and softmax are computed in float32 at least, whatever the parameters' dtype.

Shapes: N rows, T query columns, S key columns, K key/value heads, G query heads a key/value head,
H head size.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

MASKED_SCORE = -1e30
"""Finite: a query that may attend to no key then gives a finite (unused) output instead of NaN, in gradients too."""


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype of norms, softmax and logits: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Returns `x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, in x's dtype.

    Args:
        x: `[..., D]`.
        scale: `[D]`.
        epsilon: added to the mean square.

    Returns:
        `[..., D]` (Zhang and Sennrich, arXiv 1910.07467).
    """
    precise = x.astype(wide(x.dtype))
    precise = precise * jax.lax.rsqrt(jnp.mean(precise * precise, axis=-1, keepdims=True) + epsilon)
    return (jnp.reshape(scale, (1,) * (x.ndim - 1) + scale.shape) * precise.astype(x.dtype)).astype(x.dtype)


def rms_norm_from_one(x: jax.Array, offset: jax.Array, epsilon: float) -> jax.Array:
    """Returns `x / sqrt(mean(x^2) + epsilon) * (1 + offset)`, scaled before rounding to x's dtype, as in Gemma."""
    precise = x.astype(wide(x.dtype))
    precise = precise * jax.lax.rsqrt(jnp.mean(precise * precise, axis=-1, keepdims=True) + epsilon)
    scale = 1.0 + offset.astype(precise.dtype)
    return (jnp.reshape(scale, (1,) * (x.ndim - 1) + scale.shape) * precise).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Returns `(x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias` over the last axis, in x's dtype.

    (Ba et al., arXiv 1607.06450.)
    """
    precise = x.astype(wide(x.dtype))
    precise = precise - jnp.mean(precise, axis=-1, keepdims=True)
    precise = precise * jax.lax.rsqrt(jnp.mean(precise * precise, axis=-1, keepdims=True) + epsilon)
    scale, bias = (jnp.reshape(leaf.astype(precise.dtype), (1,) * (x.ndim - 1) + leaf.shape) for leaf in (scale, bias))
    return (scale * precise + bias).astype(x.dtype)


@jax.custom_jvp
def low_rank(x: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
    """Returns `x down up`, `[N, T, out]` from `[N, T, in]`, `[in, R]` and `[R, out]`.

    Its derivatives are those of the products. On a CPU the gradients of both factors are written as products whose first
    factor has R rows and is summed over its last axis: XLA has fast kernels for those, and would otherwise transpose x and
    the cotangent, which takes longer than the whole adapter.
    """
    return x @ down @ up


@functools.partial(low_rank.defjvp, symbolic_zeros=True)
def _low_rank_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    x, down, up = primals
    along_x, along_down, along_up = (None if isinstance(each, SymbolicZero) else each for each in tangents)
    inner = x @ down
    out = inner @ up
    # Barriers, or XLA would move the transpositions of the small factors to the large ones.
    barrier = jax.lax.optimization_barrier if jax.default_backend() == "cpu" else lambda array: array
    rows = x.reshape(-1, x.shape[-1])
    changes = [] if along_x is None else [along_x @ down]
    if along_down is not None:
        columns = barrier(jnp.einsum("ri,ti->rt", barrier(along_down.T), rows))
        changes.append(columns.T.reshape(inner.shape))
    changes = [sum(changes[1:], changes[0]) @ up] if changes else []
    if along_up is not None:
        columns = barrier(barrier(inner).reshape(-1, inner.shape[-1]).T)
        changes.append(jnp.einsum("rt,ro->to", columns, along_up).reshape(out.shape))
    return out, sum(changes[1:], changes[0])


def wide_einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns `einsum(subscripts, x, y)` of two arrays of one dtype, accumulated and returned in float32 at least.

    In half precision the derivative rounds to it what the products of the backward pass read, as automatic mixed precision
    does: with a cotangent in float32 they would be products in float32, at most half as fast.
    """
    return _einsum_in_half(subscripts, x, y) if wide(x.dtype) != x.dtype else jnp.einsum(subscripts, x, y)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _einsum_in_half(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=wide(x.dtype))


@functools.partial(_einsum_in_half.defjvp, symbolic_zeros=True)
def _einsum_in_half_jvp(subscripts: str, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    x, y = primals
    changes = [
        jnp.einsum(subscripts, *pair)
        for pair in ((tangents[0], y), (x, tangents[1]))
        if not any(isinstance(each, SymbolicZero) for each in pair)
    ]
    # The transpose of this conversion rounds the cotangent.
    return _einsum_in_half(subscripts, x, y), sum(changes[1:], changes[0]).astype(wide(x.dtype))


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """Returns `cap tanh(x / cap)`, or x where there is no cap (Gemma 2, arXiv 2408.00118, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    allowed: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Returns `softmax(q k scale) v` with grouped queries.

    Args:
        query: `[N, T, K, G, H]`.
        keys: `[N, K, H, S]`, so that a cache of them is read contiguously.
        values: `[N, K, S, H]`.
        allowed: `[N, T, S]`, True where a query may attend.
        scale: of the scores; None is `H^-1/2`.
        cap: of the scores; see `capped`.

    Returns:
        `[N, T, K * G * H]` in the values' dtype (grouped queries: arXiv 2305.13245).
    """
    rows, length, heads, group, size = query.shape
    query = query * (size**-0.5 if scale is None else scale)
    # The queries of a group share their keys: as rows of one matrix they need one product a key/value head.
    query = jnp.transpose(query, (0, 2, 3, 1, 4)).reshape(rows, heads, group * length, size)
    scores = wide_einsum("nkth,nkhs->nkts", query, keys)
    scores = capped(scores.reshape(rows, heads, group, length, -1), cap)
    scores = jnp.where(allowed[:, None, None], scores, MASKED_SCORE)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    # Normalise after the product with the values: H divisions a query instead of S.
    total = jnp.sum(weights, axis=-1).reshape(rows, heads, group * length, 1)
    weights = weights.reshape(rows, heads, group * length, -1).astype(values.dtype)
    out = wide_einsum("nkts,nksh->nkth", weights, values) / total
    out = jnp.transpose(out.reshape(rows, heads, group, length, size), (0, 3, 1, 2, 4))
    return out.reshape(rows, length, -1).astype(values.dtype)


def attend_causally(
    query: jax.Array, keys: jax.Array, values: jax.Array, allowed: jax.Array, **settings: Any
) -> jax.Array:
    """Returns `attend` of a row's last T columns to all S of them, where no query attends to a later column.

    Queries are computed in blocks (`query_blocks`), each without the keys after its last column: of whole rows (S = T),
    two blocks compute 3/4 of the square of scores, four 5/8.
    """
    before = keys.shape[-1] - query.shape[1]
    outputs = [
        attend(
            query[:, begin:end],
            keys[..., : before + end],
            values[:, :, : before + end],
            allowed[:, begin:end, : before + end],
            **settings,
        )
        for begin, end in query_blocks(query.shape[1])
    ]
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def attend_completions(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    allowed: tuple[jax.Array, jax.Array],
    *,
    completions: int,
    **settings: Any,
) -> jax.Array:
    """Returns `attend_causally` of rows of a prompt and several completions, which attend to it and to themselves.

    Args:
        query: `[N, P + C L, K, G, H]`, the prompt's P columns and then C completions of L columns each.
        keys, values: as `attend`'s, of the same columns.
        allowed: of the prompt's columns `[N, P, P]`, and of each completion's to the prompt's and its own
            `[N C, L, P + L]`.
        completions: C.
        settings: of `attend`.

    Returns:
        `[N, P + C L, K * G * H]`.
    """
    rows, prompt = query.shape[0], allowed[0].shape[-1]

    def with_prompt(leaf: jax.Array, axis: int) -> jax.Array:
        # The prompt's columns before each completion's: copies of keys and values are small beside what they save.
        first, rest = jnp.split(leaf, [prompt], axis=axis)
        shape = (*rest.shape[:axis], completions, -1, *rest.shape[axis + 1 :])
        rest = jnp.moveaxis(rest.reshape(shape), axis, 1).reshape(
            rows * completions, *rest.shape[1:axis], *shape[axis + 1 :]
        )
        return jnp.concatenate([jnp.repeat(first, completions, axis=0), rest], axis=axis)

    of_prompt = attend_causally(query[:, :prompt], keys[..., :prompt], values[:, :, :prompt], allowed[0], **settings)
    own = query[:, prompt:].reshape(rows * completions, -1, *query.shape[2:])
    of_completions = attend_causally(own, with_prompt(keys, 3), with_prompt(values, 2), allowed[1], **settings)
    return jnp.concatenate([of_prompt, of_completions.reshape(rows, -1, of_completions.shape[-1])], axis=1)


def attend_fused(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    allowed: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Returns `attend` of a whole row to itself (S = T) by cuDNN's fused kernel: NVIDIA GPUs, in half precision.

    The kernel holds no scores. Arguments and result as `attend`'s; `implementation="xla"` is the same call without the
    kernel. Products are accumulated in float32 as there, in another order.

    Raises:
        ValueError: the scores are capped, or the values are not in half precision, which the kernel cannot do.
    """
    if cap is not None:
        raise ValueError("cuDNN's attention cannot cap its scores; use attention='xla' for this model.")
    if values.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"cuDNN's attention computes in bfloat16 or float16, not {values.dtype}; use attention='xla'.")
    rows, length = query.shape[:2]
    odd = length % 2  # the kernel takes even lengths only

    def with_even_length(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0)))

    out = jax.nn.dot_product_attention(
        with_even_length(query.reshape(rows, length, -1, query.shape[-1])),
        with_even_length(jnp.transpose(keys, (0, 3, 1, 2))),
        with_even_length(jnp.transpose(values, (0, 2, 1, 3))),
        mask=jnp.pad(jnp.broadcast_to(allowed, (rows, length, length)), ((0, 0), (0, odd), (0, odd)))[:, None],
        scale=scale,
        implementation=implementation,
    )
    return out[:, :length].reshape(rows, length, -1)


def query_blocks(columns: int) -> list[tuple[int, int]]:
    """Returns begin and end of each block of columns: one block below 32 columns, two below 512, else four."""
    size = -(-columns // (1 if columns < 32 else 2 if columns < 512 else 4))
    return [(begin, min(begin + size, columns)) for begin in range(0, columns, size)]


def split_rows(x: jax.Array) -> jax.Array:
    """Returns `x [N, ...]`, constrained to be sharded by rows, as the batch, over the mesh axes `data` and `fsdp`.

    Otherwise compilers would keep weights in place and communicate activations, which are larger.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in ("data", "fsdp") if name in mesh.axis_names and mesh.shape[name] > 1)
    if not axes or x.shape[0] % math.prod(mesh.shape[name] for name in axes):
        return x
    free = jax.sharding.PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(axes, *[free] * (x.ndim - 1)))
