"""The launch files: their lines parse, the doctor comes first, and what was stopped is started again and continues.

`stand_ins` has srun, gcloud and xpk, which start the processes on this machine.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import tyro
import yaml

import jaxrlhf
from jaxrlhf.commands import configuration
from jaxrlhf.commands.doctor import Doctor
from jaxrlhf.commands.main import COMMANDS

ROOT = pathlib.Path(jaxrlhf.__file__).parents[1]
LAUNCH = ROOT / "launch"
STAND_INS = pathlib.Path(__file__).parent / "stand_ins"
SKYPILOT = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
SCRIPTS = {path.name: path.read_text() for path in (*LAUNCH.glob("*.sh"), *STAND_INS.iterdir())} | {
    f"skypilot {part}": f"#!/usr/bin/env bash\n{SKYPILOT[part]}" for part in ("setup", "run")
}
TRAINERS = ("sft", "reward", "dpo", "align")
LINE = ["align", "--policy", "a model", "--data", "prompts.jsonl", "--annotator", "judges:prefer", "--run", "mine"]
SLICE = {"TPU": "slice", "ZONE": "z", "TYPE": "v5litepod-16", "VERSION": "v2", "PAUSE": "0", "TRIES": "12", "PORT": "1"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_clean(name):
    checker = shutil.which("shellcheck") or str(pathlib.Path(sys.executable).with_name("shellcheck"))
    if not pathlib.Path(checker).is_file():
        checker = ""
    done = subprocess.run(
        [checker, "-"] if checker else ["bash", "-n"], input=SCRIPTS[name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with the stand-ins on PATH, and jaxrlhf's too unless `bin` has another."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{STAND_INS}:{os.environ['PATH']}")
    monkeypatch.setenv("WORLD", str(tmp_path))
    monkeypatch.setenv("RECORD", str(tmp_path / "calls"))
    for name in ("PROCESSES", "DOCTOR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    shutil.copytree(LAUNCH, tmp_path / "tree" / "launch")
    return tmp_path


@pytest.fixture
def clone(world):
    """A committed clone with the launch files alone."""
    folder = world / "clone"
    shutil.copytree(LAUNCH, folder / "launch")
    (folder / "mine.py").write_text("")
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for arguments in (["init", "--quiet"], ["add", "launch"], [*author, "commit", "--quiet", "--message", "All of it"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


def launched(script, *arguments, root=None, **environment):
    # A checkout without an environment of its own, whose jaxrlhf would come before the stand-in.
    root = pathlib.Path(os.environ["WORLD"]) / "tree" if root is None else root
    return subprocess.run(
        ["bash", str(root / "launch" / script), *arguments],
        cwd=root, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def calls(world):
    """The command lines that reached jaxrlhf, but those with --print-config."""
    path = world / "calls"
    lines = [call.split("\x1f")[:-1] for call in path.read_text().split("\x1e")[:-1]] if path.is_file() else []
    return [line for line in lines if "--print-config" not in line]


def understood(line):
    """The configuration of a command line, by the command's own parser; the doctor's file is one of `align`."""
    return tyro.cli(COMMANDS[line[0]][0], args=line[1:])


def is_run_that_continues(line):
    config = understood(line)
    return config.resume and config.run == "mine"


@pytest.mark.parametrize("command", TRAINERS)
def test_the_settings_that_the_scripts_read_are_printed_so(command, capsys):
    for given, wanted in (
        ([], ("run: null", "resume: false", "processes: null")),
        (["--run", "mine", "--resume"], ("run: mine", "resume: true")),
    ):
        with pytest.raises(SystemExit):
            configuration.parse(COMMANDS[command][0], [*given, "--print-config"], command)
        printed = capsys.readouterr().out.splitlines()
        assert set(wanted) <= set(printed)


def test_the_doctor_takes_the_settings_of_any_command(tmp_path, capsys):
    with pytest.raises(SystemExit):
        configuration.parse(
            COMMANDS["align"][0], ["--output", "elsewhere", "--mesh", "fsdp=2", "--print-config"], "align"
        )
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    config = configuration.parse(Doctor, ["--config", str(tmp_path / "run.yaml")], "doctor")
    assert config == Doctor(output=pathlib.Path("elsewhere"), mesh="fsdp=2")
    # Its own file is read as strictly as any, and it is the only command that takes those of others.
    (tmp_path / "own.yaml").write_text("command: doctor\nsteps: 3\n")
    with pytest.raises(ValueError, match="steps"):
        configuration.parse(Doctor, ["--config", str(tmp_path / "own.yaml")], "doctor")
    with pytest.raises(ValueError, match="settings of jaxrlhf align, not of jaxrlhf sft"):
        configuration.parse(COMMANDS["sft"][0], ["--config", str(tmp_path / "run.yaml")], "sft")


def test_the_doctor_comes_first_and_the_run_continues(world):
    assert launched("run.sh", *LINE).returncode == 0
    doctor, run = calls(world)
    assert doctor[:2] == ["doctor", "--config"]
    assert run == [*LINE, "--resume"] and is_run_that_continues(run)


def test_a_run_of_several_processes_and_one_without_a_doctor(world):
    launched("run.sh", *LINE, "--resume", PROCESSES="auto", DOCTOR="off")
    assert calls(world) == [[*LINE, "--resume", "--processes", "auto"]]
    launched("run.sh", *LINE, "--processes=h:1,2,0", PROCESSES="auto", DOCTOR="off")
    assert calls(world)[1] == [*LINE, "--processes=h:1,2,0", "--resume"]


def test_what_is_no_run_is_passed_on(world):
    for line in (["sample", "--policy", "p"], ["--help"], ["align", "--help"], ["doctor"]):
        launched("run.sh", *line)
        assert calls(world)[-1] == line
    launched("run.sh", "evaluate", "--policy", "p", PROCESSES="auto")
    assert [line[0] for line in calls(world)[-2:]] == ["doctor", "evaluate"]
    assert calls(world)[-1] == ["evaluate", "--policy", "p"]


def test_a_run_without_a_name_and_a_machine_that_is_not_well_start_nothing(world):
    done = launched("run.sh", "sft", "--policy", "p")
    assert done.returncode == 2 and "give --run NAME" in done.stderr
    assert launched("run.sh").returncode == 2
    assert calls(world) == []
    assert launched("run.sh", *LINE, DOCTOR_STATUS="1").returncode == 1
    assert [line[0] for line in calls(world)] == ["doctor"]


def slurm(tasks):
    return {"SLURM_JOB_ID": "7", "SLURM_NTASKS": str(tasks)}


@pytest.mark.parametrize("tasks", [1, 2])
def test_slurm_starts_every_task(world, tasks):
    assert launched("slurm.sh", *LINE, **slurm(tasks)).returncode == 0
    lines = calls(world)
    assert [line[0] for line in lines].count("doctor") == tasks
    runs = [line for line in lines if line[0] == "align"]
    assert len(runs) == tasks and all(map(is_run_that_continues, runs))
    assert {understood(run).processes for run in runs} == {None if tasks == 1 else "auto"}
    assert not (world / "scontrol").exists()


def test_a_slurm_job_that_fails_is_not_queued_again(world):
    assert launched("slurm.sh", *LINE, **slurm(2), RUN_STATUS="3").returncode == 3
    assert not (world / "scontrol").exists()
    options = re.findall(r"^#SBATCH (\S+)", SCRIPTS["slurm.sh"], re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@300"} <= set(options)


@pytest.mark.parametrize(
    ("job", "queued_again"),
    [
        ("JobState=RUNNING PreemptTime=2026-01-01T00:00:00", True),
        ("JobState=RUNNING PreemptTime=None", False),
        ("JobState=CANCELLED PreemptTime=2026-01-01T00:00:00", False),
    ],
)
def test_a_slurm_job_that_ends_in_the_time_that_a_preemption_leaves_is_queued_again(world, job, queued_again):
    (world / "job").write_text(f"JobId=7 JobName=jaxrlhf {job} Deadline=N/A\n")
    assert launched("slurm.sh", *LINE, **slurm(2), RUN_STATUS="143").returncode == 143
    assert (world / "scontrol").exists() == queued_again
    if queued_again:
        assert (world / "scontrol").read_text() == "requeue 7\n"
        (world / "scontrol").unlink()
        assert launched("slurm.sh", *LINE, **slurm(2)).returncode == 0
        assert not (world / "scontrol").exists()


@pytest.mark.parametrize("restarts", [0, 100])
def test_a_slurm_job_at_its_time_limit_stops_the_run_and_is_queued_again(world, restarts):
    (world / "bin" / "jaxrlhf").write_text(
        f"""#!/usr/bin/env bash
