"""Two ways to compute a mixture of experts: every expert on every token, or tokens sorted by expert in grouped products.

    python benchmarks/experts.py

Prints, for each shape, seconds of this process (all cores) for the output and its gradients: of `MixtureOfExperts`, of
`jax.lax.ragged_dot`, and their ratio. The two alternate; the least of several runs counts.
"""

import functools
import resource

import jax
import jax.numpy as jnp

from jaxrlhf.lm.transformer.config import Experts
from jaxrlhf.lm.transformer.experts import chosen_weights

# Tokens, width, features of an expert, experts, experts a token.
SHAPES = (
    (16, 64, 96, 8, 2),
    (1024, 64, 96, 8, 2),
    (1024, 256, 384, 8, 2),
    (16, 256, 96, 32, 4),
    (1024, 256, 96, 32, 4),
)
RUNS = 7


def dense(x, router, gate_up, output, *, chosen: int):
    """Returns the sum of experts as the decoder computes it."""
    weights = chosen_weights(jax.nn.softmax(x @ router), Experts(router.shape[1], chosen))
    width, count, _, inner = gate_up.shape
    fused = (x @ gate_up.reshape(width, -1)).reshape(-1, count, 2, inner)
    inside = jax.nn.silu(fused[:, :, 0]) * fused[:, :, 1] * weights[..., None]
    return inside.reshape(len(x), -1) @ output.reshape(-1, width)


def grouped(x, router, gate_up, output, *, chosen: int):
    """Returns the same, of tokens sorted by their experts."""
    width, count, _, inner = gate_up.shape
    weights, experts = jax.lax.top_k(jax.nn.softmax(x @ router), chosen)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=count).astype(jnp.int32)
    by_expert = jnp.moveaxis(gate_up, 1, 0).reshape(count, width, 2 * inner)
    inside = jax.lax.ragged_dot(x[order // chosen], by_expert, sizes)
    inside = jax.nn.silu(inside[:, :inner]) * inside[:, inner:]
    out = jax.lax.ragged_dot(inside, output, sizes) * weights.reshape(-1)[order][:, None]
    return jnp.zeros_like(x).at[order // chosen].add(out)


def cpu_seconds() -> float:
    """Returns the seconds that this process has computed for."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Prints the table."""
    for tokens, width, inner, count, chosen in SHAPES:
        shapes = (tokens, width), (width, count), (width, count, 2, inner), (count, inner, width)
        keys = jax.random.split(jax.random.key(0), 4)
        arguments = [shape[-1] ** -0.5 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
        programs = []
        for function in (dense, grouped):
            compute = functools.partial(function, chosen=chosen)
            gradient = jax.grad(lambda *given, compute=compute: jnp.sum(compute(*given) ** 2), argnums=(0, 1, 2, 3))
            programs += [jax.jit(compute), jax.jit(gradient)]
        results = [jax.block_until_ready(program(*arguments)) for program in programs]
        assert jnp.allclose(results[0], results[2], atol=1e-4)
        least = [float("inf")] * len(programs)
        for _ in range(RUNS):
            for index, program in enumerate(programs):
                began = cpu_seconds()
                jax.block_until_ready(program(*arguments))
                least[index] = min(least[index], cpu_seconds() - began)
        row = [
            f"{name} {least[i]:.5f} {least[i + 2]:.5f} {least[i + 2] / least[i]:.2f}"
            for i, name in enumerate(("output", "gradients"))
        ]
        print(
            f"{tokens} tokens, width {width}, {count} experts of {inner}, {chosen} chosen:", "; ".join(row), flush=True
        )


if __name__ == "__main__":
    main()
