"""Settings of a model directory, changed at random: each is read rightly or refused in one sentence that names it.

    python tests/fuzz/settings_fuzz.py --count 2000 --seed 0

No weights are read. Every change in `CHANGES` is one that a reader must accept ("fine"), refuse ("bad"), or may do
either with ("either"); an input has one to four of them. What is read is compared with `expected_stops`, which knows the
rules and nothing of the code.
"""

import argparse
import copy
import json
import pathlib
import random
import tempfile
from typing import Any

import tokenizers

from jaxrlhf.commands.models import open_bundle
from jaxrlhf.data import DataError, Message
from jaxrlhf.data.encode import encode_pair
from jaxrlhf.data.records import Preference
from jaxrlhf.lm.hugging_face.families import config_from

WORDS = ["<unk>", "<s>", "</s>", "<end>", "<pad>", "Hi", "Ho", "No", "user", "assistant", ":", "\n", "?", "."]
SPECIAL = WORDS[:5]
PROMPT = "{{ 'assistant:' if add_generation_prompt }}"
TEMPLATE = "{% for m in messages %}{{ m.role + ':' + m.content + '<end>\n' }}{% endfor %}" + PROMPT
PLAIN = "{% for m in messages %}{{ m.role + ':' + m.content }}{{ eos_token }}{% endfor %}" + PROMPT
CONFIG, GENERATION, TOKENIZER, MAP = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
FILES: dict[str, dict[str, Any]] = {
    CONFIG: {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    GENERATION: {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.6},
    TOKENIZER: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE},
}
MISSING = object()
NAN, INF = float("nan"), float("inf")
NO_ID = ["2", 2.0, True, [True], ["2"], [[2]], {"id": 2}, NAN, [2.5], "</s>", False]
NO_SIZE = [0, -1, "16", 16.5, True, [16], {}, NAN, INF]
NO_SCALE = [0, -1e-5, "1e-5", NAN, INF, True, [1.0]]
NO_FLAG = ["false", 0, 1, "yes", [], NAN]
NO_TEXT = [5, [], True, {"text": "x"}, ["</s>"], NAN, {"content": 5}]
ONE_ID = {"fine": [1, 3, None, -1, MISSING, 999, [1], []], "bad": [*NO_ID, [1, 2]]}
ENDS = {"fine": [2, 3, [2], [2, 1], [3, 2], None, -1, MISSING, 999, [], [2, 999], [2, 2]], "bad": NO_ID}
TOKEN = {
    "fine": ["</s>", "<s>", "<end>", {"content": "</s>"}, None, MISSING, ""],
    "bad": NO_TEXT,
    "either": ["</nowhere>"],
}
CHANGES: dict[str, dict[str, dict[str, list]]] = {
    CONFIG: {
        "eos_token_id": ENDS,
        "bos_token_id": ONE_ID,
        "pad_token_id": ONE_ID,
        "vocab_size": {"fine": [14, 20], "bad": [*NO_SIZE, 3, None, MISSING]},
        "hidden_size": {"bad": [*NO_SIZE, None, MISSING]},
        "intermediate_size": {"bad": [*NO_SIZE, None, MISSING]},
        "num_hidden_layers": {"fine": [1, 2], "bad": [*NO_SIZE, None, MISSING]},
        "num_attention_heads": {"bad": [*NO_SIZE, 3, None, MISSING]},
        "num_key_value_heads": {"fine": [1, 2, 4, None, MISSING], "bad": [*NO_SIZE, 3]},
        "head_dim": {"fine": [4, 8, None], "bad": [*NO_SIZE, 3]},
        "max_position_embeddings": {"fine": [8, None, MISSING], "bad": NO_SIZE},
        "rms_norm_eps": {"fine": [1e-5, None, MISSING], "bad": NO_SCALE},
        "rope_theta": {"fine": [500, None, MISSING], "bad": NO_SCALE},
        "rope_parameters": {
            "fine": [None, {}, {"rope_type": "default", "rope_theta": 7.0}],
            "bad": ["linear", 5, [], {"rope_type": "yarn"}, {"rope_type": "linear"}, {"rope_theta": "7"}],
        },
        "hidden_act": {"fine": ["gelu", None, MISSING], "bad": ["relu", 5, [], {}, True]},
        "tie_word_embeddings": {"fine": [False, None, MISSING], "bad": NO_FLAG},
        "attention_bias": {"fine": [False, True, None], "bad": NO_FLAG},
        "mlp_bias": {"fine": [False, True, None], "bad": NO_FLAG},
        "architectures": {
            "fine": [["Other", "LlamaForCausalLM"]],
            "bad": [None, [], "LlamaForCausalLM", 5, {}, [5], [["LlamaForCausalLM"]], ["BertModel"], MISSING],
        },
        "model_type": {"fine": [None, MISSING], "bad": ["gpt2", "bert", 5, [], NAN]},
        "quantization_config": {"fine": [None, {}], "bad": [{"bits": 4}, "int8"]},
    },
    GENERATION: {
        "eos_token_id": ENDS,
        "bos_token_id": ONE_ID,
        "pad_token_id": ONE_ID,
        "temperature": {"fine": [0.1, None, "hot", NAN, [], MISSING]},
        "anything": {"fine": [{"a": [1]}, 5]},
        "": {"bad": ["", "[]", "{", "null", "\u0000", "[" * 100000], "fine": ["\ufeff{}", MISSING]},
    },
    TOKENIZER: {
        "eos_token": TOKEN,
        "bos_token": TOKEN,
        "pad_token": TOKEN,
        "unk_token": TOKEN,
        "add_bos_token": {"fine": [True, False, None], "bad": ["false", 0, 1, [], NAN]},
        "chat_template": {
            "fine": [PLAIN, None, MISSING, [{"name": "default", "template": TEMPLATE}]],
            "bad": [5, {}, [], [{"name": "rag", "template": PLAIN}], True, [5], [{"name": ["default"]}]],
            "either": ["{% if %}", "{{ raise_exception('no') }}", "", "{{ messages[9].content }}"],
        },
        "additional_special_tokens": {
            "fine": [[], ["<end>"], None, [{"content": "<end>"}]],
            "bad": [5, "x", [5], [None]],
        },
        "added_tokens_decoder": {
            "fine": [None, {}, {"3": {"content": "<end>", "special": True}}],
            "bad": [5, "x", {"a": {"content": "<x>"}}, {"-1": {"content": "<x>"}}, {"2": "<new>"}, {"3": {}}, [1]],
        },
        "model_max_length": {"fine": [1e30, NAN, "x"]},
        "tokenizer_class": {"fine": ["LlamaTokenizer", 5, None, "PreTrainedTokenizerFast"]},
        "": {"bad": ["", "[]", "{", "5", "[" * 100000], "fine": ["\ufeff{}", MISSING]},
    },
    MAP: {
        "eos_token": TOKEN,
        "bos_token": TOKEN,
        "pad_token": TOKEN,
        "additional_special_tokens": {"fine": [["<end>"]], "bad": [5, [5]]},
        "": {"bad": ["", "[]", "{", "null"]},
    },
}


