"""From the `config.json` of a model family to a `DecoderConfig`; `settings` is the inverse.

Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, OLMo 2, Phi-3, SmolLM3, Gemma 2, Gemma 3 (text) and GPT-2, by the
`architectures` that transformers names. Omitted settings have transformers' defaults; features that the decoder lacks are
refused, since ignoring them would silently change the model's output.
"""

from typing import Any, Literal

from jaxrlhf.lm.hugging_face.checks import expected_instead, refuse
from jaxrlhf.lm.hugging_face.family_table import FAMILIES, Family
from jaxrlhf.lm.hugging_face.files import WeightsError
from jaxrlhf.lm.hugging_face.rope import FULL, WINDOWED, read_rope
from jaxrlhf.lm.transformer.config import DecoderConfig, Experts

Kind = Literal["policy", "reward"]


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def family_of(settings: dict[str, Any], kind: Kind, source: str) -> str:
    """Returns the name in `FAMILIES` of the model that a `config.json` describes.

    Raises:
        WeightsError: the model is of no known family, or of the other kind.
    """
    found = settings.get("architectures") or ["no architecture"]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise WeightsError(f"{source} has no list of architectures but {found!r}: save the model again.")
    for name, family in FAMILIES.items():
        if getattr(family, kind) in found:
            _check_type(settings.get("model_type"), family, source)
            return name
    others = {getattr(family, "reward" if kind == "policy" else "policy") for family in FAMILIES.values()}
    what = ", ".join(map(str, found))
    if others & set(found):
        expected = "a language model is wanted here" if kind == "policy" else "a reward model is wanted here"
        raise WeightsError(f"{source} describes {what}: {expected}.")
    known = ", ".join(getattr(family, kind) for family in FAMILIES.values())
    raise WeightsError(f"{source} describes {what}: only {known} can be read here.")


