"""Several local processes compute what one does; if one dies, the others stop and name it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf.algorithms.methods import METHODS
from jaxrlhf.training.processes import (
    ProcessAddress,
    connect,
    gathered,
    lost_processes,
    parse_process_address,
    split_over_processes,
)

JUDGE = """
import os, pathlib

def score(prompts, completions):
    with (pathlib.Path(__file__).parent / f"asked-{os.environ['WHO']}").open("a") as stream:
        stream.write(f"{len(prompts)}\\n")
    return [float(text.split().count("sun")) - float(text.split().count("rain")) for text in completions]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_world):
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "judges.py").write_text(JUDGE)
    return folder


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def begin(world, name, count, *options, steps=2, devices=1):
    """Starts a run in `count` processes, each with `devices` simulated devices; returns them."""
    port, started = free_port(), []
    for index in range(count):
        place = ["--processes", f"127.0.0.1:{port},{count},{index}"] if count > 1 else []
        command = [
            sys.executable, "-m", "jaxrlhf.commands.main", "align", "--policy", "base", "--data", "pairs.jsonl",
            "--score", "judges:score", "--steps", str(steps), "--batch-size", "4", "--pairs", "2", "--max-new-tokens", "6",
            "--evaluations", "1", "--evaluation-answers", "8", "--run", name, "--resume", *place, *options,
        ]  # fmt: skip
        said = (world / f"said-{name}-{index}").open("w")
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"WHO": f"{name}-{index}", "XLA_FLAGS": flags}
        started.append(subprocess.Popen(command, cwd=world, env=environment, stdout=said, stderr=said))
    return started


def finish(world, name, processes, *, seconds=1500):
    """Waits for a run's processes and kills those that take longer; returns the exit codes."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def said(world, name, index):
    return (world / f"said-{name}-{index}").read_text()


def questions(world, who):
    path = world / f"asked-{who}"
    return sum(map(int, path.read_text().split())) if path.is_file() else 0


def asked_in_steps(world, name):
    """Returns the labelled samples of training steps; those of evaluations have one pair a prompt."""
    lines = map(json.loads, (world / "runs" / name / "labels.jsonl").read_text().splitlines())
    return [line for line in lines if len(line["labels"][0]) == 2]


def models_of(world, name):
    return [load_file(world / "runs" / name / kind / "model.safetensors") for kind in ("policy", "reward")]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_compute_what_one_does(world, count):
    """The same tokens, labels and final states; each process annotates its part."""
    several, one = f"several-{count}", f"one-{count}"
    for name, processes in ((several, count), (one, 1)):
        started = begin(world, name, processes, "--keep-best", "1")
        assert finish(world, name, started) == [0] * processes, said(world, name, 0)
    both = (models_of(world, name) + models_of(world, f"{name}/best") for name in (several, one))
    for ours, theirs in zip(*both, strict=True):
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    whole = questions(world, f"{one}-0")
    assert [questions(world, f"{several}-{index}") for index in range(count)] == [whole // count] * count
    labels = [(world / "runs" / name / "labels.jsonl").read_text() for name in (several, one)]
    assert labels[0] == labels[1]
    assert "align" in said(world, several, 0) and "align  " not in said(world, several, 1)


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_run_resumes(world):
    whole = begin(world, "whole", 4, steps=150)
    assert finish(world, "whole", whole) == [0] * 4, said(world, "whole", 0)
    processes = begin(world, "killed", 4, "--checkpoint-steps", "2", steps=150)
    metrics = world / "runs" / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 6):
        assert time.monotonic() < deadline, said(world, "killed", 0)
        time.sleep(0.05)
    processes[2].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    ends = finish(world, "killed", processes, seconds=60)
    assert time.monotonic() - killed < 60 and all(ends)
    assert any(
        "process 2 of 4 is gone" in said(world, "killed", index) or "task:2" in said(world, "killed", index)
        for index in (0, 1, 3)
    )
    again = begin(world, "killed", 4, "--checkpoint-steps", "2", steps=150)
    assert finish(world, "killed", again) == [0] * 4, said(world, "killed", 0)
    for ours, theirs in zip(models_of(world, "killed"), models_of(world, "whole"), strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_devices(world):
    for name, stages in {
        "one-device": [(6, 1, ())],
        "fewer": [(3, 4, ("--mesh", "fsdp=4")), (6, 1, ())],
        "more": [(3, 1, ()), (6, 4, ("--mesh", "fsdp=2,tensor=2", "--microbatches", "2"))],
    }.items():
        for steps, devices, options in stages:
            started = begin(world, name, 1, *options, steps=steps, devices=devices)
            assert finish(world, name, started) == [0], said(world, name, 0)
    labels = {name: asked_in_steps(world, name) for name in ("one-device", "fewer", "more")}
    for name in ("fewer", "more"):
        assert labels[name] == labels["one-device"] and len(labels[name]) == 6
        for ours, theirs in zip(models_of(world, name), models_of(world, "one-device"), strict=True):
            for path in theirs:
                np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "bilevel"])
def test_every_method_does_on_two_devices_what_it_does_on_one(world, method):
    options = ("--method", method, "--reuse", "1", "--labels-per-step", "6")
    for devices, mesh in ((1, ()), (2, ("--mesh", "fsdp=2"))):
        started = begin(world, f"{method}-{devices}", 1, *options, *mesh, devices=devices)
        assert finish(world, f"{method}-{devices}", started) == [0], said(world, f"{method}-{devices}", 0)
    one, two = (sorted((world / "runs" / f"{method}-{devices}").rglob("*.safetensors")) for devices in (1, 2))
    assert len(one) == len(two) == 1 + (METHODS[method].learns == "reward")
    for ours, theirs in zip(map(load_file, two), map(load_file, one), strict=True):
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_process_addresses_are_parsed():
    assert parse_process_address("auto") is None
    assert parse_process_address("10.0.0.1:1234,4,3") == ProcessAddress("10.0.0.1:1234", 4, 3)
    for text in ("10.0.0.1,4,0", "host:1,2", "host:1,2,2", "host:x,2,1", ""):
        with pytest.raises(ValueError, match="auto or HOST:PORT,COUNT,INDEX"):
            parse_process_address(text)


def test_a_single_process_needs_no_communication():
    assert lost_processes() == [] and split_over_processes(len) is len
    tree = gathered({"a": np.arange(3)})
    np.testing.assert_array_equal(tree["a"], np.arange(3))


def test_a_missing_first_process_is_waited_for_and_named():
    with pytest.raises(ValueError, match=r"The first process does not answer at 127\.0\.0\.1"):
        connect(ProcessAddress(f"127.0.0.1:{free_port()}", 2, 1), seconds=0)
