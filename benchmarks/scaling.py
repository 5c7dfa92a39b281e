"""Measures how a language-model step scales: compile time with depth, run time and memory with every other size.

    python -m benchmarks.scaling --policy DIR

Compile time is that of a first step minus that of a later one, tracing included, for random models of the given model's
configuration except for the depth; Tunix's supervised step is timed beside ours. Run time and memory are those of the
bilevel update alone, with one size varied at a time. An exponent is the slope of a straight line fitted to logarithms:
1 is linear.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tyro

from benchmarks import trainers
from benchmarks.batches import as_demonstrations, as_prompts, random_tokens
from benchmarks.bilevel_steps import Program, compile_step, initial_state, random_labels, step_algorithm, step_problem
from benchmarks.devices import use_all_cores
from benchmarks.learning import adamw
from benchmarks.libraries import open_policy, tunix_config
from benchmarks.reporting import machine_info, write_results
from benchmarks.timing import Implementation, Timing, if_installed, interleave, stateful
from jaxrlhf import bilevel
from jaxrlhf.bilevel import HypergradientRule
from jaxrlhf.lm.learning import learning, supervised_loss
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.report import Table


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes to measure."""

    policy: pathlib.Path
    """A Llama in a Hugging Face directory; only its configuration is used."""
    compiled_layers: tuple[int, ...] = (2, 4, 8, 16, 32)
    batches: tuple[int, ...] = (4, 8, 16, 32)
    """Prompts per step."""
    lengths: tuple[int, ...] = (32, 64, 128, 256)
    """Tokens per completion."""
    layers: tuple[int, ...] = (2, 4, 8, 16)
    tilts: tuple[int, ...] = (2, 3, 5)
    pairs: int = 4
    prompt_length: int = 16
    rounds: int = 5
    output: pathlib.Path = pathlib.Path("runs")


class Size(NamedTuple):
    """The size of an update.

    Attributes:
        batch: prompts.
        length: tokens per completion.
        layers: of the model.
        tilts: policies, one per tilt of the stencil.
    """

    batch: int = 8
    length: int = 48
    layers: int = 5
    tilts: int = 3


RULES: dict[int, Callable[[], HypergradientRule]] = {
    1: bilevel.decoupled,
    2: lambda: bilevel.forward(0.05),
    3: lambda: bilevel.central(0.2),
    5: lambda: bilevel.five_point(0.4),
}
"""By the number of tilts."""


def tangent_solver() -> bilevel.LowerSolver:
    """Returns the solver of all bilevel steps here."""
    return bilevel.tangent(optax.adam(1e-5), optax.adam(1e-6))


def supervised(config: DecoderConfig, tokens: np.ndarray) -> Callable[[], Any]:
    """Returns the call of our supervised step on a random model."""
    policy, batch = decoder(config), jax.device_put(as_demonstrations(tokens))
    algorithm = learning(supervised_loss(policy), adamw(1e-4))
    update = jax.jit(algorithm.update, donate_argnums=0)
    return stateful(lambda state: update(state, batch), algorithm.init(policy.init(jax.random.key(0))))


def tunix_supervised(config: DecoderConfig, tokens: np.ndarray) -> Callable[[], Any]:
    """Returns the call of Tunix's supervised step on a random model."""
    from flax import nnx
    from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]

    return trainers.tunix_supervised(llama3.Llama3(tunix_config(config), rngs=nnx.Rngs(0)), tokens, 1e-4)


def bilevel_step(config: DecoderConfig, tokens: np.ndarray) -> Callable[[], Any]:
    """Returns the call of our whole bilevel step, sampling included."""
    policy, prompts = decoder(config), as_prompts(tokens)
    algorithm = step_algorithm(step_problem(policy, pairs=2, new_tokens=16), bilevel.central(), tangent_solver())
    params, key = policy.init(jax.random.key(0)), jax.random.key(1)
    step, frozen = jax.jit(algorithm.step, donate_argnums=1), LanguageFrozen(params)
    return stateful(lambda state: step(key, state, prompts, frozen), initial_state(policy, params, algorithm))


