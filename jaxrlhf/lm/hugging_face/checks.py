"""Settings of a `config.json` that cannot be read: of the wrong type, or of a feature that the decoder lacks."""

import math
from typing import Any, NoReturn

from jaxrlhf.lm.hugging_face.files import WeightsError

FLAGS = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "use_bidirectional_attention",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "add_cross_attention",
    "norm_topk_prob",
)
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "n_embd",
    "n_inner",
    "n_layer",
    "n_head",
    "n_positions",
    "no_rope_layer_interval",
    "original_max_position_embeddings",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
)
SCALES = (
    "rms_norm_eps",
    "layer_norm_epsilon",
    "rope_theta",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "partial_rotary_factor",
)
WORDS = ("hidden_act", "hidden_activation", "activation_function")


def expected_instead(setting: str, value: Any) -> str | None:
    """Returns what a setting must be where its value is not; None where it may be, or is not read."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None:
        return None
    if setting in FLAGS:
        return None if isinstance(value, bool) else "true or false"
    if setting in SIZES:
        return None if number and isinstance(value, int) and value > 0 else "a positive whole number"
    if setting in SCALES:
        return None if number and 0 < value < math.inf else "a positive number"
    if setting in ("rope_parameters", "rope_scaling"):
        return None if isinstance(value, dict) else "an object or null"
    return "the name of an activation" if setting in WORDS and not isinstance(value, str) else None


def refuse(source: str, name: str, value: Any, remedy: str) -> NoReturn:
    """Raises WeightsError for a setting that the decoder cannot follow."""
    raise WeightsError(f"{source} sets {name} to {value!r}, which is not supported: {remedy}.")
