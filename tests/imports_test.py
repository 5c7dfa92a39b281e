"""What starting costs: the library and the list of commands load none of the large libraries."""

import ast
import importlib.metadata
import inspect
import json
import pathlib
import re
import resource
import subprocess
import sys
import tomllib

import pytest

import jaxrlhf
from jaxrlhf.commands import main

PACKAGE = pathlib.Path(jaxrlhf.__file__).parent
ROOT = PACKAGE.parent
NEVER = {"tensorflow", "torch", "transformers", "pandas"}
"""Loaded by no command of ours."""
FIGURES_AND_DATA = {"matplotlib", "tensorflow_datasets", "scipy"}
"""Loaded where a figure is drawn or data are prepared, and scipy by JAX where it needs it."""
MODELS = {"flax", "orbax", "grain", "tokenizers"}
"""Loaded by the commands that read models."""


HELP = "from jaxrlhf.commands import main\ntry: main.main()\nexcept SystemExit: pass"
LOADED = {
    "library": ("import jaxrlhf", NEVER | FIGURES_AND_DATA | MODELS),
    "help": (HELP, NEVER | FIGURES_AND_DATA | MODELS),
    "commands": ("import jaxrlhf.commands.align, jaxrlhf.commands.supervised", NEVER | FIGURES_AND_DATA),
}


@pytest.mark.parametrize("case", LOADED)
def test_what_is_not_loaded(case):
    code, absent = LOADED[case]
    script = f"import sys\nsys.argv[1:] = ['--help']\n{code}\nimport json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "jaxrlhf" in loaded
    assert not absent & loaded


def test_tensorflow_datasets_is_imported_at_the_top_of_one_module_only():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and "tensorflow_datasets" in ast.unparse(node):
                found.add(path.name)
    assert found == {"record_builder.py"}


@pytest.mark.parametrize("name", main.PLACES)
def test_a_command_that_is_not_named_is_listed_as_one_that_is(name):
    kind, run = main.COMMANDS[name]
    assert callable(run)
    described = main._kinds(["--help"])[name]
    assert described is not kind
    assert described.__doc__ == inspect.cleandoc(kind.__doc__)
    assert main._kinds([name, "--help"])[name] is kind
    assert main._kinds(["--tyro-print-completion", "bash"])[name] is kind


def test_the_licence_of_each_dependency_is_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w.-]+", entry)[0] for entry in project["dependencies"]}
    rows = re.findall(r"^\| `([\w.-]+)` \| ([^|]+) \|", (ROOT / "docs" / "dependencies.md").read_text(), re.MULTILINE)
    listed = {name: licence.strip() for name, licence in rows}
    assert names <= listed.keys()
    optional = {re.match(r"[\w.-]+", entry)[0] for part in project["optional-dependencies"].values() for entry in part}
    assert optional <= listed.keys()
    for name in names:
        about = importlib.metadata.metadata(name)
        claimed = about["License-Expression"] or " ".join(about.get_all("Classifier") or []) + (about["License"] or "")
        # Older versions may have had another one.
        families = [licence.split("-")[0].lower() for licence in listed[name].split(", formerly ")]
        assert any(family in claimed.lower() for family in families), f"{name} is {claimed[:200]}"


def cpu_seconds(*arguments):
    """The least CPU seconds, of three runs, of Python with the arguments."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, timeout=300)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


@pytest.mark.slow
def test_starting_costs_little_beside_jax():
    """Measured: 1.15 times `import jax` for the library, 1.5 times for the help; machines differ, the ratio hardly."""
    jax = cpu_seconds("-c", "import jax")
    assert cpu_seconds("-c", "import jaxrlhf") < 1.4 * jax
    assert cpu_seconds("-m", "jaxrlhf.commands.main", "--help") < 1.9 * jax
