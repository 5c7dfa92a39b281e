"""The cache of compiled programs: where it is, what it does with a folder that is not its own, and that it works."""

import os
import subprocess
import sys

import jax
import pytest

from jaxrlhf.commands import compilation
from jaxrlhf.commands.compilation import CompilationConfig, cache_text, default_folder, use_compilation_cache

NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)
VARIABLES = tuple(name.upper() for name in NAMES)


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    """The environment of a user who has set nothing; JAX's settings as they were afterwards."""
    before = {name: setting(name) for name in NAMES}
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation.compilation_cache.reset_cache()


def setting(name):
    return getattr(jax.config, name)


def folder_after(choice=None):
    use_compilation_cache(CompilationConfig(compilation_cache=choice))
    return setting("jax_compilation_cache_dir")


def test_the_folder(monkeypatch, tmp_path):
    assert folder_after() == str(tmp_path / "user" / "jaxrlhf")
    assert setting("jax_compilation_cache_max_size") == compilation.LARGEST_CACHE
    assert folder_after(str(tmp_path / "given")) == str(tmp_path / "given")
    assert cache_text() == f"{tmp_path / 'given'}, 0 B of at most 4 GB"
    assert folder_after("off") is None and cache_text() == "off"
    # A relative path does not count.
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "jaxrlhf"


def test_the_users_own_settings_of_jax_win(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "123")
    jax.config.update("jax_compilation_cache_max_size", 123)
    folder_after()
    assert setting("jax_compilation_cache_max_size") == 123
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "of JAX"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "of JAX"))
    assert folder_after() == str(tmp_path / "of JAX")
    assert not (tmp_path / "of JAX").exists(), "JAX makes it where it writes"


def test_a_folder_that_cannot_be_written_is_one_sentence(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert folder_after(str(tmp_path / "file" / "cache")) is None
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and str(tmp_path / "file") in printed and "--compilation-cache" in printed


@pytest.mark.parametrize("choice", ["", " ", "gs://bucket/cache"])
def test_what_is_no_folder_is_refused(choice):
    with pytest.raises(ValueError, match="--compilation-cache"):
        folder_after(choice)


def test_programs_without_the_time_of_their_use(tmp_path):
    """JAX stops removing old programs, and keeping new ones, where one has no such time."""
    (tmp_path / "old-cache").write_bytes(b"12345")
    folder_after(str(tmp_path))
    written = int.from_bytes((tmp_path / "old-atime").read_bytes(), "little")
    assert written == (tmp_path / "old-cache").stat().st_mtime_ns
    assert cache_text().endswith(", 5 B of at most 4 GB")
    # What a killed process leaves in a folder with a limit may be cut off.
    (tmp_path / "cut-cache").write_bytes(b"12")
    folder_after(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {".lockfile", "old-cache", "old-atime"}


def test_programs_are_kept_within_the_limit(monkeypatch, tmp_path):
    def compile_one(number):
        return jax.jit(lambda x: x * number)(1.0)

    folder_after(str(tmp_path))
    compile_one(2.5)
    (first,) = tmp_path.glob("*-cache")
    monkeypatch.setattr(compilation, "LARGEST_CACHE", int(1.5 * first.stat().st_size))
    folder_after(str(tmp_path))
    compilation.compilation_cache.reset_cache()
    compile_one(3.5)
    assert len(list(tmp_path.glob("*-cache"))) == 1 and not first.exists()


def test_imports_switch_nothing_on():
    code = "import jax, jaxrlhf.commands.align; print(jax.config.jax_compilation_cache_dir)"
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