def compile_times(config: Config, model: DecoderConfig) -> tuple[Table, dict[int, tuple[Timing, ...]]]:
    """Returns the table of seconds to compile at each depth, and all timings."""
    timings, rows = {}, []
    for layers in config.compiled_layers:
        deep = dataclasses.replace(model, layers=layers)
        tokens = random_tokens(deep, 4, 32)
        implementations = (
            Implementation("ours, supervised step", supervised(deep, tokens)),
            if_installed("Tunix, supervised step", lambda deep=deep, tokens=tokens: tunix_supervised(deep, tokens)),
            Implementation("ours, bilevel step", bilevel_step(deep, tokens)),
        )
        timings[layers] = interleave(implementations, rounds=3)
        seconds = [timing.first - timing.median if timing.seconds else None for timing in timings[layers]]
        rows.append([layers, *seconds])
    shallowest, deepest = rows[0], rows[-1]
    growth = [None if low is None else high / low for low, high in zip(shallowest[1:], deepest[1:], strict=True)]
    names = [timing.name for timing in timings[config.compiled_layers[0]]]
    rows.append([f"growth from {shallowest[0]} to {deepest[0]} (goal < 1.5)", *growth])
    return Table("Seconds to compile", ("layers", *names), rows), timings


def compile_update(config: Config, model: DecoderConfig, size: Size) -> Program:
    """Compiles the bilevel update of one size for a random model."""
    model = dataclasses.replace(model, layers=size.layers)
    policy = decoder(model)
    problem = step_problem(policy, pairs=config.pairs, new_tokens=size.length)
    algorithm = step_algorithm(problem, RULES[size.tilts](), tangent_solver())
    params = policy.init(jax.random.key(0))
    frozen, state = LanguageFrozen(params), initial_state(policy, params, algorithm)
    prompts = as_prompts(random_tokens(model, size.batch, config.prompt_length))
    return compile_step(algorithm.update, state, random_labels(algorithm, state, prompts, frozen), frozen)


class Measurement(NamedTuple):
    """Seconds per update, and bytes of its temporaries."""

    size: Size
    seconds: float
    memory: float


def sweep(config: Config, model: DecoderConfig, field: str, values: Sequence[int]) -> list[Measurement]:
    """Measures the update with one field of its size varied."""
    sizes = [Size(layers=model.layers)._replace(**{field: value}) for value in values]
    programs = [compile_update(config, model, size) for size in sizes]
    calls = [Implementation(str(value), program.call) for value, program in zip(values, programs, strict=True)]
    timings = interleave(calls, rounds=config.rounds)
    return [
        Measurement(size, timing.median, program.temporaries)
        for size, timing, program in zip(sizes, timings, programs, strict=True)
    ]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Returns b of the least-squares fit `log(value) = a + b log(size)`."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def growth(config: Config, model: DecoderConfig) -> tuple[list[Table], dict[str, list[Measurement]]]:
    """Returns the tables of exponents and of the fitted points, and all measurements."""
    fields = {"batch": config.batches, "length": config.lengths, "layers": config.layers, "tilts": config.tilts}
    found = {field: sweep(config, model, field, values) for field, values in fields.items() if len(values) > 1}
    fits, points = [], []
    for field, measurements in found.items():
        prompt = config.prompt_length if field == "length" else 0
        values = [getattr(each.size, field) + prompt for each in measurements]
        time = exponent(values, [each.seconds for each in measurements])
        memory = exponent(values, [each.memory for each in measurements])
        fits.append((field, f"{values[0]} to {values[-1]}", time, memory))
        for value, each in zip(values, measurements, strict=True):
            points.append((field, value, 1e3 * each.seconds, each.memory / 2**20))
    return [
        Table("Exponents of the bilevel update", ("size", "range", "of time", "of memory"), fits),
        Table("Fitted points", ("size", "value", "ms", "MiB of temporaries"), points),
    ], found


def main(config: Config) -> pathlib.Path:
    """Prints and writes the tables; returns their folder."""
    use_all_cores()
    machine, model = machine_info(), open_policy(config.policy).model.config
    table, compiling = compile_times(config, model)
    tables, growing = growth(config, model)
    size = Size(layers=model.layers)
    notes = [
        f"Sizes not varied: {size.batch} prompts x {config.pairs} pairs, {config.prompt_length} + {size.length} tokens, "
        f"{size.layers} layers, {size.tilts} tilts. Lengths are of prompt and completion together."
    ]
    results = {"compiling": compiling, "growing": growing}
    return write_results(config, "scaling", [table, *tables], results, machine, notes=notes)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
