"""Checkpoints in folders of any name are read back where they were written, or refused before the first step."""

import collections
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.training.checkpoint import Checkpoints, check_folder
from jaxrlhf.training.paths import PlainPath, check_local
from jaxrlhf.training.resume import RunCheckpointer
from jaxrlhf.training.run_folder import RunFolder

NAMES = [
    "lr[1e-3]", "a*b", "a?b", "a\\b", "-x", " a b ", "ü日本", "a\nb", "{a}", "a#b%20", "a'b\"c", "x\udcff", "a:b", "$HOME",
    "~", "a]b[", "!x", "gs:", "a,b=c", "ocdbt.process_0", "[a]*?\\", "x" * 200,
]  # fmt: skip
WHERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
SHAPES = {"x": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=WHERE)}


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_checkpoints_are_read_back_whatever_their_folder_is_called(tmp_path, name):
    # The folder that a pattern would match instead.
    Checkpoints(tmp_path / "aXb", {}).close()
    folder = tmp_path / name / "checkpoints"
    for step in (1, 2):
        checkpoints = Checkpoints(folder, {"a": 1}, keep_best=1)
        checkpoints.save(step, {"x": jnp.full(3, float(step))}, score=-float(step))
        checkpoints.wait()
        assert checkpoints.best(SHAPES).step == 1
        checkpoints.close()
    checkpoints = Checkpoints(folder, {"a": 1})
    restored = checkpoints.restore(SHAPES)
    assert restored is not None and restored.step == 2
    np.testing.assert_array_equal(restored.arrays["x"], np.full(3, 2.0))
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_links_to_strange_folders_do_not_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    assert PlainPath(tmp_path / "plain").path == tmp_path / "plain"
    strange = PlainPath(tmp_path / "a[b]")
    assert strange.path != strange.folder and strange.path.resolve() == strange.folder.resolve()
    assert strange.own(f"no {strange.path}/1") == f"no {tmp_path}/a[b]/1"
    del strange
    assert not list((tmp_path / "links").iterdir())


def test_a_damaged_checkpoint_in_a_strange_folder_is_named_by_its_own_name(tmp_path):
    folder = tmp_path / "lr[1]"
    checkpoints = Checkpoints(folder, {})
    checkpoints.save(1, {"x": jnp.ones(3)})
    checkpoints.close()
    shutil.rmtree(folder / "1" / "arrays")
    with pytest.raises(ValueError, match=r"No checkpoint in .*is whole") as caught:
        Checkpoints(folder, {}).restore(SHAPES)
    assert "jaxrlhf-" not in str(caught.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("score", [None, float("nan")])
def test_a_missing_best_is_an_error(tmp_path, score):
    checkpoints = Checkpoints(tmp_path, {}, keep_best=1)
    checkpoints.save(1, {"x": jnp.ones(3)}, score=score)
    with pytest.raises(ValueError, match=r"There is no best checkpoint in .*no evaluation gave a finite score"):
        checkpoints.best(SHAPES)
    checkpoints.save(2, {"x": jnp.ones(3)}, score=1.0)
    assert checkpoints.best(SHAPES).step == 2
    shutil.rmtree(tmp_path / "2" / "arrays")
    with pytest.raises(ValueError, match=r"There is no best checkpoint in .*step 2: "):
        checkpoints.best(SHAPES)
    checkpoints.close()


@pytest.mark.parametrize(
    "address",
    ["gs://bucket/run", "s3://b", "hf://a/b", "file://tmp", "az://c/d", "memory://x", pathlib.Path("gs://b/r")],
)
def test_addresses_are_refused(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--to \w+://.* is an address, and only folders and files of this machine"):
        check_local(address, "--to")
    for make in (lambda: RunFolder(pathlib.Path(address), "sft"), lambda: Checkpoints(address, {})):
        with pytest.raises(ValueError, match="is an address"):
            make()
    assert not list(tmp_path.iterdir())


def test_paths_that_look_like_addresses_are_paths():
    for path in ("runs", "a:b", "/gs:/x", "c:/x", "hh-rlhf:helpful-base", "./gs:", "x y://z", ""):
        check_local(path, "--output")


def init(value):
    return collections.namedtuple("State", "step x")(jnp.zeros((), int), value)


def test_a_folder_is_tried_before_the_first_step(tmp_path, monkeypatch):
    check_folder(tmp_path / "checkpoints")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"A checkpoint cannot be written below .*file and read back"):
        check_folder(tmp_path / "file" / "checkpoints")
    folder = RunFolder(tmp_path, "run")
    arguments, where = (jnp.ones(1000),), jax.tree.map(lambda leaf: WHERE, jax.eval_shape(init, jnp.ones(1000)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("Usage", "free")(3999))
    with RunCheckpointer(folder, {}, minutes=None) as checkpointer:
        with pytest.raises(
            ValueError, match=r"A checkpoint of this run takes 4 kB, and .* has room for 4 kB; make room"
        ):
            checkpointer.restore_or_init(init, arguments, where)
        monkeypatch.undo()
        assert checkpointer.restore_or_init(init, arguments, where)[1] == {}


def test_damaged_metrics_are_named(tmp_path):
    folder = RunFolder(tmp_path, "run")
    folder.append_metrics(step=1, loss=2.0)
    with (folder.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged"):
        folder.metrics()


@pytest.mark.parametrize("step", ["1.5", '"2"', "true", "null", "Infinity", "[2]"])
def test_a_step_is_a_whole_number(tmp_path, step):
    folder = RunFolder(tmp_path, "run")
    (folder.path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{{"step": {step}}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged \(step is .*, no whole number\)"):
        folder.metrics()
