"""Four-Rooms incentive design: a leader charges for cells so that a follower's path passes through a target cell.

    python experiments/four_rooms.py --cell 0.003,1      # one cell of the published table: entropy weight, regulariser
    python experiments/four_rooms.py --all               # all nine cells beside the published results
    python experiments/four_rooms.py --search            # best known optima, by multi-start and continuation

Our methods restart and anneal within the published budget of 10,000 best responses per run; comparators follow the
published protocol. Values are exact returns of the leader at the follower's exact best response, as mean and standard
error over seeds.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from four_rooms_methods import METHODS, OURS, Budget, Outcome, exact_value
from four_rooms_pictures import draw_curves_of, draw_rooms
from four_rooms_search import search
from jax.sharding import Mesh, PartitionSpec

from jaxrlhf.mdp import four_rooms as rooms
from jaxrlhf.mdp import tabular
from jaxrlhf.training.report import Table, write_report
from jaxrlhf.training.run_folder import RunFolder

PUBLISHED = {
    (0.001, 1): {"HPGD": (0.91, 0.088), "AMD": (0.58, 0.000), "zero-order": (0.59, 0.059)},
    (0.001, 3): {"HPGD": (0.51, 0.006), "AMD": (0.51, 0.000), "zero-order": (0.50, 0.005)},
    (0.001, 5): {"HPGD": (0.46, 0.006), "AMD": (0.46, 0.003), "zero-order": (0.46, 0.007)},
    (0.003, 1): {"HPGD": (0.95, 0.002), "AMD": (1.00, 0.000), "zero-order": (0.91, 0.048)},
    (0.003, 3): {"HPGD": (0.73, 0.001), "AMD": (0.39, 0.000), "zero-order": (0.40, 0.028)},
    (0.003, 5): {"HPGD": (0.29, 0.003), "AMD": (0.32, 0.000), "zero-order": (0.32, 0.002)},
    (0.005, 1): {"HPGD": (1.17, 0.011), "AMD": (1.28, 0.003), "zero-order": (1.15, 0.026)},
    (0.005, 3): {"HPGD": (1.01, 0.002), "AMD": (1.13, 0.004), "zero-order": (1.02, 0.027)},
    (0.005, 5): {"HPGD": (0.87, 0.003), "AMD": (0.97, 0.009), "zero-order": (0.79, 0.027)},
}
"""Mean and standard error over 10 seeds, by (follower's entropy weight, regulariser): arXiv 2406.01575, table 1."""

OPTIMA = pathlib.Path(__file__).parent / "results" / "four_rooms" / "optima.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    cell: str = "0.003,1"
    """Follower's entropy weight and leader's regulariser, for example 0.003,1."""
    all: bool = False
    """All nine cells of the published table."""
    search: bool = False
    """Search for better optima of all nine cells and write optima.json, instead of comparing methods."""
    methods: tuple[str, ...] = ("central", "boltzmann")
    """Any of: central, boltzmann, central from episodes, HPGD, AMD, zero-order."""
    seeds: int = 10
    restarts: int = 16
    """Descents per run, of which the best is kept (our methods)."""
    steps: int = 200
    """Outer steps per descent (our methods): 16 descents of 200 steps of 3 best responses are 9,616."""
    episodes: int = 50
    """Episodes per goal and step (central from episodes)."""
    outer_steps: int = 10_000
    """Outer steps of a comparator, 10,000 as published."""
    rate: float = 0.1
    """Learning rate of the comparators; published: the best of 0.5, 0.1, 0.05, 0.01."""
    output: pathlib.Path = pathlib.Path("runs")
    """Directory in which the run's folder is created."""


def cells_of(config: Config) -> list[tuple[float, float]]:
    """Returns the cells to run.

    Raises:
        ValueError: the cell, a method or a number is invalid.
    """
    unknown = set(config.methods) - set(METHODS)
    if unknown:
        raise ValueError(f"Unknown method {sorted(unknown)[0]!r}; known are {', '.join(METHODS)}.")
    for name in ("seeds", "restarts", "steps", "outer_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}.")
    if config.all or config.search:
        return list(PUBLISHED)
    try:
        entropy_weight, regulariser = (float(part) for part in config.cell.split(","))
    except ValueError:
        raise ValueError(f"--cell takes two numbers as in 0.003,1, got {config.cell!r}.") from None
    if not (entropy_weight > 0 and math.isfinite(entropy_weight) and math.isfinite(regulariser)):
        raise ValueError(f"--cell takes a positive entropy weight and a finite regulariser, got {config.cell!r}.")
    return [(entropy_weight, regulariser)]


def over_seeds(run, seeds: int):
    """Returns `run(key, terms, environment)`, compiled once, mapped over seeds and sharded over devices by seed."""
    mesh = Mesh(np.array(jax.devices()[: math.gcd(seeds, jax.device_count())]), ("seeds",))
    sharded, replicated = PartitionSpec("seeds"), PartitionSpec()
    mapped = jax.vmap(run, (0, None, None))
    in_specs = (sharded, replicated, replicated)
    return jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=in_specs, out_specs=sharded, check_vma=False))


