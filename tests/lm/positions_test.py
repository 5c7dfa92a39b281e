"""Rotary positions in `config.json`; layers without positions, with partly rotated heads, with norms after a map only."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.lm.generate import generate
from jaxrlhf.lm.hugging_face.families import config_from
from jaxrlhf.lm.hugging_face.files import WeightsError
from jaxrlhf.lm.hugging_face.settings import settings_from
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.transformer.config import DecoderConfig, LongScaling, YarnScaling
from jaxrlhf.lm.transformer.model import decoder

# Every feature at once; the third layer has a window and no positions.
MIXED = DecoderConfig(
    vocabulary_size=23,
    width=16,
    layers=3,
    query_heads=4,
    key_value_heads=2,
    head_size=6,
    mlp_width=20,
    context_length=64,
    norm_before=False,
    norm_after=True,
    query_key_norm=True,
    norm_heads_together=True,
    rope_base=100.0,
    rotary_size=4,
    rope_scaling=YarnScaling(4.0, 1.0, 32.0, 16, 1.2),
    unrotated_layers=(0, 2),
    window=3,
    windowed_layers=(1, 2),
)


@pytest.mark.parametrize(("unrolled", "decoding"), [(8, {}), (1, {}), (1, {"cpu": (8, 2**30, 8)})])
def test_the_sampler_agrees_with_whole_rows(lively, limit, unrolled, decoding):
    limit("MAX_UNROLLED_LAYERS", unrolled)
    limit("UNROLLED_DECODING", decoding)
    model = decoder(MIXED)
    params = lively(model, scale=0.5)
    prompts = jax.random.randint(jax.random.key(1), (3, 5), 1, 23)
    mask = jnp.arange(5)[None, :] >= jnp.array([0, 2, 4])[:, None]
    sample = functools.partial(generate, model, max_new_tokens=9, stop_ids=(0,), temperature=0.8)
    completions = jax.jit(sample)(params, jax.random.key(2), prompts, mask)
    log_prob = jax.jit(lambda: completion_log_probs(model, params, prompts, mask, *completions[:2], temperature=0.8))()
    assert float(jnp.mean(completions.mask)) > 0.3
    np.testing.assert_allclose(completions.log_prob, log_prob, atol=2e-5)


def test_decoding_unrolls_layers_within_the_limits_of_its_backend(limit):
    config = DecoderConfig(23, 16, 10, 4, 2, 6, 20, context_length=64)
    params = jax.eval_shape(decoder(config).init, jax.random.key(0))

    def unrolled(rows):
        tokens = jax.ShapeDtypeStruct((rows, 3), jnp.int32)
        prefill = functools.partial(decoder(config).prefill, cache_length=8)
        _, cache = jax.eval_shape(lambda params, tokens: prefill(params, tokens, tokens > 0), params, tokens)
        assert isinstance(cache.keys, tuple) == (cache.layers is not None)
        return cache.layers is not None

    # Ten layers are a scan in all else. By default a single row is unrolled on a CPU.
    assert unrolled(1) and not unrolled(2)
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(params["layers"]))
    for limits, expected in (((10, weights, 1), True), ((9, weights, 1), False), ((10, weights - 1, 1), False)):
        limit("UNROLLED_DECODING", {"cpu": limits})
        assert unrolled(1) == expected
    limit("UNROLLED_DECODING", {"gpu": (64, 2**34, 2**20)})
    assert not unrolled(1)


def test_layers_without_positions_depend_on_the_order_through_the_mask_alone(lively):
    without = dataclasses.replace(MIXED, unrotated_layers=(0, 1, 2), windowed_layers=(), window=None)
    tokens, swapped = jnp.array([[3, 4, 5, 6]]), jnp.array([[4, 3, 5, 6]])
    # In one layer the last state is that of a set; deeper ones see the order through the causal mask.
    for config, same in ((dataclasses.replace(without, layers=1, unrotated_layers=(0,)), True), (MIXED, False)):
        model = decoder(config)
        params, real = lively(model, scale=0.5), jnp.ones((1, 4), bool)
        last = [jax.jit(model.hidden)(params, row, real)[0, -1] for row in (tokens, swapped)]
        assert np.allclose(*last, atol=1e-5) == same


def settings(family, **changes):
    shared = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4}
    names = {"smollm3": "SmolLM3", "phi3": "Phi3", "olmo2": "Olmo2", "llama": "Llama"}
    shared |= {"architectures": [f"{names[family]}ForCausalLM"], "num_attention_heads": 3, "num_key_value_heads": 3}
    return shared | changes


FACTORS = {"short_factor": [1.0, 1.5, 2.0, 3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
READ = {
    "every-fourth-layer": (settings("smollm3"), {"unrotated_layers": (3,), "rope_base": 2e6, "tied_embeddings": True}),
    "listed-layers": (settings("smollm3", no_rope_layers=[0, 1, 1, 0, 1]), {"unrotated_layers": (0, 3)}),
    "su-in-old-files": (
        settings(
            "phi3",
            rope_scaling={"type": "su", **FACTORS},
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
        ),
        {
            "context_length": 4096,
            # sqrt(1 + ln 32 / ln 4096)
            "rope_scaling": LongScaling((1.0, 1.5, 2.0, 3.0), (2.0, 3.0, 4.0, 5.0), 1.1902380714238083, 131072),
        },
    ),
    "yarn-by-defaults": (
        settings("llama", rope_scaling={"type": "yarn", "factor": 4.0}, max_position_embeddings=128),
        {"rope_scaling": YarnScaling(4.0, 1.0, 32.0, 128, 1.1386294361119891), "context_length": 128},
    ),
    "yarn-with-two-weights": (
        settings("llama", rope_scaling={"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7}),
        {"rope_scaling": YarnScaling(4.0, 1.0, 32.0, 2048, 1.0)},
    ),
    "the-file's-own-context": (
        settings(
            "llama",
            original_max_position_embeddings=64,
            rope_scaling={
                "type": "yarn",
                "factor": 2.0,
                "attention_factor": 1.5,
                "original_max_position_embeddings": 32,
            },
        ),
        {"rope_scaling": YarnScaling(2.0, 1.0, 32.0, 64, 1.5)},
    ),
    "a-whole-head-after-all": (
        settings("phi3", partial_rotary_factor=0.5, rope_parameters={"rope_theta": 9.0, "partial_rotary_factor": 1.0}),
        {"rotary_size": None, "rope_base": 9.0},
    ),
    "norms": (settings("olmo2"), {"norm_before": False, "norm_heads_together": True, "norm_epsilon": 1e-5}),
}


@pytest.mark.parametrize("case", READ)
def test_positions_are_read_and_written(case):
    content, expected = READ[case]
    config = config_from(content, "policy", "config.json")
    assert {name: getattr(config, name) for name in expected} == expected
    assert config_from(settings_from(config, "policy", "float32"), "policy", "config.json") == config


REFUSED = {
    "other-family": (
        settings("llama", rope_scaling={"rope_type": "longrope", **FACTORS}),
        "sets rope_scaling to .*longrope.*, which is not supported: .*, or Phi-3 with longrope",
    ),
    "too-few-factors": (
        settings("phi3", rope_scaling={"type": "longrope", **FACTORS, "short_factor": [1.0]}),
        "needs 4 short and long factors, one a frequency, got 1 and 4",
    ),
    "no-factors": (settings("phi3", rope_scaling={"type": "longrope"}), "give it its short_factor"),
    "text-factors": (
        settings("phi3", rope_scaling={"type": "longrope", **FACTORS, "long_factor": "1234"}),
        "sets rope_scaling to .*: make its long_factor a list of numbers",
    ),
    "a-number-as-text": (
        settings("phi3", rope_scaling={"type": "longrope", **FACTORS, "factor": "4"}),
        "sets rope_scaling to .*: make its factor a number",
    ),
    "negative-factors": (
        settings("phi3", rope_scaling={"type": "longrope", **FACTORS, "long_factor": [1.0, -1.0, 1.0, 1.0]}),
        "needs positive numbers, got -1.0",
    ),
    "odd-part": (settings("phi3", partial_rotary_factor=0.4), "rotary_size must be even and at most 8, got 3"),
    "nothing-rotated": (settings("phi3", partial_rotary_factor=0.01), "rotary_size must be positive, got 0"),
    "part": (settings("olmo2", partial_rotary_factor=0.5), "sets partial_rotary_factor to 0.5, which is not supported"),
    "biases": (settings("phi3", attention_bias=True), "sets attention_bias to True, which is not supported"),
    "windows": (
        settings("smollm3", use_sliding_window=True, sliding_window=4),
        "sets use_sliding_window to True, which is not supported: use a model without windows",
    ),
    "too-few-layers": (settings("smollm3", no_rope_layers=[1]), "sets no_rope_layers to .*give every layer 1"),
    "nested-layers": (settings("smollm3", no_rope_layers=[[1]] * 4), "sets no_rope_layers to .*give every layer 1"),
    "yarn-without-factor": (settings("llama", rope_scaling={"type": "yarn"}), "give it its factor"),
    "yarn-of-nothing": (
        settings("llama", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": "x"}),
        "sets rope_scaling to .*: make its original_max_position_embeddings a number",
    ),
    "yarn-flag": (
        settings("llama", rope_scaling={"type": "yarn", "factor": 4.0, "truncate": 1}),
        "sets rope_scaling to .*: make its truncate true or false",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_held_is_refused_by_name(case):
    content, message = REFUSED[case]
    with pytest.raises(WeightsError, match=message):
        config_from(content, "policy", "config.json")
