"""Every family against transformers: the same logits and scores from the same files, in both directions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.lm.generate import generate
from jaxrlhf.lm.hugging_face.weights import (
    SpecialIds,
    WeightsError,
    load_decoder,
    load_reward_model,
    save_decoder,
    save_reward_model,
)
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.config import DecoderConfig, Experts, RopeScaling
from jaxrlhf.lm.transformer.model import decoder, without_cache

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
# Three frequencies of six, as a quarter of a head is not rotated.
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.25, 1.5],
    "long_factor": [2.0, 3.0, 9.0],
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.75,
}
# Family, settings that differ from the shared ones; windows are shorter than the rows.
CASES = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"sliding_window": 4, "num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 10, "attention_bias": True, "num_experts": 5, "num_experts_per_tok": 3}
        | {"moe_intermediate_size": 12},
    ),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "phi3": ("Phi3", {"sliding_window": 4}),
    "phi3-long": (
        "Phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 16}
        | {"num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 6, "query_pre_attn_scalar": 9, "sliding_window": 4, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": ("Gemma3Text", {"head_dim": 6, "query_pre_attn_scalar": 9, "sliding_window": 4, "num_hidden_layers": 3}),
    "gpt2": ("GPT2", {}),
}
CAUSAL = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
LENGTHS = np.array([14, 11, 7, 1])


@pytest.fixture(scope="session")
def make_theirs():
    """`make_theirs(case, reward)`: a random transformers model with every parameter lively."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")

    def make(case, reward=False):
        family, changes = CASES[case]
        sizes = {"vocab_size": 31, "max_position_embeddings": 64, "pad_token_id": 0, "attn_implementation": "eager"}
        if family == "GPT2":
            sizes |= {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 64}
            sizes.pop("max_position_embeddings")
        else:
            sizes |= {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
            sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2}
        if family == "Gemma3Text":
            changes = changes | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        config = getattr(transformers, f"{family}Config")(**(sizes | changes), **({"num_labels": 1} if reward else {}))
        kind = f"{family}ForSequenceClassification" if reward else CAUSAL.get(family, f"{family}ForCausalLM")
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or ".ln_" in name:
                    # Gemma's scales are one plus their parameters.
                    parameter.uniform_(*((-0.5, 0.5) if "Gemma" in family else (0.5, 1.5)))
                else:
                    parameter.normal_(0.0, 2.0 if "score" in name else 0.3)
        return model

    return make


def rows(seed=0):
    tokens = np.random.default_rng(seed).integers(1, 31, (4, 14))
    return np.where(np.arange(14)[None, :] < LENGTHS[:, None], tokens, 0)


def torch_run(model, tokens):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        mask = torch.tensor(tokens > 0)
        return model(torch.tensor(tokens), attention_mask=mask).logits.numpy()


def our_logits(config, params, tokens):
    model = decoder(config)
    run = jax.jit(lambda tokens: model.logits(params, model.hidden(params, tokens, tokens > 0)))
    return np.asarray(run(jnp.asarray(tokens)))


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_both_ways(make_theirs, tmp_path, case):
    transformers = pytest.importorskip("transformers")
    theirs = make_theirs(case)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = load_decoder(tmp_path / "theirs")
    tokens = rows()
    expected, got = torch_run(theirs, tokens), our_logits(config, params, tokens)
    assert np.std(expected[tokens > 0]) > 0.5, "the comparison would be vacuous"
    np.testing.assert_allclose(got[tokens > 0], expected[tokens > 0], atol=1e-4)

    save_decoder(tmp_path / "ours", config, params, special=SpecialIds(1, (2,), 0))
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(again) is type(theirs)
    np.testing.assert_array_equal(torch_run(again, tokens)[tokens > 0], expected[tokens > 0])
    same_config, same = load_decoder(tmp_path / "ours")
    assert same_config == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize("case", CASES)
def test_scores_agree_both_ways(make_theirs, tmp_path, case):
    transformers = pytest.importorskip("transformers")
    theirs = make_theirs(case, reward=True)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = load_reward_model(tmp_path / "theirs")
    tokens = rows(1)
    expected = torch_run(theirs, tokens)[:, 0]
    score = jax.jit(reward_model(decoder(config)).score)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(score(params, tokens, tokens > 0), expected, atol=1e-4)

    save_reward_model(tmp_path / "ours", config, params, special=SpecialIds(pad=0))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    np.testing.assert_array_equal(torch_run(again, tokens)[:, 0], expected)
    _, same = load_reward_model(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, same, params)


