"""What a run needs of the machine, each part tried: devices, mesh, collectives, the output folder, one compiled step.

Each check returns what it found, and a sentence with the remedy for each thing that is wrong. No check raises.
"""

import contextlib
import importlib.metadata
import math
import os
import pathlib
import platform
import shutil
import time
import uuid
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrlhf import exact, preferences
from jaxrlhf.bilevel import bilevel_descent, central
from jaxrlhf.exact import bandit
from jaxrlhf.preferences import objectives
from jaxrlhf.training.processes import broadcast_text, gathered, is_first_process
from jaxrlhf.training.progress import bytes_text
from jaxrlhf.training.sharding import make_mesh

LIBRARIES = ("jax", "jaxlib", "numpy", "optax", "flax", "orbax-checkpoint", "grain", "tensorflow-datasets")
PLUGINS = {
    "NVIDIA": ("jax[cuda13]", ("jax-cuda13-plugin", "jax-cuda12-plugin"), "its driver with nvidia-smi"),
    "TPU": ("jax[tpu]", ("libtpu",), "the processes that hold it with fuser /dev/accel* /dev/vfio/*"),
}
"""Of each kind of device: what installs JAX for it, the packages that this brings, and what else to look at."""
TPU_CHIPS = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
"""PCI numbers of Google's TPUs from v2 on; other devices of Google's are no accelerators."""
LEAST_ROOM = 1 << 30
"""Free bytes below which a run is likely to end on a full disk."""
PAYLOAD = 1 << 24
"""Bytes that each device contributes to a timed collective."""
FILE_SYSTEMS_IN_MEMORY = ("tmpfs", "ramfs")
TOLERANCE = 0.01
"""Relative error allowed between the smoke step's hypergradient and the exact gradient."""


class Finding(NamedTuple):
    """What a check found: rows of a table, and a sentence with the remedy for each thing that is wrong."""

    rows: dict[str, str]
    wrong: list[str]


