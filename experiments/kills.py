"""Kills a run repeatedly, resumes it, and compares its output with that of an uninterrupted run.

    python experiments/kills.py --policy DIR              # 100 kills
    python experiments/kills.py --policy DIR --kills 10

DIR is a Hugging Face directory of a small model. `jaxrlhf align` runs in a separate process, which is killed with kill -9:
at a random time, while the annotator is labelling, right after labels are written, or during a checkpoint. Then the same
command runs again with --resume. Policy, reward and metrics must equal those of the uninterrupted run bit for bit, and no
label that was written may be requested again.
"""

import collections
import contextlib
import dataclasses
import filecmp
import functools
import json
import math
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
"""Files that must be equal byte for byte, where the uninterrupted run has them."""

# An annotator that records its requests and is slow.
ANNOTATOR = """
import pathlib, random, time

def prefers(prompts, firsts, seconds):
    here = pathlib.Path(__file__).parent
    with (here / "requests").open("a") as stream:
        stream.write("\\n".join(map(repr, zip(prompts, firsts, seconds))) + "\\n")
    time.sleep(0.2)
    drawn = random.Random("".join(firsts + seconds))
    return [float(drawn.random() < 0.5 + 0.4 * ((len(a) > len(b)) - (len(a) < len(b)))) for a, b in zip(firsts, seconds)]
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run and how often to kill it."""

    policy: pathlib.Path
    """Hugging Face directory of a small model."""
    method: str = "bilevel"
    """Of `jaxrlhf align`."""
    reuse: int = 0
    """Updates from kept labels, of `jaxrlhf align`."""
    kills: int = 100
    steps: int = 12
    """Outer steps of a run; it writes a checkpoint after every second one."""
    most: int = 4
    """Maximum number of kills per run; then it runs to its end, and another run begins."""
    seed: int = 0
    seconds: float = 300.0
    """Maximum time of a process."""
    output: pathlib.Path = pathlib.Path("runs")
    """Directory in which the run's folder is created."""


class Kill(NamedTuple):
    """A kill: its kind of moment, the last step logged before it, and the step that the next process resumes from."""

    moment: str
    reached: int
    resumed: int


