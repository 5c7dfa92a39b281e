"""Texts, token ids, ends and generation against transformers, over families, layouts of special tokens and templates."""

import itertools
import json

import jax
import numpy as np
import pytest

from jaxrlhf.commands import models
from jaxrlhf.data.chat import render
from jaxrlhf.data.encode import encode, encode_pair, encode_prompt
from jaxrlhf.data.records import Message, Preference
from jaxrlhf.lm.generate import generate
from jaxrlhf.lm.hugging_face.tokenizer_files import load_tokenizer
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder

UNK, BOS, EOS, END, USER = range(256, 261)
LAYOUTS = ("config", "map", "lists", "tokenizer", "unlisted", "decoder")
TEMPLATES = ("eos", "eos-line", "own-line", "own-then-eos", "bos", "blocks")
TYPES = {
    "llama": ("Llama", "LlamaForCausalLM"),
    "mistral": ("Mistral", "MistralForCausalLM"),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM"),
    "gemma3_text": ("Gemma3Text", "Gemma3ForCausalLM"),
    "gpt2": ("GPT2", "GPT2LMHeadModel"),
}
HELLO, HI = Message("user", "Hello!"), Message("assistant", "Hi.")
TALKS = {
    "single": (HELLO, HI),
    "several": (HELLO, HI, Message("user", "And now?\n"), Message("assistant", "Nothing,\nreally ")),
    "system": (Message("system", "Be short."), HELLO, HI),
}


def dicts(talk):
    return [{"role": message.role, "content": message.content} for message in talk]


def test_the_lists_are_those_of_the_fixture(layouts):
    assert layouts == (LAYOUTS, TEMPLATES)


