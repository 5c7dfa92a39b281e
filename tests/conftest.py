"""Strict numerics for every test; programs that several tests or commands compile are compiled once a run."""

import base64
import gc
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A path that is not there may be a name on a hub; no test asks a real one.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
# Most of the suite's time is compilation: programs here run for milliseconds.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
# The older of two code generators, one LLVM module per program in place of up to 32, and no expensive LLVM passes: each
# shortens compilation. XLA stops at a flag that it does not know; it knows the first up to 0.10 only.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) <= (0, 10):
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        " --xla_llvm_disable_expensive_passes=true"
    )
# Tracing allocates many small objects that live on; the default thresholds spend a tenth of the time looking through them.
gc.set_threshold(200_000, 50, 100)
# For pytest-xdist's workers, which start later: memory is kept for the next compilation, and an operation's location is
# its line without the calls that led there.
for name, value in {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
}.items():
    os.environ.setdefault(name, value)
# Inherited by pytest-xdist's workers and by every command that a test runs. New for each run of the suite: a test never
# sees what an older tree compiled.
OWN_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    OWN_CACHE = tempfile.mkdtemp(prefix="jaxrlhf-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = OWN_CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


LONGEST = ("kills_test.py", "processes_test.py", "notebooks_test.py", "docs_test.py", "training_test.py")
"""Files with tests of half a minute, which start first: begun last, one of them would keep a single worker busy."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    # What the modules have made stays.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    if OWN_CACHE is not None:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


BLANK = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg==")
"""A white pixel as a PNG file."""


@pytest.fixture(autouse=True)
def blank_figures(monkeypatch):
    """Runs within a test have blank curves: to draw them takes longer than the run. Fixtures of the session draw them."""
    for name in ("jaxrlhf.commands.align_report", "jaxrlhf.commands.curves"):
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "draw_curves", lambda path, panels: path.write_bytes(BLANK))


@pytest.fixture
def x64():
    """Double precision, for comparisons with oracles."""
    with jax.enable_x64(True):
        yield


WORDS = ("<s>", "</s>", "<unk>", "good", "bad", "day", "sun", "rain", "Human:", "Assistant:", "the", "a", ".", "?")


@pytest.fixture(scope="session")
def make_world():
    """Fills a folder with a tiny model of `WORDS` in `base`, and with 60 preferences for `sun` over `rain`."""
    import numpy as np
    import tokenizers

    from jaxrlhf.lm.hugging_face.weights import SpecialIds, save_decoder
    from jaxrlhf.lm.transformer.config import DecoderConfig
    from jaxrlhf.lm.transformer.model import decoder

    def fill(folder):
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        shape = DecoderConfig(
            vocabulary_size=len(WORDS),
            width=16,
            layers=1,
            query_heads=2,
            key_value_heads=1,
            head_size=8,
            mlp_width=32,
            context_length=48,
        )
        params = decoder(shape).init(jax.random.key(0))
        save_decoder(folder / "base", shape, params, special=SpecialIds(0, (1,), None), tokenizer=tokenizer)
        (folder / "base" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        source = np.random.default_rng(0)
        lines = []
        for _ in range(60):
            prompt = " ".join(source.choice(["good", "bad", "day", "the", "a"], 5)) + " ?"
            chosen = " " + " ".join(source.choice(["sun", "the", "."], 4)) + " sun"
            rejected = " " + " ".join(source.choice(["rain", "the", "."], 4)) + " rain"
            lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
        (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    return fill


SPECIAL = ("<unk>", "<s>", "</s>", "<end>", "<user>")
TURN = "{{ '<user>' if m.role == 'user' else m.role }}{{ ': ' + m.content }}"
OPENING = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
LOOP = "{% for m in messages %}" + TURN + "ENDING{% endfor %}" + OPENING
TEMPLATES = {
    "eos": LOOP.replace("ENDING", "{{ eos_token }}"),
    "eos-line": LOOP.replace("ENDING", "{{ eos_token + '\n' }}"),
    "own-line": LOOP.replace("ENDING", "{{ '<end>\n' }}"),
    "own-then-eos": LOOP.replace(
        "ENDING", "{{ '<end>\n' }}{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    ),
    "bos": "{{ bos_token }}" + LOOP.replace("ENDING", "{{ '<end>' }}"),
    "blocks": "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'assistant: ' }}{% generation %}"
    "{{ m.content + '<end>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    + TURN
    + "{{ '<end>\n' }}{% endif %}{% endfor %}"
    + OPENING,
}
"""Chat templates by how they end a turn."""
LAYOUTS = ("config", "map", "lists", "tokenizer", "unlisted", "decoder")
"""Where a directory names its special tokens."""


@pytest.fixture(scope="session")
def byte_tokenizer():
    """The contents of a `tokenizer.json`: single bytes, and `SPECIAL` behind them."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate([*alphabet, *SPECIAL])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    return json.loads(made.to_str())


@pytest.fixture(scope="session")
def lay_out(byte_tokenizer):
    """`lay_out(directory, layout, template, **config)`: writes all of a model's files but its weights.

    `config` goes to config.json, beside the ids that the layout puts there; returns the directory.
    """
    bos, eos, end = range(257, 260)
    texts = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    as_objects = {name: {"content": text, "lstrip": False, "rstrip": False} for name, text in texts.items()}

    def write(directory, layout, template, **config):
        directory.mkdir(parents=True, exist_ok=True)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
        settings |= {} if template is None else {"chat_template": TEMPLATES.get(template, template)}
        ids, generation, named, tokenizer = {"bos_token_id": bos, "eos_token_id": eos}, None, None, byte_tokenizer
        if layout == "map":
            named = as_objects
        else:
            settings |= texts
        if layout == "lists":
            ids["eos_token_id"], generation = end, {"eos_token_id": [end, eos], "temperature": 0.6, "top_p": 0.9}
        if layout == "tokenizer":
            ids = {"bos_token_id": None, "eos_token_id": None}
        if layout == "unlisted":
            # In the vocabulary only; what the settings name is never split all the same.
            tokenizer = tokenizer | {
                "added_tokens": [t for t in tokenizer["added_tokens"] if t["content"] not in texts.values()]
            }
        if layout == "decoder":
            flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
            settings["added_tokens_decoder"] = {
                str(256 + n): {"content": text} | flags for n, text in enumerate(SPECIAL)
            }
            # Not read beside it.
            named = {"eos_token": "<user>"}
        files = {
            "config.json": {"vocab_size": 256 + len(SPECIAL)} | ids | config,
            "tokenizer.json": tokenizer,
            "tokenizer_config.json": settings,
            "generation_config.json": generation,
            "special_tokens_map.json": named,
        }
        for name, content in files.items():
            if content is not None:
                (directory / name).write_text(json.dumps(content))
        return directory

    return write


@pytest.fixture(scope="session")
def layouts():
    """Names of the layouts, and of the templates, that `lay_out` knows."""
    return LAYOUTS, tuple(TEMPLATES)
