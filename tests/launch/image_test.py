"""The image: its file parsed and its RUN line run with stand-ins everywhere, built and run where there is a builder."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import tomllib

import pytest

import jaxrlhf

ROOT = pathlib.Path(jaxrlhf.__file__).parents[1]
FILE = ROOT / "launch" / "Dockerfile"


def instructions():
    """The instructions of the Dockerfile with their arguments, in order."""
    lines = [line for line in FILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [tuple(line.split(" ", 1)) for line in joined]


def arguments(name):
    return [text for found, text in instructions() if found == name]


def test_the_base_is_named_with_a_version():
    assert instructions()[0][0] == "ARG"
    (base,) = (text for text in arguments("ARG") if text.startswith("BASE="))
    assert re.fullmatch(r"BASE=docker\.io/library/python:3\.1[1-3]-slim", base)
    assert arguments("FROM") == ["${BASE}"]


def test_it_runs_the_launch_script_as_a_user_who_is_not_root():
    order = [name for name, _ in instructions()]
    assert arguments("USER") == ["1000"]
    assert order.index("USER") > max(index for index, name in enumerate(order) if name in ("RUN", "COPY"))
    assert "--uid 1000 " in arguments("RUN")[0]
    program, script = json.loads(arguments("ENTRYPOINT")[0])
    assert program == "bash"
    copied = [text.split() for text in arguments("COPY")]
    assert script.removeprefix(arguments("WORKDIR")[0] + "/") in {target for *_, target in copied}
    assert "ADD" not in order


def test_what_is_copied_is_there_and_reaches_the_builder():
    ignored = (FILE.parent / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"
    for text in arguments("COPY"):
        for source in text.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored


@pytest.mark.parametrize(
    ("accelerator", "package"), [("cpu", "."), ("cuda", ".[cuda]"), ("tpu", ".[tpu]"), ("gpu", None)]
)
def test_the_line_that_installs(tmp_path, accelerator, package):
    for name in ("python3", "pip", "useradd", "mkdir", "chown"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$(basename "$0") $*"\n')
        (tmp_path / name).chmod(0o755)
    # Without the machine's own: nothing may be created or installed here.
    programs = f"{tmp_path}:{pathlib.Path(shutil.which('basename')).parent}"
    environment = {"PATH": programs, "ACCELERATOR": accelerator}
    done = subprocess.run(
        ["/bin/sh", "-c", arguments("RUN")[0]], env=environment, capture_output=True, text=True, check=False
    )
    if package is None:
        assert done.returncode == 2 and "ACCELERATOR is cpu, cuda or tpu, not gpu." in done.stderr and not done.stdout
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["python3 -m venv /opt/venv", f"pip install -c constraints.txt {package}"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert accelerator == "cpu" or accelerator in extras


def builder():
    """The command that builds an image, from JAXRLHF_BUILD in the environment or docker if it answers."""
    given = os.environ.get("JAXRLHF_BUILD")
    if given:
        return shlex.split(given)
    if shutil.which("docker") is None:
        return None
    answers = subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=60).returncode == 0
    return ["docker", "build"] if answers else None


@pytest.mark.slow
def test_the_image_is_built_and_the_doctor_is_well_in_it():
    """The doctor runs in the container where docker builds; other builders only build."""
    command = builder()
    if command is None:
        pytest.skip("no docker that answers, and no JAXRLHF_BUILD")
    subprocess.run([*command, "-f", str(FILE), "-t", "jaxrlhf:test", "."], cwd=ROOT, check=True, timeout=1800)
    if command[0] == "docker":
        for line in (["doctor"], ["align", "--help"]):
            subprocess.run(["docker", "run", "--rm", "--init", "jaxrlhf:test", *line], check=True, timeout=300)