def family_config(case):
    """Returns a small decoder with the features that are particular to the family."""
    shared = {"vocabulary_size": 23, "width": 16, "layers": 3, "query_heads": 4, "head_size": 6, "mlp_width": 20}
    return DecoderConfig(
        **shared,
        context_length=64,
        **{
            "gpt2": {
                "key_value_heads": 4,
                "family": "gpt2",
                "rope_base": None,
                "norm": "layer",
                "gated": False,
                "activation": "gelu_tanh",
                "query_key_value_bias": True,
                "output_bias": True,
                "mlp_bias": True,
            },
            "gemma3": {
                "key_value_heads": 2,
                "family": "gemma3",
                "norm": "rms_from_one",
                "norm_after": True,
                "query_key_norm": True,
                "activation": "gelu_tanh",
                "embedding_scale": 4.0,
                "window": 3,
                "windowed_layers": (0, 2),
                "window_rope_base": 50.0,
                "logit_cap": 5.0,
                "rope_scaling": RopeScaling(2.0),
            },
            "mixtral": {"key_value_heads": 2, "family": "mixtral", "experts": Experts(4, 2)},
        }[case],
    )


@pytest.mark.parametrize("case", ["gpt2", "gemma3", "mixtral"])
def test_the_sampler_agrees_with_whole_rows(lively, case):
    model = decoder(family_config(case))
    params = lively(model)
    prompts = jax.random.randint(jax.random.key(1), (3, 5), 1, 23)
    mask = jnp.arange(5)[None, :] >= jnp.array([0, 2, 4])[:, None]
    completions = jax.jit(
        lambda key: generate(model, params, key, prompts, mask, max_new_tokens=9, stop_ids=(0,), temperature=0.8)
    )(jax.random.key(2))
    log_prob = jax.jit(lambda: completion_log_probs(model, params, prompts, mask, *completions[:2], temperature=0.8))()
    assert float(jnp.mean(completions.mask)) > 0.3
    np.testing.assert_allclose(completions.log_prob, log_prob, atol=2e-5)


@pytest.mark.parametrize("case", ["gpt2", "gemma3"])
def test_packed_texts_do_not_attend_to_each_other(lively, case):
    model = decoder(family_config(case))
    params = lively(model)
    tokens = jax.random.randint(jax.random.key(3), (1, 12), 1, 23)
    hidden = jax.jit(model.hidden)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] + [5] * 2])
    whole = hidden(params, tokens, segments)
    for first, last in ((0, 5), (5, 9), (10, 12)):
        alone = hidden(params, tokens[:, first:last], jnp.ones((1, last - first), bool))
        np.testing.assert_allclose(whole[:, first:last], alone, atol=1e-5)


def test_a_model_without_a_cache_samples_the_same(tiny):
    model, params = tiny
    simple = without_cache(model.init, model.hidden, model.logits, vocabulary_size=23, context_length=64)
    prompts, mask = jnp.array([[0, 3, 4], [5, 6, 7]]), jnp.array([[False, True, True], [True, True, True]])
    settings = {"max_new_tokens": 6, "stop_ids": (2,)}
    cached, recomputed = (
        jax.jit(functools.partial(generate, each, **settings))(params, jax.random.key(0), prompts, mask)
        for each in (model, simple)
    )
    np.testing.assert_array_equal(cached.tokens, recomputed.tokens)
    np.testing.assert_allclose(cached.log_prob, recomputed.log_prob, atol=1e-5)


def test_a_family_that_cannot_describe_a_decoder_is_named(tiny, tiny_config, tmp_path):
    _, params = tiny
    capped = dataclasses.replace(tiny_config, logit_cap=5.0)
    with pytest.raises(WeightsError, match="A llama checkpoint cannot say logit_cap of this decoder"):
        save_decoder(tmp_path, capped, params)
    with pytest.raises(WeightsError, match="The family 'lama' is none of llama, mistral"):
        save_decoder(tmp_path, dataclasses.replace(tiny_config, family="lama"), params)
    assert not list(tmp_path.iterdir())


def test_names_without_the_prefix_of_the_outer_module_are_found(make_theirs, tmp_path):
    theirs = make_theirs("gpt2")
    theirs.transformer.save_pretrained(tmp_path)
    config, params = load_decoder(edited(tmp_path, architectures=["GPT2LMHeadModel"]))
    tokens = rows()
    real = tokens > 0
    np.testing.assert_allclose(our_logits(config, params, tokens)[real], torch_run(theirs, tokens)[real], atol=1e-4)


def edited(directory, **changes):
    import json

    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory
