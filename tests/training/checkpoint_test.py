"""Checkpoints: restored bit for bit, the right ones kept, damaged ones never used."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.training.checkpoint import Checkpoints, fingerprints

IDENTITY = {"model": "tiny", "width": 4}


def state_of(step):
    """A tree like a training state: several dtypes, optimiser states, empty leaves, a scalar, a key."""
    params = {
        "weight": jax.random.normal(jax.random.key(step), (5, 7)),
        "half": jnp.arange(step, step + 6, dtype=jnp.bfloat16),
        "numbers": jnp.arange(step, step + 3),
        "seen": jnp.arange(4) % 2 == step % 2,
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init({"weight": params["weight"]})
    return {
        "params": params,
        "optimizer": optimizer,
        "step": jnp.int32(step),
        "nothing": (),
        "key": jax.random.key(step),
    }


SHAPES = jax.eval_shape(lambda: state_of(0))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with checkpoints of steps 2 and 3; tests copy it."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, IDENTITY, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step), {"next": step, "phase": "labels"})
    checkpoints.close()
    return folder


def copied(written, tmp_path):
    return pathlib.Path(shutil.copytree(written, tmp_path / "checkpoints"))


def test_the_last_checkpoint_is_restored_bit_for_bit(written):
    checkpoints = Checkpoints(written, IDENTITY)
    restored = checkpoints.restore(SHAPES)
    assert restored.step == 3 and restored.notes == {"next": 3, "phase": "labels"}
    assert_same(restored.arrays, state_of(3))
    assert sorted(path.name for path in written.iterdir() if path.name.isdigit()) == ["2", "3"]


def test_an_empty_folder_has_none(tmp_path):
    assert Checkpoints(tmp_path / "new", IDENTITY).restore(SHAPES) is None


def test_the_best_are_kept_besides_the_last(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", IDENTITY, keep=1, keep_best=1)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3)):
        checkpoints.save(step, {"a": jnp.ones(2)}, score=score)
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()) == ["2", "4"]
    # Scores survive in another process; steps without a score, or with NaN, do not replace the best.
    checkpoints = Checkpoints(tmp_path / "run", IDENTITY, keep=1, keep_best=1)
    checkpoints.save(5, {"a": jnp.ones(2)}, score=math.nan)
    checkpoints.save(6, {"a": 6 * jnp.ones(2)})
    best = checkpoints.best({"a": jax.ShapeDtypeStruct((2,), jnp.float32)})
    assert best is not None and best.step == 2
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()) == ["2", "6"]


def test_it_is_due_by_steps_and_by_seconds(tmp_path, monkeypatch):
    import time

    checkpoints = Checkpoints(tmp_path / "run", IDENTITY, every_steps=5, every_seconds=100.0)
    assert [step for step in range(1, 11) if checkpoints.due(step)] == [5, 10]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 101)
    assert checkpoints.due(1)
    checkpoints.save(1, {"a": jnp.ones(2)})
    assert not checkpoints.due(2)


FILES = ("arrays/ocdbt.process_0/d/*", "arrays/d/*", "arrays/manifest.ocdbt", "arrays/_METADATA", "metadata/metadata")


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_restored(written, tmp_path, harm, pattern):
    folder = copied(written, tmp_path)
    path = max((folder / "3").glob(pattern), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    checkpoints = Checkpoints(folder, IDENTITY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored = checkpoints.restore(SHAPES)
    # The damaged bytes may be ones that restoring does not read; then the checkpoint is intact.
    assert_same(restored.arrays, state_of(restored.step))
    if restored.step == 2:
        assert any("The checkpoint of step 3 is damaged" in str(each.message) for each in caught)
        assert len(list(tmp_path.glob("checkpoints-damaged-3-*"))) == 1
        checkpoints.save(3, state_of(3), {"again": True})
        checkpoints.close()
        assert Checkpoints(folder, IDENTITY).restore(SHAPES).notes == {"again": True}
    else:
        assert harm == "flipped" or "process_0" in pattern


def test_any_flipped_bit_is_found_or_harmless(written, tmp_path):
    source = np.random.default_rng(0)
    folder = copied(written, tmp_path)
    files = sorted(path for path in (folder / "3").rglob("*") if path.is_file() and path.stat().st_size)
    found = 0
    for turn in range(12):
        fresh = pathlib.Path(shutil.copytree(folder, tmp_path / str(turn)))
        path = fresh / files[source.integers(len(files))].relative_to(folder)
        content = bytearray(path.read_bytes())
        content[source.integers(len(content))] ^= 1 << int(source.integers(8))
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restored = Checkpoints(fresh, IDENTITY).restore(SHAPES)
        assert_same(restored.arrays, state_of(restored.step))
        found += restored.step == 2
    assert found > 0


def test_if_all_are_damaged_nothing_is_changed(written, tmp_path):
    folder = copied(written, tmp_path)
    for step in (2, 3):
        (folder / str(step) / "metadata" / "metadata").write_text("{")
    before = sorted(str(path) for path in folder.rglob("*"))
    with pytest.raises(ValueError, match=r"No checkpoint in .* is whole \(step 3: .*; step 2: .*Move the folder away"):
        Checkpoints(folder, IDENTITY).restore(SHAPES)
    assert sorted(str(path) for path in folder.rglob("*")) == before


def test_checkpoints_of_another_run_are_refused(written):
    with pytest.raises(ValueError, match="are another run's: its width is 4, this one's 8"):
        Checkpoints(written, IDENTITY | {"width": 8}).restore(SHAPES)
    with pytest.raises(ValueError, match="its width is 4, this one's None"):
        Checkpoints(written, {"model": "tiny"}).restore(SHAPES)
    with pytest.raises(ValueError, match="At least 1 checkpoint is kept"):
        Checkpoints(written, IDENTITY, keep=0)


def test_a_newer_version_is_refused(written, tmp_path, monkeypatch):
    from jaxrlhf.training import checkpoint

    monkeypatch.setattr(checkpoint, "VERSION", 0)
    with pytest.raises(ValueError, match="written by a newer version; update jaxrlhf"):
        Checkpoints(copied(written, tmp_path), IDENTITY).restore(SHAPES)


ELSEWHERE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxrlhf.training.checkpoint import Checkpoints, fingerprints
from jaxrlhf.training.sharding import make_mesh

table = jnp.arange(16 * 6, dtype=jnp.float32).reshape(16, 6)
found = []
for number, (size, wanted) in enumerate(((8, 2), (2, 8))):
    before, after = (
        NamedSharding(make_mesh({"fsdp": count}, devices=jax.devices()[:count]), PartitionSpec("fsdp"))
        for count in (size, wanted)
    )
    spread = jax.device_put(table, before)
    found.append(fingerprints({"table": spread}))
    checkpoints = Checkpoints(f"{sys.argv[1]}/{number}", {})
    checkpoints.save(1, {"table": spread})
    checkpoints.wait()
    shapes = {"table": jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=after)}
    restored = checkpoints.restore(shapes).arrays["table"]
    np.testing.assert_array_equal(restored, table)
    assert restored.sharding == after and len(restored.addressable_shards) == wanted
    checkpoints.close()
assert found[0] == found[1] == fingerprints({"table": table})
print("SAME")
"""


def test_it_is_restored_on_another_number_of_devices(tmp_path):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags}, timeout=120, check=False,
    )  # fmt: skip
    assert "SAME" in done.stdout, done.stderr[-2000:]


def test_every_flipped_bit_changes_the_fingerprint():
    source = np.random.default_rng(1)
    for dtype in (np.float32, np.int32, np.uint8, np.float16):
        array = source.integers(0, 100, (3, 4, 5)).astype(dtype)
        first = fingerprints({"a": jnp.asarray(array)})
        raw = np.frombuffer(array.tobytes(), np.uint8).copy()
        for _ in range(20):
            place, bit = source.integers(len(raw)), int(source.integers(8))
            flipped = raw.copy()
            flipped[place] ^= 1 << bit
            other = jnp.asarray(np.frombuffer(flipped.tobytes(), dtype).reshape(array.shape))
            assert fingerprints({"a": other}) != first
    assert json.loads(json.dumps(first)) == first
    assert fingerprints({"a": jnp.zeros((0, 3))}) == {"['a']": 0}