def row_of(method: str, cell: tuple[float, float], outcome: Outcome, seconds: float) -> dict:
    """Returns the results of one method on one cell; the outcome's leaves are `[seeds, ...]`."""
    seeds, environment_steps = len(outcome.value), float(outcome.environment_steps.mean())
    return {
        "entropy weight": cell[0],
        "regulariser": cell[1],
        "method": method,
        "mean": float(outcome.value.mean()),
        "standard error": float(outcome.value.std(ddof=min(1, seeds - 1)) / math.sqrt(seeds)),
        "worst": float(outcome.value.min()),
        "best": float(outcome.value.max()),
        "solves": int(outcome.solves[0]),
        "environment steps": environment_steps,
        "seconds": seconds,
        "environment steps a second": environment_steps * seeds / seconds,
    }


def compare(config: Config, cells: list, folder: RunFolder) -> tuple[list[dict], dict]:
    """Runs every method on every cell; returns the table's rows, and the best weights and the curves of each."""
    environment = rooms.four_rooms()
    tabular.check(environment.mdp, name="Four-Rooms")
    rows, best, began = [], {}, time.monotonic()
    total = len(config.methods) * len(cells)
    for name in config.methods:
        ours = name in OURS
        budget = Budget(
            restarts=config.restarts if ours else 1,
            steps=config.steps if ours else config.outer_steps,
            episodes=config.episodes,
            rate=config.rate,
        )
        run = over_seeds(functools.partial(METHODS[name](), budget=budget), config.seeds)
        for cell in cells:
            started = time.monotonic()
            keys = jax.random.split(jax.random.key(0), config.seeds)
            outcome = jax.tree.map(np.asarray, run(keys, rooms.coefficients(*cell), environment))
            seconds = time.monotonic() - started
            best[name, cell] = (outcome.upper[int(outcome.value.argmax())], outcome.curve)
            row = row_of(name, cell, outcome, seconds)
            rows.append(row)
            folder.append_metrics(**row)
            elapsed = time.monotonic() - began
            left = elapsed / len(rows) * (total - len(rows))
            print(
                f"{len(rows)}/{total}  {name}, cell {cell[0]:g},{cell[1]:g}: {row['mean']:.3f} +- "
                f"{row['standard error']:.3f}  ({seconds:.0f} s, about {left:.0f} s left)",
                flush=True,
            )
    return rows, best


def best_known(rows: list[dict]) -> dict[tuple[float, float], float]:
    """Returns the best known value of each cell, from the search or from these rows."""
    known = {}
    if OPTIMA.exists():
        for entry in json.loads(OPTIMA.read_text())["cells"]:
            known[entry["entropy weight"], entry["regulariser"]] = entry["value"]
    for row in rows:
        cell = (row["entropy weight"], row["regulariser"])
        known[cell] = max(known.get(cell, -math.inf), row["best"])
    return known


