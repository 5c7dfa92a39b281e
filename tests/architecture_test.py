"""The import directions of the design, the shape of the public surface, and what no committed file may hold."""

import ast
import pathlib
import re
import subprocess

import pytest

import jaxrlhf

ROOT = pathlib.Path(jaxrlhf.__file__).parent

# A part may import itself and what stands before it.
ORDER = [
    "_deprecated",
    "base", "bilevel", "preferences", "evaluation", "algorithms", "exact", "mdp", "control", "data", "lm", "annotation",
    "labelling", "known", "training", "commands", "__main__",
]  # fmt: skip
DOORS = {"objectives": "preferences", "bandit": "exact"}
NEVER = {("mdp", "lm"), ("lm", "mdp"), ("control", "lm"), ("lm", "control")}
OUTSIDE = {"jax", "numpy", "optax", "chex", "collections", "math", "typing"}
"""All that `base` and `bilevel` may import from elsewhere."""


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path):
    name = path.relative_to(ROOT).with_suffix("").parts[0]
    return DOORS.get(name, name)


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = part_of(path)
    assert part in ORDER, f"{part} has no place in the order"
    for name in imports(path):
        top, *rest = name.split(".")
        assert top != "experiments"
        if top == "jaxrlhf" and rest:
            other = rest[0]
            assert other in ORDER, f"{path.name} imports {name}; a door is for users"
            assert ORDER.index(other) <= ORDER.index(part), f"{path.name} imports {name}"
            assert (part, other) not in NEVER
        elif top != "jaxrlhf" and part in ("base", "bilevel"):
            assert top in OUTSIDE, f"{path.name} imports {name}"


def test_the_order_can_fail():
    assert ORDER.index("lm") > ORDER.index("bilevel")
    assert "jax.numpy" in set(imports(ROOT / "base" / "importance.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_definitions_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


LONGEST_FILE, LONGEST_FUNCTION, MOST_NESTED = 350, 70, 6


def functions_in(node):
    return [child for child in ast.walk(node) if isinstance(child, ast.FunctionDef) and child is not node]


def code_lines(function, lines):
    """Lines of a function that are neither blank, comment nor docstring."""
    documented = ast.get_docstring(function, clean=False) is not None
    docstring = range(function.body[0].lineno, function.body[0].end_lineno + 1) if documented else ()
    numbered = range(function.lineno, function.end_lineno + 1)
    stripped = [lines[number - 1].strip() for number in numbered if number not in docstring]
    return sum(bool(line) and not line.startswith("#") for line in stripped)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_on_a_screen(path):
    source = path.read_text()
    lines, tree = source.splitlines(), ast.parse(source)
    assert len(lines) <= LONGEST_FILE
    for function in functions_in(tree):
        assert code_lines(function, lines) <= LONGEST_FUNCTION, f"{path.name}: {function.name} is too long"
        assert len(functions_in(function)) <= MOST_NESTED, f"{path.name}: {function.name} holds too many functions"


def test_every_field_of_the_report_is_explained():
    text = (ROOT.parent / "docs" / "diagnostics.md").read_text()
    from jaxrlhf.bilevel import BilevelInfo

    for field in BilevelInfo._fields:
        assert f"| `{field}` |" in text


def test_no_file_names_a_machine_or_a_registry():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of committed files")
    hosts = re.compile(r"files\.pythonhosted|pypi\.org/simple|index-url|file:///|/root/|/home/\w+/")
    for name in listed.stdout.split():
        path = ROOT.parent / name
        if path.suffix in {".png", ".gif", ".safetensors"} or not path.exists() or path.name == "architecture_test.py":
            continue
        assert not hosts.search(path.read_text()), f"{name} names a machine or a registry"


def test_what_is_slow_to_import_is_imported_where_it_is_used():
    """A command that draws nothing starts without matplotlib, and none waits for scipy."""
    for path in FILES:
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        code = "\n".join(map(ast.unparse, top))
        assert not re.search(r"^(import|from) (matplotlib|scipy)\b", code, re.MULTILINE), path
