"""Pages of the documentation, executed block by block as a reader pastes them; TRL's blocks if it is installed."""

import ast
import contextlib
import importlib.util
import io
import json
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tokenizers
import tyro

from jaxrlhf.commands import label_data, models
from jaxrlhf.commands.main import COMMANDS
from jaxrlhf.data import read_records
from jaxrlhf.lm import DecoderConfig, SpecialIds, decoder, save_decoder

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
TRL = "coming_from_trl.md"
WORDS = ("<s>", "</s>", "<pad>", "<unk>", "good", "bad", "day", "sun", "rain", "the", "a", ".", "?")
NUMBER = r"-?\d+\.\d+"
# Where the blocks of a page are executed. A block that is not has a comment above it, `<!-- not run: reason -->`.
EXECUTED = {
    "coming_from_trl.md": "docs_test.py",
    "configuration.md": "commands/configuration_test.py",
    "language_models.md": "readme_test.py",
    "price.md": "docs_test.py",
    "tutorials/bandit_by_hand.md": "docs_test.py",
    "tutorials/people_label.md": "docs_test.py",
    "tutorials/your_own_environment.md": "docs_test.py",
    "tutorials/your_own_model.md": "docs_test.py",
    "your_own_policy.md": "docs_test.py",
}


class Block(NamedTuple):
    """A fenced block: its language, its text, and the library it belongs to: "ours", "TRL" or "transformers"."""

    language: str
    code: str
    owner: str


