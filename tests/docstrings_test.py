"""The examples in docstrings, run as a reader pastes them; numbers are compared in the digits that are shown."""

import doctest
import importlib
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "jaxrlhf"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text())
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


class Checker(doctest.OutputChecker):
    """Outputs agree if their texts do, and each number with a point to one unit in the last digit that is shown."""

    def check_output(self, want, got, optionflags):
        if NUMBER.sub("#", want) != NUMBER.sub("#", got):
            return False
        pairs = zip(NUMBER.findall(want), NUMBER.findall(got), strict=True)
        return all(abs(float(shown) - float(real)) <= 10.0 ** -len(shown.split(".")[1]) for shown, real in pairs)


def failures_of(test):
    report = []
    doctest.DocTestRunner(Checker()).run(test, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("name", [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in MODULES])
def test_examples_print_what_they_say(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for test in finder.find(importlib.import_module(name)) if test.examples]
    assert found
    for test in found:
        # Each starts with its own imports, as on its page.
        test.globs = {"__name__": "__main__"}
        assert not failures_of(test)


def test_a_wrong_digit_or_word_fails():
    for shown, fails in (("[0.73, 'a']", False), ("[0.75, 'a']", True), ("[0.73, 'b']", True)):
        text = f">>> [0.7310585, 'a']\n{shown}\n"
        test = doctest.DocTestParser().get_doctest(text, {}, "example", None, 0)
        assert bool(failures_of(test)) is fails


def test_the_names_that_people_compose_have_an_example():
    examples = sum(path.read_text().count("    Examples:\n        >>> ") for path in MODULES)
    assert examples >= 20
