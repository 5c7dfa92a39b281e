"""Adapters in PEFT's format, against PEFT: read into the same tensors as it merges, and written so that it merges the same."""  # noqa: E501

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.lm import lora
from jaxrlhf.lm.hugging_face.adapters import ADAPTER_WEIGHTS, maps_of, save_adapter
from jaxrlhf.lm.hugging_face.families import as_reward
from jaxrlhf.lm.hugging_face.files import ADAPTER, WeightsError
from jaxrlhf.lm.hugging_face.tensors import tensors_from
from jaxrlhf.lm.hugging_face.weights import read_parameters
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", reason="pip install '.[test]'")

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Family, settings of its model, and PEFT's settings of an adapter that is read.
CASES = {
    "llama": ("Llama", {"attention_bias": True}, {"target_modules": LLAMA, "lora_alpha": 5}),
    "qwen3": ("Qwen3", {"head_dim": 10}, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 6, "query_pre_attn_scalar": 9, "sliding_window": 4},
        {"target_modules": ["o_proj", "down_proj"], "alpha_pattern": {"down_proj": 7}, "rank_pattern": {"o_proj": 2}},
    ),
    "phi3": ("Phi3", {}, {"target_modules": ["qkv_proj", "gate_up_proj"], "lora_alpha": 5}),
    "olmo2": ("Olmo2", {}, {"target_modules": ["k_proj", "down_proj"]}),
    "gpt2": ("GPT2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}
# In the slow tests, where logits and scores are compared too.
MORE = {
    "mistral": ("Mistral", {"sliding_window": 4}, {"target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.3}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "qwen2": ("Qwen2", {}, {"target_modules": "all-linear"}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 10, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
        {"target_modules": ["o_proj"], "use_rslora": True, "lora_alpha": 3},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}, {"target_modules": ["v_proj", "gate_proj"]}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 6, "query_pre_attn_scalar": 9, "sliding_window": 4, "attn_logit_softcapping": 2.0},
        {"target_modules": ["q_proj", "down_proj"]},
    ),
}
CASES_OF_LOGITS = [pytest.param(case, marks=pytest.mark.slow) for case in (*CASES, *MORE)]
CAUSAL = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}


def base_of(case, kind):
    """A random model of transformers; a language model under a reward's adapter too."""
    family, changes, _ = CASES[case]
    sizes = {"vocab_size": 31, "pad_token_id": 0}
    if family == "GPT2":
        sizes |= {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 64}
    else:
        sizes |= {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 64}
        sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(**sizes | changes)
    torch.manual_seed(0)
    return getattr(transformers, CAUSAL.get(family, f"{family}ForCausalLM"))(config)


def as_classifier(folder, case):
    return getattr(transformers, f"{CASES[case][0]}ForSequenceClassification").from_pretrained(folder, num_labels=1)


def named(tensors):
    """Of transformers' tensors those that we have: without buffers and tied heads."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def opened(folder, case, kind):
    if kind == "policy":
        return getattr(transformers, CAUSAL.get(CASES[case][0], f"{CASES[case][0]}ForCausalLM")).from_pretrained(folder)
    return as_classifier(folder, case)


def tensors_of(config, params, kind):
    if kind == "reward":
        params = params["trunk"] | {"head": params["head"]}
    return tensors_from(jax.tree.map(np.asarray, params), config, kind)


def merge(base, adapter):
    """`lora.merge`, in numpy."""
    if "down" in adapter:
        return base | {"weight": base["weight"] + np.einsum("lir,lr...->li...", adapter["down"], adapter["up"])}
    return base | {name: merge(base[name], leaf) for name, leaf in adapter.items()}


@pytest.fixture
def world(tmp_path):
    """`world(case, kind)`: folders of a base and of an adapter that PEFT has made, and PEFT's merged tensors."""

    def make(case, kind):
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        base_of(case, kind).save_pretrained(base)
        settings = {"r": 4, "task_type": "CAUSAL_LM" if kind == "policy" else "SEQ_CLS"} | CASES[case][2]
        model = peft.get_peft_model(opened(base, case, kind), peft.LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.normal_(0.0, 0.3)
        model.save_pretrained(adapter)
        return base, adapter, named(model.merge_and_unload().state_dict())

    return make


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_merged_as_peft_merges_it(world, case, kind):
    base, adapter, expected = world(case, kind)
    loaded = read_parameters(adapter, kind)
    found = tensors_of(loaded.config, loaded.params, kind)
    changed = 0
    plain = load_file(base / "model.safetensors")
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-5, atol=1e-6)
        changed += not np.array_equal(tensor, plain.get(name))
    assert changed >= 4
    assert any("is merged into" in note for note in loaded.notes)


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize("case", CASES)
def test_peft_merges_what_is_written_as_we_do(tmp_path, case, kind):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base_of(case, kind).save_pretrained(base)
    if kind == "reward":
        as_classifier(base, case).save_pretrained(tmp_path / "classifier")
        base = tmp_path / "classifier"
    config, params, _ = read_parameters(base, kind)
    trunk = params if kind == "policy" else params["trunk"]
    source = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: lora.init_adapter(jax.random.key(0), trunk, rank=3))
    adapter = jax.tree.map(lambda leaf: source.normal(size=leaf.shape).astype(np.float32), shapes)
    head = source.normal(size=config.width).astype(np.float32)
    save_adapter(folder, config, adapter, str(base), head=head if kind == "reward" else None)
    theirs = peft.PeftModel.from_pretrained(opened(base, case, kind), folder)
    expected = named(theirs.merge_and_unload().state_dict())
    merged = merge(jax.tree.map(np.asarray, trunk), adapter)
    ours = tensors_of(config, merged if kind == "policy" else {"trunk": merged, "head": head}, kind)
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-5, atol=1e-5)
    # And we read it back.
    again = read_parameters(folder, kind)
    for name, tensor in tensors_of(again.config, again.params, kind).items():
        np.testing.assert_allclose(tensor, ours[name], rtol=1e-5, atol=1e-5)


