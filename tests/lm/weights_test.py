"""Directories that transformers wrote, directories it must read, and directories that are wrong."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from jaxrlhf.lm.hugging_face.weights import (
    SpecialIds,
    WeightsError,
    load_decoder,
    load_reward_model,
    load_tokenizer,
    save_decoder,
    save_reward_model,
    special_ids,
)
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder

TOKENS = np.random.default_rng(0).integers(1, 23, (3, 7))


def policy_logits(config, params):
    model = decoder(config)
    run = jax.jit(lambda tokens: model.logits(params, model.hidden(params, tokens, tokens >= 0)))
    return np.asarray(run(jnp.asarray(TOKENS)))


def torch_logits(llama):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return llama(torch.tensor(TOKENS)).logits.numpy()


def edit(directory, name="config.json", remove=(), **changes):
    """Changes entries of a JSON file in place."""
    path = directory / name
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


@pytest.fixture
def saved(tiny, tiny_config, tmp_path):
    """A good directory, to be spoilt."""
    _, params = tiny
    words = {f"w{index}": index for index in range(23)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    save_decoder(tmp_path, tiny_config, params, special=SpecialIds(1, (2,), 0), tokenizer=tokenizer)
    return tmp_path


def test_shards_and_a_single_file_load_alike(make_llama, tmp_path):
    llama = make_llama()
    llama.save_pretrained(tmp_path / "whole")
    llama.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    config, whole = load_decoder(tmp_path / "whole")
    same_config, shards = load_decoder(tmp_path / "shards")
    assert config == same_config
    jax.tree.map(np.testing.assert_array_equal, whole, shards)
    np.testing.assert_allclose(policy_logits(config, shards), torch_logits(llama), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_what_we_save(tiny_config, lively, tmp_path, tied):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config = dataclasses.replace(tiny_config, tied_embeddings=tied, rope_base=700.0, norm_epsilon=1e-3)
    params = lively(decoder(config))
    save_decoder(tmp_path, config, params, special=SpecialIds(bos=1, eos=(2, 5), pad=0))
    llama, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert llama.dtype == torch.float32
    assert llama.generation_config.eos_token_id == [2, 5]
    expected = policy_logits(config, params)
    np.testing.assert_allclose(torch_logits(llama), expected, atol=1e-4)


def test_a_real_model_survives_the_round_trip(stories, tmp_path):
    config, params = load_decoder(stories)
    save_decoder(tmp_path, config, params, special=special_ids(stories), tokenizer=load_tokenizer(stories))
    original, copy = load_file(stories / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert copy.keys() <= original.keys()
    assert original.keys() - copy.keys() <= {"lm_head.weight"}
    for name, tensor in copy.items():
        np.testing.assert_array_equal(tensor, original[name])
    again, same = load_decoder(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, params, same)
    text = "Lily saw a big, red ball."
    assert load_tokenizer(tmp_path).encode(text).ids == load_tokenizer(stories).encode(text).ids
    assert special_ids(tmp_path) == special_ids(stories)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_survive_the_round_trip(tiny, tiny_config, tmp_path, dtype):
    _, params = tiny
    # Cast by numpy: XLA has no conversion to float16 on a CPU without F16C.
    narrow = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(dtype)), params)
    save_decoder(tmp_path, tiny_config, narrow)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    _, same = load_decoder(tmp_path, dtype=dtype)
    _, widened = load_decoder(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, narrow, same)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), narrow)
    jax.tree.map(np.testing.assert_array_equal, wide, widened)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(widened))


def test_reward_models_go_both_ways(make_llama, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    llama = make_llama("LlamaForSequenceClassification", num_labels=1)
    llama.save_pretrained(tmp_path / "theirs")
    config, params = load_reward_model(tmp_path / "theirs")
    tokens = np.where(np.arange(7)[None, :] < np.array([[7], [4], [1]]), TOKENS, 0)
    with torch.no_grad():
        expected = llama(torch.tensor(tokens), attention_mask=torch.tensor(tokens > 0)).logits[:, 0].numpy()
    score = jax.jit(reward_model(decoder(config)).score)
    np.testing.assert_allclose(score(params, tokens, tokens > 0), expected, atol=1e-4)
    assert np.std(expected) > 0.1

    save_reward_model(tmp_path / "ours", config, params, special=SpecialIds(pad=0))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        theirs = again(torch.tensor(tokens), attention_mask=torch.tensor(tokens > 0)).logits[:, 0].numpy()
    np.testing.assert_array_equal(theirs, expected)
    _, same = load_reward_model(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_a_policy_becomes_a_reward_model_on_disk(tiny, tiny_config, tmp_path):
    model, params = tiny
    reward = reward_model(model)
    save_reward_model(tmp_path, tiny_config, reward.from_trunk(params))
    config, loaded = load_reward_model(tmp_path)
    assert config == tiny_config
    jax.tree.map(np.testing.assert_array_equal, loaded["trunk"], params)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 700.0, "rope_parameters": None},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}},
        {"rope_theta": 700.0, "rope_parameters": None, "rope_scaling": {"type": "default"}},
    ],
)
def test_the_rotary_base_is_found_in_old_and_new_files(saved, changes):
    edit(saved, **changes)
    assert load_decoder(saved)[0].rope_base == 700.0


def test_omitted_settings_have_the_defaults_of_transformers(saved):
    edit(
        saved,
        remove=("head_dim", "rope_theta", "rope_parameters", "max_position_embeddings", "rms_norm_eps"),
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with pytest.raises(WeightsError, match=r"q_proj.weight .* has shape \(24, 16\) where .* asks for \(16, 16\)"):
        load_decoder(saved)
    edit(saved, head_dim=6)
    config, _ = load_decoder(saved)
    assert (config.rope_base, config.context_length, config.norm_epsilon) == (10000.0, 2048, 1e-6)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, None, SpecialIds(1, (2,), None)),
        ({"bos_token_id": 1, "eos_token_id": 2}, {"eos_token_id": [5, 6]}, SpecialIds(1, (5, 6), None)),
        ({"eos_token_id": [2, 3], "pad_token_id": -1}, {"eos_token_id": None}, SpecialIds(None, (2, 3), None)),
        ({"pad_token_id": 4}, {}, SpecialIds(None, (), 4)),
    ],
)
def test_special_ids_prefer_the_generation_config(tmp_path, config, generation, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert special_ids(tmp_path) == expected


def spoil_truncated(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_header(directory):
    (directory / "model.safetensors").write_bytes(b"not safetensors at all")


def spoil_pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def spoil_tensors(change):
    def spoil(directory):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return spoil


def spoil_index(weight_map):
    def spoil(directory):
        (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
        index = {"weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def settings(remove=(), **changes):
    return lambda directory: edit(directory, remove=remove, **changes)


FINAL_NORM = "model.norm.weight"
WRONG = {
    "no-config": (lambda directory: (directory / "config.json").unlink(), "has no config.json: give"),
    "bad-json": (lambda directory: (directory / "config.json").write_text("{"), "is not valid JSON"),
    "no-object": (lambda directory: (directory / "config.json").write_text("[]"), "holds no JSON object"),
    "architecture": (
        settings(architectures=["MambaForCausalLM"]),
        "describes MambaForCausalLM: only LlamaForCausalLM, MistralForCausalLM, .*GPT2LMHeadModel can be read here",
    ),
    "no-architecture": (settings(architectures=None), "describes no architecture"),
    "missing-size": (settings(remove=["hidden_size"]), "has no hidden_size: save"),
    "impossible-size": (settings(num_hidden_layers=0), "sets num_hidden_layers to 0: make it a positive whole number"),
    "size-as-text": (settings(vocab_size="23"), "sets vocab_size to '23': make it a positive whole number"),
    "no-heads": (settings(num_attention_heads=0, remove=["head_dim"]), "sets num_attention_heads to 0"),
    "rope-scaling": (
        settings(rope_scaling={"rope_type": "dynamic", "factor": 8.0}),
        "sets rope_scaling to .*dynamic.*, which is not supported: use a model with plain, linear, llama3 or yarn rotary",
    ),
    "rope-parameters": (settings(rope_parameters={"rope_type": "yarn"}), "sets rope_parameters to .*yarn"),
    "partial-rotary": (settings(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    "no-bias": (settings(attention_bias=True), "has no tensor model.layers.0.self_attn.q_proj.bias"),
    "activation": (settings(hidden_act="relu2"), "sets hidden_act to 'relu2', .* silu"),
    "rope-as-text": (settings(rope_scaling="linear"), "sets rope_scaling to 'linear': make it an object or null"),
    "norm-as-text": (settings(rms_norm_eps="1e-5"), "sets rms_norm_eps to '1e-5': make it a positive number"),
    "factor-as-text": (
        settings(rope_scaling={"rope_type": "linear", "factor": "2"}),
        "rope_scaling must be a number, got '2'",
    ),
    "norm-not-a-number": (settings(rms_norm_eps=float("nan")), "sets rms_norm_eps to nan: make it a positive number"),
    "flag-as-text": (
        settings(tie_word_embeddings="false"),
        "sets tie_word_embeddings to 'false': make it true or false",
    ),
    "flag-as-number": (settings(mlp_bias=0), "sets mlp_bias to 0: make it true or false"),
    "no-key-value-heads": (settings(num_key_value_heads=0), "sets num_key_value_heads to 0: make it a positive"),
    "rope-without-factor": (
        settings(rope_scaling={"rope_type": "linear"}),
        "sets rope_scaling to .*give it its factor",
    ),
    "partial-rotary-old": (settings(partial_rotary_factor=0.5), "sets partial_rotary_factor to 0.5, which is not"),
    "two-models": (settings(model_type="gpt2"), "says model_type 'gpt2' and architectures of 'llama'"),
    "no-names": (settings(architectures=[["LlamaForCausalLM"]]), "has no list of architectures but"),
    "adapter": (
        lambda directory: (directory / "adapter_config.json").write_text("{}"),
        r"holds an adapter \(adapter_config.json\), which transformers would add",
    ),
    "other-head": (
        spoil_tensors(lambda tensors: tensors.update({"lm_head.weight": np.ones((9, 16), np.float32)})),
        r"lm_head.weight in .* has shape \(9, 16\) where config.json ties it to embeddings of shape \(23, 16\)",
    ),
    "architectures": (settings(architectures=5), "has no list of architectures but 5"),
    "unknown-layers": (
        settings(
            architectures=["Qwen3ForCausalLM"],
            model_type="qwen3",
            use_sliding_window=True,
            layer_types=["linear_attention"] * 2,
        ),
        "sets layer_types to .*linear_attention.*, which is not supported",
    ),
    "quantised": (settings(quantization_config={"bits": 4}), "sets quantization_config .* unquantised"),
    "no-weights": (lambda directory: (directory / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickle": (spoil_pickle, r"pickled weights only \(pytorch_model.bin\), and reading a pickle can run any code"),
    "truncated": (spoil_truncated, "damaged or cut short"),
    "header": (spoil_header, "damaged or cut short"),
    "missing-tensor": (spoil_tensors(lambda tensors: tensors.pop(FINAL_NORM)), f"has no tensor {FINAL_NORM}"),
    "wrong-shape": (
        spoil_tensors(lambda tensors: tensors.update({FINAL_NORM: np.ones(9, np.float32)})),
        rf"{FINAL_NORM} in .* has shape \(9,\) where config.json asks for \(16,\)",
    ),
    "integers": (
        spoil_tensors(lambda tensors: tensors.update({FINAL_NORM: np.ones(16, np.int8)})),
        f"{FINAL_NORM} in .* is stored as I8: save the model unquantised",
    ),
    "outside": (spoil_index({FINAL_NORM: "../outside.safetensors"}), "lists '../outside.safetensors', which is not"),
    "windows": (spoil_index({FINAL_NORM: "..\\outside.safetensors"}), "which is not a .safetensors file of that"),
    "other-kind": (spoil_index({FINAL_NORM: "shard.bin"}), "lists 'shard.bin', which is not a .safetensors file"),
    "lost-shard": (spoil_index({FINAL_NORM: "model-1.safetensors"}), "lacks model-1.safetensors, which model"),
    "no-map": (spoil_index(None), "has no weight_map"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_directory_is_named_with_its_remedy(saved, spoil, message):
    load_decoder(saved)
    spoil(saved)
    with pytest.raises(WeightsError, match=message) as caught:
        load_decoder(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    for load in (load_decoder, load_reward_model, load_tokenizer, special_ids):
        with pytest.raises(WeightsError, match=re.escape(f"{tmp_path / 'none'} is not a directory")):
            load(tmp_path / "none")


def test_policies_and_reward_models_are_not_confused(saved, tiny, tiny_config, tmp_path):
    with pytest.raises(WeightsError, match="describes LlamaForCausalLM: a reward model is wanted here"):
        load_reward_model(saved)
    model, params = tiny
    save_reward_model(tmp_path / "reward", tiny_config, reward_model(model).from_trunk(params))
    with pytest.raises(WeightsError, match="describes LlamaForSequenceClassification: a language model is wanted here"):
        load_decoder(tmp_path / "reward")


def test_a_classifier_of_two_labels_is_no_reward_model(make_llama, tmp_path):
    make_llama("LlamaForSequenceClassification", num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"score.weight .* has shape \(2, 24\) where .* asks for \(1, 24\)"):
        load_reward_model(tmp_path)


def test_a_tokenizer_that_is_absent_damaged_or_too_large_is_named(saved):
    assert load_tokenizer(saved).encode("w7").ids == [7]
    edit(saved, vocab_size=22)
    with pytest.raises(WeightsError, match="token ids up to 22 but the model's vocabulary ends at 21"):
        load_tokenizer(saved)
    (saved / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(WeightsError, match="is not a tokenizer"):
        load_tokenizer(saved)
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match="is not valid JSON"):
        load_tokenizer(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"has no tokenizer\.json"):
        load_tokenizer(saved)


def test_a_loaded_tokenizer_neither_truncates_nor_pads(saved):
    tokenizer = load_tokenizer(saved)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.add_special_tokens(["<picture>"])
    tokenizer.save(str(saved / "tokenizer.json"))
    # A special token beyond the vocabulary is accepted.
    assert len(load_tokenizer(saved).encode("w7").ids) == 1


def test_special_ids_that_are_not_numbers_are_named(saved):
    edit(saved, "generation_config.json", eos_token_id="</s>")
    with pytest.raises(WeightsError, match=r"eos_token_id in .* is '</s>': make it a token id or a list of them"):
        special_ids(saved)


def test_parameters_of_another_configuration_are_not_saved(tiny, tiny_config, tmp_path):
    _, params = tiny
    other = dataclasses.replace(tiny_config, mlp_width=21)
    with pytest.raises(WeightsError, match=r"gate_up.* has shape \(2, 16, 2, 20\) where .* asks for \(2, 16, 2, 21\)"):
        save_decoder(tmp_path, other, params)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    with pytest.raises(WeightsError, match=r"\['embedding'\] has shape \(2, 23, 16\)"):
        save_decoder(tmp_path, tiny_config, stacked)
    with pytest.raises(WeightsError, match=r"\['head'\] has shape None"):
        save_reward_model(tmp_path, tiny_config, {"trunk": params})
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_the_old_model(saved, tiny, tiny_config, monkeypatch):
    _, params = tiny

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("jaxrlhf.lm.hugging_face.files.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_decoder(saved, tiny_config, jax.tree.map(lambda leaf: 2 * leaf, params))
    jax.tree.map(np.testing.assert_array_equal, load_decoder(saved)[1], params)


def add_tensors(directory, **tensors):
    stored = load_file(directory / "model.safetensors")
    added = {name.replace("__", "."): np.full(shape, 0.5, np.float32) for name, shape in tensors.items()}
    save_file(stored | added, directory / "model.safetensors", metadata={"format": "pt"})


UNREAD = {
    "other layers": (
        {"model__layers__2__input_layernorm__weight": (16,)},
        "1 tensor is not read, as config.json asks for none of them: model.layers.2.input_layernorm.weight.",
    ),
    "norms of another family": (
        {f"model__layers__{index}__self_attn__q_norm__weight": (6,) for index in range(2)},
        "2 tensors are not read, .*: model.layers.0.self_attn.q_norm.weight, model.layers.1.self_attn.q_norm.weight.",
    ),
    "many": ({f"extra__{index}": (1,) for index in range(9)}, "9 tensors are not read.*extra.4 and 4 more."),
    "value head": ({"v_head__summary__weight": (1, 16), "v_head__summary__bias": (1,)}, "v_head.summary.bias, v_head"),
    "rotary frequencies": (
        {f"model__layers__{index}__self_attn__rotary_emb__inv_freq": (3,) for index in range(2)},
        "2 tensors are computed anew and not read, such as model.layers.0.self_attn.rotary_emb.inv_freq.",
    ),
}


@pytest.mark.parametrize(("tensors", "note"), UNREAD.values(), ids=UNREAD.keys())
def test_tensors_that_are_not_read_are_named(saved, recwarn, tensors, note):
    before = load_decoder(saved)
    assert not recwarn.list
    add_tensors(saved, **tensors)
    with pytest.warns(UserWarning, match=note):
        after = load_decoder(saved)
    assert before[0] == after[0]
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])


def test_a_reward_model_names_the_head_that_it_does_not_read(saved, tiny, tiny_config):
    model, params = tiny
    save_reward_model(saved, tiny_config, reward_model(model).from_trunk(params))
    add_tensors(saved, lm_head__weight=(23, 16))
    with pytest.warns(UserWarning, match=r"1 tensor is not read.*lm_head\.weight"):
        load_reward_model(saved)


@pytest.mark.parametrize("case", ["other", "equal", "narrow", "alone"])
def test_a_head_beside_tied_embeddings_is_read_as_in_transformers(saved, tmp_path, case):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    stored = load_file(saved / "model.safetensors")
    embedding = stored["model.embed_tokens.weight"]
    if case == "alone":
        stored.pop("model.embed_tokens.weight")
    noise = np.random.default_rng(0).normal(size=embedding.shape).astype(np.float32)
    head = {"other": embedding + noise, "narrow": embedding.astype(np.float16)}.get(case, embedding)
    save_file(stored | {"lm_head.weight": head}, saved / "model.safetensors", metadata={"format": "pt"})
    llama = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    if case in ("other", "narrow"):
        with pytest.warns(UserWarning, match="holds a head of its own"):
            config, params = load_decoder(saved)
    else:
        config, params = load_decoder(saved)
    # A rounded copy is another head, for transformers too.
    assert config.tied_embeddings == (case not in ("other", "narrow"))
    np.testing.assert_allclose(policy_logits(config, params), torch_logits(llama), atol=1e-4)
    save_decoder(tmp_path / "again", config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    np.testing.assert_allclose(torch_logits(again), torch_logits(llama), atol=1e-5)


def test_further_generation_settings_are_written(saved, tiny, tiny_config):
    _, params = tiny
    save_decoder(
        saved, tiny_config, params, special=SpecialIds(1, (2,), None), generation={"top_k": 7, "eos_token_id": 9}
    )
    assert json.loads((saved / "generation_config.json").read_text()) == {
        "top_k": 7,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
