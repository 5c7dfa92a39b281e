"""The model families that can be read and written, by the `architectures` that transformers names, and their defaults."""

from typing import Any, NamedTuple


class Family(NamedTuple):
    """A family's `model_type`, its architectures, and the defaults that transformers gives its settings."""

    model_type: str
    policy: str
    reward: str
    defaults: dict[str, Any]


_LLAMA = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False}
_GEMMA = _LLAMA | {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
FAMILIES = {
    "llama": Family(
        "llama", "LlamaForCausalLM", "LlamaForSequenceClassification", _LLAMA | {"max_position_embeddings": 2048}
    ),
    "mistral": Family(
        "mistral",
        "MistralForCausalLM",
        "MistralForSequenceClassification",
        _LLAMA | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "Qwen2ForSequenceClassification",
        _LLAMA | {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "Qwen3ForSequenceClassification",
        _LLAMA | {"max_position_embeddings": 32768, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "mixtral": Family(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralForSequenceClassification",
        _LLAMA
        | {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeForSequenceClassification",
        _LLAMA
        | {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
    ),
    "olmo2": Family(
        "olmo2",
        "Olmo2ForCausalLM",
        "Olmo2ForSequenceClassification",
        _LLAMA | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    ),
    "phi3": Family(
        "phi3",
        "Phi3ForCausalLM",
        "Phi3ForSequenceClassification",
        _LLAMA | {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "smollm3": Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        "SmolLM3ForSequenceClassification",
        _LLAMA
        | {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
    ),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2ForSequenceClassification",
        _GEMMA
        | {
            "max_position_embeddings": 8192,
            "num_key_value_heads": 4,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
    ),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "Gemma3TextForSequenceClassification",
        _GEMMA
        | {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 4,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10000.0,
        },
    ),
    "gpt2": Family(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        {
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        },
    ),
}