SOME = {"gpt2": ("attn.c_proj", "c_fc"), "phi3": ("qkv_proj",)}
"""Modules with adapters, where they are not `o_proj` and `down_proj`."""


@pytest.mark.parametrize("case", CASES)
def test_alpha_and_modules_are_pefts(tmp_path, case):
    base_of(case, "policy").save_pretrained(tmp_path / "base")
    config, params, _ = read_parameters(tmp_path / "base", "policy")
    modules = SOME.get(case, ("o_proj", "down_proj"))
    maps = maps_of(config, "policy", modules)
    shapes = jax.eval_shape(lambda: lora.init_adapter(jax.random.key(0), params, rank=2, maps=maps))
    source = np.random.default_rng(0)
    adapter = jax.tree.map(lambda leaf: source.normal(size=leaf.shape).astype(np.float32), shapes)
    save_adapter(tmp_path / "adapter", config, adapter, str(tmp_path / "base"), scaling=3.5)
    settings = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert settings.lora_alpha == 7 and settings.r == 2
    # The same modules, as PEFT finds them by the user's names.
    asked = peft.LoraConfig(r=2, target_modules=list(modules), fan_in_fan_out=case == "gpt2")
    changed = lambda model: {name.partition(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}  # noqa: E731
    theirs = peft.PeftModel.from_pretrained(opened(tmp_path / "base", case, "policy"), tmp_path / "adapter")
    assert changed(theirs) == changed(peft.get_peft_model(opened(tmp_path / "base", case, "policy"), asked))
    expected = named(theirs.merge_and_unload().state_dict())
    merged = merge(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, lora.scaled(adapter, 3.5)))
    for name, tensor in tensors_of(config, merged, "policy").items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-5, atol=1e-5)


def lively_theirs(model):
    """Draws every parameter, or the adapter's if there is one, so that logits are far from uniform; returns the model."""
    adapted = hasattr(model, "peft_config")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapted and "lora_" not in name and "modules_to_save" not in name:
                continue
            if "norm" in name or ".ln_" in name:
                parameter.uniform_(*((-0.5, 0.5) if "Gemma" in type(model).__name__ else (0.5, 1.5)))
            else:
                parameter.normal_(0.0, 0.1 if "lora_" in name else 0.3)
    return model.eval()