@pytest.mark.parametrize("family", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_ids_and_masks_are_those_of_transformers(lay_out, tmp_path, family, layout):
    transformers = pytest.importorskip("transformers")
    for template in TEMPLATES:
        directory = lay_out(tmp_path / template, layout, template, model_type=family)
        theirs, bundle = transformers.AutoTokenizer.from_pretrained(directory), models.open_bundle(directory)
        ours = bundle.chat_tokenizer()
        assert (theirs.bos_token_id, theirs.eos_token_id) == (BOS, EOS)
        for talk in TALKS.values():
            text = theirs.apply_chat_template(dicts(talk), tokenize=False)
            assert render(bundle.template, talk).text == text
            expected = theirs.apply_chat_template(
                dicts(talk), return_dict=True, return_assistant_tokens_mask=template == "blocks"
            )
            found = encode(ours, (), talk)
            assert found.tokens.tolist() == expected["input_ids"]
            if template == "blocks":
                assert found.completion_mask.astype(int).tolist() == expected["assistant_masks"]
            prompt = theirs.apply_chat_template(dicts(talk[:-1]), add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            assert encode_prompt(ours, talk[:-1]).tolist() == prompt
        for plain in ("a b", "</s> <s>", "<end> a</s", " <unk>"):
            assert (
                bundle.tokenizer.encode(plain, add_special_tokens=False).ids
                == theirs(plain, add_special_tokens=False)["input_ids"]
            )


@pytest.mark.parametrize(("layout", "template"), list(itertools.product(LAYOUTS, TEMPLATES)))
def test_a_completion_ends_at_the_end_of_its_turn(lay_out, tmp_path, layout, template):
    """The ends that transformers knows stop the sampler, the template's too, and a text ends at the first of them."""
    directory = lay_out(tmp_path, layout, template, model_type="llama")
    bundle = models.open_bundle(directory)
    configured = {"lists": {END, EOS}, "tokenizer": set()}.get(layout, {EOS})
    turn = EOS if template.startswith("eos") else END
    assert set(bundle.special.eos) == configured | {EOS, turn}
    assert bundle.special.eos[0] == EOS and bundle.stop_ids == tuple(sorted({BOS, EOS, *bundle.special.eos}))
    pair = encode_pair(bundle.chat_tokenizer(), Preference((HELLO,), (HI,), (Message("assistant", "No"),)))
    for text in (pair.chosen, pair.rejected):
        assert text.tokens[-1] == turn and text.completion_mask[-1]
        assert not np.isin(text.tokens[text.completion_mask][:-1], bundle.stop_ids).any()
    whole = encode(bundle.chat_tokenizer(), (HELLO,), (HI,))
    np.testing.assert_array_equal(whole.tokens[: len(pair.chosen.tokens)], pair.chosen.tokens)
    rows = bundle.plan_rows()
    for stop in bundle.stop_ids:
        assert f"({stop}; " in rows["completions end"]
    assert ("which no file names" in rows.get("special tokens", "")) == (turn not in configured | {EOS})


def random_weights(directory, family, *, tied):
    """Saves a small random model of transformers into a directory, whose config.json keeps its ids; returns the model."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    name, kind = TYPES[family]
    settings = json.loads((directory / "config.json").read_text())
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 128, "head_dim": 8}
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 24, "n_positions": 128}
    settings = {key: value for key, value in settings.items() if key != "model_type"}
    config = getattr(transformers, f"{name}Config")(
        **sizes, **settings, tie_word_embeddings=tied, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    generation = directory / "generation_config.json"
    kept = generation.read_text() if generation.exists() else None
    model.save_pretrained(directory)
    generation.unlink(missing_ok=True)
    if kept is not None:
        generation.write_text(kept)
    return model


CELLS = [
    (family, tied, LAYOUTS[(2 * index + tied) % 6], TEMPLATES[(index + 3 * tied) % 6])
    for index, family in enumerate(TYPES)
    for tied in (True, False)
]


@pytest.mark.parametrize(("family", "tied", "layout", "template"), CELLS)
def test_sampling_stops_where_generate_stops(lay_out, tmp_path, family, tied, layout, template):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    directory = lay_out(tmp_path / "model", layout, template, model_type=family)
    theirs = random_weights(directory, family, tied=tied)
    bundle = models.open_bundle(directory)
    prompts = [encode_prompt(bundle.chat_tokenizer(), talk[:-1]) for talk in TALKS.values()]
    prompt = np.stack([row[-8:] for row in prompts])
    with torch.no_grad():
        free = theirs.generate(torch.tensor(prompt), max_new_tokens=10, do_sample=False, eos_token_id=None)[
            :, 8:
        ].numpy()
    # An end that each of these texts meets, or none: what the model writes of itself.
    for name in ("config.json", "generation_config.json"):
        if (directory / name).exists():
            content = json.loads((directory / name).read_text())
            (directory / name).write_text(json.dumps(content | {"eos_token_id": [int(row[5]) for row in free]}))
    model = models.open_model(directory, "policy")

    def greedy(folder):
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": UNK, "temperature": None, "top_p": None}
        with torch.no_grad():
            tokens = again.generate(torch.tensor(prompt), **settings)[:, 8:].numpy()
        return np.pad(tokens, ((0, 0), (0, 10 - tokens.shape[1])), constant_values=UNK)

    expected = greedy(directory)
    run = jax.jit(
        lambda params: generate(
            decoder(model.config),
            params,
            jax.random.key(0),
            prompt,
            prompt >= 0,
            max_new_tokens=10,
            stop_ids=model.bundle.stop_ids,
            temperature=0.0,
            pad_id=UNK,
        )
    )
    found = np.asarray(run(model.params).tokens)
    # Where the text meets an end that transformers does not know, such as BOS, it ends here and goes on there.
    for ours, row in zip(found, expected, strict=True):
        met = np.flatnonzero(np.isin(row, model.bundle.stop_ids))
        length = len(row) if not len(met) else int(met[0]) + 1
        np.testing.assert_array_equal(ours[:length], row[:length])
    assert any(set(model.bundle.special.eos) & set(row.tolist()) for row in expected)
    # An export names all ends, and both then stop at the same token: all but BOS.
    exported = greedy(models.save_model(tmp_path / "exported", model, "policy"))
    for ours, row in zip(found, exported, strict=True):
        until = int(np.append(row == BOS, True).argmax())
        np.testing.assert_array_equal(ours[:until], row[:until])


@pytest.mark.parametrize(("family", "tied", "layout", "template"), CELLS[::2])
def test_a_reward_is_the_same_in_transformers(lay_out, tmp_path, family, tied, layout, template):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    directory = lay_out(tmp_path / "model", layout, template, model_type=family)
    random_weights(directory, family, tied=tied)
    model = models.reward_on(models.open_model(directory, "policy"))
    head = np.random.default_rng(0).normal(0, 4, model.config.width).astype(np.float32)
    model = model._replace(params=model.params | {"head": head})
    saved = models.save_model(tmp_path / "reward", model, "reward")
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    assert tokenizer.pad_token_id not in {*model.bundle.stop_ids, None}
    source = transformers.AutoTokenizer.from_pretrained(directory)
    texts = ["!!! What a day", "<s>Hi</s>\n", "<end><end>"]
    assert [source(text)["input_ids"] for text in texts] == [tokenizer(text)["input_ids"] for text in texts]
    judged = [
        encode_pair(model.bundle.chat_tokenizer(), Preference(talk[:-1], (talk[-1],), (Message("assistant", "!"),)))
        for talk in TALKS.values()
    ]
    rows = [text.tokens.tolist() for pair in judged for text in (pair.chosen, pair.rejected)]
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(saved, attn_implementation="eager")
    with torch.no_grad():
        theirs = classifier(**{name: padded[name] for name in ("input_ids", "attention_mask")}).logits[:, 0].numpy()
    again = models.open_model(saved, "reward")
    tokens, mask = padded["input_ids"].numpy(), padded["attention_mask"].numpy().astype(bool)
    ours = jax.jit(reward_model(decoder(again.config)).score)(again.params, tokens, mask)
    assert np.std(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert load_tokenizer(saved).id_to_token(again.bundle.special.pad) == tokenizer.pad_token
