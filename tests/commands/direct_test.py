"""Direct preference learning: losses against transformers and TRL, runs that resume to the bit, refused settings."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxrlhf.commands import direct, models
from jaxrlhf.commands.main import run
from jaxrlhf.data.batches import padded_pairs
from jaxrlhf.data.records import Preference
from jaxrlhf.data.tokenization import tokenize_pairs

STORIES = pathlib.Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"
BASE = pathlib.Path("base")
PAIRS = (
    ("Once upon a time, there was a", " little girl named Lily.", " big red ball who was very sad and cried all day."),
    ("Tom went to the park.", " He saw a dog!", " He was"),
    ("One day,", " the sun was hot and Mom was happy.", " a bird sang."),
)
LOSSES = {
    "dpo": ({"beta": 0.3}, lambda d, n, beta: softplus(-beta * (d[0] - d[1]))),
    "dpo-smoothed": (
        {"beta": 0.3, "smoothing": 0.2},
        lambda d, n, beta: 0.8 * softplus(-beta * (d[0] - d[1])) + 0.2 * softplus(beta * (d[0] - d[1])),
    ),
    "robust": (
        {"beta": 0.3, "smoothing": 0.2},
        lambda d, n, beta: (0.8 * softplus(-beta * (d[0] - d[1])) - 0.2 * softplus(beta * (d[0] - d[1]))) / 0.6,
    ),
    "ipo": ({"beta": 0.3}, lambda d, n, beta: (d[0] / n[0] - d[1] / n[1] - 1 / (2 * beta)) ** 2),
    "dpo-reference-free": ({"reference_free": True}, lambda d, n, beta: softplus(-0.1 * (d[0] - d[1]))),
    "simpo": (
        {"beta": 2.5, "gamma": 1.5},
        lambda d, n, beta: softplus(-beta * (d[0] / n[0] - d[1] / n[1] - 1.5 / beta)),
    ),
    "simpo-smoothed": (
        {"smoothing": 0.1},
        lambda d, n, beta: sum(
            share * softplus(-sign * 2.0 * (d[0] / n[0] - d[1] / n[1] - 0.25)) for share, sign in ((0.9, 1), (0.1, -1))
        ),
    ),
}
"""TRL's formulas: `d` log-ratios of the chosen and the rejected text, or log-probabilities, and `n` their tokens."""


def softplus(value):
    return np.logaddexp(0, value)


def config_of(name, **settings):
    return direct.Direct(policy=BASE, data="pairs.jsonl", loss=name.split("-")[0], **settings)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """The pretrained reference, a policy away from it as saved in a directory, and pairs as rows."""
    if not STORIES.is_dir():
        pytest.skip(f"needs the pretrained model in {STORIES}")
    reference, source = models.open_model(STORIES, "policy"), np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + 0.05 * leaf.std() * source.normal(size=leaf.shape), reference.params)
    policy = reference._replace(params=jax.tree.map(lambda leaf: leaf.astype(np.float32), moved))
    directory = tmp_path_factory.mktemp("stories") / "policy"
    models.save_model(directory, policy, "policy")
    rows = tokenize_pairs(reference.bundle.chat_tokenizer(), [Preference(*pair) for pair in PAIRS], max_length=64).rows
    return reference, policy, directory, rows


