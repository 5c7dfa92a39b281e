"""What begins, ends and pads a text, from files that agree, disagree, say too little or are wrong."""

import json

import pytest
import tokenizers

from jaxrlhf.commands.models import open_bundle
from jaxrlhf.data.special_tokens import template_tokens
from jaxrlhf.lm.hugging_face.generation import generation_settings
from jaxrlhf.lm.hugging_face.special import SpecialIds, special_ids
from jaxrlhf.lm.hugging_face.tokenizer_files import load_tokenizer, mark_ends, padding_for
from jaxrlhf.lm.hugging_face.weights import WeightsError

BOS, EOS, END, USER = range(257, 261)


def write(directory, **contents):
    """Changes JSON files of a directory, by their names without the ending; a value MISSING removes a key."""
    for name, changes in contents.items():
        path = directory / f"{name}.json"
        content = (json.loads(path.read_text()) if path.exists() else {}) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not MISSING}))
    return directory


MISSING = object()
BOTH_MISSING = {"eos_token_id": MISSING, "bos_token_id": MISSING}
# Changes by file; what is read: BOS, ends and padding; and a part of the note, if one is due.
CASES = {
    "agree": ({}, (BOS, (EOS,), None), ""),
    "a base model with a chat template": (
        {"tokenizer_config": {"chat_template": "{% for m in messages %}{{ m.content + '<end>\n' }}{% endfor %}"}},
        (BOS, (EOS, END), None),
        "ends a turn with '<end>' (259), which no file names beside '</s>' (258)",
    ),
    "the tokenizer names another end": (
        {"tokenizer_config": {"eos_token": "<end>"}},
        (BOS, (END, EOS), None),
        "tokenizer_config.json ends a text with '<end>' (259), config.json with '</s>' (258); all of them",
    ),
    "generation and model differ": (
        {"generation_config": {"eos_token_id": [END]}},
        (BOS, (EOS, END), None),
        "eos is '<end>' (259) in generation_config.json and '</s>' (258) in config.json; the former counts",
    ),
    "only the tokenizer names an end": ({"config": BOTH_MISSING | {"model_type": "x"}}, (BOS, (EOS,), None), ""),
    "the map counts before the settings": (
        {"special_tokens_map": {"eos_token": {"content": "<end>"}}},
        (BOS, (END, EOS), None),
        "special_tokens_map.json ends a text with '<end>'",
    ),
    "but not beside the decoder": (
        {"special_tokens_map": {"eos_token": "<end>"}, "tokenizer_config": {"added_tokens_decoder": {}}},
        (BOS, (EOS,), None),
        "",
    ),
    "an end outside of the model": (
        {"config": {"eos_token_id": [EOS, 999]}},
        (BOS, (EOS,), None),
        "eos_token_id 999 of config.json is outside the model's vocabulary",
    ),
    "BOS that the tokenizer lacks": (
        {"config": {"bos_token_id": 262, "vocab_size": 270}, "tokenizer_config": {"bos_token": MISSING}},
        (None, (EOS,), None),
        "bos_token_id 262 of config.json is outside the tokenizer's vocabulary",
    ),
    "BOS differs": (
        {"tokenizer_config": {"bos_token": "<user>"}},
        (USER, (EOS,), None),
        "bos is '<user>' (260) in tokenizer_config.json and '<s>' (257) in config.json; the tokenizer's counts",
    ),
    "padding differs": (
        {"tokenizer_config": {"pad_token": "<user>"}, "config": {"pad_token_id": 0}},
        (BOS, (EOS,), USER),
        "pad is '<user>' (260) in tokenizer_config.json and '!' (0) in config.json",
    ),
    "padding is a word": (
        {"tokenizer_config": {"pad_token": "!"}},
        (BOS, (EOS,), 0),
        "The padding '!' (0; tokenizer_config.json) can stand in a text; an exported reward model gets another.",
    ),
    "padding of tokenizer.json": (
        {"tokenizer": {"padding": {"pad_token": "<user>", "pad_id": USER} | dict.fromkeys(("pad_type_id",), 0)}},
        (BOS, (EOS,), USER),
        "",
    ),
    "a name without a token": (
        {"tokenizer_config": {"eos_token": "</nowhere>"}},
        (BOS, (EOS,), None),
        "eos_token '</nowhere>' of tokenizer_config.json is not in the vocabulary",
    ),
    "a name that has room in the model": (
        {"tokenizer_config": {"eos_token": "</new>"}, "config": {"vocab_size": 264}},
        (BOS, (261, EOS), None),
        "ends a text with '</new>' (261)",
    ),
    "defaults of a class": (
        {
            "config": BOTH_MISSING,
            "tokenizer_config": {"tokenizer_class": "GemmaTokenizer", "eos_token": MISSING, "bos_token": MISSING},
        },
        (None, (), None),
        "",
    ),
    "no end at all": (
        {
            "config": {"eos_token_id": None, "bos_token_id": None},
            "tokenizer_config": {"eos_token": None, "bos_token": None},
        },
        (None, (), None),
        "",
    ),
    "a template that ends in words": (
        {"tokenizer_config": {"chat_template": "{% for m in messages %}{{ m.content + '\n\n' }}{% endfor %}"}},
        (BOS, (EOS,), None),
        "ends the assistant's turn in no token of its own",
    ),
    "a template with a name that nothing names": (
        {
            "tokenizer_config": {
                "chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
                "eos_token": MISSING,
            }
        },
        (BOS, (EOS,), None),
        "writes eos_token, which no file of the tokenizer names; it is left empty",
    ),
}