def compared(model, config, params, kind):
    """Logits of real tokens, or scores, of a model of torch and of ours."""
    tokens = np.random.default_rng(0).integers(1, 31, (3, 9))
    tokens[1, 6:] = 0
    mask = tokens > 0
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    language = decoder(config)
    if kind == "reward":
        return theirs[:, 0], np.asarray(jax.jit(reward_model(language).score)(params, tokens, mask))
    run = jax.jit(lambda params: language.logits(params, language.hidden(params, tokens, mask)))
    return theirs[mask], np.asarray(run(params))[mask]


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize("case", CASES_OF_LOGITS)
def test_logits_and_scores_under_an_adapter_are_pefts_both_ways(tmp_path, monkeypatch, case, kind):
    monkeypatch.setattr(f"{__name__}.CASES", CASES | MORE)
    base = tmp_path / "base"
    lively_theirs(base_of(case, kind)).save_pretrained(base)
    settings = {"r": 4, "task_type": "CAUSAL_LM" if kind == "policy" else "SEQ_CLS"} | CASES[case][2]
    theirs = lively_theirs(peft.get_peft_model(opened(base, case, kind), peft.LoraConfig(**settings)))
    theirs.save_pretrained(tmp_path / "adapter")
    loaded = read_parameters(tmp_path / "adapter", kind)
    expected, found = compared(theirs, loaded.config, loaded.params, kind)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())

    # The other way: ours on the same base, unmerged here and there.
    config, params, _ = read_parameters(base, "policy")
    source = np.random.default_rng(2)
    shapes = jax.eval_shape(lambda: lora.init_adapter(jax.random.key(0), params, rank=3))
    adapter = jax.tree.map(lambda leaf: source.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    head = source.normal(size=config.width).astype(np.float32) if kind == "reward" else None
    save_adapter(tmp_path / "ours", config, adapter, str(base), head=head, dropout=0.2)
    trunk = lora.attach(params, adapter)
    trunk = trunk if head is None else {name: leaf for name, leaf in trunk.items() if name != "output_head"}
    model = peft.PeftModel.from_pretrained(opened(base, case, kind), tmp_path / "ours").eval()
    expected, found = compared(model, config, trunk if head is None else {"trunk": trunk, "head": head}, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_modules_that_cannot_have_an_adapter_of_their_own_are_named(tmp_path):
    base_of("llama", "policy").save_pretrained(tmp_path / "base")
    config = read_parameters(tmp_path / "base", "policy").config
    with pytest.raises(
        WeightsError, match="q_proj, k_proj, v_proj are one map here, with one adapter: name all of them"
    ):
        maps_of(config, "policy", ("o_proj", "q_proj"))
    with pytest.raises(WeightsError, match="no module 'c_attn' for an adapter; it has down_proj, gate_proj, k_proj"):
        maps_of(config, "policy", ("o_proj", "c_attn"))
    with pytest.raises(WeightsError, match="no module 'embed_tokens'"):
        maps_of(config, "policy", ("embed_tokens",))


SETTINGS = {
    "use_dora": (True, "sets use_dora, which is not supported"),
    "bias": ("all", "sets bias to 'all'"),
    "peft_type": ("LOHA", "is of the type 'LOHA'"),
    "task_type": ("TOKEN_CLS", "is for the task 'TOKEN_CLS'"),
    "lora_alpha": ("16", "the lora_alpha '16', which is no number"),
    "alpha_pattern": ({"(": 4}, "has an alpha_pattern that cannot be read"),
    "init_lora_weights": ("pissa", "changes the base"),
    "base_model_name_or_path": ("somebody/model", "is an adapter of somebody/model, which is not a local directory"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_cannot_be_merged_is_refused_before_a_tensor_is_read(world, name):
    _, adapter, _ = world("llama", "policy")
    value, message = SETTINGS[name]
    settings = json.loads((adapter / ADAPTER).read_text()) | {name: value}
    (adapter / ADAPTER).write_text(json.dumps(settings))
    if name not in ("task_type", "base_model_name_or_path", "lora_alpha", "alpha_pattern"):
        (adapter / ADAPTER_WEIGHTS).write_bytes(b"cut")
    with pytest.raises(WeightsError, match=message):
        read_parameters(adapter, "policy")


def test_a_file_that_does_not_fit_is_named(world):
    _, adapter, _ = world("llama", "policy")
    with pytest.raises(WeightsError, match="is an adapter of a policy model: a reward is wanted"):
        read_parameters(adapter, "reward")
    path, good = adapter / ADAPTER_WEIGHTS, load_file(adapter / ADAPTER_WEIGHTS)
    first = next(name for name in good if "lora_A" in name)
    renamed = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in good.items()}
    wrong = {
        "which its base .* does not have": renamed,
        "has shape .* where its base": good | {first: np.zeros((4, 99), np.float32)},
        "of the shape": good | {first: np.zeros((0, 99), np.float32)},
        "and no lora_B to it": {name: good[name] for name in good if name != first.replace("lora_A", "lora_B")},
        "which cannot be merged here": good | {"something.else": np.zeros(3, np.float32)},
    }
    for message, tensors in wrong.items():
        save_file(tensors, path)
        with pytest.raises(WeightsError, match=message):
            read_parameters(adapter, "policy")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(WeightsError, match="damaged or cut short"):
        read_parameters(adapter, "policy")
    path.unlink()
    with pytest.raises(WeightsError, match=r"should hold adapter_model\.safetensors and has none"):
        read_parameters(adapter, "policy")


def test_a_base_that_is_named_on_a_hub_is_found_there(world):
    base, adapter, expected = world("llama", "policy")
    settings = json.loads((adapter / ADAPTER).read_text()) | {"base_model_name_or_path": "somebody/model"}
    (adapter / ADAPTER).write_text(json.dumps(settings))
    asked = []
    loaded = read_parameters(adapter, "policy", find_base=lambda path: asked.append(str(path)) or base)
    assert asked == ["somebody/model"]
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_allclose(tensors_of(loaded.config, loaded.params, "policy")[name], expected[name], rtol=1e-5)


def test_a_language_models_settings_become_a_reward_models():
    assert as_reward({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "x")["architectures"] == [
        "Qwen3ForSequenceClassification"
    ]
    with pytest.raises(WeightsError, match="only"):
        as_reward({"architectures": ["BertModel"]}, "x")
