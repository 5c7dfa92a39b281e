"""Measures the theory's claims: bias, variance, global convergence, gradient domination, sample complexity, objectives.

    python experiments/convergence.py --quick       # a minute
    python experiments/convergence.py               # the full study, about 20 minutes on 2 cores
    python experiments/convergence.py --only bias variance

Writes tables (JSON and Markdown) and figures into one folder, and a report that combines them.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Literal

import jax
import tyro

from jaxrlhf.training.report import tables_of, write_report

Study = Literal["optima", "bias", "variance", "global_convergence", "domination", "sample_complexity", "objectives"]
ORDER: tuple[Study, ...] = Study.__args__  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    only: tuple[Study, ...] = ORDER
    """The studies to run; they run in a fixed order."""
    quick: bool = False
    """Small sizes, to check that everything runs; the numbers mean little."""
    output: pathlib.Path = pathlib.Path("runs/convergence")
    """Folder for tables and figures; created if missing. Files of the same name are overwritten."""


def commit() -> str:
    """Returns the commit of the checkout, or a placeholder."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip() or "unknown (not a git checkout)"


def report(config: Config, seconds: dict[str, int]) -> str:
    """Returns the report: how it was made, and the table of every study in the folder."""
    device = jax.devices()[0]
    lines = [
        "# The theory's claims, measured",
        "",
        f"`python experiments/convergence.py{' --quick' if config.quick else ''}`, commit {commit()}, "
        f"{device.device_kind} ({jax.device_count()} device), JAX {jax.__version__}, Python {platform.python_version()}; "
        + ", ".join(f"{study} {seconds[study]} s" for study in ORDER if study in seconds)
        + ".",
    ]
    for study in ORDER:
        path = config.output / f"{study}.md"
        if path.exists():
            lines += ["", path.read_text().strip()]
            lines += [f"\n![{study}]({figure.name})" for figure in sorted(config.output.glob(f"{study}*.png"))]
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Runs the studies and combines their tables."""
    if config.quick:
        # Compilation dominates a quick run. JAX reads the flag when the first array is created.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "README.md").touch()
    except OSError as error:
        sys.exit(f"The output folder {config.output} cannot be written ({error.strerror}); give --output another.")
    # Earlier studies in this folder stay in the report.
    record = config.output / "seconds.json"
    seconds = json.loads(record.read_text()) if record.exists() else {}
    for study in ORDER:
        if study not in config.only:
            continue
        began = time.monotonic()
        importlib.import_module(f"convergence_studies.{study}").run(config.quick, config.output)
        seconds[study] = round(time.monotonic() - began)
        record.write_text(json.dumps(seconds) + "\n")
        print(f"{study}: {seconds[study]} s", flush=True)
        text = report(config, seconds)
        (config.output / "README.md").write_text(text)
        write_report(
            config.output,
            title="The theory's claims, measured",
            summary=text.split("\n\n")[1],
            tables=tables_of(text),
            figures=sorted(path.name for path in config.output.glob("*.png")),
            config=config,
        )
    print(f"\n{config.output / 'README.md'}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
