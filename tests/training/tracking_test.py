"""Tracking: what is logged, and the message if a library is missing."""

import dataclasses
import math
import pathlib
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.training.tracking import tracker


@dataclasses.dataclass
class Config:
    rate: float = 1e-3
    policy: pathlib.Path = pathlib.Path("a") / "b"


def numbers(step):
    return {"loss": 1 / (step + 1), "kl": jnp.float32(0.5), "labels": np.int32(step), "gap": math.nan, "none": None}


def test_nothing_is_tracked_unless_asked_for(tmp_path):
    quiet = tracker(None, tmp_path, name="study", config=Config())
    quiet.log(0, numbers(0))
    quiet.close()
    assert list(tmp_path.iterdir()) == []


def events(path):
    """Reads the records of an event file: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16


def test_tensorboard_reads_back_what_was_logged(tmp_path, caplog):
    pytest.importorskip("tensorboardX")
    tracked = tracker("tensorboard", tmp_path, name="study", config=Config())
    for step in range(3):
        tracked.log(step, numbers(step))
    tracked.log(np.int32(3), {"loss": math.inf})  # pyright: ignore
    tracked.close()
    tracked.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    read = [(event.step, value) for event in events(path) for value in event.summary.value]
    assert b'"policy": "a/b"' in read[0][1].tensor.string_val[0]
    scalars = [(value.tag, step, value.simple_value) for step, value in read[1:]]
    assert scalars == [
        logged
        for step in range(3)
        for logged in [("loss", step, pytest.approx(1 / (step + 1))), ("kl", step, 0.5), ("labels", step, step)]
    ]
    assert not caplog.records


def fake_wandb():
    """Returns a fake wandb module with the functions we use, and the list of calls to it."""
    calls = []

    class Run:
        def define_metric(self, name, *, step_metric):
            calls.append(("define_metric", name, step_metric))

        def log(self, data):
            calls.append(("log", data))

        def finish(self):
            calls.append(("finish",))

    def init(*, project, name, dir, config):
        calls.append(("init", project, name, dir, config))
        return Run()

    module = types.ModuleType("wandb")
    module.__dict__.update(init=init, Error=type("Error", (Exception,), {}))
    return module, calls


def test_wandb_gets_every_step_even_if_steps_restart(tmp_path, monkeypatch):
    module, calls = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracked = tracker("wandb", tmp_path, name="study", config=Config())
    tracked.log(1, numbers(1))
    tracked.log(0, {"other/loss": 2, "worst": -math.inf})
    tracked.close()
    assert calls == [
        ("init", "jaxrlhf", "study", str(tmp_path), {"rate": 1e-3, "policy": "a/b"}),
        ("define_metric", "*", "step"),
        ("log", {"loss": 0.5, "kl": 0.5, "labels": 1.0, "step": 1}),
        ("log", {"other/loss": 2.0, "step": 0}),
        ("finish",),
    ]


def test_trackio_gets_every_step_under_its_number(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, metrics, step=None):
            calls.append((metrics, step))

        def finish(self):
            calls.append("finish")

    def init(project, name=None, *, config=None, resume="never", embed=True):
        calls.append((project, name, config, resume, embed))
        return Run()

    module = types.ModuleType("trackio")
    module.__dict__.update(init=init)
    monkeypatch.setitem(sys.modules, "trackio", module)
    tracked = tracker("trackio", tmp_path, name="study", config=Config())
    tracked.log(np.int32(1), numbers(1))
    tracked.log(0, {"other/loss": 2, "worst": -math.inf})
    tracked.close()
    assert calls == [
        ("jaxrlhf", "study", {"rate": 1e-3, "policy": "a/b"}, "allow", False),
        ({"loss": 0.5, "kl": 0.5, "labels": 1.0}, 1),
        ({"other/loss": 2.0}, 0),
        "finish",
    ]
    assert not list(tmp_path.iterdir())


def test_a_wandb_that_cannot_start_names_the_remedy(tmp_path, monkeypatch):
    module, _ = fake_wandb()

    def init(**_):
        raise module.Error("No key.")

    monkeypatch.setattr(module, "init", init)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ValueError, match=r"could not start \(No key\).*WANDB_MODE=offline"):
        tracker("wandb", tmp_path, name="study", config={})


@pytest.mark.parametrize(
    ("kind", "library"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")]
)
@pytest.mark.parametrize("found", [None, types.ModuleType("a folder of that name")], ids=["missing", "empty"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, kind, library, found):
    monkeypatch.setitem(sys.modules, library, found)
    with pytest.raises(
        ValueError, match=rf"library {library}, which is not installed: pip install 'jaxrlhf\[tracking\]'"
    ):
        tracker(kind, tmp_path, name="study", config={})


def test_an_unknown_tracker_is_named(tmp_path):
    with pytest.raises(ValueError, match="no tracker 'mlflow'; choose tensorboard, wandb, trackio or none"):
        tracker("mlflow", tmp_path, name="study", config={})  # pyright: ignore
