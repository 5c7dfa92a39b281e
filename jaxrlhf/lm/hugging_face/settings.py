"""From a `DecoderConfig` to the `config.json` of its family; the inverse of `families`."""

import dataclasses
from typing import Any

from jaxrlhf.lm.hugging_face.checks import FLAGS, SCALES, SIZES, WORDS
from jaxrlhf.lm.hugging_face.families import Kind, config_from
from jaxrlhf.lm.hugging_face.family_table import FAMILIES
from jaxrlhf.lm.hugging_face.files import WeightsError
from jaxrlhf.lm.hugging_face.generation import IDS, LEGACY
from jaxrlhf.lm.hugging_face.rope import FULL, ORIGINAL, WINDOWED, rope_settings
from jaxrlhf.lm.transformer.config import DecoderConfig, LongScaling

DESCRIBED = (
    *FLAGS,
    *SCALES,
    *SIZES,
    *WORDS,
    "auto_map",
    "decoder_sparse_step",
    "layer_types",
    "max_window_layers",
    "mlp_only_layers",
    "no_rope_layers",
    "num_labels",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "problem_type",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "sliding_window_pattern",
    "transformers_version",
)
"""Settings of a `config.json` that describe the decoder, its head or its files, beside those that are written."""


def settings_from(config: DecoderConfig, kind: Kind, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of a decoder or reward model, without its special token ids.

    Args:
        config: the decoder.
        kind: whether it is a policy or a reward model.
        dtype: name of the dtype that the tensors are stored in.

    Returns:
        Settings for versions of transformers before and after it moved the rotary base into `rope_parameters`.

    Raises:
        WeightsError: the family is unknown, or cannot describe this decoder.
    """
    if config.family not in FAMILIES:
        raise WeightsError(f"The family {config.family!r} is none of {', '.join(FAMILIES)}: name one of them.")
    family = FAMILIES[config.family]
    settings: dict[str, Any] = {
        "architectures": [getattr(family, kind)],
        "model_type": family.model_type,
        "vocab_size": config.vocabulary_size,
        "tie_word_embeddings": config.tied_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    settings |= _gpt2_settings(config) if config.family == "gpt2" else _llama_like_settings(config)
    if kind == "reward":
        settings |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    read_back = config_from(settings, kind, "the configuration")
    if read_back != config:
        fields = dataclasses.fields(config)
        differ = [field.name for field in fields if getattr(read_back, field.name) != getattr(config, field.name)]
        raise WeightsError(
            f"A {config.family} checkpoint cannot say {', '.join(differ)} of this decoder: choose the family that has it."
        )
    return settings


def kept_settings(source: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Returns the settings of a source's `config.json` that are not read here, such as dropout, to be written again.

    Those that describe the decoder are left out, since `settings_from` writes them, and so are those of another family.

    Args:
        source: the contents of the source's file.
        config: the decoder that is written.
    """
    if config.family not in FAMILIES or source.get("model_type") != FAMILIES[config.family].model_type:
        return {}
    described = settings_from(config, "reward", "float32").keys() | {*DESCRIBED, *IDS, *LEGACY}
    kept = {name: value for name, value in source.items() if name not in described}
    try:
        same = config_from(kept | settings_from(config, "policy", "float32"), "policy", "the configuration") == config
    except WeightsError:
        same = False
    return kept if same else {}


def _llama_like_settings(config: DecoderConfig) -> dict[str, Any]:
    scaling, rope = config.rope_scaling, rope_settings(config)
    settings: dict[str, Any] = {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_epsilon,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rope_base,
        "rope_parameters": rope,
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": _named(config.activation),
    }
    if scaling is not None:
        settings["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    kinds = [WINDOWED if index in config.windowed_layers else FULL for index in range(config.layers)]
    if config.family in ("mistral", "mixtral", "phi3"):
        settings["sliding_window"] = config.window
    elif config.family == "qwen3_moe":
        settings |= {"sliding_window": config.window, "use_sliding_window": bool(config.windowed_layers)}
    elif config.family not in ("llama", "olmo2", "smollm3"):
        settings |= {"sliding_window": config.window, "layer_types": kinds}
        settings["use_sliding_window"] = bool(config.windowed_layers)
    if config.family == "phi3":
        settings["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0)
        # Transformers reads the original context here first.
        settings[ORIGINAL] = config.context_length
    if isinstance(scaling, LongScaling):
        settings["max_position_embeddings"] = scaling.extended_length
    if config.experts is not None:
        settings |= {"num_local_experts": config.experts.count, "num_experts_per_tok": config.experts.chosen}
        if config.family == "qwen3_moe":
            settings |= {"moe_intermediate_size": config.mlp_width, "num_experts": config.experts.count}
            settings |= {"norm_topk_prob": config.experts.normalised, "mlp_only_layers": [], "decoder_sparse_step": 1}
    if config.family == "smollm3":
        settings["no_rope_layers"] = [int(index not in config.unrotated_layers) for index in range(config.layers)]
    if config.family.startswith("gemma"):
        settings |= {
            "hidden_activation": _named(config.activation),
            "query_pre_attn_scalar": round((config.query_scale or config.head_size**-0.5) ** -2),
            "final_logit_softcapping": config.logit_cap,
            "attn_logit_softcapping": config.score_cap,
        }
    if config.family == "gemma3":
        local = config.window_rope_base or config.rope_base
        settings |= {
            "rope_parameters": {FULL: rope, WINDOWED: {"rope_type": "default", "rope_theta": local}},
            "rope_local_base_freq": local,
        }
    return settings


def _gpt2_settings(config: DecoderConfig) -> dict[str, Any]:
    return {
        "n_embd": config.width,
        "n_inner": config.mlp_width,
        "n_layer": config.layers,
        "n_head": config.query_heads,
        "n_positions": config.context_length,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else config.activation,
    }


def _named(activation: str) -> str:
    return "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation
