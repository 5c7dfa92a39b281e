"""`jaxrlhf align --method`: kept labels, fewer labels and a target KL resume to the bit; flags that do not apply are refused."""  # noqa: E501

import importlib
import json

import numpy as np
import pytest

from jaxrlhf.algorithms.methods import METHODS
from jaxrlhf.commands import align, evaluate, method_flags
from jaxrlhf.commands.methods import method_of
from jaxrlhf.data import DataError
from jaxrlhf.training.run_folder import RunFolder

ALWAYS = """
LEFT = []


def longer(prompts, firsts, seconds):
    if LEFT and LEFT.pop() == "fail":
        raise RuntimeError("gone")
    return [float(len(first) > len(second)) for first, second in zip(firsts, seconds)]
"""
KEPT = {"reuse": 1, "kept_labels": 16, "labels_per_step": 5}


def settings(here, **others):
    shared = {"data": "pairs.jsonl", "policy": here / "base", "held_out": 0.25, "steps": 4}
    shared |= {"batch_size": 4, "pairs": 2, "max_new_tokens": 6, "max_prompt": 16, "evaluations": 1}
    shared |= {
        "annotator": "always:longer",
        "evaluation_answers": 8,
        "warmup": 1,
        "data_dir": here / "prepared",
    }
    return align.Align(**shared | {"output": here / "by-method"} | others)


@pytest.fixture
def always(here):
    """An annotator that answers every question, so that labels can be counted."""
    (here / "always.py").write_text(ALWAYS)


def metrics(folder):
    return [row for row in RunFolder.followed(folder).metrics() if "labels" in row]


def resumed(here, name, **options):
    """The folders of a run, and of the same run whose annotator fails in the third step, resumed."""
    whole = align.main(settings(here, run=f"{name}-whole", resume=True, **options))
    parted = settings(here, run=f"{name}-parted", resume=True, checkpoint_steps=1, **options)
    importlib.import_module("always").LEFT[:] = ["fail", "", "", ""]
    with pytest.raises(Exception, match="gone"):
        align.main(parted)
    return whole, align.main(parted)


def check_equal(whole, parted):
    assert metrics(whole) == metrics(parted)
    models = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert models
    for path in models:
        assert (whole / path).read_bytes() == (parted / path).read_bytes()


def test_kept_labels_and_a_target_survive_a_resume_and_are_reported(here, always, report_text):
    whole, parted = resumed(here, "dpo", method="online-dpo", target_kl=0.5, **KEPT)
    check_equal(whole, parted)
    rows = metrics(whole)
    assert [row["labels"] for row in rows] == [5.0] * 4
    # Eight prompts are kept, and four come each step.
    np.testing.assert_allclose([row["age"] for row in rows], [0.0, 0.5, 0.5, 0.5])
    assert (
        all(0 < row["ess_fraction"] <= 1 and row["beta"] > 0 for row in rows) and len({row["beta"] for row in rows}) > 2
    )
    text = report_text(whole)
    for words in ("Alignment by online-dpo", "Labels were kept and used again", "moved towards the target KL"):
        assert words in text
    assert not (whole / "reward").exists()
    assert json.loads((whole / "results.json").read_text())["labels"] == 20


def test_existing_preferences_are_learned_from_before_anyone_is_asked(here, always, capsys):
    """The reward orders pairs as the file does, whatever the labels of the single step say."""
    lines = (here / "pairs.jsonl").read_text().splitlines()
    long = json.dumps({"prompt": "day " * 20 + "?", "chosen": " sun", "rejected": " rain"})
    late = json.dumps({"prompt": "day ?", "chosen": " the" * 6 + " sun", "rejected": " the" * 6 + " rain"})
    cut = json.dumps({"prompt": "day ?", "chosen": " sun" * 7, "rejected": " rain" * 7})
    (here / "known.jsonl").write_text("\n".join([*lines, long, late, cut]) + "\n")
    options = {"steps": 1, "reuse": 1, "from_preferences": "known.jsonl", "annotator": "always:longer"}
    options |= {"method": "iterated", "reward_learning_rate": 3e-2, "warmup": 0, "run": "known", "resume": True}
    folder = align.main(settings(here, **options))
    said = " ".join(capsys.readouterr().out.split())
    assert "Existing preferences: 61 rows" in said and "1 dropped (too long" in said, said
    assert "; 2 completions cut to --max-new-tokens." in said, said
    found = evaluate.main(
        evaluate.Evaluate(reward=folder, data="pairs.jsonl", held_out=0.25, split="test", data_dir=here / "prepared")
    )
    assert json.loads((found / "results.json").read_text())["reward"]["accuracy"] > 0.9
    assert metrics(folder)[0]["labels"] == 8.0
    # Another file under the same name is another run's, and the same pairs elsewhere are not.
    (here / "moved.jsonl").write_text((here / "known.jsonl").read_text())
    assert align.main(settings(here, **options | {"from_preferences": "./moved.jsonl"})) == folder
    (here / "known.jsonl").write_text("\n".join(lines[:30]) + "\n")
    with pytest.raises(ValueError, match=r"its from_preferences is '.*Name another run"):
        align.main(settings(here, **options))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_survives_a_resume(here, always, method):
    check_equal(*resumed(here, f"{method}-plain", method=method))
    known = {"from_preferences": "pairs.jsonl"} if "from_preferences" in method_flags.READS[method] else {}
    known |= {"choose": "disagreement"} if METHODS[method].learns == "reward" else {}
    whole, parted = resumed(
        here, f"{method}-kept", method=method, **known, lora_rank=2, microbatches=2, target_kl=1.0, **KEPT
    )
    check_equal(whole, parted)
    assert (whole / "reward").exists() == (METHODS[method].learns == "reward")
    assert [row["labels"] for row in metrics(whole)] == [5.0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].learns == "reward"])
