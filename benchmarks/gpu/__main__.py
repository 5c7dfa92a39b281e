"""How well one GPU is used: training as a fraction of its peak FLOP/s, decoding as a fraction of its bandwidth.

    python -m benchmarks.gpu                                        # one H100 or H200, 8 minutes
    python -m benchmarks.gpu --libraries ours --workloads decode
    python -m benchmarks.gpu --attention cudnn --libraries ours     # our attention by cuDNN's kernel
    python -m benchmarks.gpu --tiny                                 # the same code on any machine

The models are Llamas with random weights; matrix products are in bfloat16. Where all weights are trained they are float32;
with adapters of rank 16 they are bfloat16 and the adapters float32, as in `jaxrlhf align --lora-rank 16`. FLOPs are
counted from the model's configuration: recomputation to save memory does not count, and half of the square of causal
attention does. Peaks are the published ones.

Each library has a process and the whole GPU to itself, ours first. A process that exceeds its part of the time is stopped,
and its missing rows are marked. Checked first: the FLOP count against the programs, the first losses of all libraries from
the same weights, and our sampler's log-probabilities. With JAX_COMPILATION_CACHE_DIR set, a second run compiles little.
"""

import os
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks.chips import chip_of
from benchmarks.gpu.cases import Config, Library, Row, Workload, tiny_model
from benchmarks.gpu.process import Result, Results, collect
from benchmarks.gpu.steps import check_flops, random_weights
from benchmarks.reporting import machine_info, write_results
from jaxrlhf.lm.hugging_face.weights import save_decoder
from jaxrlhf.training.report import Table

GOALS: dict[Workload, int] = {"supervised": 55, "reward": 55, "bilevel": 45, "decode": 60}
"""Percent of the peak."""
LAST_COLUMNS = ("goal", "first call, s", "notes")
TRAINING_COLUMNS = ("step", "model", "library", "ms", "tokens/s", "TFLOP", "TFLOP/s", "MFU, %", *LAST_COLUMNS)
DECODING_COLUMNS = ("model", "library", "ms per token", "tokens/s", "GB", "GB/s", "of bandwidth, %", *LAST_COLUMNS)


def peaks_of(device: str) -> str:
    """Describes the published peaks of a device."""
    chip = chip_of(device)
    if chip is None:
        return "peak unknown, so no percentages of it"
    return f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s ({chip.source})"


def cells_of(library: Library, row: Row, result: Result, device: str) -> tuple[Any, ...]:
    """Returns a result as a row of the decoding table; no percentage where the device's peak is unknown."""
    decodes, chip = row.workload == "decode", chip_of(device)
    peak, unit = (chip and chip.bandwidth, 1e9) if decodes else (chip and chip.flops, 1e12)
    goal = f">= {GOALS[row.workload]}"
    if isinstance(result, str):
        return (row.label, library, *[None] * 5, goal, None, result)
    seconds = result.timing.median
    rate = result.work / seconds
    percent = 100 * rate / peak if peak else None
    numbers = (1e3 * seconds, result.tokens / seconds, result.work / unit, rate / unit, percent)
    return (row.label, library, *numbers, goal, result.timing.first, result.notes)


def tables_of(results: Results) -> list[Table]:
    """Returns the tables of training and of decoding, without empty ones."""
    training, decoding = [], []
    for (library, row), result in results.measured.items():
        cells = cells_of(library, row, result, results.devices.get(library, ""))
        if row.workload == "decode":
            decoding.append(cells)
        else:
            training.append((row.workload, *cells))
    tables = Table("Training", TRAINING_COLUMNS, training), Table("Decoding", DECODING_COLUMNS, decoding)
    return [table for table in tables if table.rows]


def main(config: Config) -> pathlib.Path:
    """Prints and writes the tables; returns their folder."""
    deadline = time.monotonic() + config.seconds
    jax.config.update("jax_platforms", "cpu")  # the GPU belongs to the other processes
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    flops_note = f"{check_flops()}."
    print(flops_note, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_model("llama-1b")
        save_decoder(directory, model, random_weights(model, jnp.float32))
        machine = machine_info()
        results = collect(config, pathlib.Path(directory), deadline)
    machine["device"] = next(iter(results.devices.values()), machine["device"])
    machine["precision"] = "bfloat16 except for rows marked float32"
    peaks = [f"{library} on {device}: {peaks_of(device)}." for library, device in results.devices.items()]
    checked = [
        f"Checked before, {library}, {row.label}: {result.agreed}."
        for (library, row), result in results.measured.items()
        if not isinstance(result, str) and result.agreed
    ]
    measured = [
        {"library": library, "workload": row.workload, "model": row.label, "result": result}
        for (library, row), result in results.measured.items()
    ]
    notes = [*peaks, flops_note, *results.notes, *checked]
    return write_results(config, "gpu", tables_of(results), measured, machine, notes=notes)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
