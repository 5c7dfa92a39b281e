"""Model cards: the hub's metadata, what a model was made from and how, and no path of this machine."""

import json
import pathlib
import re

import pytest
from huggingface_hub import ModelCard

from jaxrlhf.commands import align_config, direct, export, main, model_card, reward, supervised

COMMIT = "c" * 40
TOLD = model_card.Told(
    "Direct preference learning",
    "2 steps. The model is in policy, the mixture of rewards in mixture.",
    [model_card.Table("On 4 held-out pairs", ("policy", "accuracy"), [("after", "0.500, 95% in 0.150 to 0.850")])],
    [
        "Texts begin with <s>.",
        "Skipped pairs.jsonl, line 3: no.",
        "Asked http://judge.internal:80/v1 twice, from /data/me/x/file.",
    ],
)


def card_of(directory: pathlib.Path) -> ModelCard:
    return ModelCard.load(directory / "README.md", ignore_metadata_errors=False)


def made(folder: pathlib.Path, config, *kinds: str) -> pathlib.Path:
    """Writes the cards of a run whose folder has models of these kinds."""
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        (folder / kind / "config.json").write_text("{}")
    model_card.write_cards(folder, config, TOLD)
    return folder


def test_each_command_that_makes_models_is_known():
    known = {place[2]: name for name, place in main.PLACES.items()}
    assert {name: known[name] for name in model_card.COMMANDS} == model_card.COMMANDS
    assert {name for name, (kind, _) in main.COMMANDS.items() if hasattr(kind, "checkpoint_steps")} == {
        *model_card.COMMANDS.values()
    }


def test_runs_write_cards_that_say_what_was_measured(world, trained, aligned):
    policy, rewards = trained
    for directory, kind, pipeline, tags in (
        (policy / "policy", "policy", "text-generation", ["jaxrlhf", "sft"]),
        (rewards / "reward", "reward", "text-classification", ["jaxrlhf", "rlhf", "reward-model"]),
        (aligned["all-weights"] / "policy", "policy", "text-generation", ["jaxrlhf", "rlhf", "bilevel"]),
        (
            aligned["all-weights"] / "reward",
            "reward",
            "text-classification",
            ["jaxrlhf", "rlhf", "reward-model", "bilevel"],
        ),
    ):
        card = card_of(directory)
        assert card.data.to_dict() == {
            "base_model": "base",
            "library_name": "transformers",
            "pipeline_tag": pipeline,
            "tags": tags,
        }
        assert f"A {kind} model, made from" in card.text and "with the data pairs.jsonl" in card.text
        assert str(world) not in card.content and not model_card.ABSOLUTE.search(card.content)
    text = card_of(aligned["all-weights"] / "policy").text
    summary = json.loads((aligned["all-weights"] / "results.json").read_text())["aligned"]
    assert f"{summary['win_rate']:.3f} ± {summary['win_rate_half_interval']:.3f}" in text
    assert re.search(r"\*\*On 8 completions of (\d|one) held-out prompts?; ± is half a 95% interval ", text)
    assert "kappa, the price of a nat of KL in win rate: 0.05" in text
    assert "beta, the weight of the KL at the start: 0.2" in text
    assert re.search(r"^    jaxrlhf align .*--score annotators:score", text, re.MULTILINE)


def test_adapters_and_the_best_step_have_cards_of_their_own(aligned):
    folder = aligned["adapters"]
    for directory in sorted(folder.rglob("adapter_config.json")):
        assert card_of(directory.parent).data.library_name == "peft"
    for kind in ("policy", "reward"):
        assert "These are the weights of the best evaluated step" in card_of(folder / "best" / kind).text


def test_the_base_on_a_hub_gives_its_licence_and_the_chain_keeps_its_name(tmp_path, monkeypatch):
    base = tmp_path / "cache"
    base.mkdir()
    front = "license: other\nlicense_name: mine\nlicense_link: LICENSE\nbase_model: an/ancestor\ndatasets: [an/other]"
    (base / "README.md").write_text(f"---\n{front}\n---\n# Tiny")
    monkeypatch.setattr(model_card, "local_directory", lambda path: base if str(path).startswith("org/") else path)
    settings = {"policy": pathlib.Path(f"org/tiny@{COMMIT}"), "data": f"org/pairs@{COMMIT}:data/train-*"}
    first = made(tmp_path / "first", supervised.Supervised(**settings), "policy")
    expected = {"base_model": "org/tiny", "license": "other", "license_name": "mine", "datasets": ["org/pairs"]}
    assert expected.items() <= card_of(first / "policy").data.to_dict().items()
    assert "license_link" not in card_of(first / "policy").data.to_dict()
    assert (
        f"made from org/tiny at commit {COMMIT} with the data org/pairs@{COMMIT}:data/train-*"
        in card_of(first / "policy").text
    )
    second = made(
        tmp_path / "second", direct.Direct(policy=first, data="hh-rlhf:harmless-base/test", loss="ipo"), "policy"
    )
    expected["datasets"] = ["Anthropic/hh-rlhf", "org/pairs"]
    assert expected.items() <= card_of(second / "policy").data.to_dict().items()
    assert (
        "made from first with" in card_of(second / "policy").text and "- beta: 0.1" in card_of(second / "policy").text
    )


