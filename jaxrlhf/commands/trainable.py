"""Which parameters of a model are trained: all of them, or LoRA adapters on a frozen base."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.types import Params
from jaxrlhf.commands.adapters import Adapters
from jaxrlhf.commands.models import Model
from jaxrlhf.lm import lora
from jaxrlhf.lm.learning import Noise, ParamsOf, full_params


class Trainable(NamedTuple):
    """The trained and the frozen parameters of a model.

    Attributes:
        params: the parameters that the optimiser updates.
        frozen: the base under the adapters; `()` without adapters.
        params_of: `(params, frozen) -> ` the model's parameters, traceable.
        merged: `(params) -> ` plain parameters to export.
        scaling: alpha over the rank of the adapters.
        dropout: of the adapters while they are trained.
    """

    params: Params
    frozen: Params
    params_of: ParamsOf
    merged: Callable[[Params], Params]
    scaling: float = 1.0
    dropout: float = 0.0

    @property
    def noise(self) -> Noise | None:
        """The dropout as noise of `learning`; None without."""
        return functools.partial(lora.with_dropout, rate=self.dropout) if self.dropout else None

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained, and not all weights."""
        return self.frozen != ()


def trainable_policy(start: Model, adapters: Adapters | None, key: jax.Array) -> Trainable:
    """Returns a language model's parameters for training, or adapters on them."""
    params = start.params
    if adapters is None:
        return Trainable(params, (), full_params, lambda trained: trained)

    def params_of(adapter, base):
        return lora.attach(base, adapters.scaled(adapter))

    def merged(adapter):
        return lora.merge(params, adapters.scaled(adapter))

    adapter = adapters.init(key, start.config, "policy", params)
    return Trainable(adapter, params, params_of, merged, adapters.scaling, adapters.dropout)


def trainable_reward(start: Model, adapters: Adapters | None, key: jax.Array) -> Trainable:
    """Returns the parameters of a reward model `{"trunk", "head"}` for training, or an adapter and the head."""
    params = start.params
    if adapters is None:
        return Trainable(params, (), full_params, lambda trained: trained)
    trunk = params["trunk"]
    adapter = adapters.init(key, start.config, "reward", trunk)

    def params_of(trained, trunk):
        return {"trunk": lora.attach(trunk, adapters.scaled(trained["adapter"])), "head": trained["head"]}

    def merged(trained):
        return {"trunk": lora.merge(trunk, adapters.scaled(trained["adapter"])), "head": trained["head"]}

    trained = {"adapter": adapter, "head": jnp.asarray(params["head"], jnp.float32)}
    return Trainable(trained, trunk, params_of, merged, adapters.scaling, adapters.dropout)
