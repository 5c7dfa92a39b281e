"""The doctor: what is well is said to be, and each thing that is wrong has a sentence with its remedy."""

import importlib.metadata
import os
import pathlib
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrlhf.commands import doctor
from jaxrlhf.training import diagnosis
from jaxrlhf.training.diagnosis import Finding


@pytest.fixture
def well(monkeypatch):
    """Every check but that of the output finds nothing wrong, at once."""
    monkeypatch.setattr(diagnosis, "smoke_error", lambda: 1e-5)
    monkeypatch.setattr(diagnosis, "file_system", lambda path: "ext4")
    monkeypatch.setattr(diagnosis, "LEAST_ROOM", 0)


def test_the_smoke_step_agrees_with_the_exact_gradient_and_can_fail(monkeypatch):
    found = diagnosis.smoke_step()
    assert not found.wrong
    assert "hypergradient" in found.rows["smoke step"]
    for error in (0.02, float("nan")):
        monkeypatch.setattr(diagnosis, "smoke_error", lambda error=error: error)
        (sentence,) = diagnosis.smoke_step().wrong
        assert "reinstall jax" in sentence

    def fail():
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr(diagnosis, "smoke_error", fail)
    assert diagnosis.smoke_step().wrong == [
        "The smoke step cannot be taken (no kernel image); reinstall jax and jaxlib."
    ]


def test_the_doctor_exits_with_0_and_leaves_nothing(well, tmp_path, capsys):
    doctor.main(doctor.Doctor(output=tmp_path / "runs" / "deep"))
    said = capsys.readouterr().out
    assert said.endswith("Nothing is wrong.\n")
    for name in (
        "python",
        "jaxlib",
        "devices",
        "processes",
        "mesh",
        "write access",
        "free room",
        "file system",
        "smoke",
    ):
        assert name in said
    assert not list(tmp_path.iterdir())


