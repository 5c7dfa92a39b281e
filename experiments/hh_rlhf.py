"""Reward learning on real human preferences (HH-RLHF, arXiv 2204.05862), against baselines without a model.

    python experiments/hh_rlhf.py --data harmless-base-test.jsonl.gz --policy DIR

Two rewards: one starts from a pretrained model, the other from a small decoder with the same tokenizer that was first
trained on the preferred texts from random weights. A tenth of the prompts is held out from both. Writes a table, a figure
and the stages' own folders.
"""

import dataclasses
import json
import pathlib
import time

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console

from jaxrlhf.commands import reward, supervised
from jaxrlhf.data.records import DataError
from jaxrlhf.training.report import Table, rich_table, write_report
from jaxrlhf.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the study."""

    data: str
    """HH-RLHF as published: a file, a folder, or hh-rlhf:harmless-base/test, which needs a network."""
    policy: pathlib.Path
    """Hugging Face directory of the pretrained model."""
    skip_bad: bool = False
    """Skips unreadable lines and lists them in the stages' reports."""
    seeds: tuple[int, ...] = (0,)
    """Random seeds."""
    epochs: float = 2.0
    """Passes of reward learning over the data."""
    pretraining_epochs: float = 6.0
    """Passes of the small decoder's supervised training over the data."""
    max_length: int = 256
    """Maximum tokens of a dialogue; long prompts are truncated at the beginning."""
    batch_size: int = 32
    """Rows or pairs per step."""
    reward_learning_rate: float = 3e-4
    """Peak learning rate of reward learning."""
    supervised_learning_rate: float = 3e-3
    """Peak learning rate of supervised training."""
    width: int = 96
    """Width of the small decoder."""
    layers: int = 3
    """Layers of the small decoder."""
    heads: int = 4
    """Attention heads of the small decoder."""
    output: pathlib.Path = pathlib.Path("runs")
    """Directory in which the study's folder is created."""


def main(config: Config) -> pathlib.Path:
    """Trains both rewards for every seed and reports; returns the folder."""
    folder, began = RunFolder(config.output, "hh_rlhf"), time.monotonic()
    folder.write_json("config.json", config)
    shared = {"data": config.data, "held_out": 0.1, "data_dir": config.output / "data", "output": folder.path}
    shared |= {
        "skip_bad": config.skip_bad,
        "max_length": config.max_length,
        "batch_size": config.batch_size,
        "evaluations": 4,
    }
    results: dict[str, list[dict]] = {"pretrained": [], "from scratch": []}
    for seed in config.seeds:
        pretraining = supervised.Supervised(
            tokenizer=config.policy,
            seed=seed,
            epochs=config.pretraining_epochs,
            learning_rate=config.supervised_learning_rate,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            **shared,
        )
        starts = {"pretrained": config.policy, "from scratch": supervised.main(pretraining)}
        for name, start in starts.items():
            run = reward.main(
                reward.Reward(
                    policy=start,
                    seed=seed,
                    cut_prompts=True,
                    epochs=config.epochs,
                    learning_rate=config.reward_learning_rate,
                    **shared,
                )
            )
            results[name].append(json.loads((run / "results.json").read_text()))
    table = tabulate(results, config.seeds)
    draw(folder.path / "reliability.png", results)
    folder.write_json("results.json", results | {"seconds": time.monotonic() - began})
    write_report(
        folder.path,
        title="Rewards from human preferences",
        summary=f"{config.data}, {len(config.seeds)} seeds.",
        tables=[table],
        figures=["reliability.png"],
        config=config,
    )
    Console().print(rich_table(table))
    Console().print(str(folder.path), soft_wrap=True)
    return folder.path


def tabulate(results: dict[str, list[dict]], seeds: tuple[int, ...]) -> Table:
    """Returns a table of every reward and seed, and of the baselines on the same pairs."""
    rows = []
    for name, runs in results.items():
        for seed, run in zip(seeds, runs, strict=True):
            gain = f"{run['length']['reward_gains']:+.3f} ± {run['length']['reward_gains_half_interval']:.3f}"
            rows.append((f"reward, {name}, seed {seed}", *_cells(run["reward"]), gain))
    first = next(run for runs in results.values() for run in runs)
    rows += [(name, *_cells(first[name]), None) for name in ("length", "majority")]
    columns = ("predictor", "accuracy", "95% interval", "nats per pair", "calibration error", "better than length by")
    return Table(f"{first['reward']['pairs']} held-out pairs", columns, rows)


def _cells(predictor: dict) -> tuple:
    interval = f"{predictor['low']:.3f} to {predictor['high']:.3f}"
    return predictor["accuracy"], interval, predictor["log_loss"], predictor["calibration_error"]


def draw(path: pathlib.Path, results: dict[str, list[dict]]) -> None:
    """Draws accuracy by predicted confidence, for the first seed."""
    figure = Figure(figsize=(4.8, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, label="calibrated")
    for (name, runs), colour in zip(results.items(), ("#0b6e99", "#d9730d"), strict=True):
        bins = runs[0]["reward"]["reliability"]
        filled = np.array(bins["count"]) > 0
        axes.plot(
            np.array(bins["confidence"], float)[filled],
            np.array(bins["accuracy"], float)[filled],
            "o-",
            color=colour,
            label=name,
        )
    axes.set(xlabel="confidence", ylabel="accuracy", ylim=(0, 1.05))
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (DataError, ValueError) as error:
        raise SystemExit(f"hh_rlhf: {error}") from None