def make_tokenizer() -> tokenizers.Tokenizer:
    """Returns a tokenizer of `WORDS`, which splits at their borders."""
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+|\W"), "isolated")
    made.add_special_tokens(SPECIAL)
    return made


Change = tuple[str, str, str, Any]
"""File, key, verdict and value; an empty key replaces the whole file."""


def draw(source: random.Random) -> list[Change]:
    """Returns one to four changes of different keys."""
    changes = []
    keys = source.sample([(file, key) for file in CHANGES for key in CHANGES[file]], source.randint(1, 4))
    for file, key in keys:
        verdicts = CHANGES[file][key]
        # Most changes are harmless: one bad one hides what the others do.
        verdict = source.choice([*sorted(verdicts), *["fine"] * 4 * ("fine" in verdicts)])
        changes.append((file, key, verdict, source.choice(verdicts[verdict])))
    return changes


def changed(changes: list[Change]) -> tuple[dict[str, Any], list[Change]]:
    """Returns contents by file (a text where a whole file is replaced), and the changes that are still in them."""
    files = copy.deepcopy(FILES)
    replaced = {file for file, key, *_ in changes if key == ""}
    # The changes of a file's keys are lost with it.
    changes = [change for change in changes if change[1] == "" or change[0] not in replaced]
    for file, key, _, value in changes:
        if key == "":
            files.pop(file, None)
            files |= {} if value is MISSING else {file: value}
        elif value is MISSING:
            files.get(file, {}).pop(key, None)
        else:
            files.setdefault(file, {})[key] = value
    return files, changes


