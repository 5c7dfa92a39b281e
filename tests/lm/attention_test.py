"""The fused attention's layout against the plain one; the cuDNN kernel itself where there is a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.layers import attend, attend_fused
from jaxrlhf.lm.transformer.model import decoder

GPU = jax.default_backend() == "gpu"
CONFIG = DecoderConfig(64, 32, 2, 4, 2, 8, 48, tied_embeddings=True, context_length=32)


def inputs(length: int, dtype):
    """Random queries, keys, values, and a causal mask with padding on the left of the second row."""
    rows, heads, group, size = 2, 2, 3, 8
    keys = jax.random.split(jax.random.key(length), 3)
    query = jax.random.normal(keys[0], (rows, length, heads, group, size), dtype)
    key = jax.random.normal(keys[1], (rows, heads, size, length), dtype)
    value = jax.random.normal(keys[2], (rows, heads, length, size), dtype)
    real = jnp.arange(length)[None] >= jnp.array([0, 2])[:, None]
    allowed = real[:, None, :] & jnp.tril(jnp.ones((1, length, length), bool))
    return query, key, value, allowed, real


@pytest.mark.parametrize("length", [6, 7])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_fused_attention_has_the_plain_ones_result_and_gradient(length, scale):
    query, key, value, allowed, real = inputs(length, jnp.bfloat16)
    implementation = "cudnn" if GPU else "xla"
    columns = real[:, :, None]
    weights = jax.random.normal(jax.random.key(9), (2, length, 48)) * columns

    def loss(function, *arguments, **settings):
        out = function(*arguments, allowed, scale=scale, **settings)
        return jnp.sum(weights * out.astype(jnp.float32)), out

    def result_and_gradient(function, **settings):
        differentiated = jax.value_and_grad(lambda *a: loss(function, *a, **settings), (0, 1, 2), has_aux=True)
        (_, out), gradient = jax.jit(differentiated)(query, key, value)
        return out, gradient

    plain, gradient = result_and_gradient(attend)
    fused, fused_gradient = result_and_gradient(attend_fused, implementation=implementation)
    for expected, got in zip((plain, *gradient), (fused, *fused_gradient), strict=True):
        expected, got = (np.asarray(leaf, np.float32) for leaf in (expected, got))
        if expected.shape == weights.shape:
            expected, got = expected * columns, got * columns
        assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)  # a few roundings of 2^-9 each


@pytest.mark.skipif(not GPU, reason="cuDNN needs a GPU")
def test_a_decoder_with_cudnn_agrees_with_one_without():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), decoder(CONFIG).init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (3, 17), 0, 64)
    plain, fused = (
        decoder(CONFIG, attention=kernel).hidden(params, tokens, jnp.ones_like(tokens, bool))
        for kernel in ("xla", "cudnn")
    )
    assert np.max(np.abs(np.asarray(plain - fused, np.float32))) < 0.1


def test_what_the_kernel_cannot_do_is_named():
    query, key, value, allowed, _ = inputs(6, jnp.float32)
    with pytest.raises(ValueError, match="not float32"):
        attend_fused(query, key, value, allowed)
    with pytest.raises(ValueError, match="cap"):
        attend_fused(query, key, value, allowed, cap=30.0)
    with pytest.raises(ValueError, match="xla, cudnn, not 'flash'"):
        decoder(CONFIG, attention="flash")  # pyright: ignore[reportArgumentType]
