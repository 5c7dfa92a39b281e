"""LoRA adapters on the command line: rank, alpha and modules, and the data type of the weights under them."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.types import Params
from jaxrlhf.commands.flags import refuse_unused
from jaxrlhf.commands.options import Groups
from jaxrlhf.lm import lora
from jaxrlhf.lm.hugging_face.adapters import maps_of
from jaxrlhf.lm.hugging_face.families import Kind
from jaxrlhf.lm.transformer.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of adapters, common to every command that trains."""

    GROUPS: ClassVar[Groups] = {"adapters": ("lora_alpha", "lora_modules")}

    lora_rank: int = 0
    """Trains LoRA adapters of this rank instead of all weights; they are merged into the saved models."""
    lora_alpha: float | None = None
    """Adapters count alpha / rank times; by default alpha is the rank."""
    lora_modules: tuple[str, ...] = ()
    """Modules with adapters, by the ends of their names in the checkpoint, such as q_proj k_proj v_proj; by default every
    linear map in the layers."""


def dtype_of(name: str, rank: int) -> Any:
    """Returns the data type named by --dtype.

    Raises:
        ValueError: bfloat16 without adapters.
    """
    if name != "float32" and not rank:
        raise ValueError(
            f"Weights in {name} cannot be trained whole, as small steps round to nothing; give --lora-rank."
        )
    return jnp.dtype(name)


class Adapters(NamedTuple):
    """The adapters of a run.

    Attributes:
        rank: R.
        alpha: they count alpha / rank times.
        modules: of `maps_of`; every linear map if there are none.
        dropout: probability that a feature of an adapter's inputs is dropped in training.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...]
    dropout: float = 0.0

    @property
    def scaling(self) -> float:
        """Alpha over the rank."""
        return self.alpha / self.rank

    def init(self, key: jax.Array, config: DecoderConfig, kind: Kind, base: Params) -> Params:
        """Returns a new adapter of a model's layers, of `lora.init_adapter`.

        Raises:
            WeightsError: the model does not have the modules.
        """
        maps = maps_of(config, kind, self.modules) if self.modules else None
        return lora.init_adapter(key, base, rank=self.rank, maps=maps)

    def scaled(self, adapter: Params) -> Params:
        """Returns an adapter as `lora.attach` and `lora.merge` take it."""
        return lora.scaled(adapter, self.scaling)


def configured_adapters(config: AdapterConfig) -> Adapters | None:
    """Returns the adapters that the flags describe; None where all weights are trained.

    Raises:
        ValueError: a flag for adapters is given without --lora-rank, or the dropout is out of range.
    """
    # Only stages whose loss does not compare probabilities of one policy have a dropout.
    dropout = getattr(config, "lora_dropout", 0.0)
    if not config.lora_rank:
        flags = [name for name in ("lora_alpha", "lora_dropout", "lora_modules") if hasattr(config, name)]
        refuse_unused(config, flags, "without --lora-rank")
        return None
    if not 0 <= dropout < 1:
        raise ValueError(f"--lora-dropout must lie in [0, 1), got {dropout:g}.")
    alpha: Any = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    return Adapters(config.lora_rank, alpha, config.lora_modules, dropout)
