"""One version everywhere, and workflows that run what is there."""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

import jaxrlhf

ROOT = pathlib.Path(jaxrlhf.__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEADING = r"^## (\d+\.\d+\.\d+) \((unreleased|\d{4}-\d{2}-\d{2})\)$"


def test_the_version_is_the_same_everywhere():
    heading = re.search(
        r"^## (\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert heading[1] == cited[1] == jaxrlhf.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", jaxrlhf.__version__)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_scripts_that_exist(path):
    text = path.read_text()
    for script in re.findall(r"bash (\S+)", text):
        assert (ROOT / script).is_file()
    for extra in re.findall(r"\.\[(\w+)\]", text):
        assert re.search(rf"^{extra} = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert "timeout-minutes:" in text
    assert "permissions:" in text


def releases(changelog):
    """The versions and dates of a changelog's headings, from the newest."""
    headings = re.findall(r"^## .*$", changelog, re.MULTILINE)
    found = [re.fullmatch(HEADING, heading) for heading in headings]
    assert all(found), f"a heading is not '## VERSION (DATE or unreleased)': {headings}"
    return [(tuple(map(int, each[1].split("."))), each[2]) for each in found]


def check_order(changelog):
    """Versions and dates fall, and only the first may be unreleased."""
    found = releases(changelog)
    versions, dates = ([each[place] for each in found] for place in (0, 1))
    assert versions == sorted(set(versions), reverse=True)
    assert "unreleased" not in dates[1:]
    released = [date for date in dates if date != "unreleased"]
    assert released == sorted(released, reverse=True)


def test_the_changelog_is_in_order():
    check_order((ROOT / "CHANGELOG.md").read_text())
    good = "## 0.2.0 (unreleased)\n- x\n## 0.1.1 (2026-02-01)\n## 0.1.0 (2026-01-01)\n"
    check_order(good)
    for old, new in (("0.2.0", "0.1.1"), ("2026-02-01", "unreleased"), ("2026-02-01", "2025-02-01"), ("(2026", "2026")):
        with pytest.raises(AssertionError):
            check_order(good.replace(old, new, 1))


def test_every_supported_python_and_architecture_is_tested():
    checks = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    matrix = checks["jobs"]["checks"]["strategy"]["matrix"]
    assert matrix["python"][0] == PROJECT["requires-python"].removeprefix(">=")
    assert {"ubuntu-latest", "ubuntu-24.04-arm"} <= set(matrix["os"])
    runs = " ".join(path.read_text() for path in WORKFLOWS)
    for versions in ("lowest", "newest"):
        assert f"versions: {versions}" in runs
    assert "bash .ci/versions main" in runs


def test_scripts_of_the_checks_are_clean():
    checker = shutil.which("shellcheck") or str(pathlib.Path(sys.executable).with_name("shellcheck"))
    command = [checker] if pathlib.Path(checker).is_file() else ["bash", "-n"]
    for name in ("run", "distributions", "versions"):
        done = subprocess.run([*command, ROOT / ".ci" / name], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_minimums_that_no_resolution_reaches_are_named():
    spec = importlib.util.spec_from_file_location("minimums", ROOT / ".ci" / "minimums.py")
    minimums = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(minimums)
    project = {"dependencies": ["Jax>=0.10", "flax>=0.12"], "optional-dependencies": {"test": ["pytest"]}}
    assert minimums.missed(project, "jax==0.10.0\nflax==0.12.1\n") == [
        "flax>=0.12 cannot be had with the others; the lowest is 0.12.1.",
        "pytest names no minimum, such as pytest>=1.0.",
    ]
    assert minimums.missed(project, "jax==0.10.0\n")[0] == "flax was not resolved."
    # Each minimum of ours is named.
    entries = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    named = [re.sub(r"\[\w+\]", "", entry).replace(">=", "==") for entry in entries]
    assert minimums.missed(PROJECT, "\n".join(named)) == []


@pytest.mark.slow
def test_the_wheel_and_the_sdist_work_in_environments_of_their_own():
    """Needs a package index."""
    done = subprocess.run(["bash", ROOT / ".ci" / "distributions"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("Nothing is wrong.") == 2