def test_mixtures_of_rewards_are_learned_by_every_method_with_a_reward(here, always, method):
    whole, parted = resumed(here, f"{method}-mixed", method=method, rewards=("annotators:score",), **KEPT)
    check_equal(whole, parted)
    assert metrics(whole)[-1]["weight/annotators:score"] != 0.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "rloo", "estimator": "boltzmann"}, r"--estimator does not apply with --method rloo"),
        (
            {"method": "online-dpo", "reward": "x", "rewards": ("a:b",)},
            r"--reward and --rewards do not apply with --method",
        ),
        ({"method": "label-gradient", "beta": 0.7}, r"--beta does not apply with --method label-gradient"),
        ({"method": "grpo", "critic_learning_rate": 1e-3}, r"--critic-learning-rate does not apply with --method grpo"),
        ({"method": "iterated", "learn_scale": True}, r"--learn-scale does not apply with --method iterated"),
        ({"learn_scale": True, "target_kl": 1.0}, r"give one of the two"),
        ({"method": "rloo", "mesh": "stencil=2"}, r"--mesh stencil=2 does not apply with --method rloo"),
        ({"mesh": "stencil=2"}, r"does not apply with --estimator boltzmann.* Give --estimator central"),
        ({"kept_labels": 20}, r"--kept-labels does not apply without --reuse"),
        ({"reuse": 1, "kept_labels": 7}, r"--kept-labels 7 has no room for the 8 pairs of one step"),
        ({"reuse": -1}, r"--reuse must be at least 0, got -1"),
        ({"from_preferences": "pairs.jsonl"}, r"--from-preferences does not apply without --reuse"),
        (
            {"method": "sail", "reuse": 1, "from_preferences": "x"},
            r"--from-preferences does not apply with --method sail",
        ),
        ({"method": "label-gradient", "kl_price": 0.0}, r"--method label-gradient needs a positive --kl-price"),
        (
            {"reuse": 1, "from_preferences": "bare.jsonl"},
            r"--from-preferences bare.jsonl: Record 0 is of the kind Prompt; pairs",
        ),
        ({"reuse": 1, "from_preferences": "none.jsonl"}, r"There is no file or folder none.jsonl"),
        ({"labels_per_step": 9}, r"--labels-per-step 9 is more than the 8 pairs of a step"),
        ({"labels_per_step": 0}, r"--labels-per-step must be at least 1"),
        ({"choose": "disagreement"}, r"chooses the pairs of --labels-per-step, of which there is none"),
        (
            {"choose": "disagreement", "labels_per_step": 8},
            r"nothing to choose, as --labels-per-step 8 is all of a step",
        ),
        ({"choose": "disagreement", "labels_per_step": 2}, r"with the kept labels of --reuse; give at least 1"),
        (
            {"choose": "disagreement", "method": "sail", **KEPT},
            r"a reward model alone as the reward; .* with --method sail",
        ),
        ({"target_kl": 1.0, "steps": 10**20}, r"--steps must be at most 2147483647, got 1000"),
        ({"target_kl": 0.0}, r"--target-kl must be positive"),
    ],
)
def test_what_a_method_does_not_read_is_refused(here, always, options, message):
    (here / "bare.jsonl").write_text('{"prompt": "good day"}\n')
    with pytest.raises((ValueError, DataError), match=message):
        align.main(settings(here, **options))
    assert not (here / "by-method" / "align-0").exists()


def test_a_mixture_of_scores_is_compared_with_the_reference(here):
    """Functions of --rewards score pairs alone: what a label is worth against the reference is not known."""
    alone, mixed = settings(here), settings(here, rewards=("always:longer",))
    assert method_of(alone) is METHODS["bilevel"] and method_of(alone).against == "self"
    assert method_of(mixed).against == "reference" and method_of(mixed).learns == "reward"
    others = (name for name in METHODS if name != "bilevel")
    assert all(method_of(settings(here, method=name)) is METHODS[name] for name in others)