def as_reward(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns the settings of a language model's `config.json` as those of a reward model of its family.

    Raises:
        WeightsError: the model is of no known family.
    """
    found = settings.get("architectures")
    if isinstance(found, list) and any(family.reward in found for family in FAMILIES.values()):
        return settings
    family = FAMILIES[family_of(settings, "policy", source)]
    return settings | {"architectures": [family.reward]}


def _check_type(model_type: Any, family: Family, source: str) -> None:
    # transformers goes by the type, and would read another model.
    if model_type is not None and model_type != family.model_type:
        raise WeightsError(
            f"{source} says model_type {model_type!r} and architectures of {family.model_type!r}: save the model again."
        )


def config_from(settings: dict[str, Any], kind: Kind, source: str) -> DecoderConfig:
    """Returns the decoder that a `config.json` describes.

    Args:
        settings: the file's contents.
        kind: whether a policy or a reward model is expected.
        source: the file's name, for messages.

    Returns:
        The configuration.

    Raises:
        WeightsError: unknown architecture, a feature that the decoder lacks, or a missing or invalid size.
    """
    name = family_of(settings, kind, source)
    for setting, value in settings.items():
        expected = expected_instead(setting, value)
        if expected is not None:
            raise WeightsError(f"{source} sets {setting} to {value!r}: make it {expected}.")
    if settings.get("quantization_config"):
        refuse(source, "quantization_config", settings["quantization_config"], "use the unquantised model")
    values = FAMILIES[name].defaults | {key: value for key, value in settings.items() if value is not None}
    nulls = {key: None for key, value in settings.items() if value is None and key in _MEANINGFUL_NULLS}
    try:
        read = _gpt2 if name == "gpt2" else _llama_like
        return read(name, values | nulls, source)
    except KeyError as error:
        raise WeightsError(
            f"{source} has no {error.args[0]}: save the model again with its full configuration."
        ) from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{source} describes no decoder ({error}): correct the value.") from error


# Settings where null is a value, not an omission.
_MEANINGFUL_NULLS = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")


def _llama_like(name: str, values: dict[str, Any], source: str) -> DecoderConfig:
    heads, gemma = values["num_attention_heads"], name.startswith("gemma")
    bias = bool(values.get("attention_bias"))
    activation = values["hidden_activation"] if gemma else values["hidden_act"]
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        refuse(source, "hidden_activation" if gemma else "hidden_act", activation, f"use a model with {known}")
    windowed = _windowed_layers(name, values, source)
    rope = read_rope(name, values, source)
    if gemma and values.get("use_bidirectional_attention"):
        refuse(source, "use_bidirectional_attention", True, "use a causal model")
    if name == "gemma3" and values.get("attn_logit_softcapping"):
        refuse(source, "attn_logit_softcapping", values["attn_logit_softcapping"], "use a model without it")
    if name != "llama" and values.get("mlp_bias"):
        refuse(source, "mlp_bias", True, "use a model without biases")
    if name in ("mistral", "mixtral", "qwen2", "phi3") and bias:
        refuse(source, "attention_bias", True, "use a model without that setting")
    width = values["hidden_size"]
    gemma_settings: dict[str, Any] = {
        "norm": "rms_from_one",
        "norm_after": True,
        "query_scale": values.get("query_pre_attn_scalar", 0) ** -0.5 if gemma else None,
        "embedding_scale": width**0.5,
        "score_cap": values.get("attn_logit_softcapping"),
        "logit_cap": values.get("final_logit_softcapping"),
    }
    return DecoderConfig(
        vocabulary_size=values["vocab_size"],
        width=width,
        layers=values["num_hidden_layers"],
        query_heads=heads,
        key_value_heads=values.get("num_key_value_heads", heads),
        head_size=values["head_dim"] if "head_dim" in values else width // heads,
        mlp_width=values["moe_intermediate_size" if name == "qwen3_moe" else "intermediate_size"],
        norm_epsilon=values["rms_norm_eps"],
        rope_base=rope.base,
        tied_embeddings=bool(values["tie_word_embeddings"]),
        context_length=rope.context_length,
        family=name,
        query_key_norm=name in ("qwen3", "qwen3_moe", "gemma3", "olmo2"),
        activation=ACTIVATIONS[activation],  # pyright: ignore[reportArgumentType]
        query_key_value_bias=bias or name == "qwen2",
        output_bias=bias,
        mlp_bias=bool(values.get("mlp_bias")),
        window=values["sliding_window"] if windowed else None,
        windowed_layers=windowed,
        rope_scaling=rope.scaling,
        window_rope_base=rope.windowed_base if windowed else None,
        rotary_size=rope.rotary_size,
        unrotated_layers=_unrotated_layers(values, source) if name == "smollm3" else (),
        experts=_experts(name, values, source),
        **(gemma_settings if gemma else _OLMO if name == "olmo2" else {}),
    )


_OLMO: dict[str, Any] = {"norm_before": False, "norm_after": True, "norm_heads_together": True}


def _gpt2(name: str, values: dict[str, Any], source: str) -> DecoderConfig:
    if values["activation_function"] not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        refuse(source, "activation_function", values["activation_function"], f"use a model with {known}")
    for setting in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if values.get(setting):
            refuse(source, setting, True, "use a plain GPT-2")
    if not values.get("scale_attn_weights", True):
        refuse(source, "scale_attn_weights", False, "use a plain GPT-2")
    width, heads = values["n_embd"], values["n_head"]
    if width % heads:
        raise ValueError(f"{width} features do not divide into {heads} heads")
    return DecoderConfig(
        vocabulary_size=values["vocab_size"],
        width=width,
        layers=values["n_layer"],
        query_heads=heads,
        key_value_heads=heads,
        head_size=width // heads,
        mlp_width=values.get("n_inner", 4 * width),
        norm_epsilon=values["layer_norm_epsilon"],
        rope_base=None,
        tied_embeddings=bool(values["tie_word_embeddings"]),
        context_length=values["n_positions"],
        family=name,
        norm="layer",
        activation=ACTIVATIONS[values["activation_function"]],  # pyright: ignore[reportArgumentType]
        gated=False,
        query_key_value_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def _experts(name: str, values: dict[str, Any], source: str) -> Experts | None:
    """Returns the mixture of experts of a family that has one; every layer must have it."""
    if name not in ("mixtral", "qwen3_moe"):
        return None
    for setting, expected in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        if values.get(setting, expected) != expected:
            refuse(source, setting, values[setting], "use a model with experts in every layer")
    if name == "mixtral":
        return Experts(values["num_local_experts"], values["num_experts_per_tok"])
    # Transformers writes one name or the other, by its version.
    count = values.get("num_local_experts", values["num_experts"])
    return Experts(count, values["num_experts_per_tok"], values["norm_topk_prob"])


_ALL_WINDOWED = ("mistral", "mixtral", "qwen3_moe", "phi3")
"""Families where a window is every layer's."""


def _windowed_layers(name: str, values: dict[str, Any], source: str) -> tuple[int, ...]:
    layers = range(values["num_hidden_layers"])
    if name == "smollm3" and values.get("use_sliding_window"):
        refuse(source, "use_sliding_window", True, "use a model without windows")
    if not values.get("sliding_window") or name in ("llama", "olmo2", "smollm3"):
        return ()
    if name.startswith("qwen") and not values.get("use_sliding_window"):
        return ()
    kinds = values.get("layer_types")
    if kinds and name not in _ALL_WINDOWED:
        if len(kinds) != len(layers) or not set(kinds) <= {WINDOWED, FULL}:
            refuse(source, "layer_types", kinds, f"give every layer {WINDOWED} or {FULL}")
        return tuple(index for index, kind in enumerate(kinds) if kind == WINDOWED)
    if name in _ALL_WINDOWED:
        return tuple(layers)
    if name.startswith("qwen"):
        return tuple(index for index in layers if index >= values["max_window_layers"])
    period = 2 if name == "gemma2" else values.get("sliding_window_pattern", 6)
    return tuple(index for index in layers if (index + 1) % period)


def _unrotated_layers(values: dict[str, Any], source: str) -> tuple[int, ...]:
    """Returns the indices of SmolLM3's layers without positions."""
    layers, interval = range(values["num_hidden_layers"]), values["no_rope_layer_interval"]
    rotated = values.get("no_rope_layers")
    if rotated is None:
        return tuple(index for index in layers if (index + 1) % interval == 0)
    if not isinstance(rotated, list) or len(rotated) < len(layers) or any(each not in (0, 1) for each in rotated):
        refuse(source, "no_rope_layers", rotated, "give every layer 1, for rotary positions, or 0")
    return tuple(index for index in layers if not rotated[index])