def returns_table(rows: list[dict]) -> list[str]:
    """Returns the returns by cell as Markdown lines: measured, published, best known, and the gap to it."""
    known = best_known(rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    header = ["entropy weight", "regulariser", *methods, "published HPGD", "AMD", "zero-order", "best known"]
    header += [f"gap of {method}" for method in methods if method in OURS]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for cell in dict.fromkeys((row["entropy weight"], row["regulariser"]) for row in rows):
        by_method = {row["method"]: row for row in rows if (row["entropy weight"], row["regulariser"]) == cell}
        line = [f"{cell[0]:g}", f"{cell[1]:g}"]
        line += [f"{by_method[method]['mean']:.2f} +- {by_method[method]['standard error']:.3f}" for method in methods]
        published = PUBLISHED.get(cell, {})
        names = ("HPGD", "AMD", "zero-order")
        line += ["{:.2f} +- {:.3f}".format(*published[name]) if published else "" for name in names]
        line += [f"{known[cell]:.3f}"]
        line += [f"{known[cell] - by_method[method]['mean']:.3f}" for method in methods if method in OURS]
        lines.append("| " + " | ".join(line) + " |")
    return lines


def cost_table(rows: list[dict]) -> list[str]:
    """Returns what each method used as Markdown lines, mean over cells."""
    lines = [
        "| method | best responses per run | environment steps per run | seconds per cell | steps per second |",
        "|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        mean = {name: np.mean([row[name] for row in of_method]) for name in of_method[0] if name != "method"}
        lines.append(
            f"| {method} | {of_method[0]['solves']:,} | {mean['environment steps']:,.0f} | {mean['seconds']:.0f} | "
            f"{mean['environment steps a second']:,.0f} |"
        )
    return lines


def tables(config: Config, rows: list[dict]) -> str:
    """Returns both tables as Markdown."""
    text = (
        f"Leader's exact return, mean and standard error over {config.seeds} seeds. Published budget per run: 10,000 "
        "best responses (20,000 for zero-order) and 100,000,000 environment steps (none for AMD and zero-order)."
    )
    return "\n".join([text, "", *returns_table(rows), "", *cost_table(rows), ""])


def report_search(config: Config, folder: RunFolder, found: list[dict]) -> None:
    """Writes and prints what the search found."""
    folder.write_json("optima.json", {"command": "python experiments/four_rooms.py --search", "cells": found})
    rows = [(entry["entropy weight"], entry["regulariser"], entry["value"]) for entry in found]
    optima = Table("Best return found", ("entropy weight", "regulariser", "return"), rows)
    write_report(folder.path, title="Optima of Four-Rooms", summary="", tables=[optima], figures=[], config=config)
    for entry in found:
        print(f"{entry['entropy weight']:g},{entry['regulariser']:g}: {entry['value']:.4f}")
    print(f"\n{folder.path}")


def report(config: Config, cells: list, folder: RunFolder, rows: list[dict], best: dict) -> None:
    """Writes tables, figures and numbers of the comparison, and prints the tables."""
    environment, text = rooms.four_rooms(), tables(config, rows)
    folder.write_text("table.md", text)
    folder.write_json("results.json", {"config": config, "rows": rows})
    for cell in cells:
        name = f"{cell[0]:g}_{cell[1]:g}"
        of_cell = [row for row in rows if (row["entropy weight"], row["regulariser"]) == cell]
        winner = max(of_cell, key=lambda row: row["best"])
        upper = jnp.asarray(best[winner["method"], cell][0])
        draw_rooms(folder.path / f"rooms_{name}.png", upper, rooms.coefficients(*cell), environment)
        draw_curves_of(folder.path / f"curves_{name}.png", {method: best[method, cell][1] for method in config.methods})
        value = float(exact_value(upper, rooms.coefficients(*cell), environment))
        folder.write_json(f"incentives_{name}.json", {"value": value, "weights": np.asarray(upper)})
    columns = [name for name, value in rows[0].items() if isinstance(value, str | int | float)]
    write_report(
        folder.path,
        title="Incentive design in Four-Rooms",
        summary=text.split("\n\n")[0],
        tables=[Table("Every method and cell", columns, [[row[name] for name in columns] for row in rows])],
        figures=sorted(path.name for path in folder.path.glob("*.png")),
        config=config,
    )
    print("\n" + text)
    print(folder.path)


def main(config: Config) -> None:
    """Compares the methods, or searches for optima."""
    try:
        cells = cells_of(config)
        folder = RunFolder(config.output, "four_rooms_search" if config.search else "four_rooms")
    except ValueError as error:
        print(f"four_rooms: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    folder.write_json("config.json", config)
    if config.search:
        found = search(cells, config.seeds, config.steps, over_seeds, rooms.four_rooms())
        report_search(config, folder, found)
        return
    rows, best = compare(config, cells, folder)
    report(config, cells, folder, rows, best)


if __name__ == "__main__":
    # An entropy weight of 0.001 divides action values: single precision would leave errors of a nat.
    jax.config.update("jax_enable_x64", True)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    main(tyro.cli(Config, description=__doc__))