trap 'echo stopped >> "{world}/stopped"; exit 143' TERM
case " $* " in *" --print-config "* | " doctor "*) exec {STAND_INS}/jaxrlhf "$@" ;; esac
touch "{world}/running-$SLURM_PROCID"
for ((i = 0; i < 600; i++)); do sleep 0.05; done
"""
    )
    (world / "bin" / "jaxrlhf").chmod(0o755)
    environment = os.environ | slurm(2) | {"SLURM_RESTART_COUNT": str(restarts)}
    job = subprocess.Popen(
        ["bash", str(world / "tree" / "launch" / "slurm.sh"), *LINE],
        cwd=world / "tree", env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: len(list(world.glob("running-*"))) == 2, job)
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=30)[1]
    assert job.returncode == 143
    assert (world / "stopped").read_text() == "stopped\n" * 2
    if restarts:
        assert "queued 100 times again" in said and not (world / "scontrol").exists()
    else:
        assert (world / "scontrol").read_text() == "requeue 7\n"


def wait_until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "ended before"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.05)


def gcloud(world):
    return [line.split() for line in (world / "gcloud").read_text().splitlines()]


def test_a_tpu_slice_is_created_filled_used_and_deleted(world, clone):
    done = launched("tpu_vm.sh", *LINE, **SLICE, FILES="mine.py", KEEP="yes", root=clone)
    assert "delete" not in [line[0] for line in gcloud(world)]
    assert all((world / f"host-{index}" / "jaxrlhf" / "mine.py").is_file() for index in (0, 1))
    shutil.rmtree(world / "host-0")
    for name in ("state", "gcloud", "calls", "python3"):
        (world / name).unlink()
    done = launched("tpu_vm.sh", *LINE, **SLICE, root=clone)
    assert done.returncode == 0, done.stderr
    assert [line[0] for line in gcloud(world)] == ["describe", "create", "describe", "scp", "ssh", "ssh", "delete"]
    assert " ".join(gcloud(world)[1][1:]) == "slice --zone z --accelerator-type v5litepod-16 --version v2 --spot"
    asked = (world / "python3").read_text().splitlines()
    steps = sorted(" ".join(line.split()[1:3]) for line in asked)
    # The environment of the host that was left is used again.
    assert steps == ["pip install"] * 2 + ["uv pip"] * 2 + ["uv venv"]
    assert sum(line.endswith("-c constraints.txt .[tpu]") for line in asked) == 2
    runs = [line for line in calls(world) if line[0] == "align"]
    assert len(runs) == 2 and all(map(is_run_that_continues, runs))
    assert {understood(run).processes for run in runs} == {"127.0.0.1:1,2,0", "127.0.0.1:1,2,1"}
    assert understood(runs[0]).policy == pathlib.Path("a model")


def test_a_tpu_slice_that_is_there_stays_and_one_that_is_preempted_is_created_again(world, clone):
    for index in (0, 1):
        (world / f"host-{index}").mkdir()
    (world / "state").write_text("READY\n")
    assert launched("tpu_vm.sh", *LINE, **SLICE, root=clone).returncode == 0
    assert "delete" not in [line[0] for line in gcloud(world)]
    (world / "gcloud").unlink()
    # Is seen to be there, is preempted while the command runs, and again each time.
    (world / "state").write_text("CREATING\nREADY\nPREEMPTED\n")
    done = launched("tpu_vm.sh", *LINE, **SLICE, RUN_STATUS="1", SPOT="no", root=clone)
    asked = [line[0] for line in gcloud(world)]
    assert asked[:5] == ["describe", "describe", "scp", "ssh", "ssh"]
    assert asked[5:12] == ["describe", "describe", "delete", "describe", "create", "describe", "scp"]
    assert "--spot" not in gcloud(world)[9]
    # The second time it is still there after the failure, which is then the command's own.
    assert done.returncode == 1 and "the command failed, and slice is there" in done.stderr


def test_what_is_missing_is_named(world):
    slice_of = {name: value for name, value in SLICE.items() if name != "ZONE"}
    assert "set ZONE" in launched("tpu_vm.sh", *LINE, **slice_of).stderr
    assert "give a command" in launched("tpu_vm.sh", **SLICE).stderr
    assert "set IMAGE" in launched("xpk.sh", *LINE, CLUSTER="c", TYPE="v5litepod-16").stderr
    (world / "state").write_text("REPAIRING\n")
    done = launched("tpu_vm.sh", *LINE, **SLICE)
    assert done.returncode == 1 and "gave up after 12 tries" in done.stderr


def test_xpk_runs_the_command_in_the_image(world):
    done = launched("xpk.sh", *LINE, CLUSTER="c", TYPE="v5litepod-16", IMAGE="i", STORAGE="s", CAPACITY="spot")
    assert done.returncode == 0, done.stderr
    doctor, run = calls(world)
    assert doctor[0] == "doctor" and is_run_that_continues(run) and understood(run).processes == "auto"


def test_the_skypilot_job_runs_on_one_node_and_on_two(world, monkeypatch):
    for key, value in SKYPILOT["envs"].items():
        monkeypatch.setenv(key, value)
    for nodes, processes in ((1, None), (2, "10.0.0.1:8476,2,1")):
        node = {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
        subprocess.run(["bash", "-c", SKYPILOT["run"]], cwd=world / "tree", env=os.environ | node, check=True)
        doctor, run = calls(world)[-2:]
        assert doctor[0] == "doctor" and is_run_that_continues(run) and understood(run).processes == processes
    assert SKYPILOT["resources"]["use_spot"] and SKYPILOT["resources"]["job_recovery"]["strategy"]
    output = understood(run).output
    assert any(output.is_relative_to(place) for place in SKYPILOT["file_mounts"])


def test_the_kubernetes_job_starts_the_image_as_it_is_made_to_be(world):
    claim, service, job = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    values = {each["name"]: each.get("value", "1") for each in container["env"]}
    processes = re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], values["PROCESSES"])
    assert launched("run.sh", *container["args"], PROCESSES=processes).returncode == 0
    doctor, run = calls(world)
    assert doctor[0] == "doctor" and is_run_that_continues(run)
    # The first pod's name, and as many processes as pods.
    names = (job["metadata"]["name"], pod["subdomain"])
    assert understood(run).processes == f"{names[0]}-0.{names[1]}:8476,{spec['completions']},1"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
    mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    (store,) = (each["name"] for each in pod["volumes"] if "persistentVolumeClaim" in each)
    assert understood(run).output.is_relative_to(mounted[store])
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert pod["securityContext"]["runAsNonRoot"]


JUDGE = """
def score(prompts, completions):
    return [float(text.split().count("sun")) - float(text.split().count("rain")) for text in completions]
