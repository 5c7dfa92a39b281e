"""Tabulates which model fits which accelerator: runs `benchmarks.plan` for three models on five kinds of chips.

    python -m benchmarks.plans                     # needs pip install '.[plan]'; takes minutes per row
    python -m benchmarks.plans --models llama-8b --topologies v5e:2x4 v6e:2x4

Each plan runs in a process of its own. A failed plan (an unknown topology, a compiler that runs out of memory) is a row of
the table too, with the reason.
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
    "model", "adapters", "devices", "microbatches", "state, reference, batch (GB per device)",
    "temporaries (GB per device)", "fits", "PFLOP per step", "collectives (GB per device)", "lower bound (s)", "tokens",
    "compile time (s)", "method",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """What to plan."""

    models: tuple[str, ...] = ("llama-1b", "llama-8b", "llama-70b")
    topologies: tuple[str, ...] = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4", "h100:8", "h200:8")
    lora_rank: int = 16
    microbatches: tuple[int, ...] = (1, 2, 4)
    """Tried in order until the step fits."""
    batch_size: int = 8
    timeout: float = 900.0
    """Seconds that one plan may take."""
    output: pathlib.Path = pathlib.Path("runs")
    """The run's folder is created in here."""


def row_of(config: Config, model: str, topology: str, folder: RunFolder) -> dict:
    """Returns the plan with the fewest microbatches that fit; otherwise the last plan tried, or why it failed."""
    result: dict = {}
    for microbatches in config.microbatches:
        result = attempt(config, model, topology, microbatches, folder)
        if result.get("fits"):
            break
    return result


def attempt(config: Config, model: str, topology: str, microbatches: int, folder: RunFolder) -> dict:
    """Returns one plan, or why it failed."""
    output = folder.path / "rows" / f"{model}-{topology.replace(':', '-')}-{microbatches}.jsonl"
    output.parent.mkdir(exist_ok=True)
    options = {
        "model": model,
        "topology": topology,
        "lora-rank": config.lora_rank,
        "microbatches": microbatches,
        "batch-size": config.batch_size,
        "output": output,
    }
    command = [sys.executable, "-m", "benchmarks.plan"]
    command += [text for option, value in options.items() for text in (f"--{option}", str(value))]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=config.timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"model": model, "topology": topology, "failed": f"took more than {config.timeout:g} s"}
    if process.returncode or not output.is_file():
        reason = (process.stderr.strip().splitlines() or ["no reason was given"])[-1]
        return {"model": model, "topology": topology, "failed": reason[:200]}
    return json.loads(output.read_text().splitlines()[-1])


def cells_of(row: dict) -> tuple:
    """Returns a plan as a row of the table."""
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
        "unknown" if row["collectives"] is None else f"{sum(row['collectives'].values()) / 1e9:.1f}",
        f"{row['seconds']:.2f}",
        f"{row['tokens']:,}",
        f"{row['compile_seconds']:.0f}",
        row["method"],
    )


def main(config: Config) -> pathlib.Path:
    """Plans every row and writes the table; returns the run's folder."""
    console, rows = Console(), []
    folder = RunFolder(config.output, "plans")
    folder.write_json("config.json", config)
    combinations = [(model, topology) for model in config.models for topology in config.topologies]
    with progress("plans", len(combinations), "plans", console=console) as advance:
        for model, topology in combinations:
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