def blocks_of(page):
    fence = r"^(<!-- not run: [^\n]+ -->\n)?```(\w+)\n(.*?)^```$"
    found = re.findall(fence, (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert {language for _, language, _ in found} <= {"python", "console", "text", "yaml"}
    return [Block(language, code, owner_of(code)) for mark, language, code in found if not mark]


def owner_of(code):
    first = code.splitlines()[0]
    return "TRL" if first.startswith("trl ") else first[2:] if first in ("# TRL", "# transformers") else "ours"


def execute(page, owner, names):
    """Runs an owner's blocks in the working directory and compares their output with the `text` block that follows.

    Numbers may differ by 0.15 plus a tenth: machines round differently, and samples change with rounding. Returns the
    namespace of the blocks; the output of each is in `printed`.
    """
    names["printed"], printed = [], ""
    for block in blocks_of(page):
        if block.owner != owner:
            continue
        if block.language == "text":
            assert re.sub(NUMBER, "#", printed) == re.sub(NUMBER, "#", block.code)
            expected, actual = (list(map(float, re.findall(NUMBER, text))) for text in (block.code, printed))
            np.testing.assert_allclose(actual, expected, atol=0.15, rtol=0.1, err_msg=printed)
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            if block.language == "console":
                for line in block.code.replace("\\\n", " ").splitlines():
                    run_command(line)
            elif re.match(r"# \w+\.py\n", block.code):
                pathlib.Path(block.code.split()[1]).write_text(block.code)
            else:
                exec(compile(block.code, page, "exec"), names)
        printed = output.getvalue()
        names["printed"].append(printed)
    return names


def run_command(line):
    """Runs a line of a console block; `runs/NAME-...` is the latest such folder."""
    program, name, *arguments = shlex.split(line)
    if program == "trl":
        subprocess.run([pathlib.Path(sys.executable).with_name("trl"), name, *arguments], check=True, timeout=300)
        return
    assert program == "jaxrlhf"
    arguments = [str(latest(part[:-3])) if part.endswith("-...") else part for part in arguments]
    kind, main = COMMANDS[name]
    main(tyro.cli(kind, args=arguments))


def latest(prefix):
    return max(pathlib.Path().glob(prefix + "*"), key=lambda folder: folder.stat().st_mtime)


def make_files(folder):
    """Writes the files that the page for users of TRL assumes: completions with sun are preferred to those with rain."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    shape = DecoderConfig(len(WORDS), 16, 1, 2, 1, 8, 32, context_length=32)
    params = decoder(shape).init(jax.random.key(0))
    save_decoder(folder / "base", shape, params, special=SpecialIds(0, (1,), 2), tokenizer=tokenizer)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    generator, lines = np.random.default_rng(0), []
    for _ in range(60):
        words = {
            side: generator.choice([word, "the", "."], generator.integers(2, 5))
            for side, word in (("chosen", "sun"), ("rejected", "rain"))
        }
        completions = {side: " " + " ".join([*chosen, chosen[0]]) for side, chosen in words.items()}
        prompt = " ".join(generator.choice(["good", "bad", "day", "the", "a"], 4)) + " ?"
        completions = {"chosen": completions["chosen"] + " sun", "rejected": completions["rejected"] + " rain"}
        lines.append({"prompt": prompt} | completions)
    for name, keys in (("preferences", ("prompt", "chosen", "rejected")), ("prompts", ("prompt",))):
        (folder / name).mkdir()
        rows = [json.dumps({key: line[key] for key in keys}) for line in lines]
        (folder / name / "train.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The working directory of the page for users of TRL, and the namespace of our blocks."""
    folder, names = tmp_path_factory.mktemp("trl"), {"__name__": "coming_from_trl"}
    make_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        execute(TRL, "ours", names)
        sys.modules.pop("weather")
    return folder, names


def test_every_block_of_code_is_executed_or_marked():
    """Every fence has a language, and every page with blocks that are not marked is executed where `EXECUTED` says."""
    for path in sorted(DOCS.rglob("*.md")):
        page, text = path.relative_to(DOCS).as_posix(), path.read_text()
        fences = re.findall(r"^ *```.*$", text, re.MULTILINE)
        assert all(re.fullmatch(r"```(\w+)?", fence) for fence in fences), page
        assert all(re.fullmatch(r"```\w+", fence) for fence in fences[::2]) and set(fences[1::2]) <= {"```"}, page
        marks = re.findall(r"^<!-- not run: \S.* -->\n```\w", text, re.MULTILINE)
        assert len(marks) == text.count("<!-- not run:"), page
        if any(block.language != "text" for block in blocks_of(page)):
            assert page in EXECUTED, f"{page}: execute its blocks, or mark them"
            assert path.name in (DOCS.parent / "tests" / EXECUTED[page]).read_text()


def test_the_bandit_by_hand():
    with jax.numpy_rank_promotion("allow"):
        names = execute("tutorials/bandit_by_hand.md", "ours", {"__name__": "bandit_by_hand"})
    values = [line[0] for line in numbers(names["printed"], "step")]
    (optimum,) = numbers(names["printed"], "optimum")[0]
    assert np.all(np.diff(values) < 0) and 0 <= values[-1] - optimum < 0.001
    assert np.all(np.isclose(jax.grad(names["G"])(names["phi"], names["REFERENCE"]), 0.0))


def test_the_page_on_labelling_writes_pairs_that_label_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute("tutorials/people_label.md", "ours", {"__name__": "people_label"})
    assert len(label_data.pairs_of(read_records("pairs.jsonl").records).pairs) == 4


@pytest.mark.slow
def test_an_environment_of_ones_own():
    with jax.numpy_rank_promotion("allow"):
        names = execute("tutorials/your_own_environment.md", "ours", {"__name__": "your_own_environment"})
    before, after = numbers(names["printed"], "true return")[0]
    assert before < -15 and after > -4


@pytest.mark.slow
def test_a_model_of_ones_own(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = execute("tutorials/your_own_model.md", "ours", {"__name__": "your_own_model"})
    sys.modules.pop("rewards")
    trained, compared = (
        json.loads((folder / "results.json").read_text())
        for folder in (tmp_path / "runs" / "sft", latest("runs/evaluate-"))
    )
    assert trained["after"]["perplexity"] < 2 < 100 < trained["before"]["perplexity"]
    assert compared["win_rate"] > 0.55 and compared["kl"] < 5
    assert names["printed"][-1].startswith("Can I return hats? ")


def test_what_the_page_for_users_of_trl_imports_and_calls_is_there():
    """The blocks themselves are executed by the slow tests."""
    blocks = [block for block in blocks_of(TRL) if block.owner == "ours"]
    commands = [block.code.replace("\\\n", " ") for block in blocks if block.language == "console"]
    lines = [line for command in commands for line in command.splitlines()]
    assert {shlex.split(line)[1] for line in lines if line.startswith("jaxrlhf ")} <= set(COMMANDS)
    trees = [ast.parse(block.code) for block in blocks if block.language == "python"]
    found = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [(node.module, name.name) for node in found for name in node.names if str(node.module).startswith("jaxrlhf")]
    assert len(ours) > 20
    for module, name in ours:
        loaded = importlib.import_module(module)
        assert hasattr(loaded, name) or importlib.util.find_spec(f"{module}.{name}"), (module, name)


@pytest.mark.slow
def test_our_side_of_the_page_for_users_of_trl(ours):
    folder, names = ours
    before, after = numbers(names["printed"], "held-out loss")[0]
    assert before == pytest.approx(np.log(2), abs=1e-3)
    assert after < 0.3
    wins = numbers(names["printed"], "win rate")
    assert len(wins) == 2
    assert all(last > first + 0.25 for first, last in wins)
    first, last = numbers(names["printed"], "suns per completion")[0]
    assert last > first + 0.2
    shapes = [models.open_model(folder / name, "policy").config for name in ("base", "dpo", "aligned")]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.slow
def test_transformers_loads_the_export(ours, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder, _ = ours
    monkeypatch.chdir(folder)
    names = execute(TRL, "transformers", {})
    assert names["printed"][0].startswith("<s> good day ?")


@pytest.mark.slow
def test_trls_side_of_the_page(request, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl", reason="TRL's blocks are executed only if trl is installed beside this library")
    folder, ours = request.getfixturevalue("ours")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    names = execute(TRL, "TRL", {"__name__": "trls_side"})
    accuracy, loss, scores = (text.splitlines()[-1] for text in names["printed"][:4] if text)
    assert float(accuracy) > 0.8
    assert json.loads(scores)[-1] > json.loads(scores)[0]
    # For the same policy and pairs, both libraries report the same loss.
    policy = models.open_model(folder / "trl" / "dpo", "policy")
    assert float(loss) == pytest.approx(float(ours["loss_of"](policy.params)), abs=1e-4)
    run_command("jaxrlhf evaluate --reward trl/reward --data preferences --max-length 24")
    results = json.loads((latest("runs/evaluate-") / "results.json").read_text())
    assert results["reward"]["accuracy"] > 0.8
    run_command(
        "jaxrlhf evaluate --policy trl/grpo --reference base --data prompts --score weather:suns --max-new-tokens 6"
    )
    assert json.loads((latest("runs/evaluate-") / "results.json").read_text())["win_rate"] > 0.7
    sys.modules.pop("weather")


def test_a_policy_a_model_and_an_annotator_of_ones_own():
    # As for a reader: rank promotion is allowed.
    with jax.numpy_rank_promotion("allow"):
        names = execute("your_own_policy.md", "ours", {"__name__": "your_own_policy"})
    before, after = numbers(names["printed"], "mean error")[0]
    assert after < 0.5 * before
    first, last = numbers(names["printed"], "win rate")[0]
    assert last > first + 0.2


def test_the_page_on_prices():
    with jax.numpy_rank_promotion("allow"):
        names = execute("price.md", "ours", {"__name__": "price"})
    printed = names["printed"]
    wins, nats = np.array(numbers(printed[:1], "price")).T[1:]
    assert np.all(np.diff(wins) < 0) and np.all(np.diff(nats) < 0)  # a higher price buys less
    runs = np.array(numbers(printed[1:2], "price"))  # price, beta, win rate, KL, marginal price
    np.testing.assert_allclose(runs[[0, 2], 2], runs[[1, 3], 2], atol=0.03)
    np.testing.assert_allclose(runs[:, 4], runs[:, 0], rtol=0.35)
    ratios = np.array(numbers(printed, "spread"))[:, 1::2]
    np.testing.assert_allclose(ratios[0], 4.0, atol=0.1)
    assert np.all(np.diff(ratios, axis=0) > 0)
    targets = np.array(numbers(printed, "target"))
    np.testing.assert_allclose(targets[:, 2], targets[:, 0], rtol=0.25)
    assert targets[0, 3] > targets[1, 3]  # the first nats buy the most


def numbers(printed, prefix):
    """The numbers of every printed line with this prefix."""
    lines = [line for text in printed for line in text.splitlines() if line.startswith(prefix)]
    return [list(map(float, re.findall(NUMBER, line))) for line in lines]
