"""Configuration of a decoder: one dataclass that covers the supported model families."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

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


class YarnScaling(NamedTuple):
    """Rotary frequencies scaled by YaRN (arXiv 2309.00071).

    Attributes:
        factor: divides the frequencies that are interpolated in full.
        low, high: rotations within the original context up to which a pair of features is interpolated in full, and from
            which it is unchanged; linear in the pair's index in between.
        original_length: the original context.
        attention_factor: of rotated queries and of rotated keys.
        whole: whether the bounds of the indices are rounded outwards.
    """

    factor: float
    low: float
    high: float
    original_length: int
    attention_factor: float
    whole: bool = True


class LongScaling(NamedTuple):
    """Rotary frequencies scaled one by one (LongRoPE, arXiv 2402.13753), within the original context.

    Checkpoints have other factors for rows beyond the original context. Those are kept, not used: a token's state would
    depend on whether later tokens make its row a long one.

    Attributes:
        short, long: what each frequency is divided by, within the original context and beyond it.
        attention_factor: of rotated queries and of rotated keys.
        extended_length: the context with the factors `long`.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    attention_factor: float
    extended_length: int


class Experts(NamedTuple):
    """A mixture of experts in place of every layer's MLP (`transformer.experts`).

    Attributes:
        count: number of experts.
        chosen: how many of them each token uses.
        normalised: whether the chosen experts' weights are divided by their sum.
    """

    count: int
    chosen: int
    normalised: bool = True


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
        mlp_width: features inside the MLP, or inside one expert.
        norm_epsilon: added to the mean square (or variance) in every norm.
        rope_base: base of the rotary frequencies; None: learned position embeddings instead.
        tied_embeddings: whether the output head is the transposed embedding.
        context_length: the largest number of columns a sequence may have.
        family: name of the checkpoint format; the arithmetic does not depend on it.
        norm: "rms"; "rms_from_one", whose scale is one plus its parameter; or "layer", with a bias.
        norm_before: whether attention and MLP are preceded by a norm.
        norm_after: whether attention and MLP are followed by a norm.
        query_key_norm: whether queries and keys are normalised.
        norm_heads_together: whether that is one norm over all heads, rather than one over each.
        activation: of the MLP.
        gated: whether the MLP is gated.
        query_key_value_bias, output_bias, mlp_bias: which linear maps have a bias; `output` is the attention's.
        query_scale: factor of the attention scores; None is head_size^-1/2.
        score_cap, logit_cap: c of `c tanh(x / c)` on attention scores and on logits; None is no cap.
        embedding_scale: factor of the input embeddings.
        window: number of tokens, its own included, that a query of a windowed layer attends to.
        windowed_layers: indices of the windowed layers.
        rope_scaling: of the rotary frequencies, in layers without a window.
        rotary_size: leading features of a head that are rotated; None is all.
        unrotated_layers: indices of the layers without positions.
        window_rope_base: base in windowed layers; None: `rope_base`, with the same scaling.
        experts: of a mixture in place of the MLP, gated and without biases; None is one MLP.

    Raises:
        ValueError: a size is not a positive integer, the query heads are not a multiple of the key/value heads, the head
            size is odd, `windowed_layers` or `unrotated_layers` names layers that do not exist, there is no window for the
            former, `rope_scaling` does not fit, or `experts` are too few or have biases.
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
    norm_before: bool = True
    norm_after: bool = False
    query_key_norm: bool = False
    norm_heads_together: bool = False
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
    rope_scaling: RopeScaling | YarnScaling | LongScaling | None = None
    window_rope_base: float | None = None
    rotary_size: int | None = None
    unrotated_layers: tuple[int, ...] = ()
    experts: Experts | None = None

    def __post_init__(self):
        for name in SIZES:
            if type(getattr(self, name)) is not int:
                raise ValueError(f"DecoderConfig.{name} must be a whole number, got {getattr(self, name)!r}.")
        for name, value in (
            *((name, getattr(self, name)) for name in SCALES),
            *(("rope_scaling", value) for value in _numbers(self.rope_scaling)),
        ):
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not number:
                raise ValueError(f"DecoderConfig.{name} must be a number, got {value!r}.")
        _check_scaling(self.rope_scaling, self.rotated)
        _check_experts(self.experts, plain=self.gated and not self.mlp_bias)
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
        if (self.rotated % 2 and self.rope_base is not None) or self.rotated > self.head_size:
            raise ValueError(
                f"DecoderConfig.rotary_size must be even and at most {self.head_size}, got {self.rotary_size}."
            )
        if not set(self.unrotated_layers) <= set(range(self.layers)):
            raise ValueError(
                f"DecoderConfig.unrotated_layers {self.unrotated_layers} must be among {self.layers} layers."
            )
        if self.windowed_layers and (self.window is None or not set(self.windowed_layers) <= set(range(self.layers))):
            raise ValueError(
                f"DecoderConfig.windowed_layers {self.windowed_layers} need a window and must be among {self.layers} "
                "layers."
            )

    @property
    def rotated(self) -> int:
        """The features of a head that are rotated."""
        return self.head_size if self.rotary_size is None else self.rotary_size


def _numbers(scaling: Any) -> list[Any]:
    """Returns the numbers of a scaling of rotary frequencies."""
    found: list[Any] = []
    for name, value in zip(() if scaling is None else scaling._fields, scaling or (), strict=True):
        if name != "whole":
            found += value if isinstance(value, tuple) else [value]
    return found


def _check_scaling(scaling: Any, rotated: int) -> None:
    """Raises ValueError unless the scaling is one of positive numbers, for this number of rotated features."""
    if isinstance(scaling, RopeScaling | YarnScaling) and not (scaling.factor or 0) > 0:
        raise ValueError(f"DecoderConfig.rope_scaling needs a positive factor, got {scaling.factor!r}.")
    if isinstance(scaling, YarnScaling | LongScaling) and not min(_numbers(scaling)) > 0:
        raise ValueError(f"DecoderConfig.rope_scaling needs positive numbers, got {min(_numbers(scaling))}.")
    if isinstance(scaling, LongScaling) and not len(scaling.short) == len(scaling.long) == rotated // 2:
        raise ValueError(
            f"DecoderConfig.rope_scaling needs {rotated // 2} short and long factors, one a frequency, got "
            f"{len(scaling.short)} and {len(scaling.long)}."
        )


def _check_experts(experts: Experts | None, *, plain: bool) -> None:
    """Raises ValueError unless a mixture has as many experts as a token uses, each a gated MLP without biases."""
    if experts is None:
        return
    count, chosen, _ = experts
    if not (type(count) is type(chosen) is int and 1 <= chosen <= count):
        raise ValueError(f"DecoderConfig.experts needs 1 to {count!r} chosen experts a token, got {chosen!r}.")
    if not plain:
        raise ValueError("DecoderConfig.experts are gated and have no biases: leave gated as it is and mlp_bias off.")