@pytest.fixture(scope="module")
def log_probs(stories):
    """Log-probabilities `[2 models, 3 pairs, 2]` of completions by transformers in double precision, and their tokens."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    _, _, directory, rows = stories
    sums, counts = np.zeros((2, len(rows), 2)), np.zeros((len(rows), 2))
    for which, path in enumerate((directory, STORIES)):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for number, row in enumerate(rows):
            for side, text in enumerate(row[:2]):
                tokens = torch.tensor(text.tokens.astype(np.int64))[None]
                with torch.no_grad():
                    logits = model(tokens).logits[0, :-1].log_softmax(-1)
                chosen = logits[torch.arange(len(logits)), tokens[0, 1:]].numpy()
                sums[which, number, side] = chosen[text.completion_mask[1:]].sum()
                counts[number, side] = text.completion_mask.sum()
    return sums, counts


@pytest.fixture(scope="module")
def scores_of(stories):
    """`(labels) -> ` the scores by each loss, all in one program."""
    reference, policy, _, rows = stories
    scorers = {
        name: direct.scorer_of(config_of(name, **settings), reference.config) for name, (settings, _) in LOSSES.items()
    }
    batch = padded_pairs(rows, 64)

    @jax.jit
    def score(params, reference_params, labels):
        relabelled = batch._replace(labels=labels)
        return {name: scorer(params, relabelled, reference_params) for name, scorer in scorers.items()}

    return lambda label: score(policy.params, reference.params, np.full_like(batch.labels, label))


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_each_pair_is_trls(scores_of, log_probs, name):
    settings, formula = LOSSES[name]
    config, (sums, counts) = config_of(name, **settings), log_probs
    difference = sums[0] - sums[1] if direct.has_reference(config) else sums[0]
    expected, flipped = (
        np.array([formula(d[::way], n[::way], config.beta) for d, n in zip(difference, counts, strict=True)])
        for way in (1, -1)
    )
    np.testing.assert_allclose(scores_of(1.0)[name].log_ratio, difference, atol=1e-4)
    assert np.ptp(expected) > 0.02
    # The second may be the better one, and a tie is half of each.
    for label, costs in ((1.0, expected), (0.0, flipped), (0.5, (expected + flipped) / 2)):
        np.testing.assert_allclose(scores_of(label)[name].cost, costs, atol=1e-4)


TRL = {"dpo": ("sigmoid", {}), "robust": ("robust", {"label_smoothing": 0.2}), "ipo": ("ipo", {})}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRL, "simpo"])
def test_trl_itself_reports_the_same_loss(stories, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl", reason="compared with TRL only if it is installed beside this library")
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    reference, policy, directory, rows = stories
    data = datasets.Dataset.from_list(
        [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    shared = {"per_device_eval_batch_size": 3, "bf16": False, "report_to": "none", "max_length": 64}
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    if name == "simpo":
        arguments = CPOConfig(str(tmp_path), loss_type="simpo", cpo_alpha=0.0, beta=2.5, simpo_gamma=1.5, **shared)
        trainer = CPOTrainer(model, args=arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    else:
        loss_type, further = TRL[name]
        arguments = trl.DPOConfig(str(tmp_path), loss_type=[loss_type], beta=0.3, **further, **shared)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(STORIES)
        trainer = trl.DPOTrainer(
            model, theirs, args=arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer
        )
    scorer = jax.jit(direct.scorer_of(config_of(name, **LOSSES[name][0]), reference.config))
    ours = float(np.mean(scorer(policy.params, padded_pairs(rows, 64), reference.params).cost))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(ours, abs=1e-4)


REFUSED = {
    "gamma": ({"gamma": 1.0}, "--gamma does not apply with --loss dpo"),
    "smoothing": ({"loss": "ipo", "smoothing": 0.1}, "--smoothing does not apply with --loss ipo"),
    "free": ({"loss": "simpo", "reference_free": True}, "--reference-free does not apply with --loss simpo"),
    "robust": ({"loss": "robust"}, "--loss robust needs --smoothing"),
    "half": ({"smoothing": 0.5}, r"--smoothing must lie in \[0, 1/2\), got 0.5"),
    "beta": ({"beta": 0.0}, "--beta must be positive"),
    "negative": ({"loss": "simpo", "gamma": -1.0}, "--gamma must not be negative"),
    "half-precision": ({"dtype": "bfloat16"}, "give --lora-rank"),
    "stencil": ({"mesh": "stencil=2", "steps": 1, "held_out": 0.25}, "only align has iterates to split"),
    "reward": ({"policy": pathlib.Path("reward-model")}, "holds no policy model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_are_refused_by_name(here, capsys, case):
    settings, message = REFUSED[case]
    with pytest.raises(SystemExit) as caught:
        run(direct.Direct(**{"policy": BASE, "data": "pairs.jsonl"} | settings))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.count("\n") == 1 and re.search(message, error), error


SETTINGS = {"data": "pairs.jsonl", "policy": BASE, "held_out": 0.25, "evaluations": 1, "batch_size": 8}
SETTINGS |= {"max_length": 24, "steps": 6, "learning_rate": 1e-2}


def test_a_run_of_adapters_learns_the_preference_and_is_exported(here, report_text):
    further = {"lora_rank": 2, "dtype": "bfloat16", "loss": "ipo", "keep_best": 1}
    folder = direct.main(direct.Direct(**SETTINGS | further))
    results = json.loads((folder / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert before["loss"] == pytest.approx(25.0, abs=1e-3)  # (1 / (2 beta))^2
    assert before["preferred"] == before["rejected"] == pytest.approx(0.0, abs=1e-4)
    assert after["loss"] < before["loss"]
    assert after["preferred"] > after["rejected"]
    assert models.open_model(folder, "policy").config == models.open_model(BASE, "policy").config
    text = report_text(folder)
    assert "Direct preference learning" in text and "Greedy completions" in text


def test_margins_are_counted(here, tmp_path):
    lines = [json.loads(line) for line in (here / "pairs.jsonl").read_text().splitlines()]
    lines = [line | {"margin": 2.0} if number % 2 else line for number, line in enumerate(lines)]
    (tmp_path / "margins.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    row = {"margins": "30 pairs have one, which only `jaxrlhf reward` reads"}
    for path, expected in ((here / "pairs.jsonl", {}), (tmp_path / "margins.jsonl", row)):
        inputs = direct.prepare(direct.Direct(**SETTINGS | {"data": str(path)}))
        assert direct.margin_row(inputs) == expected


COMMAND = [sys.executable, "-m", "jaxrlhf.commands.main", "dpo", "--policy", "base", "--data", "pairs.jsonl"]
COMMAND += [
    "--held-out",
    "0.25",
    "--evaluations",
    "2",
    "--batch-size",
    "8",
    "--max-length",
    "24",
    "--learning-rate",
    "1e-2",
]


@pytest.mark.slow
@pytest.mark.parametrize("further", [[], ["--lora-rank", "2", "--loss", "ipo"]], ids=["all-weights", "adapters"])
def test_a_killed_run_resumes_to_the_bit(here, further):
    name, steps = "-".join(["run", *further]).replace("--", ""), ["--steps", "60", "--checkpoint-steps", "1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([*COMMAND, *further, *steps, "--run", f"{name}-whole"], check=True, timeout=200, env=environment)
    resume = [*COMMAND, *further, *steps, "--run", f"{name}-cut", "--resume"]
    for number in (3, 17, 41):
        process = subprocess.Popen(resume, env=environment)
        metrics = here / "runs" / f"{name}-cut" / "metrics.jsonl"
        while process.poll() is None and f'"step": {number},' not in (metrics.read_text() if metrics.exists() else ""):
            time.sleep(0.002)
        process.kill()
        process.wait()
    subprocess.run(resume, check=True, timeout=200, env=environment)
    whole, cut = (here / "runs" / f"{name}-{which}" for which in ("whole", "cut"))
    for file in ("policy/model.safetensors", "metrics.jsonl"):
        assert (whole / file).read_bytes() == (cut / file).read_bytes()


@pytest.mark.slow
def test_microbatches_and_a_mesh_change_nothing(here):
    parts = {"plain": [], "microbatches": ["--microbatches", "4"], "mesh": ["--mesh", "fsdp=2"]}
    losses = {}
    for name, further in parts.items():
        devices = " --xla_force_host_platform_device_count=2" if name == "mesh" else ""
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + devices}
        shared = ["--steps", "5", "--run", f"parts-{name}"]
        subprocess.run([*COMMAND, *further, *shared], check=True, timeout=200, env=environment)
        rows = (here / "runs" / f"parts-{name}" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
    assert len(losses["plain"]) == 5
    for name in parts:
        np.testing.assert_allclose(losses[name], losses["plain"], atol=1e-5)
