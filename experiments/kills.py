"""Kills a run again and again, goes on with it, and compares what comes out with a run that was left alone.

    python experiments/kills.py --policy DIR              # 100 kills
    python experiments/kills.py --policy DIR --kills 10

DIR is a Hugging Face directory of a small model. `jaxrlhf align` runs in a process of its own, which is ended by kill -9:
at a random time, while an annotator thinks, as soon as labels are written, or while a checkpoint is. Then the same command
runs again with --resume. Policy, reward and metrics must be those of the run that was left alone, bit for bit, and nobody
may be asked twice for a label that was given.
"""

import collections
import contextlib
import dataclasses
import filecmp
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import tyro
from rich.console import Console

from jaxrlhf.training.progress import progress
from jaxrlhf.training.report import Table, as_markdown, rich_table, write_report
from jaxrlhf.training.run_folder import RunFolder

MOMENTS = ("at random", "while labelling", "labels written", "in a checkpoint")
SAME = ("policy/model.safetensors", "reward/model.safetensors", "metrics.jsonl")
"""What must be equal to the last byte."""

# It notes what it was asked for, and takes its time.
JUDGE = """
import pathlib, random, time

def prefers(prompts, firsts, seconds):
    here = pathlib.Path(__file__).parent
    with (here / "asked").open("a") as stream:
        stream.write("\\n".join(map(repr, zip(prompts, firsts, seconds))) + "\\n")
    time.sleep(0.2)
    drawn = random.Random("".join(firsts + seconds))
    return [float(drawn.random() < 0.5 + 0.4 * ((len(a) > len(b)) - (len(a) < len(b)))) for a, b in zip(firsts, seconds)]
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to kill."""

    policy: pathlib.Path
    """Hugging Face directory of a small model."""
    kills: int = 100
    steps: int = 12
    """Of a run; a checkpoint is due after every second."""
    most: int = 4
    """Kills of one run; then it may end, and another begins."""
    seed: int = 0
    seconds: float = 300.0
    """That a process may take."""
    output: pathlib.Path = pathlib.Path("runs")
    """Where the run's own folder is made."""


class Killed(NamedTuple):
    """A process that was killed: at which moment, after how many steps, and from which one the next went on."""

    moment: str
    reached: int
    resumed: int


def command(config: Config, place: pathlib.Path, name: str) -> list[str]:
    """Returns the command of a run in a folder of its own."""
    options = {
        "policy": config.policy.absolute(),
        "data": place / "prompts.jsonl",
        "annotator": "judge:prefers",
        "steps": config.steps,
        "batch-size": 4,
        "pairs": 2,
        "max-new-tokens": 8,
        "evaluations": 2,
        "evaluation-answers": 8,
        "checkpoint-steps": 2,
        "output": place / "runs",
        "data-dir": place / "data",
        "run": name,
    }
    flat = [text for option, value in options.items() for text in (f"--{option}", str(value))]
    return [sys.executable, "-m", "jaxrlhf.commands.main", "align", *flat, "--resume"]


