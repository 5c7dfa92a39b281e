"""One version everywhere, and workflows that run what is there."""

import pathlib
import re

import pytest

import jaxrlhf

ROOT = pathlib.Path(jaxrlhf.__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


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
