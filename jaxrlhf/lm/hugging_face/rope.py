"""Rotary positions in a `config.json`, which says them in several ways, in both directions."""

import math
from typing import Any, NamedTuple

from jaxrlhf.lm.hugging_face.checks import refuse
from jaxrlhf.lm.transformer.config import DecoderConfig, LongScaling, RopeScaling, YarnScaling

WINDOWED, FULL = "sliding_attention", "full_attention"
ORIGINAL = "original_max_position_embeddings"
NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
"""Kinds of rotary positions, and the settings that each needs."""


class Rope(NamedTuple):
    """Rotary positions of a decoder, under the names of `DecoderConfig`; the windowed base is of Gemma 3."""

    base: float
    scaling: RopeScaling | YarnScaling | LongScaling | None
    windowed_base: float | None
    rotary_size: int | None
    context_length: int


def read_rope(name: str, values: dict[str, Any], source: str) -> Rope:
    """Returns the rotary positions that settings describe.

    Args:
        name: of the family.
        values: the settings, with the family's defaults.
        source: name of their file, for messages.

    Raises:
        WeightsError: they are of an unknown kind, lack what their kind needs, or rotate a part of a head in a family that
            does not.
    """
    rope, local = values.get("rope_parameters") or {}, None
    if name == "gemma3":
        windowed = rope.get(WINDOWED) or {}
        local = windowed.get("rope_theta") or values["rope_local_base_freq"]
        if windowed.get("rope_type", "default") != "default":
            refuse(source, "rope_parameters", windowed, "use a model with plain rotary positions in its windows")
        rope = rope.get(FULL) or {}
    base, context_length = rope.get("rope_theta") or values["rope_theta"], values["max_position_embeddings"]
    rotary_size = _rotary_size(name, values, rope, source)
    for setting, value in (("rope_parameters", rope), ("rope_scaling", values.get("rope_scaling") or {})):
        kind = value.get("rope_type", value.get("type", "default"))
        if name == "phi3" and kind in ("su", "yarn"):
            kind = "longrope"  # its older names
        if kind not in NEEDS or (kind == "longrope" and name != "phi3"):
            plain = "plain, linear, llama3 or yarn"
            refuse(source, setting, value, f"use a model with {plain} rotary positions, or Phi-3 with longrope")
        # The file's own setting counts first, as in transformers.
        original = values.get(ORIGINAL) or value.get(ORIGINAL)
        value = value if original is None else value | {ORIGINAL: original}
        missing = [needed for needed in NEEDS[kind] if needed not in value]
        if missing:
            refuse(source, setting, value, f"give it its {missing[0]}")
        wrong = _wrong_type(value) if kind in ("yarn", "longrope") else None
        if wrong is not None:
            refuse(source, setting, value, f"make its {wrong}")
        if kind == "longrope":
            scaling = _long(value, context_length)
            return Rope(base, scaling, local, rotary_size, min(value[ORIGINAL], context_length))
        if kind != "default":
            return Rope(base, _scaling(kind, value, context_length), local, rotary_size, context_length)
    return Rope(base, None, local, rotary_size, context_length)


def rope_settings(config: DecoderConfig) -> dict[str, Any]:
    """Returns the rotary positions of a decoder as `rope_parameters` has them."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rotary_size is not None:
        rope["partial_rotary_factor"] = config.rotary_size / config.head_size
    if isinstance(scaling, LongScaling):
        return rope | {
            "rope_type": "longrope",
            "short_factor": list(scaling.short),
            "long_factor": list(scaling.long),
            "attention_factor": scaling.attention_factor,
            ORIGINAL: config.context_length,
        }
    if isinstance(scaling, YarnScaling):
        return rope | {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "beta_slow": scaling.low,
            "beta_fast": scaling.high,
            "attention_factor": scaling.attention_factor,
            "truncate": scaling.whole,
            ORIGINAL: scaling.original_length,
        }
    if scaling is not None and scaling.low is not None:
        return rope | {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            ORIGINAL: scaling.original_length,
        }
    return rope if scaling is None else rope | {"rope_type": "linear", "factor": scaling.factor}


def _wrong_type(value: dict[str, Any]) -> str | None:
    """Returns the first setting of a scaling that has the wrong type, and what it must be; None if there is none."""

    def number(found):
        return isinstance(found, int | float) and not isinstance(found, bool)

    for name in ("factor", "attention_factor", "beta_slow", "beta_fast", "mscale", "mscale_all_dim", ORIGINAL):
        if not number(value.get(name, 1.0)) and value[name] is not None:
            return f"{name} a number"
    for name in ("short_factor", "long_factor"):
        found = value.get(name, [])
        if not isinstance(found, list) or not all(map(number, found)):
            return f"{name} a list of numbers"
    return None if isinstance(value.get("truncate", True), bool) else "truncate true or false"


def _rotary_size(name: str, values: dict[str, Any], rope: dict[str, Any], source: str) -> int | None:
    """Returns the number of rotated features of a head; None if it is all of them."""
    places = (values.get("rope_scaling") or {}, rope, values)
    fraction = next((found for each in places if (found := each.get("partial_rotary_factor")) is not None), 1.0)
    if fraction == 1.0:
        return None
    if name != "phi3":
        refuse(source, "partial_rotary_factor", fraction, "use a model with whole rotary positions")
    return int(values.get("head_dim", values["hidden_size"] // values["num_attention_heads"]) * float(fraction))


def _scaling(kind: str, value: dict[str, Any], context_length: int) -> RopeScaling | YarnScaling:
    factor = value["factor"]
    if kind == "linear":
        return RopeScaling(factor)
    if kind == "llama3":
        return RopeScaling(factor, value["low_freq_factor"], value["high_freq_factor"], value[ORIGINAL])
    attention = value.get("attention_factor")
    if attention is None:
        weights = value.get("mscale"), value.get("mscale_all_dim")
        over, under = weights if all(weights) else (1.0, 0.0)
        attention = _yarn_scale(factor, over) / _yarn_scale(factor, under)
    low, high, original = value.get("beta_slow") or 1.0, value.get("beta_fast") or 32.0, value.get(ORIGINAL)
    return YarnScaling(factor, low, high, original or context_length, attention, value.get("truncate", True))


def _yarn_scale(factor: float, weight: Any) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _long(value: dict[str, Any], extended: int) -> LongScaling:
    original, attention = value[ORIGINAL], value.get("attention_factor")
    if attention is None:
        factor = value.get("factor") or extended / original
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (tuple(map(float, value[name])) for name in ("short_factor", "long_factor"))
    return LongScaling(short, long, attention, extended)