def prepare(place: pathlib.Path) -> None:
    """Writes prompts and the judge."""
    place.mkdir(parents=True, exist_ok=True)
    openings = ("Once upon a time", "One day a girl", "The little dog", "Tom and Lily", "A big red bird")
    endings = (" was", " had", " saw", " went", " wanted", " liked", " found", " made")
    lines = [json.dumps({"prompt": first + second}) for first in openings for second in endings]
    (place / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (place / "judge.py").write_text(JUDGE)


def begin(config: Config, place: pathlib.Path, name: str) -> subprocess.Popen:
    """Starts a run, or goes on with it, in its folder; what it says is in `said`."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(place.parent / "compiled"), "PYTHONPATH": str(place)}
    with (place / "said").open("ab") as said:
        return subprocess.Popen(command(config, place, name), cwd=place, env=environment, stdout=said, stderr=said)


def moment_of(moment: str, folder: pathlib.Path, place: pathlib.Path, drawn: random.Random, usual: float) -> Callable:
    """Returns `() -> ` whether a moment has come: an event that is waited for, the first time or later ones."""
    began, count = time.monotonic(), drawn.randint(1, 3)
    after = drawn.uniform(0.2, 1.0) * usual

    def lines(path: pathlib.Path) -> int:
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    asked, answered = lines(place / "asked"), lines(folder / "labels.jsonl")
    seen: set[str] = set()

    def come() -> bool:
        if moment == "at random":
            return time.monotonic() - began > after
        if moment == "while labelling":
            # Eight questions a call.
            return lines(place / "asked") >= asked + 8 * count
        if moment == "labels written":
            return lines(folder / "labels.jsonl") >= answered + count
        seen.update(each.name for each in (folder / "checkpoints").glob("*tmp*"))
        return len(seen) >= count

    return come


def kill(config: Config, place: pathlib.Path, moment: str, drawn: random.Random, usual: float) -> bool:
    """Goes on with a run and kills it at a moment; returns whether that came before its end.

    Raises:
        RuntimeError: the process failed, or took too long.
    """
    come = moment_of(moment, place / "runs" / "mine", place, drawn, usual)
    process, began = begin(config, place, "mine"), time.monotonic()
    while process.poll() is None:
        if come():
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=30)
            return True
        if time.monotonic() - began > config.seconds:
            process.kill()
            process.wait(timeout=30)
            raise RuntimeError(f"A run took more than {config.seconds:g} s; see {place / 'said'}.")
        time.sleep(0.002)
    if process.returncode:
        raise RuntimeError(f"A run failed with {process.returncode}; see {place / 'said'}.")
    return False


def steps_of(folder: pathlib.Path) -> tuple[int, int]:
    """Returns the steps that a run has told of, and those of its last whole checkpoint."""
    path = folder / "metrics.jsonl"
    told = [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []
    kept = [int(each.name) for each in (folder / "checkpoints").glob("*") if each.name.isdigit()]
    return max(told, default=0), max(kept, default=0)


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """Returns what is not the same in two run folders."""
    different = [name for name in SAME if not filecmp.cmp(one / name, other / name, shallow=False)]
    # Each sample is named by its prompts and responses: none is skipped, none comes twice.
    return different + ["labels.jsonl"] * (samples_of(one) != samples_of(other))


def samples_of(folder: pathlib.Path) -> list[dict]:
    """Returns the samples of a run in their order, with their labels; a line that was being written is not one."""
    found = []
    for line in (folder / "labels.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def asked_again(place: pathlib.Path, kills: int) -> list[str]:
    """Returns how far questions were put more often than the kills explain: each may interrupt one call of 8."""
    asked = (place / "asked").read_text().splitlines()
    labelled = sum(len(line["labels"]) * len(line["labels"][0]) for line in samples_of(place / "runs" / "mine"))
    return [f"{len(asked)} questions for {labelled} labels"] if len(asked) > labelled + 8 * kills else []


def alone(config: Config, place: pathlib.Path) -> tuple[pathlib.Path, float]:
    """Runs once without a kill, twice to know the time with everything compiled; returns the folder and seconds."""
    for name in ("first", "mine"):
        began = time.monotonic()
        prepare(place)
        (place / "asked").unlink(missing_ok=True)
        process = begin(config, place, name)
        if process.wait(timeout=config.seconds):
            raise RuntimeError(f"A run failed; see {place / 'said'}.")
    return place / "runs" / "mine", time.monotonic() - began


def killed_run(
    config: Config, place: pathlib.Path, whole: pathlib.Path, moments: list[str], drawn: random.Random, usual: float
) -> tuple[list[Killed], list[str]]:
    """Kills one run at each moment in turn, as far as they come before its end, then lets it end.

    Returns:
        the kills, and what is different from the run that was left alone.
    """
    prepare(place)
    folder, kills = place / "runs" / "mine", []
    for moment in moments:
        if not kill(config, place, moment, drawn, usual):
            break
        kills.append(Killed(moment, *steps_of(folder)))
    kill(config, place, "at random", drawn, float("inf"))
    return kills, differences(folder, whole) + asked_again(place, len(kills))


def report(folder: RunFolder, config: Config, kills: list[Killed], wrong: list[str], seconds: float) -> Table:
    """Writes table and numbers; returns the table."""
    by_moment = collections.defaultdict(list)
    for each in kills:
        by_moment[each.moment].append(each)
    rows = []
    for moment, found in [*by_moment.items(), ("all", kills)]:
        again = sum(max(0, each.reached - each.resumed) for each in found) / max(1, len(found))
        rows.append((moment, len(found), f"{again:.1f}", sum(each.resumed == 0 for each in found)))
    columns = ("killed", "times", "steps taken again, mean", "before the first checkpoint")
    table = Table(f"{len(kills)} kills, {len(wrong)} differences", columns, rows)
    folder.write_json("results.json", {"kills": kills, "differences": wrong, "seconds": seconds})
    folder.write_text("tables.md", as_markdown(table))
    write_report(
        folder.path,
        title="Killed and gone on",
        summary=f"{len(kills)} kills in {seconds / 60:.1f} minutes; {len(wrong)} differences from the run left alone.",
        tables=[table],
        figures=[],
        config=config,
        notes=wrong
        or ["Policy, reward, metrics and samples are those of the run that was left alone, to the last byte."],
    )
    return table


def main(config: Config) -> pathlib.Path:
    """Kills as often as asked; ends with 1 if anything was different."""
    console, began, drawn = Console(), time.monotonic(), random.Random(config.seed)
    try:
        folder = RunFolder(config.output, "kills")
    except ValueError as error:
        print(f"kills: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    folder.write_json("config.json", config)
    work = folder.path / "runs"
    whole, usual = alone(config, work / "alone")
    kills, wrong = [], []
    with progress("kills", config.kills, "kills", console=console) as advance:
        while len(kills) < config.kills:
            moments = [drawn.choice(MOMENTS) for _ in range(min(config.most, config.kills - len(kills)))]
            found, different = killed_run(config, work / f"run-{len(kills)}", whole, moments, drawn, usual)
            kills += found
            wrong += [f"after kill {len(kills)}: {each}" for each in different]
            for each in found:
                folder.append_metrics(**each._asdict())
                advance(1)
    console.print(rich_table(report(folder, config, kills, wrong, time.monotonic() - began)))
    console.print(str(folder.path), soft_wrap=True)
    if wrong:
        raise SystemExit(1)
    return folder.path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
