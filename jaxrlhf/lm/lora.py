"""Low-rank adapters (LoRA): a shared base, and for every iterate two factors beside each linear map of its layers.

    W x  becomes  W x + up down x,     up = 0 at initialisation, so that training starts from the base

(arXiv 2106.09685, with alpha equal to the rank; `scaled` gives it another, `with_dropout` a dropout). The experts of a
mixture have no adapters, only the attention beside them. The base is in `frozen` and never copied: lower iterates, reward
and their optimisers hold adapters, and the reference is the base without one. On a base in half precision build the policy
with `decoder(config, dtype=jnp.float32)`: otherwise only the adapted policy would compute in float32, and the reference's
rounding would count as KL.

    problem = language_problem(policy, reward, objective, ..., policy_params=policy_on_reference,
                               reward_params=reward_on_reference)
    state = algorithm.init(key, {"adapter": init_adapter(upper_key, base, rank=16), "head": jnp.zeros(width)},
                           init_adapter(lower_key, base, rank=16))
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.base.types import Key, Params
from jaxrlhf.lm.reward import NOT_IN_TRUNK


def init_adapter(key: Key, base: Params, *, rank: int, maps: Collection[tuple[str, ...]] | None = None) -> Params:
    """Returns an adapter of linear maps in the layers of a `decoder`, in float32, under the base's names.

    `down ~ N(0, 1 / inputs)`, `[layers, in, rank]`; `up = 0`, `[layers, rank, ...]`. Consumes the key.

    Args:
        key: PRNG key.
        base: the decoder's parameters, or their shapes.
        rank: R.
        maps: paths of the linear maps within a layer, such as `("attention", "query_key_value")`; all by default.

    Raises:
        ValueError: the rank is not positive, or the parameters have no linear maps.
    """
    if rank < 1:
        raise ValueError(f"The rank of an adapter must be at least 1, got {rank}.")
    shapes = _shapes(base.get("layers", {})) if isinstance(base, dict) else {}
    if not jax.tree.leaves(shapes):
        raise ValueError("These parameters have no layers with products: adapters are for `decoder` models.")
    weights = [(path, shape) for path, shape in _linear_weights(shapes) if maps is None or path in maps]
    keys = jax.random.split(key, len(weights))
    adapter: dict[str, Any] = {}
    for weight_key, (path, shape) in zip(keys, weights, strict=True):
        factors = adapter
        for name in path:
            factors = factors.setdefault(name, {})
        layers, inputs, *outputs = shape
        factors["down"] = inputs**-0.5 * jax.random.normal(weight_key, (layers, inputs, rank), jnp.float32)
        factors["up"] = jnp.zeros((layers, rank, *outputs), jnp.float32)
    return {"layers": adapter}


def scaled(adapter: Params, scaling: float) -> Params:
    """Returns the adapter of `W x + scaling up down x`, where scaling is alpha over the rank."""
    if scaling == 1:
        return adapter
    if "down" in adapter:
        return adapter | {"up": scaling * adapter["up"]}
    return {name: scaled(leaf, scaling) for name, leaf in adapter.items()}


def with_dropout(adapter: Params, key: Key, rate: float) -> Params:
    """Returns an adapter of `W x + up down dropout(x)` in the base's layers, for one evaluation of its loss.

    Each linear map of each layer drops features of its input on its own, and scales the rest by `1 / (1 - rate)`, as PEFT
    does while it trains. Only `attach` takes such an adapter. Consumes the key.

    Args:
        adapter: of `init_adapter`, or parameters that hold one, such as a reward's adapter beside its head.
        key: PRNG key.
        rate: probability in [0, 1) that a feature is dropped.
    """
    if not isinstance(adapter, dict):
        return adapter
    if "down" in adapter:
        layers = len(adapter["down"])
        keys = jax.vmap(jax.random.key_data)(jax.random.split(key, layers))
        return adapter | {"dropout_key": keys, "dropout_rate": jnp.full(layers, rate, jnp.float32)}
    keys = jax.random.split(key, len(adapter))
    parts = zip(sorted(adapter), keys, strict=True)
    return {name: with_dropout(adapter[name], part, rate) for name, part in parts}


def attach(base: Params, adapter: Params) -> Params:
    """Returns the base with an adapter beside its linear maps, for the functions of `decoder`; nothing is copied."""
    if not isinstance(base, dict) or not isinstance(adapter, dict):
        return adapter
    return base | {name: attach(base.get(name, {}), leaf) for name, leaf in adapter.items()}


def merge(base: Params, adapter: Params) -> Params:
    """Returns plain parameters equivalent to base and adapter: `W + down up`, added in float32, in W's dtype.

    In half precision the sum is rounded: adapters that are small against the base lose part of their effect.
    """
    if "down" in adapter:
        weight = base["weight"]
        change = jax.vmap(lambda down, up: jnp.tensordot(down, up, axes=1))(adapter["down"], adapter["up"])
        return base | {"weight": (weight.astype(change.dtype) + change).astype(weight.dtype)}
    return base | {name: merge(base[name], leaf) for name, leaf in adapter.items()}


def policy_on_reference(lower: Params, frozen: Any) -> Params:
    """Returns the policy's parameters: its adapter on the frozen reference."""
    return attach(frozen.reference, lower)


def reward_on_reference(upper: Params, frozen: Any) -> Params:
    """Returns the reward model's parameters: its adapter on the frozen reference, and its head."""
    base = {name: leaf for name, leaf in frozen.reference.items() if name not in NOT_IN_TRUNK}
    return {"trunk": attach(base, upper["adapter"]), "head": upper["head"]}


def reward_on_own_trunk(upper: Params, frozen: Any) -> Params:
    """Returns the reward model's parameters: its adapter on the frozen trunk of another reward model, and its head."""
    return {"trunk": attach(frozen.reward, upper["adapter"]), "head": upper["head"]}


def _shapes(layers: Params) -> Params:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), layers)


def _linear_weights(shapes: Any, path: tuple[str, ...] = ()):
    """Yields the paths of the linear maps and the shapes of their weights."""
    if isinstance(shapes, dict):
        if isinstance(shapes.get("weight"), tuple):
            yield path, shapes["weight"]
        else:
            for name in sorted(shapes):
                yield from _linear_weights(shapes[name], (*path, name))