def write(directory: pathlib.Path, files: dict[str, Any]) -> None:
    """Writes the files, and removes those that are not among them."""
    for name in (CONFIG, GENERATION, TOKENIZER, MAP):
        path = directory / name
        path.unlink(missing_ok=True)
        if name in files:
            content = files[name]
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def expected_stops(files: dict[str, Any]) -> set[int]:
    """Returns the tokens that stop the sampler, by the rules of `docs/language_models.md`."""

    def parsed(name):
        content = files.get(name, {})
        return json.loads(content.removeprefix("\ufeff")) if isinstance(content, str) else content

    config, generation, settings = (parsed(name) for name in (CONFIG, GENERATION, TOKENIZER))
    named = {} if "added_tokens_decoder" in settings else parsed(MAP)
    size = config["vocab_size"]

    def ids(content, name):
        value = content.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        return [token for token in listed if 0 <= token < size]

    def token(name):
        value = (settings | named).get(name)
        text = value["content"] if isinstance(value, dict) else value
        if text in WORDS:
            return WORDS.index(text)
        # A token that only the settings know is added behind the others, as by transformers.
        return len(WORDS) if text and size > len(WORDS) else None

    end = token("eos_token")
    if "eos_token" not in settings | named and settings.get("tokenizer_class") == "LlamaTokenizer":
        end = 2
    stops = {*(ids(generation, "eos_token_id") or ids(config, "eos_token_id"))} | ({end} - {None})
    template = settings.get("chat_template")
    source = template[0]["template"] if isinstance(template, list) else template
    if source == TEMPLATE:
        stops.add(3)
    if not stops and "eos_token_id" not in config and config.get("model_type") == "llama":
        stops.add(2)
    return stops


def check(directory: pathlib.Path, files: dict[str, Any], changes: list[Change]) -> str:
    """Reads a directory; returns "read" or "refused".

    Raises:
        AssertionError: it was read wrongly, refused without cause, or in more than one sentence.
    """
    verdicts = {verdict for _, _, verdict, _ in changes}
    # What `special_tokens_map.json` says is not read beside `added_tokens_decoder`.
    passed_by = isinstance(files.get(TOKENIZER), dict) and "added_tokens_decoder" in files[TOKENIZER]
    if passed_by and any(file == MAP and verdict == "bad" for file, _, verdict, _ in changes):
        verdicts.add("either")
    try:
        bundle = open_bundle(directory)
        config = config_from(json.loads((directory / CONFIG).read_text()), "policy", str(directory / CONFIG))
        rows = bundle.plan_rows()
        tokenizer = bundle.chat_tokenizer()
        pair = encode_pair(
            tokenizer,
            Preference((Message("user", "Hi"),), (Message("assistant", "Ho"),), (Message("assistant", "No"),)),
        )
    except (ValueError, DataError) as error:
        message = str(error)
        assert "\n" not in message and message.endswith("."), f"no sentence: {message!r}"
        assert verdicts & {"bad", "either"}, f"refused without cause: {message}"
        wrong = [key or file for file, key, verdict, _ in changes if verdict != "fine"]
        if "either" not in verdicts:
            assert any(key in message or ALSO_NAMED.get(key, key) in message for key in wrong), (
                f"names none of {wrong}: {message}"
            )
        return "refused"
    assert verdicts & {"fine", "either"} and not (verdicts & {"bad"} and "either" not in verdicts), "read in silence"
    assert config.vocabulary_size == bundle.size
    expected = expected_stops(files)
    assert set(bundle.special.eos) == expected, f"ends {bundle.special.eos}, expected {sorted(expected)}"
    for stop in bundle.stop_ids:
        assert f"({stop};" in rows["completions end"] and 0 <= stop < config.vocabulary_size
    for text in (text for text in (pair.chosen, pair.rejected) if len(text.tokens)):
        last = int(text.tokens[-1])
        assert text.completion_mask[-1] and (last in bundle.stop_ids or not set(text.tokens[2:].tolist()) & expected)
    return "read"


ALSO_NAMED = {
    "num_attention_heads": "head",
    "num_key_value_heads": "key_value_heads",
    "head_dim": "head_size",
    "architectures": "describes",
    "rope_parameters": "rope_base",
    "model_type": "architectures",
    "vocab_size": "vocabulary",
    "added_tokens_decoder": "token",
}
"""What a message may say in place of a setting's name."""


def run(count: int, seed: int) -> dict[str, int]:
    """Tries `count` inputs; returns how many were read and how many refused.

    Raises:
        AssertionError: at the first that went wrong, with the changes that reproduce it.
    """
    source, outcomes = random.Random(seed), {"read": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        make_tokenizer().save(str(directory / "tokenizer.json"))
        for number in range(count):
            files, changes = changed(draw(source))
            write(directory, files)
            try:
                outcomes[check(directory, files, changes)] += 1
            except Exception as error:
                raise AssertionError(
                    f"input {number} of seed {seed}, {changes}: {type(error).__name__}: {error}"
                ) from error
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(run(given.count, given.seed))
