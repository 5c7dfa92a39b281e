"""What the documentation site makes by itself: typeset formulas, pages of notebooks, and the list of public names."""

import dataclasses
import importlib.util
import inspect
import pathlib
import re
import xml.etree.ElementTree

import pytest

import jaxrlhf
from jaxrlhf import bilevel

ROOT = pathlib.Path(__file__).resolve().parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(f"website_{name}", ROOT / "website" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


formulas, notebook_pages, reference = map(load, ("formulas", "notebook_pages", "reference"))
PACKAGE = ROOT / "jaxrlhf"


@pytest.mark.parametrize(
    "text",
    [
        "grad Phi = E[grad_phi cost] + (1 / beta) Cov_pi(dG/dpi, grad_phi R).",
        "min_lambda  E_{pi_lambda}[cost(y0, y1, labels)] + kappa KL(pi_lambda || reference),",
        "V(s) = sum_a pi(a | s) [r(s, a) + gamma sum_s' P(s' | s, a) V(s')]",
    ],
)
def test_formulas_are_told_from_code(text):
    assert formulas.is_formula(text)


@pytest.mark.parametrize(
    "text",
    [
        "state, info = algorithm.step(key, state, data, frozen)",
        "algorithm = target_kl(make, target=5.0)",
        "jaxrlhf align --policy DIR --data prompts.jsonl",
        "python experiments/online_rlhf.py",
        "data       replicates the weights, splits the batch",
        "problem = language_problem(policy, ...)  # a comment",
    ],
)
def test_code_and_tables_are_no_formulas(text):
    assert not formulas.is_formula(text)


def test_symbols_are_set_as_symbols():
    (row,) = formulas.typeset("lambda*(phi) = argmax over lambda of J_0^-1").splitlines()
    text = "".join(xml.etree.ElementTree.fromstring(row).itertext())
    assert text == "λ∗(φ)=argmaxoverλofJ0−1"
    assert row.count("<msup>") == 2 and row.count("<msub>") == 1


def test_every_block_of_every_docstring_gives_well_formed_markup():
    """Brackets that do not close, and letters of markup, included."""
    blocks = [
        block for path in PACKAGE.rglob("*.py") for block in re.findall(r"\n\n((?:    .+\n)+)\n", path.read_text())
    ]
    assert len(blocks) > 500
    for text in [*blocks, "a < b & c [(", ") ] x_", "x^", "_", "*"]:
        for row in formulas.typeset(text).splitlines():
            xml.etree.ElementTree.fromstring(row)


def test_a_notebook_becomes_a_page_with_its_outputs():
    source = (ROOT / "notebooks" / "first_steps.ipynb").read_text()
    text, pictures = notebook_pages.page_of(source, "first_steps")
    assert text.startswith("# First steps")
    assert text.count("\n```python\n") == source.count('"cell_type": "code"') > 5
    assert len(pictures) == 2 and all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    assert all(f"]({name})" in text for name in pictures)
    assert '<a class="md-button" href="first_steps.ipynb" download>' in text


def test_every_exported_name_is_on_a_page_and_every_page_in_the_menu():
    names, menu = reference.public_names(PACKAGE), (ROOT / "mkdocs.yml").read_text()
    assert len(names) > 700
    on_page = {name.rpartition(".")[2] for name in names}
    assert set(bilevel.__all__) <= on_page
    # These two are modules, with pages of their own.
    assert set(jaxrlhf.__all__) - {"bilevel", "preferences", "objectives"} <= on_page
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"commands"}
    assert rooms == set(reference.ROOMS)
    assert all(f"reference/{room}.md" in menu for room in (*rooms, "commands"))
    assert {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")} <= set(
        re.findall(r"\S+\.md", menu)
    )


def test_a_name_that_a_module_shares_is_documented_as_the_function():
    home = reference.home(PACKAGE, PACKAGE / "bilevel", "boltzmann")
    assert home == "jaxrlhf.bilevel.rules.boltzmann.boltzmann"
    assert reference.home(PACKAGE, PACKAGE / "bilevel", "central") == "jaxrlhf.bilevel.central"
    assert inspect.isfunction(bilevel.boltzmann)


@pytest.mark.slow
def test_the_page_of_commands_has_every_option():
    from jaxrlhf.commands.main import COMMANDS

    text = reference.commands_page()
    for name, (kind, _) in COMMANDS.items():
        section = text.split(f"\n## jaxrlhf {name}\n")[1].split("\n## ")[0]
        for field in dataclasses.fields(kind):
            assert f"--{field.name.replace('_', '-')}" in section or field.name.upper() in section, (name, field.name)
