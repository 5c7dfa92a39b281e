"""Reward learning on real human preferences (HH-RLHF, arXiv 2204.05862), against what needs no model.

    python experiments/hh_rlhf.py --data harmless-base-test.jsonl.gz --policy DIR

Two rewards: one starts from a pretrained model, one from a small decoder that was first trained on the preferred texts,
from random weights, with the pretrained model's tokenizer. A tenth of the prompts is held out from both. Makes a table, a
figure and the stages' own folders.
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
    """What to run."""

    data: str
    """A file or folder of HH-RLHF as published, or hh-rlhf:harmless-base/test where there is a network."""
    policy: pathlib.Path
    """Hugging Face directory of the pretrained model."""
    skip_bad: bool = False
    """Skips lines that cannot be read, and lists them in the stages' reports."""
    seeds: tuple[int, ...] = (0,)
    epochs: float = 2.0
    """Of reward learning."""
    pretraining_epochs: float = 6.0
    """Of the small decoder's supervised training."""
    max_length: int = 256
    """Tokens of a dialogue; long prompts lose their beginning."""
    batch_size: int = 32
    reward_learning_rate: float = 3e-4
    supervised_rate: float = 3e-3
    width: int = 96
    layers: int = 3
    heads: int = 4
    output: pathlib.Path = pathlib.Path("runs")


def main(config: Config) -> pathlib.Path:
    """Runs both rewards for every seed and reports; returns the folder."""
    folder, began = RunFolder(config.output, "hh_rlhf"), time.monotonic()
    folder.write_json("config.json", config)
    shared = {"data": config.data, "held_out": 0.1, "data_dir": config.output / "data", "output": folder.path}
    shared |= {
        "skip_bad": config.skip_bad,
        "max_length": config.max_length,
        "batch_size": config.batch_size,
        "evaluations": 4,
    }
    found: dict[str, list[dict]] = {"pretrained": [], "from scratch": []}
    for seed in config.seeds:
        learner = supervised.Supervised(
            tokenizer=config.policy,
            seed=seed,
            epochs=config.pretraining_epochs,
            learning_rate=config.supervised_rate,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            **shared,
        )
        starts = {"pretrained": config.policy, "from scratch": supervised.main(learner)}
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
            found[name].append(json.loads((run / "results.json").read_text()))
    table = tabulate(found, config.seeds)
    draw(folder.path / "reliability.png", found)
    folder.write_json("results.json", found | {"seconds": time.monotonic() - began})
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


def tabulate(found: dict[str, list[dict]], seeds: tuple[int, ...]) -> Table:
    """Returns every reward of every seed, and the baselines on the same pairs."""
    rows = []
    for name, runs in found.items():
        for seed, run in zip(seeds, runs, strict=True):
            gained = f"{run['length']['reward_gains']:+.3f} ± {run['length']['reward_gains_half_interval']:.3f}"
            rows.append((f"reward, {name}, seed {seed}", *_cells(run["reward"]), gained))
    first = next(run for runs in found.values() for run in runs)
    rows += [(name, *_cells(first[name]), None) for name in ("length", "majority")]
    columns = ("predictor", "accuracy", "95% interval", "nats a pair", "calibration error", "better than length by")
    return Table(f"{first['reward']['pairs']} held-out pairs", columns, rows)


def _cells(verdict: dict) -> tuple:
    interval = f"{verdict['low']:.3f} to {verdict['high']:.3f}"
    return verdict["accuracy"], interval, verdict["log_loss"], verdict["calibration_error"]


def draw(path: pathlib.Path, found: dict[str, list[dict]]) -> None:
    """Draws how often predictions of a confidence were right, for the first seed."""
    figure = Figure(figsize=(4.8, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, label="calibrated")
    for (name, runs), colour in zip(found.items(), ("#0b6e99", "#d9730d"), strict=True):
        bins = runs[0]["reward"]["reliability"]
        filled = np.array(bins["count"]) > 0
        axes.plot(
            np.array(bins["confidence"], float)[filled],
            np.array(bins["accuracy"], float)[filled],
            "o-",
            color=colour,
            label=name,
        )
    axes.set(xlabel="confidence", ylabel="share that was right", ylim=(0, 1.05))
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (DataError, ValueError) as error:
        raise SystemExit(f"hh_rlhf: {error}") from None
