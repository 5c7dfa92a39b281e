"""The entry point: `jaxrlhf sft|reward|align|evaluate|sample|export`."""

import errno
import os
import sys
from typing import Annotated, Any

import jax
import tyro

from jaxrlhf.commands import align, evaluate, export, reward, sample, supervised
from jaxrlhf.data.records import DataError
from jaxrlhf.training import processes
from jaxrlhf.training.keeping import StoppedError

COMMANDS = {
    "sft": (supervised.Supervised, supervised.main),
    "reward": (reward.Reward, reward.main),
    "align": (align.Align, align.main),
    "evaluate": (evaluate.Evaluate, evaluate.main),
    "sample": (sample.Sample, sample.main),
    "export": (export.Export, export.main),
}


def run(config: Any, name: str = "jaxrlhf") -> Any:
    """Runs what a configuration asks for; ends the process with 2 and one sentence where it cannot be done.

    A run that was asked to stop ends with 128 and the signal's number, as the signal itself would have ended it.

    With JAXRLHF_TRACEBACK=1 in the environment the whole traceback is shown.
    """
    mains: dict[type, Any] = dict(COMMANDS.values())
    try:
        if getattr(config, "processes", None):
            processes.connect(processes.parse_process_address(config.processes))
        return mains[type(config)](config)
    except (DataError, ValueError, OSError) as error:
        if os.environ.get("JAXRLHF_TRACEBACK"):
            raise
        print(f"{name}: {_sentence(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(f"{name}: {processes.told_of_lost(error)}", file=sys.stderr, flush=True)
        # Whoever ends in order waits for those who are gone.
        os._exit(1)
    except StoppedError as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what was written so far stays in the run's folder.", file=sys.stderr)
        raise SystemExit(130) from None


def _sentence(error: Exception) -> str:
    told = " ".join(str(error).split())
    if any(os.strerror(number) in told for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        return f"The disk is full ({told}); make room, and the same command with --run NAME --resume goes on."
    return told


def main() -> None:
    """Reads the command line and runs it."""
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name)]  # pyright: ignore[reportInvalidTypeForm]
        for name, (kind, _) in COMMANDS.items()
    ]
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    run(tyro.cli(union, prog="jaxrlhf", description="Online RLHF as one bilevel problem, in JAX."))


if __name__ == "__main__":
    main()
