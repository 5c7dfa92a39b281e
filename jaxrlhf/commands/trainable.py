"""Which parameters of a model are trained: all of them, or LoRA adapters on a frozen base."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.types import Params
from jaxrlhf.lm import lora
from jaxrlhf.lm.learning import ParamsOf, full_params


class Trainable(NamedTuple):
    """The trained and the frozen parameters of a model.

    Attributes:
        params: the parameters that the optimiser updates.
        frozen: the base under the adapters; `()` without adapters.
        params_of: `(params, frozen) -> ` the model's parameters, traceable.
        merged: `(params) -> ` plain parameters to export.
    """

    params: Params
    frozen: Params
    params_of: ParamsOf
    merged: Callable[[Params], Params]

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained, and not all weights."""
        return self.frozen != ()


def trainable_policy(params: Params, rank: int, key: jax.Array) -> Trainable:
    """Returns a language model's parameters for training; adapters on them where `rank` is positive."""
    if not rank:
        return Trainable(params, (), full_params, lambda trained: trained)
    adapter = lora.init_adapter(key, params, rank=rank)

    def params_of(adapter, base):
        return lora.attach(base, adapter)

    return Trainable(adapter, params, params_of, lambda adapter: lora.merge(params, adapter))


def trainable_reward(params: Params, rank: int, key: jax.Array) -> Trainable:
    """Returns the parameters of a reward model `{"trunk", "head"}` for training; an adapter and the head for a rank."""
    if not rank:
        return Trainable(params, (), full_params, lambda trained: trained)
    trunk = params["trunk"]
    trained = {"adapter": lora.init_adapter(key, trunk, rank=rank), "head": jnp.asarray(params["head"], jnp.float32)}

    def params_of(trained, trunk):
        return {"trunk": lora.attach(trunk, trained["adapter"]), "head": trained["head"]}

    def merged(trained):
        return {"trunk": lora.merge(trunk, trained["adapter"]), "head": trained["head"]}

    return Trainable(trained, trunk, params_of, merged)