def versions() -> Finding:
    """Returns the versions of Python, of jaxrlhf's libraries, and of the machine."""
    rows = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    wrong = []
    for name in ("jaxrlhf", *LIBRARIES):
        try:
            rows[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            rows[name] = "not installed"
            wrong.append(f"{name} is not installed as a package; install it with pip install jaxrlhf.")
    return Finding(rows, wrong)


def devices() -> tuple[bool, Finding]:
    """Returns whether JAX has any devices, and which; wrong is a device of the machine that JAX does not use."""
    kinds: dict[str, int] = {}
    try:
        found = jax.devices()
    except Exception as error:  # JAX also asserts that there is a platform
        remedy = "mend or unset JAX_PLATFORMS, or install its package"
        return False, Finding({"devices": "none"}, [f"JAX finds no devices ({_reason(error)}); {remedy}."])
    for device in found:
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    listed = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    rows = {
        "backend": jax.default_backend(),
        "devices": f"{jax.device_count()} ({listed}), {jax.local_device_count()} of this process",
        "processes": f"{jax.process_count()}, this is {jax.process_index()}",
    }
    memory = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    if all(memory):
        rows["memory"] = f"{bytes_text(min(filter(None, memory)))} a device"
    wrong = []
    if jax.default_backend() == "cpu":
        for present, (maker, (package, plugins, look)) in zip(
            (_has_nvidia(), _has_tpu()), PLUGINS.items(), strict=True
        ):
            if present and os.environ.get("JAX_PLATFORMS", "") != "cpu":
                remedy = f"look at {look}" if any(map(_installed, plugins)) else f"pip install '{package}'"
                wrong.append(f"This machine has a {maker} device that JAX does not use; {remedy}.")
    return True, Finding(rows, wrong)


def same_versions(rows: Mapping[str, str]) -> Finding:
    """Compares the rows of `versions` with those of the first process; called by all processes together."""
    theirs = dict(line.split("=", 1) for line in broadcast_text(lambda: _listed(rows)).splitlines())
    return Finding(
        {},
        [
            f"{name} is {rows[name]} here and {version} in the first process; install the same everywhere."
            for name, version in theirs.items()
            if rows[name] != version
        ],
    )


def _listed(rows: Mapping[str, str]) -> str:
    return "\n".join(f"{name}={version}" for name, version in rows.items())


def mesh_of(sizes: Mapping[str, int]) -> tuple[Mesh | None, Finding]:
    """Returns the mesh of some sizes, or None where it does not fit the devices."""
    try:
        mesh = make_mesh(sizes)
    except ValueError as error:
        return None, Finding({"mesh": "none"}, [f"{str(error).removesuffix('.')}; give another --mesh."])
    text = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    return mesh, Finding({"mesh": text}, [])


def collectives(mesh: Mesh, *, payload: int = PAYLOAD, repeats: int = 3) -> Finding:
    """Sums `payload` bytes of each device over each mesh axis, checks the sums, and times the best of some repeats.

    The rate is the bytes that a ring sends from each device, 2 (n - 1) / n times the payload, a second. The row of an axis
    whose devices belong to several processes says so.
    """
    rows, wrong = {}, []
    for axis, size in mesh.shape.items():
        if size == 1:
            continue
        try:
            seconds, total = _timed_sum(mesh, axis, payload, repeats)
        except Exception as error:  # whatever a backend raises is what is looked for
            reason = " ".join(str(error).split())[:200]
            wrong.append(
                f"Devices cannot sum over {axis} ({reason}); look at the network between them, or its settings."
            )
            continue
        if total != size:
            wrong.append(f"A sum over {axis} gave {total:g} in place of {size}; restart the devices or replace one.")
        rate = 2 * (size - 1) / size * payload / seconds
        where = " between processes" if _leaves_process(mesh, axis) else ""
        rows[f"sum over {axis}{where}"] = (
            f"{bytes_text(payload)} in {seconds * 1e3:.3g} ms, {bytes_text(rate)}/s a device"
        )
    return Finding(rows or {"sums": "one device: none"}, wrong)


def _leaves_process(mesh: Mesh, axis: str) -> bool:
    """Returns whether the devices along an axis belong to more than one process."""
    numbers = np.vectorize(lambda device: device.process_index)(
        np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    )
    return bool((numbers != numbers[0]).any())


def _timed_sum(mesh: Mesh, axis: str, payload: int, repeats: int) -> tuple[float, float]:
    """Returns the least seconds of a sum over an axis, and the sum of ones, which is the axis's size."""
    spread = PartitionSpec(mesh.axis_names)
    values = jax.jit(
        lambda: jnp.ones((mesh.size, max(1, payload // 4)), jnp.float32), out_shardings=NamedSharding(mesh, spread)
    )()
    total = jax.jit(
        jax.shard_map(
            lambda part: jax.lax.psum(part, axis), mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False
        )
    )
    jax.block_until_ready(total(values))
    seconds, result = math.inf, values
    for _ in range(repeats):
        began = time.perf_counter()
        result = jax.block_until_ready(total(values))
        seconds = min(seconds, time.perf_counter() - began)
    return seconds, float(np.asarray(result.addressable_shards[0].data).min())


def output_folder(path: pathlib.Path) -> Finding:
    """Writes, reads and removes a file in the folder or its nearest parent, and returns the room and kind of its disk."""
    path = path.absolute()
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        return Finding({"output": str(path)}, [f"The output {path} cannot be used ({error.strerror}); give another."])
    # Unlike `Path.exists`, False for what may not be looked at.
    place = next(part for part in (path, *path.parents) if os.path.exists(part))
    if not place.is_dir():
        return Finding({"output": str(path)}, [f"The output {place} is a file; give --output a folder."])
    rows, wrong = {"output": str(path)}, []
    trial = place / f".jaxrlhf-doctor-{jax.process_index()}-{os.getpid()}"
    try:
        trial.write_bytes(b"jaxrlhf")
        if trial.read_bytes() != b"jaxrlhf":
            wrong.append(f"A file written in {place} reads back changed; give --output another disk.")
        rows["write access"] = "yes"
    except OSError as error:
        rows["write access"] = "no"
        wrong.append(f"The output folder {place} cannot be written ({error.strerror}); give --output another.")
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()
    free, kind = shutil.disk_usage(place).free, file_system(place)
    rows["free room"], rows["file system"] = bytes_text(free), kind
    if free < LEAST_ROOM:
        wrong.append(f"Only {bytes_text(free)} are free in {place}; make room, or give --output another disk.")
    if kind in FILE_SYSTEMS_IN_MEMORY:
        wrong.append(f"{place} is in memory ({kind}) and lost at a restart; give --output a folder on a disk.")
    return Finding(rows, wrong)


def shared_output(path: pathlib.Path, *, seconds: float = 5.0) -> Finding:
    """Looks in every process for a file that the first one writes in the folder; called by all processes together.

    Args:
        path: of the folder, or one to be created in its nearest parent.
        seconds: to wait for the file: a network's file system may show it late.
    """
    place = next(part for part in (path.absolute(), *path.absolute().parents) if os.path.exists(part))
    trial = place / f".jaxrlhf-doctor-{uuid.uuid4().hex}"

    def write() -> str:
        try:
            trial.write_bytes(b"jaxrlhf")
        except OSError:  # reported by `output_folder`
            return ""
        return trial.name

    name, wrong = broadcast_text(write), []
    if name and place.is_dir() and not _appears(place / name, seconds):
        wrong.append(f"The output {path} is not the first process's folder; give all of them one that they share.")
    multihost_utils.sync_global_devices("the output was looked at")
    if is_first_process():
        with contextlib.suppress(OSError):
            trial.unlink()
    return Finding({}, wrong)


def _appears(path: pathlib.Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def file_system(path: pathlib.Path, mounts: pathlib.Path = pathlib.Path("/proc/mounts")) -> str:
    """Returns the kind of file system of an existing path, such as "ext4"; "unknown" where the system does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    best, kind = "", "unknown"
    for line in lines:
        _, place, found, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        # Of two mounts at one place the later hides the earlier.
        if path.resolve().is_relative_to(place) and len(place) >= len(best):
            best, kind = place, found
    return kind


def smoke_step() -> Finding:
    """Compiles and takes one bilevel step on the bandit; its hypergradient is compared with the exact gradient of Phi."""
    began = time.perf_counter()
    try:
        error = smoke_error()
    except Exception as raised:  # whatever a backend raises is what is looked for
        return Finding(
            {"smoke step": "failed"}, [f"The smoke step cannot be taken ({_reason(raised)}); reinstall jax and jaxlib."]
        )
    seconds = time.perf_counter() - began
    rows = {"smoke step": f"relative error of the hypergradient {error:.1e}, {seconds:.1f} s with compilation"}
    if error < TOLERANCE:
        return Finding(rows, [])
    return Finding(
        rows, [f"The smoke step is off by {error:.2g} relative to the exact gradient; reinstall jax and jaxlib."]
    )


def smoke_error() -> float:
    """Returns the relative error of a step's hypergradient, a stencil of exact policies, against `jax.grad` of Phi."""
    contexts, arms, beta = 3, 4, 0.5
    gold = jnp.sin(jnp.arange(contexts * arms, dtype=jnp.float32)).reshape(contexts, arms)
    features = jnp.eye(contexts * arms).reshape(contexts, arms, -1)
    frozen = bandit.Bandit(features, gold, jax.nn.log_softmax(jnp.cos(gold)))
    objective = objectives.add(objectives.likelihood(), objectives.utility(kl_price=0.1))
    upper = 0.3 * jnp.cos(jnp.arange(contexts * arms, dtype=jnp.float32))

    def reward(upper, features):
        return features @ upper

    def phi(upper):
        return exact.upper_value(
            objective, reward(upper, features), gold, frozen.reference, beta=beta, against_reference=True
        )

    algorithm = bilevel_descent(
        bandit.bandit_problem(reward, objective),
        central(relative_sigma=0.05),
        bandit.best_response(reward, objective, beta=beta),
        optax.sgd(1.0),
        beta=beta,
        annotate=preferences.expected_annotator(bandit.gold_score),
    )
    policy = exact.soft_policy(reward(upper, features), frozen.reference, beta)
    # What a TPU rounds in a product by default would hide what is looked for.
    with jax.default_matmul_precision("highest"):
        state = algorithm.init(jax.random.key(0), upper, policy)
        after, _ = jax.jit(algorithm.step)(jax.random.key(1), state, None, frozen)
        wanted = np.asarray(gathered(jax.jit(jax.grad(phi))(upper)))
    taken = np.asarray(gathered(state.upper - after.upper))
    return float(np.linalg.norm(taken - wanted) / np.linalg.norm(wanted))


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].removesuffix(".") or type(error).__name__


def _has_nvidia() -> bool:
    return pathlib.Path("/dev/nvidia0").exists()


def _has_tpu() -> bool:
    for device in pathlib.Path("/sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            vendor, chip = ((device / name).read_text().strip() for name in ("vendor", "device"))
            if vendor == "0x1ae0" and chip in TPU_CHIPS:
                return True
    return False


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
