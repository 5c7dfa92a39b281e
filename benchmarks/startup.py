"""From the command to the first step: CPU time and programs of `jaxrlhf align` by phase, in a first and a second run.

python -m benchmarks.startup --policy DIR --data FILE --score MODULE:FUNCTION [further options of `jaxrlhf align`]

Both runs are new processes with one new cache of compiled programs. CPU time counts all threads, so that others on the
machine disturb it little; elapsed time is beside it.
"""

import collections
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

PHASES = (
    ("prepare", "models, data and plan"),
    ("_recorder", "sampling the reference"),
    ("_rehearse", "rehearsal of the end"),
)
"""Functions of `jaxrlhf.commands.align` before the first step, and what each does."""
MISS, HIT = "compiled", "read from the cache"
EVENTS = {"/jax/compilation_cache/cache_misses": MISS, "/jax/compilation_cache/cache_hits": HIT}


class Recording:
    """Times of a process since its start, and counts of its programs.

    Attributes:
        rows: of each phase: its name, CPU seconds, elapsed seconds, programs compiled and read.
    """

    def __init__(self):
        """Begins; the CPU time of imports before it counts in the first phase."""
        self.rows: list[tuple[Any, ...]] = []
        self.counts = collections.Counter()
        self._last = 0.0, time.monotonic(), 0, 0

    def close(self, phase: str) -> None:
        """Ends a phase, which began where the last one ended."""
        now = time.process_time(), time.monotonic(), self.counts[MISS], self.counts[HIT]
        cpu, elapsed, compiled, read = (after - before for after, before in zip(now, self._last, strict=True))
        self.rows.append((phase, cpu, elapsed, int(compiled), int(read)))
        self._last = now


def record(arguments: Sequence[str], path: pathlib.Path) -> None:
    """Runs `jaxrlhf align` in this process and writes its phases to a file."""
    recording = Recording()
    import jax

    from jaxrlhf.commands import align, main, running

    def count(event: str, **_: Any) -> None:
        recording.counts[EVENTS.get(event, "")] += 1

    jax.monitoring.register_event_listener(count)

    def wrap(module: Any, name: str, before: str | None, after: str | None) -> None:
        inner: Callable[..., Any] = getattr(module, name)

        @functools.wraps(inner)
        def timed(*args: Any, **keywords: Any) -> Any:
            if before is not None:
                recording.close(before)
            result = inner(*args, **keywords)
            if after is not None:
                recording.close(after)
            return result

        setattr(module, name, timed)

    for (name, title), before in zip(PHASES, ("imports", "initial state", None), strict=True):
        wrap(align, name, before, title)
    steps = running.outer_steps

    def first_apart(*args: Any, **keywords: Any) -> Any:
        for number, reached in enumerate(steps(*args, **keywords)):
            if number == 0:
                jax.block_until_ready(reached.state)
                recording.close("first step")
            yield reached

    running.outer_steps = first_apart
    wrap(align, "train", None, "later steps and evaluation")
    main.run_command("align", arguments)
    recording.close("models and report")
    path.write_text(json.dumps(recording.rows))


def main(arguments: Sequence[str]) -> None:
    """Runs the command twice and prints a table of its phases."""
    table = Table("", "first run: CPU s", "elapsed s", MISS, "second run: CPU s", "elapsed s", MISS, HIT)
    with tempfile.TemporaryDirectory() as folder:
        cells = [_child(arguments, pathlib.Path(folder), number) for number in range(2)]
    for first, second in zip(*cells, strict=True):
        table.add_row(first[0], *_text(first[1:4]), *_text(second[1:5]))
    step = [row[0] for row in cells[0]].index("first step")
    for title, end in (("until the first step begins", step), ("until it is taken", step + 1)):
        sums = [[sum(column) for column in zip(*(row[1:] for row in rows[:end]), strict=True)] for rows in cells]
        table.add_row(title, *_text(sums[0][:3]), *_text(sums[1]))
    Console(width=120).print(table)


def _text(numbers: Sequence[float]) -> list[str]:
    return [f"{number:.1f}" if isinstance(number, float) else str(number) for number in numbers]


def _child(arguments: Sequence[str], folder: pathlib.Path, number: int) -> list[Any]:
    path, environment = folder / f"{number}.json", dict(os.environ)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    own = [f"--output={folder}", f"--run=run{number}", f"--compilation-cache={folder / 'cache'}"]
    command = [sys.executable, "-m", "benchmarks.startup", "--record", str(path), *arguments, *own]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    return json.loads(path.read_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        record(sys.argv[3:], pathlib.Path(sys.argv[2]))
    else:
        main(sys.argv[1:])
