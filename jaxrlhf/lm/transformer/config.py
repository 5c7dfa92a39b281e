"""Configuration of a decoder: one dataclass that covers the supported model families."""

import dataclasses
import math
from typing import Literal, NamedTuple

SIZES = (
    "vocabulary_size",
    "width",
    "layers",
    "query_heads",
    "key_value_heads",
    "head_size",
    "mlp_width",
    "context_length",
)


SCALES = (
    "norm_epsilon",
    "rope_base",
    "window_rope_base",
    "query_scale",
    "score_cap",
    "logit_cap",
    "embedding_scale",
    "window",
)


class RopeScaling(NamedTuple):
    """How rotary frequencies were scaled to extend the context beyond that of pre-training.

    Attributes:
        factor: divides the frequencies.
        low, high: rotations within the original context below which a frequency is divided in full, and above which it is
            unchanged; interpolated in between (Llama 3). None: all are divided (linear, arXiv 2306.15595).
        original_length: the original context; needed with `low` and `high`.
    """

    factor: float
    low: float | None = None
    high: float | None = None
    original_length: int | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Configuration of a decoder. The defaults are Llama's; `lm.hugging_face.families` has those of the other families.

    Attributes:
        vocabulary_size: number of token ids.
        width: size of the residual stream.
        layers: number of blocks.
        query_heads: number of query heads, a multiple of `key_value_heads`.
        key_value_heads: number of key and of value heads.
        head_size: features a head, even with rotary positions.
        mlp_width: features inside the MLP.
        norm_epsilon: added to the mean square (or variance) in every norm.
        rope_base: base of the rotary frequencies; None: learned position embeddings instead.
        tied_embeddings: whether the output head is the transposed embedding.
        context_length: the largest number of columns a sequence may have.
        family: name of the checkpoint format; the arithmetic does not depend on it.
        norm: "rms"; "rms_from_one", whose scale is one plus its parameter; or "layer", with a bias.
        norm_after: whether attention and MLP are followed by a norm too.
        query_key_norm: whether queries and keys are normalised.
        activation: of the MLP.
        gated: whether the MLP is gated.
        query_key_value_bias, output_bias, mlp_bias: which linear maps have a bias; `output` is the attention's.
        query_scale: factor of the attention scores; None is head_size^-1/2.
        score_cap, logit_cap: c of `c tanh(x / c)` on attention scores and on logits; None is no cap.
        embedding_scale: factor of the input embeddings.
        window: number of tokens, its own included, that a query of a windowed layer attends to.
        windowed_layers: indices of the windowed layers.
        rope_scaling: of the rotary frequencies, in layers without a window.
        window_rope_base: base in windowed layers; None: `rope_base`, with the same scaling.

    Raises:
        ValueError: a size is not a positive integer, the query heads are not a multiple of the key/value heads, the head
            size is odd, `windowed_layers` names layers that do not exist, or it is given without a window.
    """

    vocabulary_size: int
    width: int
    layers: int
    query_heads: int
    key_value_heads: int
    head_size: int
    mlp_width: int
    norm_epsilon: float = 1e-5
    rope_base: float | None = 10000.0
    tied_embeddings: bool = True
    context_length: int = 2048
    family: str = "llama"
    norm: Literal["rms", "rms_from_one", "layer"] = "rms"
    norm_after: bool = False
    query_key_norm: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    query_key_value_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    rope_scaling: RopeScaling | None = None
    window_rope_base: float | None = None

    def __post_init__(self):
        for name in SIZES:
            if type(getattr(self, name)) is not int:
                raise ValueError(f"DecoderConfig.{name} must be a whole number, got {getattr(self, name)!r}.")
        scaling = () if self.rope_scaling is None else self.rope_scaling
        for name, value in (
            *((name, getattr(self, name)) for name in SCALES),
            *(("rope_scaling", value) for value in scaling),
        ):
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not number:
                raise ValueError(f"DecoderConfig.{name} must be a number, got {value!r}.")
        if self.rope_scaling is not None and not (self.rope_scaling.factor or 0) > 0:
            raise ValueError(f"DecoderConfig.rope_scaling needs a positive factor, got {self.rope_scaling.factor!r}.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"DecoderConfig.{field.name} must be positive, got {value}.")
        if self.query_heads % self.key_value_heads:
            raise ValueError(
                f"DecoderConfig.query_heads ({self.query_heads}) must be a multiple of key_value_heads "
                f"({self.key_value_heads})."
            )
        if self.head_size % 2 and self.rope_base is not None:
            raise ValueError(f"DecoderConfig.head_size must be even for rotary positions, got {self.head_size}.")
        if self.windowed_layers and (self.window is None or not set(self.windowed_layers) <= set(range(self.layers))):
            raise ValueError(
                f"DecoderConfig.windowed_layers {self.windowed_layers} need a window and must be among {self.layers} "
                "layers."
            )
