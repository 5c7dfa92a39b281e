"""The table of what fits where: `benchmarks.plan` for three models on five kinds of chips, a process each.

    python -m benchmarks.plans                     # needs pip install '.[plan]'; minutes a row
    python -m benchmarks.plans --models llama-8b --topologies v5e:2x4 v6e:2x4

Rows that fail (a topology that libtpu does not know, a compiler that gives up) are rows too, with the reason.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

import tyro
from rich.console import Console

from jaxrlhf.training.progress import progress
from jaxrlhf.training.report import Table, as_markdown, as_text
from jaxrlhf.training.run_folder import RunFolder

COLUMNS = (
    "model", "adapters", "devices", "microbatches", "state, reference, batch (GB a device)", "beside them (GB)", "fits",
    "PFLOP a step", "collectives (GB a device)", "least seconds", "tokens", "compiled in (s)", "how",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Which rows."""

    models: tuple[str, ...] = ("llama-1b", "llama-8b", "llama-70b")
    topologies: tuple[str, ...] = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4", "h100:8", "h200:8")
    lora_rank: int = 16
    microbatches: tuple[int, ...] = (1, 2, 4)
    """Of each row the first that fits."""
    batch_size: int = 8
    seconds: float = 900.0
    """That one compilation may take."""
    output: pathlib.Path = pathlib.Path("runs")
    """Where the run's own folder is made."""


def row_of(config: Config, model: str, topology: str, folder: RunFolder) -> dict:
    """Returns the plan of the fewest parts that fit; of the most, or the reason why there is none, where none does."""
    found: dict = {}
    for microbatches in config.microbatches:
        found = attempt(config, model, topology, microbatches, folder)
        if found.get("fits"):
            break
    return found


def attempt(config: Config, model: str, topology: str, microbatches: int, folder: RunFolder) -> dict:
    """Returns one plan, or the reason why there is none."""
    place = folder.path / "rows" / f"{model}-{topology.replace(':', '-')}-{microbatches}.jsonl"
    place.parent.mkdir(exist_ok=True)
    options = {
        "model": model,
        "topology": topology,
        "lora-rank": config.lora_rank,
        "microbatches": microbatches,
        "batch-size": config.batch_size,
        "output": place,
    }
    command = [sys.executable, "-m", "benchmarks.plan"]
    command += [text for option, value in options.items() for text in (f"--{option}", str(value))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=config.seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"model": model, "topology": topology, "failed": f"took more than {config.seconds:g} s"}
    if done.returncode or not place.is_file():
        said = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        return {"model": model, "topology": topology, "failed": said[:200]}
    return json.loads(place.read_text().splitlines()[-1])


def cells_of(row: dict) -> tuple:
    """Returns a row of the table."""
    if "failed" in row:
        return (row["model"], "", row["topology"], *[""] * 9, row["failed"])
    return (
        row["model"],
        row["lora_rank"] or "all weights",
        f"{row['devices']} ({row['topology']})",
        row["microbatches"],
        f"{row['arguments'] / 1e9:.2f}",
        f"{row['temporaries'] / 1e9:.2f}",
        "yes" if row["fits"] else "no",
        f"{row['flops'] / 1e15:.2f}",
        "not told" if row["collectives"] is None else f"{sum(row['collectives'].values()) / 1e9:.1f}",
        f"{row['seconds']:.2f}",
        f"{row['tokens']:,}",
        f"{row['compile_seconds']:.0f}",
        row["how"],
    )


def main(config: Config) -> pathlib.Path:
    """Plans every row and writes the table; returns the run's folder."""
    console, rows = Console(), []
    folder = RunFolder(config.output, "plans")
    folder.write_json("config.json", config)
    wanted = [(model, topology) for model in config.models for topology in config.topologies]
    with progress("plans", len(wanted), "plans", console=console) as advance:
        for model, topology in wanted:
            rows.append(row_of(config, model, topology, folder))
            folder.append_metrics(**rows[-1])
            advance(1)
    table = Table("The update of jaxrlhf align", COLUMNS, [cells_of(row) for row in rows])
    folder.write_text("tables.md", as_markdown(table))
    folder.write_json("results.json", rows)
    print(as_text(table))
    console.print(str(folder.path), soft_wrap=True)
    return folder.path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