@pytest.fixture
def directory(lay_out, tmp_path):
    return lay_out(tmp_path, "config", None, model_type="x")


@pytest.mark.parametrize(("changes", "expected", "note"), CASES.values(), ids=CASES.keys())
def test_all_files_are_read_together(directory, changes, expected, note):
    if "tokenizer" in changes:
        padding = changes["tokenizer"]["padding"] | {"strategy": "BatchLongest", "direction": "Right"}
        changes = changes | {"tokenizer": {"padding": padding | {"pad_to_multiple_of": None}}}
    bundle = open_bundle(write(directory, **changes))
    assert bundle.special == SpecialIds(*expected)
    assert bool(bundle.found.notes) == bool(note) and note in "\n".join(bundle.found.notes)
    assert special_ids(directory) == bundle.special
    assert bundle.plan_rows().get("special tokens", "") == "\n".join(bundle.found.notes)


WRONG = {
    "a number": ({"tokenizer_config": {"eos_token": 5}}, "eos_token in .*tokenizer_config.json is 5; make it the text"),
    "a list": ({"special_tokens_map": {"pad_token": ["<pad>"]}}, "pad_token in .*special_tokens_map.json is"),
    "an id as text": ({"generation_config": {"pad_token_id": "2"}}, "pad_token_id in .*generation_config.json is '2'"),
    "an id as float": ({"config": {"eos_token_id": 2.0}}, "eos_token_id in .*config.json is 2.0: make it a token id"),
    "an id as flag": ({"config": {"bos_token_id": True}}, "bos_token_id in .*config.json is True: make it"),
    "two beginnings": ({"config": {"bos_token_id": [1, 2]}}, r"is \[1, 2\]: make it one token id"),
    "a flag as text": (
        {"tokenizer_config": {"add_bos_token": "no"}},
        "add_bos_token in .* is 'no': make it true or false",
    ),
    "an id of another token": (
        {"tokenizer_config": {"added_tokens_decoder": {"7": {"content": "<new>"}}}},
        "give the token '<new>' the id 7, the tokenizer gives it 261: use files that were saved together",
    ),
    "no id": (
        {"tokenizer_config": {"added_tokens_decoder": {"a": {"content": "x"}}}},
        "lists no token with its id but 'a'",
    ),
    "a size as text": ({"config": {"vocab_size": "261"}}, "vocab_size in .* is '261': make it the number of tokens"),
    "listed as text": (
        {"tokenizer_config": {"additional_special_tokens": "<a>"}},
        "additional_special_tokens in .* is '<a>'",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_is_named(directory, changes, message):
    special_ids(directory)
    with pytest.raises(WeightsError, match=message):
        special_ids(write(directory, **changes))


def test_templates_see_the_tokens_that_transformers_gives_them(directory):
    named = {"eos_token": {"content": "<end>"}, "extra_special_tokens": {"image_token": "<image>"}}
    write(directory, special_tokens_map=named, tokenizer_config={"boi_token": "<boi>", "pad_token": None})
    assert template_tokens(directory) == {
        "bos_token": "<s>",
        "eos_token": "<end>",
        "unk_token": "<unk>",
        "boi_token": "<boi>",
        "image_token": "<image>",
    }


def test_files_with_a_byte_order_mark_are_read(directory):
    for name in ("config.json", "tokenizer_config.json"):
        (directory / name).write_text("\ufeff" + (directory / name).read_text(), encoding="utf-8")
    assert special_ids(directory) == SpecialIds(BOS, (EOS,), None)


def test_a_class_has_its_defaults_where_no_file_names_a_token(directory, byte_tokenizer):
    words = byte_tokenizer["model"]["vocab"] | {"<|endoftext|>": 261}
    model = byte_tokenizer["model"] | {"vocab": words}
    named = {"bos_token": MISSING, "eos_token": MISSING, "unk_token": MISSING, "tokenizer_class": MISSING}
    none = {"bos_token_id": None, "eos_token_id": None, "vocab_size": 262, "model_type": "gpt2"}
    write(directory, tokenizer={"model": model}, tokenizer_config=named, config=none)
    assert special_ids(directory) == SpecialIds(261, (261,), None)
    assert "the default of GPT2Tokenizer" in open_bundle(directory).plan_rows()["completions end"]
    # Only one that the tokenizer has.
    assert special_ids(write(directory, config={"model_type": "gemma2"})) == SpecialIds(None, (), None)


def test_the_default_of_a_family_must_be_a_special_token(directory):
    bare = {
        "tokenizer_config": {"bos_token": MISSING, "eos_token": MISSING},
        "config": BOTH_MISSING | {"model_type": "llama"},
    }
    # 2 is an ordinary word here.
    assert special_ids(write(directory, **bare)) == SpecialIds(None, (), None)
    content = json.loads((directory / "tokenizer.json").read_text())
    words = {
        word: (2 if word == "</s>" else 258 if token == 2 else token)
        for word, token in content["model"]["vocab"].items()
    }
    added = [token | {"id": words[token["content"]]} for token in content["added_tokens"]]
    write(directory, tokenizer={"model": content["model"] | {"vocab": words}, "added_tokens": added})
    assert special_ids(directory) == SpecialIds(None, (2,), None)


def test_an_end_is_one_token_and_is_not_shown():
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2, "<e>": 3}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w|\W"), "isolated")
    made.add_tokens([tokenizers.AddedToken("<e>", special=False)])
    assert 2 not in made.encode("a</s>").ids and made.decode([1, 3]) == "a <e>"
    mark_ends(made, (1, 2, 3))
    assert made.encode("aa</s><e>").ids == [1, 1, 2, 3] and made.decode([1, 3, 2]) == "a"


PADDINGS = {
    "declared": (USER, set(), (USER, "<user>", False)),
    "ordinary": (0, set(), (261, "<|pad|>", True)),
    "none": (None, set(), (261, "<|pad|>", True)),
    "an end": (EOS, {EOS}, (261, "<|pad|>", True)),
    "in the template": (USER, {USER}, (261, "<|pad|>", True)),
    "unknown": (700, set(), (261, "<|pad|>", True)),
    # Bytes leave no character unknown.
    "unk that nothing is": (256, set(), (256, "<unk>", False)),
}


@pytest.mark.parametrize(("declared", "used", "expected"), PADDINGS.values(), ids=PADDINGS.keys())
def test_padding_is_no_token_of_a_text(directory, declared, used, expected):
    assert padding_for(load_tokenizer(directory), declared, used) == expected


def test_padding_that_stands_for_unknown_words_is_replaced():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<|pad|>": 1, "a": 2}, unk_token="<unk>"))
    made.add_special_tokens(["<unk>"])
    # <|pad|> is an ordinary word of this tokenizer.
    assert padding_for(made, 0, set()) == (3, "<|padding|>", True)


def test_generation_settings_of_old_files_are_found(directory):
    assert generation_settings(directory) == {}
    write(directory, config={"temperature": 0.7, "top_p": None, "do_sample": True})
    assert generation_settings(directory) == {"temperature": 0.7, "do_sample": True}
    write(directory, generation_config={"repetition_penalty": 1.1, "eos_token_id": 5})
    assert generation_settings(directory) == {"repetition_penalty": 1.1}
