"""The README and the guide to language models: their code runs, their commands parse, and links resolve."""

import ast
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tyro

from jaxrlhf.commands.main import COMMANDS
from jaxrlhf.commands.options import OWN
from jaxrlhf.lm import DecoderConfig, Prompts, decoder, save_decoder

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "language_models.md"
FOLDERS = ("docs", "experiments", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))])


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def guide_block(text):
    """The guide's only block of code that contains the text."""
    (code,) = (block for block in python_blocks(GUIDE) if text in block)
    return code


def test_the_example_runs_as_printed(tmp_path):
    (code,) = python_blocks(README)
    assert len(code.splitlines()) <= 15
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (promised,) = re.findall(r"It prints `(.*?)`", README.read_text())
    number = r"-?\d+\.\d+"
    assert re.sub(number, "#", done.stdout.strip()) == re.sub(number, "#", promised)
    before, after, best = map(float, re.findall(number, done.stdout))
    assert before < 0.3
    assert after > best - 0.1
    assert [before, after, best] == pytest.approx(list(map(float, re.findall(number, promised))), abs=0.05)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130


def test_the_call_site_of_the_guide_runs(tmp_path):
    shape = DecoderConfig(9, 16, 1, 2, 1, 8, 16, context_length=32)
    save_decoder(tmp_path, shape, decoder(shape).init(jax.random.key(0)))
    names = {
        "directory": tmp_path,
        "key": jax.random.key(1),
        "batches": [Prompts(jnp.full((2, 3), 4), jnp.ones((2, 3), bool))] * 2,
        "annotate": lambda sample: jnp.ones((2, 4, 1)),
    }
    exec(compile(guide_block("bilevel_descent(problem"), GUIDE.name, "exec"), names)
    assert names["state"].step == 2
    assert jnp.isfinite(names["info"].hypergradient_norm)


def test_the_set_up_lines_are_the_ones_that_ci_runs():
    lines = [line.strip() for line in README.read_text().splitlines() if line.startswith("    python3 -m venv")]
    assert len(lines) == 2
    assert lines[0].endswith("experiments/online_rlhf.py")
    assert lines[1].endswith("bin/pytest")
    assert all("-c constraints.txt" in line for line in lines)


def test_every_command_that_is_shown_is_understood():
    lines = [line for page in PAGES for line in page.read_text().replace("\\\n", " ").splitlines()]
    commands = re.compile(r"(    (\S+ )?(\.venv/bin/)?)?jaxrlhf [a-z]+ ")
    shown = [line.split("jaxrlhf ", 1)[1] for line in lines if commands.match(line)]
    # What comes from a file is tested with the page on such files; `...` stands for what a run needs.
    shown = [line for line in shown if "--config" not in line]
    shown = [re.sub(r"(?<= )\.\.\.(?= )", "--policy DIR --data FILE --annotator judges:prefer", line) for line in shown]
    assert len(shown) >= 50
    for line in shown:
        name, *arguments = shlex.split(line, comments=True)
        kind, _ = COMMANDS[name]
        assert isinstance(tyro.cli(kind, args=arguments), kind)


def test_every_option_that_a_page_names_exists():
    # Pages also name options of the scripts, whose configurations are dataclasses of their own.
    scripts = " ".join(path.read_text() for name in FOLDERS[1:] for path in (ROOT / name).glob("*.py"))
    fields = {name for kind, _ in COMMANDS.values() for name in kind.__dataclass_fields__} | set(OWN)
    for page in (README, *(ROOT / "docs").glob("*.md")):
        for option in re.findall(r"`--([a-z][a-z-]+)", page.read_text()):
            name = option.replace("-", "_")
            assert name in fields or f"    {name}: " in scripts, f"{page.name} names --{option}"


def test_the_functions_that_the_guide_shows_are_annotators():
    names = {}
    exec(guide_block("def prefer"), names)
    assert list(names["prefer"](["p", "p"], ["a", "long"], ["bb", "no"])) == [1.0, 0.0]
    assert list(names["score"](["p"], ["x" * 100])) == [-1.0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_code_map_names_every_package():
    text = (ROOT / "docs" / "code_map.md").read_text()
    for file in (ROOT / "jaxrlhf").rglob("*/__init__.py"):
        assert f"(../{file.parent.relative_to(ROOT).as_posix()})" in text


def test_blocks_of_python_parse():
    for page in PAGES:
        for code in python_blocks(page):
            ast.parse(code)