def test_the_doctor_exits_with_1_and_says_why(well, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        doctor.main(doctor.Doctor(output=tmp_path / "file", mesh="fsdp=3"))
    assert caught.value.code == 1
    sentences = capsys.readouterr().out.splitlines()[-2:]
    assert sentences[0] == "A mesh of fsdp 3 does not fit 1 devices; give another --mesh."
    assert sentences[1].endswith("file is a file; give --output a folder.")


def test_what_is_wrong_with_an_output(monkeypatch, tmp_path):
    assert "cannot be used (File name too long)" in diagnosis.output_folder(tmp_path / ("x" * 300)).wrong[0]
    assert diagnosis.output_folder(tmp_path).rows["write access"] == "yes"
    monkeypatch.setattr(diagnosis, "LEAST_ROOM", 1 << 80)
    monkeypatch.setattr(diagnosis, "file_system", lambda path: "tmpfs")
    room, memory = diagnosis.output_folder(tmp_path).wrong
    assert "make room, or give --output another disk" in room
    assert "is in memory (tmpfs) and lost at a restart" in memory

    def refuse(path, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    found = diagnosis.output_folder(tmp_path / "new")
    assert found.rows["write access"] == "no"
    assert (
        found.wrong[0] == f"The output folder {tmp_path} cannot be written (Permission denied); give --output another."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "kind"), [("/", "overlay"), ("/data/runs", "nfs4"), ("/data2", "overlay"), ("/with space/x", "xfs")]
)
def test_the_file_system_is_that_of_the_longest_mount(tmp_path, path, kind):
    (tmp_path / "mounts").write_text(
        "none / ext4 rw 0 0\nnone / overlay rw 0 0\nhost:/d /data nfs4 rw 0 0\ndisk /with\\040space xfs rw 0 0\n"
    )
    assert diagnosis.file_system(pathlib.Path(path), tmp_path / "mounts") == kind
    assert diagnosis.file_system(pathlib.Path(path), tmp_path / "none") == "unknown"


def test_a_device_that_jax_does_not_use_and_libraries_that_are_missing(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(diagnosis, "_has_nvidia", lambda: True)
    monkeypatch.setattr(diagnosis, "_has_tpu", lambda: False)
    works, found = diagnosis.devices()
    assert works
    assert found.wrong == ["This machine has a NVIDIA device that JAX does not use; pip install 'jax[cuda13]'."]
    monkeypatch.setattr(diagnosis, "_installed", lambda name: name == "jax-cuda13-plugin")
    (sentence,) = diagnosis.devices()[1].wrong
    assert sentence.endswith("look at its driver with nvidia-smi.")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert len(diagnosis.versions().wrong) == len(diagnosis.LIBRARIES) + 1

    def no_devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", no_devices)
    works, found = diagnosis.devices()
    assert not works
    assert "mend or unset JAX_PLATFORMS" in found.wrong[0]


def test_sums_are_checked(monkeypatch):
    devices = np.array([SimpleNamespace(process_index=index) for index in (0, 0, 1, 1)])
    mesh = SimpleNamespace(shape={"data": 4, "fsdp": 1}, axis_names=("data", "fsdp"), devices=devices.reshape(4, 1))
    monkeypatch.setattr(diagnosis, "_timed_sum", lambda *arguments: (0.5, 4.0))
    found = diagnosis.collectives(mesh, payload=1_000_000)
    # A ring sends 2 * 3/4 of a megabyte in half a second.
    assert found == Finding({"sum over data between processes": "1 MB in 500 ms, 3 MB/s a device"}, [])
    monkeypatch.setattr(diagnosis, "_timed_sum", lambda *arguments: (0.5, 3.0))
    assert "gave 3 in place of 4" in diagnosis.collectives(mesh).wrong[0]

    def fail(*arguments):
        raise RuntimeError("unreachable")

    monkeypatch.setattr(diagnosis, "_timed_sum", fail)
    assert "cannot sum over data (unreachable)" in diagnosis.collectives(mesh).wrong[0]


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def together(places, code=None):
    """Starts the doctor in two processes with two devices each, in the folders given; returns what each prints."""
    port = free_port()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    program = ["-c", code] if code else ["-m", "jaxrlhf.commands.main"]
    started = [
        subprocess.Popen(
            [sys.executable, *program, "doctor", "--mesh", "fsdp=2,data=-1", "--output", output,
             "--processes", f"127.0.0.1:{port},2,{index}"],
            cwd=place, env=os.environ | {"XLA_FLAGS": flags, "INDEX": str(index)}, stdout=subprocess.PIPE, text=True,
        )
        for index, (place, output) in enumerate(places)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return said, [process.returncode for process in started]


def test_two_processes_with_two_devices_each_and_what_one_of_them_finds(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    places = [(tmp_path, "runs"), (tmp_path / "elsewhere", "runs")]
    # The second one has another version, and a folder of its own.
    code = (
        "import importlib.metadata as metadata, os, sys\n"
        "version = metadata.version\n"
        "if os.environ['INDEX'] == '1': metadata.version = lambda name: '9' if name == 'optax' else version(name)\n"
        "from jaxrlhf.commands import main\n"
        "main.main()"
    )
    (first, second), ends = together(places, code=code)
    assert ends == [1, 1]
    for part in (
        "4 (4 x cpu), 2 of this process",
        "2, this is 0",
        "data 2 x fsdp 2",
        "sum over data between processes",
    ):
        assert part in first
    assert "sum over fsdp  " in first
    assert "process 1: optax is 9 here and " in first
    assert "process 1: The output runs is not the first process's folder; give all of them one" in first
    assert "jaxrlhf doctor" not in second
    assert not list(tmp_path.rglob(".jaxrlhf*"))


@pytest.mark.slow
def test_two_processes_that_are_well_and_one_whose_output_is_a_file(tmp_path):
    (first, _), ends = together([(tmp_path, "runs")] * 2)
    assert ends == [0, 0], first
    assert first.endswith("Nothing is wrong.\n")
    (tmp_path / "file").write_text("")
    (first, _), ends = together([(tmp_path, "runs"), (tmp_path, "file")])
    assert ends == [1, 1]
    assert f"process 1: The output {tmp_path / 'file'} is a file; give --output a folder." in first
