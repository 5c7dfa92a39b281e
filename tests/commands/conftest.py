"""A tiny model, its data, and one run of every training command, shared by all tests of the command line."""

import html.parser
import pathlib

import jax
import pytest

from jaxrlhf.commands import align, models, reward, supervised
from jaxrlhf.lm.transformer.model import decoder

ANNOTATORS = """
def score(prompts, completions):
    return [float(text.split().count("sun")) - float(text.split().count("rain")) for text in completions]


def prefers_sun(prompts, firsts, seconds):
    pairs = zip(score(prompts, firsts), score(prompts, seconds))
    return [None if a == b else float(a > b) for a, b in pairs]


def signs(prompts, firsts, seconds):
    return [-1.0] * len(prompts)


def silent(prompts, firsts, seconds):
    return None


def too_few(prompts, completions):
    return [0.0]


def out_of_range(prompts, firsts, seconds):
    return [7.0] * len(prompts)
"""


@pytest.fixture(scope="session")
def world(tmp_path_factory, make_world):
    """A folder with a tiny model, preferences for `sun` over `rain`, prompts and a module of annotators."""
    folder = make_world(tmp_path_factory.mktemp("commands"))
    (folder / "annotators.py").write_text(ANNOTATORS)
    return folder


@pytest.fixture
def here(world, monkeypatch):
    """The world as the working directory."""
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(str(world))
    return world


@pytest.fixture(scope="session")
def trained(world):
    """Folders of a supervised and a reward run."""
    shared = {"held_out": 0.25, "data_dir": world / "prepared", "output": world / "runs", "evaluations": 1}
    shared |= {"data": str(world / "pairs.jsonl"), "steps": 12, "batch_size": 8, "max_length": 24}
    shared |= {"learning_rate": 1e-2}
    policy = supervised.main(supervised.Supervised(policy=world / "base", **shared))
    return policy, reward.main(reward.Reward(policy=policy, **shared))


@pytest.fixture(scope="session")
def align_settings():
    """Settings of a short alignment: those of `aligned`, whose compiled programs they share."""
    settings = {"steps": 6, "batch_size": 4, "pairs": 2, "max_new_tokens": 6, "max_prompt": 16, "evaluations": 1}
    return settings | {"policy_learning_rate": 1e-2, "warmup": 1}


@pytest.fixture(scope="session")
def aligned(world, trained, align_settings):
    """Folders of two alignments: of all weights labelled by a function, and of adapters labelled by a reward model."""
    policy, reward_run = trained
    shared = {"policy": policy, "data": str(world / "pairs.jsonl"), "held_out": 0.25, "evaluation_answers": 8}
    shared |= {"data_dir": world / "prepared", "output": world / "runs"} | align_settings
    adapters = {"dtype": "bfloat16", "lora_rank": 2, "rollout_dtype": "bfloat16", "microbatches": 2, "keep_best": 1}
    adapters |= {"lora_alpha": 3.0, "lora_modules": ("q_proj", "k_proj", "v_proj", "mlp.down_proj")}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(world))
        return {
            "all-weights": align.main(align.Align(score="annotators:score", reward=reward_run, **shared)),
            "adapters": align.main(align.Align(annotator=str(reward_run), **adapters, **shared)),
        }


class Page(html.parser.HTMLParser):
    """Collects the text of a page, and fails on tags that do not close."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "img", "br", "link", "hr", "col", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="session")
def report_text():
    """Returns `(folder) -> ` the text of a run's report."""

    def read(folder: pathlib.Path) -> str:
        page = Page()
        page.feed((folder / "report.html").read_text())
        assert not page.open
        return " ".join(" ".join(page.text).split())

    return read


@pytest.fixture(scope="session")
def logits():
    """Returns `(directory) -> ` logits of a policy on fixed tokens."""

    def compute(directory: pathlib.Path) -> jax.Array:
        model = models.open_model(directory, "policy")
        tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 14)
        language = decoder(model.config)

        @jax.jit
        def compute_logits(params):
            return language.logits(params, language.hidden(params, tokens, tokens >= 0))

        return compute_logits(model.params)

    return compute
