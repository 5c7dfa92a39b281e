"""The entry point: `jaxrlhf sft|reward|dpo|align|evaluate|sample|chat|label|export`, with options or `--config FILE`."""

import contextlib
import dataclasses
import errno
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import tyro

from jaxrlhf.commands import align, chat, direct, evaluate, export, label, reward, sample, supervised
from jaxrlhf.commands.configuration import parse
from jaxrlhf.commands.flags import check_flags, flag
from jaxrlhf.commands.hub import pinned
from jaxrlhf.data.records import DataError
from jaxrlhf.training import processes
from jaxrlhf.training.resume import StoppedError

COMMANDS = {
    "sft": (supervised.Supervised, supervised.main),
    "reward": (reward.Reward, reward.main),
    "dpo": (direct.Direct, direct.main),
    "align": (align.Align, align.main),
    "evaluate": (evaluate.Evaluate, evaluate.main),
    "sample": (sample.Sample, sample.main),
    "chat": (chat.Chat, chat.main),
    "label": (label.Label, label.main),
    "export": (export.Export, export.main),
}


def run(config: Any, name: str = "jaxrlhf") -> Any:
    """Runs the command of a configuration; prints one sentence and exits with status 2 where it cannot be done.

    A run stopped by a signal exits with 128 plus the signal's number, as the signal itself would have made it.
    JAXRLHF_TRACEBACK=1 in the environment shows the whole traceback.
    """
    mains: dict[type, Any] = dict(COMMANDS.values())
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a letter must not end a run.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        check_flags(config)
        if getattr(config, "processes", None):
            processes.connect(processes.parse_process_address(config.processes))
        return mains[type(config)](pinned(config))
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
    try:
        config = parse(COMMANDS[name][0], arguments, name)
    except ValueError as error:
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
    # Lists the commands, or refuses what is none.
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name)]  # pyright: ignore[reportInvalidTypeForm]
        for name, (kind, _) in COMMANDS.items()
    ]
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    tyro.cli(union, prog="jaxrlhf", description="Online RLHF as one bilevel problem, in JAX.")


if __name__ == "__main__":
    main()