"""
STEPS = 20


@pytest.fixture
def real(world, make_world):
    """The world with a model, data, a judge, and jaxrlhf itself; returns the arguments of a run there."""
    make_world(world)
    (world / "judges.py").write_text(JUDGE)
    (world / "bin" / "jaxrlhf").write_text(
        f'#!/usr/bin/env bash\nexport PYTHONPATH={world}\nexec {sys.executable} -m jaxrlhf.commands.main "$@"\n'
    )
    (world / "bin" / "jaxrlhf").chmod(0o755)
    return [
        "align", "--policy", str(world / "base"), "--data", str(world / "pairs.jsonl"), "--score", "judges:score",
        "--steps", str(STEPS), "--batch-size", "4", "--pairs", "2", "--max-new-tokens", "6", "--evaluations", "1",
        "--evaluation-answers", "8", "--output", str(world / "runs"), "--run", "mine",
    ]  # fmt: skip


def steps_of(world):
    path = world / "runs" / "mine" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith(b"\n")]


def check_finished(world):
    """Every step was taken once by both processes together, and the models are there."""
    steps = steps_of(world)
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    config = json.loads((world / "runs" / "mine" / "config.json").read_text())
    assert config["resume"] is True
    assert (world / "runs" / "mine" / "policy" / "model.safetensors").is_file()


def free_job():
    """A job number from which JAX makes a port that is free."""
    for job in range(os.getpid(), os.getpid() + 1000):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", job % 2**12 + 65535 - 2**12 + 1))
            except OSError:
                continue
            return str(job)
    raise AssertionError("no port is free")


@pytest.mark.slow
def test_a_slurm_job_of_two_processes_that_reaches_its_limit_goes_on(world, real):
    environment = os.environ | slurm(2) | {"SLURM_JOB_ID": free_job()}
    with (world / "said").open("w") as said:
        job = subprocess.Popen(
            ["bash", str(world / "tree" / "launch" / "slurm.sh"), *real],
            cwd=world / "tree",
            env=environment,
            stdout=said,
            stderr=said,
        )
        wait_until(lambda: len(steps_of(world)) >= 3, job, seconds=900)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=300) == 143, (world / "said").read_text()
    taken = len(steps_of(world))
    assert 3 <= taken < STEPS
    assert (world / "scontrol").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    assert "Nothing is wrong." in (world / "said").read_text()
    again = launched_for_long("slurm.sh", real, environment | {"SLURM_RESTART_COUNT": "1"}, world / "tree")
    assert again.returncode == 0, again.stdout
    check_finished(world)


def launched_for_long(script, line, environment, root):
    return subprocess.run(
        ["bash", str(root / "launch" / script), *line],
        cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=1200,
    )  # fmt: skip


@pytest.mark.slow
def test_a_tpu_slice_of_two_hosts_that_is_preempted_goes_on(world, real, clone):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    with (world / "said").open("w") as said:
        run = subprocess.Popen(
            ["bash", str(clone / "launch" / "tpu_vm.sh"), *real],
            cwd=clone, env=os.environ | SLICE | {"PORT": str(port)}, stdout=said, stderr=said,
        )  # fmt: skip
        try:
            wait_until(lambda: len(steps_of(world)) >= 3, run, seconds=900)
            (world / "state").write_text("PREEMPTED\n")
            for process in processes_of(world):
                os.kill(process, signal.SIGTERM)
            assert run.wait(timeout=1200) == 0, (world / "said").read_text()
        finally:
            run.kill()
    assert [line[0] for line in gcloud(world)].count("create") == 2
    check_finished(world)


def processes_of(world):
    """The numbers of the Python processes of the run, which this test started."""
    found = []
    for place in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"align" in line and str(world / "runs").encode() in line and b"jaxrlhf.commands.main" in line:
            found.append(int(place.name))
    return found
