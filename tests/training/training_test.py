"""Compilation over devices, the loop, and the run folder."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.loop import outer_steps
from jaxrlhf.training.run_folder import RunFolder
from jaxrlhf.training.step import check_batch, data_mesh

ROOT = pathlib.Path(__file__).parents[2]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"


def on_eight_devices(*arguments):
    """Runs `eight_devices.py`; returns its results by mesh."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    # In double precision: a stencil divides the rounding of iterates that have hardly parted by sigma. In float32 that
    # alone is 1e-2 of the hypergradient of stories260K under tensor=2, and of Four-Rooms under fsdp=8, and 1e-5 of that of
    # the enumerable language.
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_ENABLE_X64": "1"}
    command = [sys.executable, str(pathlib.Path(__file__).with_name("eight_devices.py")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@functools.cache
def small_problems():
    """Two problems in one process: it starts once."""
    return on_eight_devices("small")


@pytest.mark.parametrize(
    "problem",
    ["enumerable", *(pytest.param(name, marks=pytest.mark.slow) for name in ("four_rooms", "mixture", "stories260K"))],
)
def test_eight_devices_do_what_one_does(problem):
    """The same gradients, states and tokens; weights gathered one at a time, and nothing through the host."""
    stories = problem == "stories260K"
    if stories and not STORIES.is_dir():
        pytest.skip(f"the model {STORIES} is missing")
    if problem == "enumerable":
        found = small_problems()["enumerable"]
    else:
        found = on_eight_devices(problem, *[str(STORIES)] * stories)
    assert list(found) == ["fsdp=8", "tensor=2,data=4", "stencil=2,fsdp=4"]
    for mesh, row in found.items():
        assert row["gradients"] < 1e-5 and row["states"] < 1e-4, (mesh, row)
        assert row["hypergradient"] < 1e-5, (mesh, row)
        assert row["same_tokens"] and not row["host"], (mesh, row)
    if problem != "four_rooms":
        for mesh in ("fsdp=8", "stencil=2,fsdp=4"):
            assert 0 < found[mesh]["largest_collective"] <= 4, found[mesh]
    if stories:
        assert found["fsdp=8"]["share"] < 1.1 / 8


def test_devices_of_a_cpu_write_and_read_their_rows_in_parts():
    """Nothing but "has every row ended" goes from one to the other while they write."""
    found = small_problems()["microbatches"]
    assert set(found["microbatches"]) == {4}
    assert found["same_tokens"] and found["gradients"] < 1e-5
    assert 0 < found["bytes"] < 64


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    class FourDevices:
        shape = {"data": 2, "fsdp": 2}  # noqa: RUF012

    with pytest.raises(ValueError, match="batch of 6 prompts does not divide over 4 devices"):
        check_batch(6, FourDevices)  # pyright: ignore
    check_batch(8, FourDevices)  # pyright: ignore
    check_batch(3, data_mesh(jax.devices()[:1]))


def test_the_loop_reads_metrics_one_step_late_and_resumes():
    from jaxrlhf.bilevel import BilevelState

    def step(key, state, data, frozen):
        draw = jax.random.uniform(key)
        return state._replace(step=state.step + 1, upper=state.upper + draw * data), (state.step, draw)

    def start():
        return BilevelState(jnp.zeros((), jnp.int32), jnp.zeros(()), (), (), (), jnp.zeros(()))

    whole = list(outer_steps(step, start(), [1.0] * 6, None, key=jax.random.key(0)))
    assert [(progress.step, progress.info and int(progress.info[0])) for progress in whole] == [
        (1, None), (2, 0), (3, 1), (4, 2), (5, 3), (6, 4), (6, 5),
    ]  # fmt: skip
    *_, half = outer_steps(step, start(), [1.0] * 3, None, key=jax.random.key(0))
    *_, rest = outer_steps(step, half.state, [1.0] * 3, None, key=jax.random.key(0))
    assert rest.state.upper == whole[-1].state.upper
    assert list(outer_steps(step, start(), [], None, key=jax.random.key(0))) == []


def test_run_folders_do_not_overwrite_each_other(tmp_path):
    folders = [RunFolder(tmp_path / "runs", "study") for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    folder = folders[0]
    folder.append_metrics(step=1, loss=jnp.float32(0.5), worst=float("nan"))
    folder.append_metrics(step=2, loss=np.float64(np.inf))
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.5, "worst": None}, {"step": 2, "loss": None}]
    folder.write_json("config.json", {"path": pathlib.Path("a") / "b", "rows": (1, 2)})
    assert json.loads((folder.path / "config.json").read_text()) == {"path": "a/b", "rows": [1, 2]}


def test_an_output_that_is_not_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="give --output a"):
        RunFolder(tmp_path / "file", "study")
    with pytest.raises(ValueError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "below", "study")


