"""How a Llama checkpoint corresponds to a decoder: its `config.json`, its tensor names and its layouts.

Theirs and ours differ in layout only: their projections are `[out, in]` and separate; ours are `[in, out]` and
fused (queries, key and value by key/value head; gate and up).
"""

from typing import Any

import jax
import numpy as np

from jaxrlhf.lm.model import DecoderConfig
from jaxrlhf.lm.weight_files import WeightsError

POLICY = "LlamaForCausalLM"
REWARD = "LlamaForSequenceClassification"
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def config_from(settings: dict[str, Any], architecture: str, source: str) -> DecoderConfig:
    """The decoder's shape that a `config.json` describes.

    Args:
        settings: the file's contents. What it leaves out has the meaning that transformers gives it.
        architecture: `POLICY` or `REWARD`.
        source: the file's name, for messages.

    Returns:
        The configuration.

    Raises:
        WeightsError: another architecture, a feature the decoder lacks, or a missing or impossible size.
    """
    found = settings.get("architectures") or ["no architecture"]
    if architecture not in found:
        raise WeightsError(
            f"{source} describes {', '.join(map(str, found))}: only {architecture} can be read here (policies are "
            f"{POLICY}, reward models {REWARD})."
        )
    check_features(settings, source)
    for name in REQUIRED:
        if name not in settings:
            raise WeightsError(f"{source} has no {name}: save the model again with its full configuration.")
    heads = settings["num_attention_heads"]
    rope = settings.get("rope_parameters") or {}
    try:
        return DecoderConfig(
            vocabulary_size=settings["vocab_size"],
            width=settings["hidden_size"],
            layers=settings["num_hidden_layers"],
            query_heads=heads,
            key_value_heads=settings.get("num_key_value_heads") or heads,
            head_size=settings.get("head_dim") or settings["hidden_size"] // heads,
            mlp_width=settings["intermediate_size"],
            norm_epsilon=settings.get("rms_norm_eps", 1e-6),
            rope_base=rope.get("rope_theta") or settings.get("rope_theta") or 10000.0,
            tied_embeddings=bool(settings.get("tie_word_embeddings", False)),
            context_length=settings.get("max_position_embeddings", 2048),
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise WeightsError(f"{source} describes no decoder ({error}): correct the value.") from error


def check_features(settings: dict[str, Any], source: str) -> None:
    """Raises WeightsError for what would silently change the model's output if it were ignored."""

    def refuse(name: str, value: Any, remedy: str):
        raise WeightsError(f"{source} sets {name} to {value!r}, which is not supported: {remedy}.")

    for name in ("attention_bias", "mlp_bias"):
        if settings.get(name):
            refuse(name, settings[name], "use a model without biases")
    if settings.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", settings["hidden_act"], "use a model with silu")
    if settings.get("quantization_config"):
        refuse("quantization_config", settings["quantization_config"], "use the unquantised model")
    for name in ("rope_scaling", "rope_parameters"):
        rope = settings.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            refuse(name, rope, "use a model with plain rotary positions")


def settings_from(config: DecoderConfig, architecture: str, dtype: str) -> dict[str, Any]:
    """The `config.json` of a decoder or reward model, less its special token ids.

    Args:
        config: the decoder's shape.
        architecture: `POLICY` or `REWARD`.
        dtype: name of the dtype that the tensors are stored in.

    Returns:
        Settings that transformers reads, before and after it moved the rotary base into `rope_parameters`.
    """
    settings = {
        "architectures": [architecture],
        "model_type": "llama",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if architecture == REWARD:
        settings |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return settings


def tensor_shapes(config: DecoderConfig, architecture: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint."""
    width, mlp_width = config.width, config.mlp_width
    queries, others = config.query_heads * config.head_size, config.key_value_heads * config.head_size
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (others, width),
        "self_attn.v_proj": (others, width),
        "self_attn.o_proj": (width, queries),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (mlp_width, width),
        "mlp.up_proj": (mlp_width, width),
        "mlp.down_proj": (width, mlp_width),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocabulary_size, width)}
    for index in range(config.layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (width,)
    if architecture == REWARD:
        shapes["score.weight"] = (1, width)
    elif not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocabulary_size, width)
    return shapes


def params_from(tensors: dict[str, np.ndarray], config: DecoderConfig) -> dict:
    """Our parameters from a checkpoint's tensors; `output_head` if there is one."""
    groups = (config.width, config.key_value_heads, -1, config.head_size)

    def layer(index: int) -> dict[str, np.ndarray]:
        def tensor(name):
            return tensors[f"model.layers.{index}.{name}.weight"].T

        query_key_value = [tensor(f"self_attn.{kind}_proj").reshape(groups) for kind in "qkv"]
        return {
            "attention_norm": tensor("input_layernorm"),
            "query_key_value": np.concatenate(query_key_value, axis=2).reshape(config.width, -1),
            "attention_output": tensor("self_attn.o_proj"),
            "mlp_norm": tensor("post_attention_layernorm"),
            "gate_up": np.stack([tensor("mlp.gate_proj"), tensor("mlp.up_proj")], axis=1),
            "mlp_output": tensor("mlp.down_proj"),
        }

    params: dict[str, Any] = {
        "embedding": tensors["model.embed_tokens.weight"],
        "layers": {str(index): layer(index) for index in range(config.layers)},
        "final_norm": tensors["model.norm.weight"],
    }
    if "lm_head.weight" in tensors:
        params["output_head"] = tensors["lm_head.weight"].T
    return params


def tensors_from(params: dict, config: DecoderConfig) -> dict[str, np.ndarray]:
    """A checkpoint's tensors from our parameters; the inverse of `params_from`."""
    params = jax.tree.map(np.asarray, params)
    groups = (config.width, config.key_value_heads, -1, config.head_size)
    tensors = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["final_norm"]}
    if "output_head" in params:
        tensors["lm_head.weight"] = params["output_head"].T
    for index, layer in params["layers"].items():
        grouped = layer["query_key_value"].reshape(groups)
        group = grouped.shape[2] - 2
        query, key, value = np.split(grouped, [group, group + 1], axis=2)
        named = {
            "input_layernorm": layer["attention_norm"],
            "self_attn.q_proj": query.reshape(config.width, -1),
            "self_attn.k_proj": key.reshape(config.width, -1),
            "self_attn.v_proj": value.reshape(config.width, -1),
            "self_attn.o_proj": layer["attention_output"],
            "post_attention_layernorm": layer["mlp_norm"],
            "mlp.gate_proj": layer["gate_up"][:, 0],
            "mlp.up_proj": layer["gate_up"][:, 1],
            "mlp.down_proj": layer["mlp_output"],
        }
        tensors |= {f"model.layers.{index}.{name}.weight": tensor.T for name, tensor in named.items()}
    return tensors
