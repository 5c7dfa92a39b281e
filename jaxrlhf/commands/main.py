"""The entry point: `jaxrlhf COMMAND`, with options or `--config FILE`; `jaxrlhf --help` lists the commands."""

import ast
import contextlib
import dataclasses
import difflib
import errno
import importlib
import importlib.util
import os
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import tyro

from jaxrlhf.commands.compilation import use_compilation_cache
from jaxrlhf.commands.configuration import parse
from jaxrlhf.commands.flags import check_flags, flag
from jaxrlhf.data.records import DataError
from jaxrlhf.training import processes

PLACES = {
    "sft": ("supervised", "supervised", "Supervised"),
    "reward": ("reward", "reward", "Reward"),
    "dpo": ("direct", "direct", "Direct"),
    "align": ("align", "align_config", "Align"),
    "evaluate": ("evaluate", "evaluate", "Evaluate"),
    "sample": ("sample", "sample", "Sample"),
    "chat": ("chat", "chat", "Chat"),
    "label": ("label", "label", "Label"),
    "export": ("export", "export", "Export"),
    "doctor": ("doctor", "doctor", "Doctor"),
    "watch": ("watch", "watch", "Watch"),
    "compare": ("compare", "compare", "Compare"),
}
"""Of each command: the module with its `main`, the module with its configuration, and the configuration's name."""


class _Commands(Mapping[str, tuple[type, Callable[[Any], Any]]]):
    """The configuration and the `main` of each command, imported when they are looked up."""

    def __getitem__(self, name: str) -> tuple[type, Callable[[Any], Any]]:
        module, place, kind = PLACES[name]
        return getattr(_module(place), kind), _module(module).main

    def __iter__(self) -> Iterator[str]:
        return iter(PLACES)

    def __len__(self) -> int:
        return len(PLACES)


COMMANDS = _Commands()


def run(config: Any, name: str = "jaxrlhf") -> Any:
    """Runs the command of a configuration; prints one sentence and exits with status 2 where it cannot be done.

    A run stopped by a signal exits with 128 plus the signal's number, as the signal itself would have made it.
    JAXRLHF_TRACEBACK=1 in the environment shows the whole traceback.
    """
    # They import Orbax and the hub's client, which the list of commands does without.
    from jaxrlhf.commands.hub import pinned
    from jaxrlhf.training.resume import StoppedError

    (command,) = (command for command, place in PLACES.items() if place[2] == type(config).__name__)
    _replace_missing_letters()
    try:
        check_flags(config)
        if hasattr(config, "compilation_cache"):
            use_compilation_cache(config)
        if getattr(config, "processes", None):
            processes.connect(processes.parse_process_address(config.processes))
        return COMMANDS[command][1](pinned(config))
    except (DataError, ValueError, OSError) as error:
        if os.environ.get("JAXRLHF_TRACEBACK"):
            raise
        print(f"{name}: {_with_flags(_sentence(error), config)}", file=sys.stderr)
        raise SystemExit(2) from None
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(f"{name}: {processes.lost_processes_message(error)}", file=sys.stderr, flush=True)
        # A regular exit would wait for the lost processes.
        os._exit(1)
    except StoppedError as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what was written so far stays in the run's folder.", file=sys.stderr)
        raise SystemExit(130) from None


def _replace_missing_letters() -> None:
    """A terminal that lacks a letter must not end a command."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]


def _sentence(error: Exception) -> str:
    message = " ".join(str(error).split())
    if any(os.strerror(number) in message for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        return f"The disk is full ({message}); make room, and the same command with --run NAME --resume goes on."
    return message


def _with_flags(message: str, config: Any) -> str:
    """Returns the message with flags in place of names of settings, which functions of the library give them."""
    for field in dataclasses.fields(config):
        if "_" in field.name:
            message = re.sub(rf"(?<![\w/.\-\"'`=]){field.name}(?![\w/.\"'`=])", flag(field.name), message)
    return message


def run_command(name: str, arguments: Sequence[str]) -> Any:
    """Runs a command by its name, with its options and files of options; ends as `run` does."""
    _replace_missing_letters()
    try:
        config = parse(COMMANDS[name][0], arguments, name)
    except (ValueError, OSError) as error:
        if os.environ.get("JAXRLHF_TRACEBACK"):
            raise
        print(f"jaxrlhf: {_sentence(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    return run(config)


def main() -> None:
    """Parses the command line and runs the command."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        run_command(arguments[0], arguments[1:])
        return
    near = difflib.get_close_matches(arguments[0], COMMANDS, 1) if arguments else []
    if near:
        print(f"jaxrlhf: There is no command {arguments[0]}; the nearest is {near[0]}.", file=sys.stderr)
        raise SystemExit(2)
    # Lists the commands, or refuses what is none.
    _replace_missing_letters()
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name)]  # pyright: ignore[reportInvalidTypeForm]
        for name, kind in _kinds(arguments).items()
    ]
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    tyro.cli(union, prog="jaxrlhf", description="Online RLHF as one bilevel problem, in JAX.")


def _kinds(arguments: Sequence[str]) -> dict[str, type]:
    """Returns the configuration of each command; of those that no argument names, only the name and the docstring."""
    # A script that completes command lines lists the flags of all of them.
    every = any(argument.startswith("--tyro") for argument in arguments)
    return {name: COMMANDS[name][0] if every or name in arguments else _described(name) for name in PLACES}


def _described(name: str) -> type:
    """Returns an empty configuration with the docstring of a command's own, which is read without importing it."""
    _, place, kind = PLACES[name]
    spec = importlib.util.find_spec(f"jaxrlhf.commands.{place}")
    assert spec is not None and spec.origin is not None
    body = ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8")).body
    (found,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == kind)
    empty = dataclasses.make_dataclass(kind, [])
    empty.__doc__ = ast.get_docstring(found)
    return empty


def _module(name: str) -> types.ModuleType:
    return importlib.import_module(f"jaxrlhf.commands.{name}")


if __name__ == "__main__":
    main()