@pytest.mark.parametrize("front", ["no metadata", "---\n[1, 2]\n---\n", "---\na: [\n---\n", "\udcff"])
def test_a_base_with_a_card_that_cannot_be_read_has_no_licence(tmp_path, front):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(front, errors="surrogateescape")
    run = made(tmp_path / "run", reward.Reward(policy=str(tmp_path / "base"), data="a.csv"), "reward")
    assert card_of(run / "reward").data.to_dict()["base_model"] == "base"
    assert "license" not in card_of(run / "reward").data.to_dict()


def test_a_new_model_has_no_base(tmp_path):
    run = made(tmp_path / "run", supervised.Supervised(data="a.txt"), "policy")
    assert "base_model" not in card_of(run / "policy").data.to_dict()
    assert "made from random weights with" in card_of(run / "policy").text


def test_reports_lose_paths_and_addresses_and_skipped_lines(tmp_path):
    config = direct.Direct(policy=pathlib.Path("/data/me/base"), data="../my data/pairs.jsonl")
    text = card_of(made(tmp_path / "run", config, "policy") / "policy").content
    assert (
        "twice, from file." in text
        and "/data" not in text
        and "judge.internal" not in text
        and "Skipped" not in text
        and "my data" not in text
    )
    assert (
        "2 steps.\n" in text
        and "The model is in" not in text
        and "Texts begin with &lt;s>." in text
        and "0.150 to 0.850" in text
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            direct.Direct(policy=pathlib.Path("/data/runs/sft"), data="a b/c d.csv", run="r", resume=True),
            "jaxrlhf dpo --data 'c d.csv' --policy sft",
        ),
        (
            direct.Direct(policy=pathlib.Path("org/tiny@main"), data="org/pairs:a", reference_free=True, beta=0.3),
            "jaxrlhf dpo --data org/pairs:a --policy org/tiny@main --beta 0.3 --reference-free",
        ),
        (
            align_config.Align(
                policy=pathlib.Path("b"), data="d", annotator="http://me:key@host/v1#judge", rewards=("m:f", "m:g"),
                reward_weights=(0.1, 0.2),
            ),
            "jaxrlhf align --annotator 'http://...#judge' --policy b --data d --rewards m:f --rewards m:g "
            "--reward-weights 0.1 0.2",
        ),
    ],
)  # fmt: skip
def test_the_command_is_the_users_without_what_says_where(config, expected):
    assert model_card.command_line(config) == expected


def test_a_card_that_a_person_wrote_or_edited_is_kept(tmp_path, capsys):
    config = direct.Direct(policy=pathlib.Path("b"), data="d")
    run = made(tmp_path / "run", config, "policy")
    path = run / "policy" / "README.md"
    written = path.read_text()
    model_card.write_cards(run, config, TOLD)
    assert path.read_text() == written and not capsys.readouterr().err
    for text in ("# Mine\n", written.replace("2 steps", "3 steps"), written + "More.\n"):
        path.write_text(text)
        model_card.write_cards(run, config, TOLD)
        assert path.read_text() == text
        assert (
            "README.md was not written by jaxrlhf, or was edited, and is kept; see README.jaxrlhf.md."
            in capsys.readouterr().err
        )
        assert model_card.is_own((run / "policy" / "README.jaxrlhf.md").read_text())
    assert sorted(each.name for each in (run / "policy").iterdir()) == ["README.jaxrlhf.md", "README.md", "config.json"]


def test_an_export_keeps_the_card_of_its_run(world, trained, tmp_path):
    policy, _ = trained
    for source, to in ((policy, tmp_path / "once"), (tmp_path / "once", tmp_path / "twice")):
        export.main(export.Export(source=source, to=to, dtype="bfloat16"))
        card = card_of(to)
        assert card.content.split("\n## Export")[0] == card_of(policy / "policy").content.split("\n\n<!--")[0] + "\n"
        assert (
            card.content.count("## Export") == 1
            and "--dtype bfloat16" in card.content
            and model_card.is_own(card.content)
        )
    export.main(export.Export(source=world / "base", to=tmp_path / "base copy"))
    assert card_of(tmp_path / "base copy").data.to_dict()["base_model"] == "base"
    assert "A policy model: the weights of base." in card_of(tmp_path / "base copy").text


@pytest.mark.slow
def test_the_code_of_a_card_loads_its_model(aligned, monkeypatch):
    for directory in sorted(path.parent for path in aligned["adapters"].rglob("README.md")):
        code = re.search(r"```python\n(.*?)```", card_of(directory).text, re.DOTALL)[1]
        names: dict = {}
        base = (
            json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
            if "BASE" in code
            else ""
        )
        exec(code.replace("DIR", str(directory)).replace("BASE", base), names)
        assert names["model"] is not None and names["tokenizer"] is not None
