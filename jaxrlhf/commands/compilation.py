"""The cache of compiled programs that commands keep between runs: its folder, its size, its line in the plan."""

import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile
from typing import Any, ClassVar

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxrlhf.commands.options import Groups
from jaxrlhf.training.paths import check_local
from jaxrlhf.training.progress import bytes_text

LARGEST_CACHE = 4_000_000_000
"""Bytes of compiled programs that are kept; those not used for longest are removed."""
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
LOCK = ".lockfile"
"""JAX's name for the file that processes lock while they read or write a cache of limited size."""
PROGRAM, USED = "-cache", "-atime"
"""JAX's endings of a program's file, and of the file with the time of its last use."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompilationConfig:
    """Setting of the commands that compile programs."""

    GROUPS: ClassVar[Groups] = {"devices and memory": ("compilation_cache",)}

    compilation_cache: str | None = None
    """Directory that keeps compiled programs for later runs, or off. By default JAX_COMPILATION_CACHE_DIR where it is set,
    and else jaxrlhf in the user's cache folder. At most 4 GB are kept, except in JAX_COMPILATION_CACHE_DIR."""


def use_compilation_cache(config: CompilationConfig) -> None:
    """Switches on JAX's cache of compiled programs, as the setting says; before the first compilation.

    A directory that cannot be written is one sentence on standard error, and programs are then not kept.

    Raises:
        ValueError: the setting is empty, or an address such as `gs://bucket/cache`.
    """
    choice = config.compilation_cache
    if choice == "off":
        _set_folder(None)
        return
    if choice is not None and not choice.strip():
        raise ValueError("--compilation-cache needs the name of a directory, or off.")
    if choice is None and VARIABLE in os.environ:
        return
    folder = default_folder() if choice is None else pathlib.Path(choice)
    check_local(folder, "--compilation-cache")
    try:
        _make_ready(folder)
    except OSError as error:
        print(
            f"Compiled programs are not kept: {folder} cannot be written ({error.strerror or error}); "
            "give another directory, or off, with --compilation-cache.",
            file=sys.stderr,
        )
        _set_folder(None)
        return
    settings = {
        "jax_compilation_cache_max_size": LARGEST_CACHE,
        # Hundreds of small programs take longer to compile than to read.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    _set_folder(folder)
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _set_folder(folder: pathlib.Path | None) -> None:
    path = None if folder is None else str(folder.absolute())
    if path != _setting("jax_compilation_cache_dir"):
        jax.config.update("jax_compilation_cache_dir", path)
        # JAX keeps the first folder that a process used.
        compilation_cache.reset_cache()


def default_folder() -> pathlib.Path:
    """Returns the folder in the user's cache folder; `$XDG_CACHE_HOME` must be absolute to count, as its standard says."""
    given = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else pathlib.Path(os.path.expanduser("~"), ".cache")) / "jaxrlhf"


def cache_text() -> str:
    """Returns what the plan says of the cache: its folder, and the bytes in it."""
    folder = _setting("jax_compilation_cache_dir")
    if folder is None or not _setting("jax_enable_compilation_cache"):
        return "off"
    limit = _setting("jax_compilation_cache_max_size")
    most = "" if limit < 0 else f" of at most {bytes_text(limit)}"
    return f"{folder}, {bytes_text(_size(pathlib.Path(folder)))}{most}"


def _setting(name: str) -> Any:
    return getattr(jax.config, name)


def _size(folder: pathlib.Path) -> int:
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            # Another process may remove it meanwhile.
            with contextlib.suppress(OSError):
                total += entry.stat().st_size if entry.name.endswith(PROGRAM) else 0
    return total


def _make_ready(folder: pathlib.Path) -> None:
    """Makes the folder, and gives each program in it the time of use that JAX needs to remove the oldest.

    A process killed between the two files that JAX writes leaves a program without, perhaps cut off: it is removed. In
    a folder that JAX has filled without a limit all are without; they get the time at which they were written.

    Raises:
        OSError: the folder cannot be written.
    """
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    limited = (folder / LOCK).exists()
    with tempfile.TemporaryFile(dir=folder), filelock.FileLock(folder / LOCK, timeout=10):
        for program in folder.glob(f"*{PROGRAM}"):
            used = program.with_name(program.name.removesuffix(PROGRAM) + USED)
            if used.exists():
                continue
            if limited:
                program.unlink()
            else:
                used.write_bytes(program.stat().st_mtime_ns.to_bytes(8, "little"))