def command(config: Config, place: pathlib.Path, name: str) -> list[str]:
    """Returns the command of a run under `place`."""
    options = {
        "policy": config.policy.absolute(),
        "data": place / "prompts.jsonl",
        "annotator": "annotator:prefers",
        "method": config.method,
        "reuse": config.reuse,
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
    """Writes the prompts and the annotator."""
    place.mkdir(parents=True, exist_ok=True)
    openings = ("Once upon a time", "One day a girl", "The little dog", "Tom and Lily", "A big red bird")
    endings = (" was", " had", " saw", " went", " wanted", " liked", " found", " made")
    lines = [json.dumps({"prompt": first + second}) for first in openings for second in endings]
    (place / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (place / "annotator.py").write_text(ANNOTATOR)


def begin(config: Config, place: pathlib.Path, name: str) -> subprocess.Popen:
    """Starts or resumes a run; its output is appended to `log`."""
    environment = (
        {"JAX_COMPILATION_CACHE_DIR": str(place.parent / "compiled")} | os.environ | {"PYTHONPATH": str(place)}
    )
    with (place / "log").open("ab") as log:
        return subprocess.Popen(command(config, place, name), cwd=place, env=environment, stdout=log, stderr=log)


def moment_of(
    moment: str, folder: pathlib.Path, place: pathlib.Path, rng: random.Random, usual: Callable[[], float]
) -> Callable:
    """Returns `() -> bool`, whether it is time to kill: the first, second or third event of the kind has happened.

    Args:
        moment: one of `MOMENTS`.
        folder: of the run.
        place: of the run's annotator.
        rng: draws which event, or the time.
        usual: returns the seconds that a run takes; called for a kill at random only.
    """
    count, share = rng.randint(1, 3), rng.uniform(0.2, 1.0)
    after = share * usual() if moment == "at random" else math.inf
    began = time.monotonic()

    def lines(path: pathlib.Path) -> int:
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    requested, labelled = lines(place / "requests"), lines(folder / "labels.jsonl")
    checkpoints: set[str] = set()

    def due() -> bool:
        if moment == "at random":
            return time.monotonic() - began > after
        if moment == "while labelling":
            # A call of the annotator has eight requests.
            return lines(place / "requests") >= requested + 8 * count
        if moment == "labels written":
            return lines(folder / "labels.jsonl") >= labelled + count
        checkpoints.update(path.name for path in (folder / "checkpoints").glob("*tmp*"))
        return len(checkpoints) >= count

    return due


def kill(config: Config, place: pathlib.Path, moment: str, rng: random.Random, usual: Callable[[], float]) -> bool:
    """Resumes a run and kills it at a moment; returns False if the run ended first.

    Raises:
        RuntimeError: the process failed, or took too long.
    """
    due = moment_of(moment, place / "runs" / "mine", place, rng, usual)
    process, began = begin(config, place, "mine"), time.monotonic()
    while process.poll() is None:
        if due():
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=30)
            return True
        if time.monotonic() - began > config.seconds:
            process.kill()
            process.wait(timeout=30)
            raise RuntimeError(f"A run took more than {config.seconds:g} s; see {place / 'log'}.")
        time.sleep(0.002)
    if process.returncode:
        raise RuntimeError(f"A run failed with {process.returncode}; see {place / 'log'}.")
    return False


def steps_of(folder: pathlib.Path) -> tuple[int, int]:
    """Returns the last step in the metrics of a run, and that of its last complete checkpoint."""
    path = folder / "metrics.jsonl"
    logged = [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []
    saved = [int(each.name) for each in (folder / "checkpoints").glob("*") if each.name.isdigit()]
    return max(logged, default=0), max(saved, default=0)


def differences(folder: pathlib.Path, uninterrupted: pathlib.Path) -> list[str]:
    """Returns the files that differ between two run folders."""
    expected = [name for name in SAME if (uninterrupted / name).exists()]
    different = [name for name in expected if not filecmp.cmp(folder / name, uninterrupted / name, shallow=False)]
    # Each sample is identified by its prompts and responses, so a skipped or repeated one is noticed.
    return different + ["labels.jsonl"] * (samples_of(folder) != samples_of(uninterrupted))


def samples_of(folder: pathlib.Path) -> list[dict]:
    """Returns the labelled samples of a run in order, without an incomplete last line."""
    samples = []
    for line in (folder / "labels.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            samples.append(json.loads(line))
    return samples


def repeated_requests(place: pathlib.Path, kills: int) -> list[str]:
    """Returns a message if there were more requests than the kills explain: each may interrupt one call of 8."""
    requests = (place / "requests").read_text().splitlines()
    labelled = sum(len(line["labels"]) * len(line["labels"][0]) for line in samples_of(place / "runs" / "mine"))
    return [f"{len(requests)} requests for {labelled} labels"] if len(requests) > labelled + 8 * kills else []


def run_uninterrupted(config: Config, place: pathlib.Path) -> tuple[pathlib.Path, float]:
    """Runs without a kill; returns the folder and the seconds it took."""
    prepare(place)
    began = time.monotonic()
    if begin(config, place, "mine").wait(timeout=config.seconds):
        raise RuntimeError(f"A run failed; see {place / 'log'}.")
    return place / "runs" / "mine", time.monotonic() - began


def killed_run(
    config: Config,
    place: pathlib.Path,
    uninterrupted: pathlib.Path,
    moments: list[str],
    rng: random.Random,
    usual: Callable[[], float],
) -> tuple[list[Kill], list[str]]:
    """Kills one run at each moment in turn, until it ends before one of them, and then lets it finish.

    Returns:
        the kills, and the differences from the uninterrupted run.
    """
    prepare(place)
    folder, kills = place / "runs" / "mine", []
    for moment in moments:
        if not kill(config, place, moment, rng, usual):
            break
        kills.append(Kill(moment, *steps_of(folder)))
    kill(config, place, "at random", rng, lambda: math.inf)
    return kills, differences(folder, uninterrupted) + repeated_requests(place, len(kills))


def report(folder: RunFolder, config: Config, kills: list[Kill], wrong: list[str], seconds: float) -> Table:
    """Writes the table and numbers; returns the table."""
    by_moment = collections.defaultdict(list)
    for each in kills:
        by_moment[each.moment].append(each)
    rows = []
    for moment, found in [*by_moment.items(), ("all", kills)]:
        repeated = sum(max(0, each.reached - each.resumed) for each in found) / max(1, len(found))
        rows.append((moment, len(found), f"{repeated:.1f}", sum(each.resumed == 0 for each in found)))
    columns = ("killed", "times", "steps repeated, mean", "before the first checkpoint")
    table = Table(f"{len(kills)} kills, {len(wrong)} differences", columns, rows)
    folder.write_json("results.json", {"kills": kills, "differences": wrong, "seconds": seconds})
    folder.write_text("tables.md", as_markdown(table))
    write_report(
        folder.path,
        title="Killed and resumed",
        summary=f"{len(kills)} kills in {seconds / 60:.1f} minutes; {len(wrong)} differences from the uninterrupted run.",
        tables=[table],
        figures=[],
        config=config,
        notes=wrong or ["Models, metrics and samples equal those of the uninterrupted run, byte for byte."],
    )
    return table


def main(config: Config) -> pathlib.Path:
    """Kills the requested number of times; exits with status 1 if anything differed."""
    console, began, rng = Console(), time.monotonic(), random.Random(config.seed)
    try:
        folder = RunFolder(config.output, "kills")
    except ValueError as error:
        print(f"kills: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    folder.write_json("config.json", config)
    work = folder.path / "runs"
    uninterrupted, _ = run_uninterrupted(config, work / "uninterrupted")
    # The time of another run: unlike the first, it compiles nothing.
    usual = functools.cache(lambda: run_uninterrupted(config, work / "timed")[1])
    kills, wrong = [], []
    with progress("kills", config.kills, "kills", console=console) as advance:
        while len(kills) < config.kills:
            moments = [rng.choice(MOMENTS) for _ in range(min(config.most, config.kills - len(kills)))]
            found, different = killed_run(config, work / f"run-{len(kills)}", uninterrupted, moments, rng, usual)
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
