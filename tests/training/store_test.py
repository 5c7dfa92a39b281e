"""Runs copied to an object store: a stand-in of `gs://` with the interface of etils' backends, which can fail."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import pytest
from etils.epath import backend, gpath

from jaxrlhf.training.resume import RunCheckpointer
from jaxrlhf.training.run_folder import RunFolder
from jaxrlhf.training.store import LIST, RunStore


class Bucket(backend._OsPathBackend):
    """Objects as files below a folder; a call that is due to fail raises, and what was written before it stays.

    Attributes:
        left: number of objects that may still be written; None is any.
        written: names of the objects, in order.
    """

    def __init__(self, folder):
        self.folder, self.left, self.written = folder, None, []

    def _here(self, path):
        return self.folder / str(path).removeprefix("gs://")

    def open(self, path, mode):
        if "w" in mode:
            if self.left == 0:
                raise PermissionError("403 quota exceeded")
            self.left = None if self.left is None else self.left - 1
            self.written.append(pathlib.PurePath(str(path)).name)
        self._here(path).parent.mkdir(parents=True, exist_ok=True)
        return super().open(self._here(path), mode)

    def exists(self, path):
        return super().exists(self._here(path))

    def mkdir(self, path, exist_ok=False, mode=None):
        super().makedirs(self._here(path), exist_ok=True)

    makedirs = mkdir

    def remove(self, path):
        super().remove(self._here(path))

    def stat(self, path):
        return super().stat(self._here(path))

    def isdir(self, path):
        return super().isdir(self._here(path))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    stand_in = Bucket(tmp_path / "cloud")
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", stand_in)
    return stand_in


def written(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


FIRST = {"config.json": "{}", "metrics.jsonl": "1\n", "checkpoints/2/array": "two", "policy/model": "weights"}
NOT_COPIED = {
    "writer": "x",
    "trial/report": "x",
    "checkpoints-trial/0": "x",
    "checkpoints/4.orbax-checkpoint-tmp-1/a": "x",
}


def test_what_has_changed_is_copied_and_a_folder_comes_back_as_it_was(bucket, tmp_path):
    here = written(tmp_path / "runs" / "mine", FIRST | NOT_COPIED | {"model.partial": "x"})
    store = RunStore("gs://bucket/runs/", "mine")
    store.begin(here, resume=False)
    store.push(here)
    cloud = tmp_path / "cloud" / "bucket" / "runs" / "mine"
    assert {name: text for name, text in contents(cloud).items() if name != LIST} == FIRST
    assert bucket.written.index(LIST) > bucket.written.index("array") > bucket.written.index("model")
    bucket.written.clear()
    shutil.rmtree(here / "checkpoints" / "2")
    written(here, {"metrics.jsonl": "1\n2\n", "checkpoints/4/array": "four"})
    store.push(here)
    assert bucket.written == ["metrics.jsonl", "array", LIST]
    assert not (cloud / "checkpoints" / "2" / "array").exists()
    # A process that resumes copies no checkpoint again.
    bucket.written.clear()
    RunStore("gs://bucket/runs", "mine").push(here)
    assert "array" not in bucket.written
    there = tmp_path / "elsewhere" / "mine"
    again = RunStore("gs://bucket/runs", "mine")
    again.begin(there, resume=True)
    expected = FIRST | {"metrics.jsonl": "1\n2\n", "checkpoints/4/array": "four"}
    expected.pop("checkpoints/2/array")
    assert contents(there) == expected
    with pytest.raises(ValueError, match=r"There is a run in gs://bucket/runs/mine already; add --resume"):
        again.begin(there, resume=False)


def test_a_copy_that_is_cut_off_anywhere_leaves_a_whole_run(bucket, tmp_path):
    """Whichever object was the last to be written, what is fetched has checkpoint 2 or checkpoint 4, whole."""
    for left in range(6):
        shutil.rmtree(tmp_path / "cloud", ignore_errors=True)
        here = written(tmp_path / f"runs-{left}" / "mine", FIRST)
        bucket.left = None
        RunStore("gs://bucket", "mine").push(here)
        shutil.rmtree(here / "checkpoints")
        written(here, {"metrics.jsonl": "1\n2\n", "checkpoints/4/array": "four", "checkpoints/4/notes": "four too"})
        bucket.left = left
        store = RunStore("gs://bucket", "mine")
        if left < 6 - 1:
            with pytest.raises(ValueError, match=r"gs://bucket/mine cannot be written \(403 quota exceeded\); check"):
                store.push(here)
        bucket.left = None
        there = tmp_path / f"there-{left}" / "mine"
        RunStore("gs://bucket", "mine").begin(there, resume=True)
        found = {name: text for name, text in contents(there).items() if name.startswith("checkpoints")}
        assert found in (
            {"checkpoints/2/array": "two"},
            {"checkpoints/4/array": "four", "checkpoints/4/notes": "four too"},
        )
        store.push(here)
        RunStore("gs://bucket", "mine").begin(here, resume=True)
        assert (
            "four too" in contents(tmp_path / "cloud").values() and "two" not in contents(tmp_path / "cloud").values()
        )


def test_what_is_wrong_in_a_store_is_said(bucket, tmp_path):
    here, cloud = written(tmp_path / "runs" / "mine", FIRST), tmp_path / "cloud" / "bucket" / "mine"
    store = RunStore("gs://bucket", "mine")
    store.push(here)
    with pytest.raises(ValueError, match=r"gs://bucket/mine has taken 2 steps and .* only 0: move that folder away"):
        store.begin(written(tmp_path / "older", {"config.json": "{}"}), resume=True)
    there = tmp_path / "there"
    (cloud / "checkpoints" / "2" / "array").write_text("tw")
    with pytest.raises(ValueError, match="checkpoints/2/array in gs://bucket/mine has 2 bytes in place of 3"):
        store.begin(there, resume=True)
    (cloud / "checkpoints" / "2" / "array").unlink()
    with pytest.raises(ValueError, match=r"gs://bucket/mine lacks checkpoints/2/array, which its store\.json lists"):
        store.begin(there, resume=True)
    assert not there.exists()
    listed = json.loads((cloud / LIST).read_text())
    for content, message in (
        ("{", "is damaged"),
        (json.dumps({"version": 1, "files": {"../../x": 1}}), "is damaged .*outside the folder"),
        (json.dumps({"version": 1, "files": {"/x": 1}}), "is damaged .*outside the folder"),
        (json.dumps(listed | {"version": 2}), "was written by a newer version"),
    ):
        (cloud / LIST).write_text(content)
        with pytest.raises(ValueError, match=message):
            store.begin(there, resume=True)
    with pytest.raises(ValueError, match=r"ftp://bucket cannot be opened .*; check the address"):
        RunStore("ftp://bucket", "mine")


def test_a_run_goes_on_from_its_store_where_its_folder_is_lost(bucket, tmp_path):
    """Six steps, of which the second three are taken in another folder; a copy that fails in between is a warning."""
    update = jax.jit(lambda state: {"value": state["value"] * 1.5 + 1})

    def take(root, steps):
        store = RunStore("gs://bucket", "mine")
        store.begin(root / "mine", resume=True)
        folder = RunFolder(root, "test", fixed="mine", resume=True)
        folder.store = store
        with RunCheckpointer(folder, {"seed": 0}, minutes=None, steps=1) as checkpointer:
            where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            state, notes = checkpointer.restore_or_init(lambda: {"value": jnp.ones(3)}, (), {"value": where})
            done = notes.get("done", 0)
            for step in range(done + 1, steps + 1):
                state = update(state)
                folder.append_metrics(step=step, first=float(state["value"][0]))
                checkpointer.after_step(step, state, {"done": step}, last=step == steps)
        folder.release()
        return state["value"], folder.metrics()

    whole, metrics = take(tmp_path / "one", 6)
    shutil.rmtree(tmp_path / "cloud")
    take(tmp_path / "two", 3)
    found, lines = take(tmp_path / "three", 6)
    assert found.tolist() == whole.tolist() and lines == metrics and len(lines) == 6
    bucket.left = 0
    with pytest.warns(UserWarning, match="A checkpoint was not copied: gs://bucket/mine cannot be written"):
        take(tmp_path / "three", 7)