def test_figures_are_written(tmp_path):
    draw_curves(tmp_path / "curves.png", {"a": ("x", "y", {"one": ([0, 1], [1, 2])}), "b": ("x", "y", {})})
    plain = (tmp_path / "curves.png").read_bytes()
    assert plain.startswith(b"\x89PNG")
    draw_curves(
        tmp_path / "band.png", {"a": ("x", "y", {"one": ([0, 1], [1, 2], [0, 1], [2, 3])}), "b": ("x", "y", {})}
    )
    assert (tmp_path / "band.png").read_bytes() != plain


def test_a_mesh_of_named_axes():
    from jaxrlhf.training.sharding import make_mesh, parse_mesh

    one = jax.devices()[:1]
    assert make_mesh(devices=one).shape == {"data": 1, "fsdp": 1, "tensor": 1, "stencil": 1}
    assert parse_mesh("tensor=2, data=-1") == {"tensor": 2, "data": -1}
    for sizes, message in (
        ({"fsdp": 8}, "A mesh of fsdp 8 does not fit 1 devices"),
        ({"fsdp": 3, "data": -1}, "does not fit 1 devices"),
        ({"rows": 1}, "not 'rows'"),
        ({"fsdp": 0}, "at least 1, or -1"),
        ({"fsdp": -1, "data": -1}, "Only one mesh axis"),
    ):
        with pytest.raises(ValueError, match=message):
            make_mesh(sizes, devices=one)
    for text in ("fsdp", "fsdp=many", "8"):
        with pytest.raises(ValueError, match="written as fsdp=8"):
            parse_mesh(text)


def test_arrays_are_split_by_the_names_of_their_dimensions():
    from jax.sharding import PartitionSpec

    from jaxrlhf.lm.transformer.axes import decoder_names
    from jaxrlhf.training.sharding import by_size, specification

    class Mesh:
        shape = {"data": 1, "fsdp": 4, "tensor": 2, "stencil": 3}  # noqa: RUF012

    def split(path, shape):
        return specification(decoder_names(path, shape), shape, Mesh)  # pyright: ignore

    weight = ("layers", "query_key_value", "weight")
    assert split(weight, (2, 8, 12)) == PartitionSpec(None, "fsdp", "tensor")
    assert split(("lowers", *weight), (3, 2, 8, 12)) == PartitionSpec("stencil", None, "fsdp", "tensor")
    assert split(("solver", "0", "mu", *weight), (2, 8, 13)) == PartitionSpec(None, "fsdp", None)
    assert split(("lowers", *weight), (5, 2, 6, 12)) == PartitionSpec(None, None, None, "tensor")
    assert split(("layers", "mlp_norm", "scale"), (2, 8)) == PartitionSpec(None, None)
    assert split(("embedding",), (8, 8)) == PartitionSpec("tensor", "fsdp")
    assert split(("layers", "gate_up", "up"), (3, 4, 2, 6)) == PartitionSpec(None, None, None, "tensor")
    assert split(("final_norm", "scale"), (8,)) == PartitionSpec(None)
    assert split(("lowers", "final_norm", "scale"), (3, 8)) == PartitionSpec("stencil", None)
    assert split(("step",), ()) == PartitionSpec()
    names = by_size(("table",), (3, 16))
    assert names == (None, "width") and by_size((), (7,)) == (None,)


def test_a_run_of_a_fixed_name_is_resumed_and_has_one_writer(tmp_path):
    first = RunFolder(tmp_path, "study", fixed="mine", resume=True)
    assert first.path == tmp_path / "mine" and not first.resumed
    with pytest.raises(ValueError, match=r"Another process \(process \d+ on .*\) writes .*mine; wait until"):
        RunFolder(tmp_path, "study", fixed="mine", resume=True)
    del first
    with pytest.raises(ValueError, match=r"There is a run in .*mine already; add --resume"):
        RunFolder(tmp_path, "study", fixed="mine")
    assert RunFolder(tmp_path, "study", fixed="mine", resume=True).resumed
    with pytest.raises(ValueError, match="needs a name of its own; give --run NAME"):
        RunFolder(tmp_path, "study", resume=True)
    for name in ("a/b", "..", ""):
        with pytest.raises(ValueError, match="that of one folder"):
            RunFolder(tmp_path, "study", fixed=name)


def test_a_killed_writer_releases_its_lock(tmp_path):
    code = (
        "import pathlib, sys, time; from jaxrlhf.training.run_folder import RunFolder;"
        "kept = RunFolder(pathlib.Path(sys.argv[1]), 'study', fixed='mine'); print('held', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {writer.pid} on"):
        RunFolder(tmp_path, "study", fixed="mine", resume=True)
    writer.kill()
    writer.wait(timeout=30)
    assert RunFolder(tmp_path, "study", fixed="mine", resume=True).resumed


def test_a_signal_asks_to_stop_once():
    import signal

    from jaxrlhf.training.preemption import stopping

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        with stopping() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop
            assert signal.getsignal(number) is before[number]
    assert {number: signal.getsignal(number) for number in before} == before
