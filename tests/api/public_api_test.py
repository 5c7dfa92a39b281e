"""The public names and their signatures are those of `public_api.txt`, and old names work for as long as was said."""

import ast
import importlib
import importlib.util
import inspect
import pathlib
import re
import sys
import types
import warnings

import pytest

import jaxrlhf
from jaxrlhf import _deprecated

HERE = pathlib.Path(__file__).parent
PACKAGE = pathlib.Path(jaxrlhf.__file__).parent


@pytest.fixture(scope="module")
def listing():
    spec = importlib.util.spec_from_file_location("listing", HERE / "listing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def now(listing):
    return listing.listing()


def differences(before, after):
    """One line for each name that is gone, new or changed."""
    lines = [f"gone: {name}{before[name]}" for name in sorted(before.keys() - after.keys())]
    lines += [f"new: {name}{after[name]}" for name in sorted(after.keys() - before.keys())]
    both = sorted(before.keys() & after.keys())
    lines += [
        f"changed: {name}\n  from {before[name]}\n  to   {after[name]}" for name in both if before[name] != after[name]
    ]
    return lines


UPDATE = """\
The public names of jaxrlhf have changed. If that is meant: python tests/api/listing.py --write, a line in CHANGELOG.md,
and for what is gone or takes other arguments the old name for a while (CONTRIBUTING.md, "Public names").
"""


def test_the_public_names_are_those_of_the_file(listing, now):
    before = listing.read(listing.FILE.read_text())
    lines = differences(before, now)
    assert not lines, UPDATE + "\n".join(lines)
    assert listing.FILE.read_text() == listing.text(now), UPDATE


def test_the_file_holds_what_people_compose(now):
    for name in (
        "jaxrlhf.bilevel_descent",
        "jaxrlhf.bilevel.tangent",
        "jaxrlhf.lm.language_problem",
        "jaxrlhf.algorithms.replay.replay",
        "jaxrlhf.training.step.make_outer_step",
        "jaxrlhf.objectives.likelihood",
    ):
        assert name in now
    assert not any("._" in name or name.startswith("jaxrlhf.commands") for name in now)


def test_names_are_importable_and_arguments_are_those_that_python_sees(now):
    for name in ("jaxrlhf.bilevel_descent", "jaxrlhf.objectives", "jaxrlhf.lm.reward_model"):
        module, _, attribute = name.rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        if now[name] == ": module":
            assert inspect.ismodule(value)
            continue
        expected = list(inspect.signature(value).parameters)
        tree = ast.parse(f"def found{now[name]}: ...").body[0].args
        assert [each.arg for each in (*tree.posonlyargs, *tree.args, *tree.kwonlyargs)] == expected


def test_a_change_is_told(listing):
    before = {"a.f": "(x)", "a.g": "()", "a.C": "(NamedTuple)\n    x: int"}
    after = {"a.f": "(x, y=0)", "a.C": "(NamedTuple)\n    x: int", "a.h": "()"}
    assert differences(before, after) == ["gone: a.g()", "new: a.h()", "changed: a.f\n  from (x)\n  to   (x, y=0)"]
    assert listing.read(listing.text(before)) == before


def test_the_listing_of_a_package(listing, tmp_path, monkeypatch):
    room = tmp_path / "jaxrlhf" / "room"
    room.mkdir(parents=True)
    (tmp_path / "jaxrlhf" / "__init__.py").write_text("from jaxrlhf import room\n__all__ = ['room']\n")
    (room / "__init__.py").write_text("")
    (room / "part.py").write_text(
        "import os\nLIMIT = 3\n_hidden = 4\nclass C(dict):\n    x: int = 1\n    _y: int = 2\n"
        "    @property\n    def p(self): ...\n    def m(self, a, *, b=2) -> int: ...\n    def _n(self): ...\n"
        "def f(a, /, b: int, *c, d=None, **e) -> str: ...\n"
    )
    for folder in ("docs", "examples", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "README.md").write_text("")
    monkeypatch.setattr(listing, "ROOT", tmp_path)
    monkeypatch.setattr(listing, "PACKAGE", tmp_path / "jaxrlhf")
    assert listing.listing() == {
        "jaxrlhf.room": ": module",
        "jaxrlhf.room.part.C": "(dict)\n    x: int = 1\n    p: property\n    m(self, a, *, b=2) -> int",
        "jaxrlhf.room.part.LIMIT": ": constant",
        "jaxrlhf.room.part.f": "(a, /, b: int, *c, d=None, **e) -> str",
    }


def double(x, *, times=2):
    """Doubles."""
    return x * times


def warned(call, *arguments, **keywords):
    """The result of a call, and the one warning, which names this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call(*arguments, **keywords)
    (warning,) = caught
    assert warning.category is DeprecationWarning and warning.filename == __file__
    return result, str(warning.message)


def test_a_renamed_function_works_and_says_so():
    twice = _deprecated.renamed_function("twice", double, until="0.3.0")
    assert warned(twice, 3, times=4) == (12, "twice is now double; the old name is there until jaxrlhf 0.3.0.")
    assert twice.__name__ == "twice" and "until 0.3.0" in twice.__doc__
    assert inspect.signature(twice) == inspect.signature(double)


def test_renamed_arguments_work_under_both_names_but_not_at_once():
    renamed = _deprecated.renamed_arguments(until="0.3.0", factor="times")(double)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert renamed(3, times=5) == 15
    result, sentence = warned(renamed, 3, factor=5)
    assert result == 15
    assert sentence == "The argument factor of double() is now times; the old name is there until jaxrlhf 0.3.0."
    with pytest.raises(TypeError, match=r"double\(\) got times and its old name factor; give times alone"):
        renamed(3, factor=5, times=5)
    with pytest.raises(TypeError, match="unexpected keyword"):
        renamed(3, other=1)


def test_renamed_attributes_of_a_module(monkeypatch):
    module = types.ModuleType("old_place")
    module.__getattr__ = _deprecated.renamed_attributes(
        "old_place", {"descent": "jaxrlhf.bilevel.bilevel_descent"}, until="0.3.0"
    )
    monkeypatch.setitem(sys.modules, "old_place", module)
    value, sentence = warned(lambda: module.descent)
    assert value is jaxrlhf.bilevel_descent
    assert sentence.startswith("old_place.descent is now jaxrlhf.bilevel.bilevel_descent;")
    with pytest.raises(AttributeError, match="module 'old_place' has no attribute 'none'"):
        _ = module.none
    assert not hasattr(module, "none")
    with pytest.raises(ImportError):
        exec("from old_place import none")


def overdue(source, version):
    """The `until` of each old name in a source that a version should be without."""
    named = [re.findall(r"\d+", text) for text in re.findall(r'\buntil="([\d.]+)"', source)]
    return [".".join(parts) for parts in named if tuple(map(int, parts)) <= tuple(map(int, version.split(".")))]


def test_old_names_are_removed_when_it_was_said():
    source = 'x = renamed_function("a", b, until="0.3.0")\ny = renamed_arguments(until="0.10.0", a="b")'
    assert overdue(source, "0.2.9") == []
    assert overdue(source, "0.3.0") == ["0.3.0"]
    assert overdue(source, "1.0.0") == ["0.3.0", "0.10.0"]
    for path in PACKAGE.rglob("*.py"):
        if path.name != "_deprecated.py":
            assert overdue(path.read_text(), jaxrlhf.__version__) == [], f"{path.name} keeps old names for too long"
