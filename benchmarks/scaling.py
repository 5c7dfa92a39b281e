"""How a language-model step grows: its compile time with layers, its time and memory with everything else.

    python -m benchmarks.scaling --policy DIR

Compile times are those of a first step less a later one, tracing included, of random models of the given model's shape but
for the layers; Tunix's supervised step stands beside ours. Time and memory are of the bilevel update alone, one size
moved at a time. An exponent is the slope of a straight line through the logarithms: 1 is linear.
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
from benchmarks.bilevel_steps import Program, algorithm_of, begin, compiled, labelled_by
from benchmarks.learning import adamw
from benchmarks.peers import open_policy, tunix_config, without_padding
from benchmarks.sides import Side, Timed, alternate, machine, report, side, stepping, use_all_cores
from jaxrlhf import bilevel
from jaxrlhf.bilevel import HypergradientRule
from jaxrlhf.data.batches import Demonstrations
from jaxrlhf.lm.learning import learning, supervised_loss
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.report import Table


@dataclasses.dataclass(frozen=True)
class Config:
    """What to move."""

    policy: pathlib.Path
    """A Llama in a Hugging Face directory; of it the shape is taken."""
    compiled_layers: tuple[int, ...] = (2, 4, 8, 16, 32)
    batches: tuple[int, ...] = (4, 8, 16, 32)
    """Prompts."""
    lengths: tuple[int, ...] = (32, 64, 128, 256)
    """Tokens of an answer."""
    layers: tuple[int, ...] = (2, 4, 8, 16)
    tilts: tuple[int, ...] = (2, 3, 5)
    pairs: int = 4
    prompt_length: int = 16
    rounds: int = 5
    output: pathlib.Path = pathlib.Path("runs")


class Size(NamedTuple):
    """Of one update: prompts, tokens of an answer, layers, and policies that are kept."""

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
"""By the number of policies."""


def texts(shape: DecoderConfig, rows: int, length: int) -> np.ndarray:
    """Returns random tokens `[rows, length]`, none of them 0."""
    return np.random.default_rng(0).integers(1, shape.vocabulary_size, (rows, length)).astype(np.int32)


def supervised(shape: DecoderConfig, tokens: np.ndarray) -> Callable[[], Any]:
    """Returns the call of our supervised step of a random model."""
    policy = decoder(shape)
    batch = jax.device_put(Demonstrations(tokens, np.ones_like(tokens), np.ones(tokens.shape, bool)))
    algorithm = learning(supervised_loss(policy), adamw(1e-4))
    update = jax.jit(algorithm.update, donate_argnums=0)
    return stepping(lambda state: update(state, batch), algorithm.init(policy.init(jax.random.key(0))))


def supervised_of_tunix(shape: DecoderConfig, tokens: np.ndarray) -> Callable[[], Any]:
    """Returns the call of Tunix's."""
    from flax import nnx
    from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]

    return trainers.tunix_supervised(llama3.Llama3(tunix_config(shape), rngs=nnx.Rngs(0)), tokens, 1e-4)


def coupled(shape: DecoderConfig, tokens: np.ndarray) -> Callable[[], Any]:
    """Returns the call of our whole bilevel step, sampler included."""
    policy, prompts = decoder(shape), without_padding(tokens)
    solver = bilevel.tangent(optax.adam(1e-5), optax.adam(1e-6))
    algorithm = algorithm_of(policy, bilevel.central(), solver, pairs=2, new_tokens=16)
    params, key = policy.init(jax.random.key(0)), jax.random.key(1)
    step, frozen = jax.jit(algorithm.step, donate_argnums=1), LanguageFrozen(params)
    return stepping(lambda state: step(key, state, prompts, frozen), begin(policy, params, algorithm))


def compile_times(config: Config, shape: DecoderConfig) -> tuple[Table, dict[int, tuple[Timed, ...]]]:
    """Returns the seconds that compiling takes at each depth, and all times."""
    found, rows = {}, []
    for layers in config.compiled_layers:
        deep = dataclasses.replace(shape, layers=layers)
        tokens = texts(deep, 4, 32)
        sides = (
            Side("ours, supervised step", supervised(deep, tokens)),
            side("Tunix, supervised step", lambda deep=deep, tokens=tokens: supervised_of_tunix(deep, tokens)),
            Side("ours, bilevel step", coupled(deep, tokens)),
        )
        found[layers] = alternate(sides, rounds=3)
        rows.append([layers, *(each.first - each.median if each.seconds else None for each in found[layers])])
    first, last = rows[0], rows[-1]
    grown = [None if begun is None else ended / begun for begun, ended in zip(first[1:], last[1:], strict=True)]
    names = [each.name for each in found[config.compiled_layers[0]]]
    rows.append([f"grown from {first[0]} to {last[0]} (goal < 1.5)", *grown])
    return Table("Seconds to compile", ("layers", *names), rows), found


def update_of(config: Config, shape: DecoderConfig, size: Size) -> Program:
    """Returns the bilevel update of one size, of a random model."""
    deep = dataclasses.replace(shape, layers=size.layers)
    policy = decoder(deep)
    solver = bilevel.tangent(optax.adam(1e-5), optax.adam(1e-6))
    sizes = {"pairs": config.pairs, "new_tokens": size.length}
    algorithm = algorithm_of(policy, RULES[size.tilts](), solver, **sizes)
    params = policy.init(jax.random.key(0))
    frozen, state = LanguageFrozen(params), begin(policy, params, algorithm)
    labelled = labelled_by(algorithm, state, without_padding(texts(deep, size.batch, config.prompt_length)), frozen)
    return compiled(algorithm.update, state, labelled, frozen)


def sweep(config: Config, shape: DecoderConfig, name: str, values: Sequence[int]) -> list[tuple[Size, float, float]]:
    """Returns each size, its seconds and its bytes of temporaries, one field of the size moved."""
    sizes = [Size(layers=shape.layers)._replace(**{name: value}) for value in values]
    programs = [update_of(config, shape, size) for size in sizes]
    sides = [Side(str(value), program.call) for value, program in zip(values, programs, strict=True)]
    timed = alternate(sides, rounds=config.rounds)
    memory = [program.temporaries for program in programs]
    return [(size, took.median, used) for size, took, used in zip(sizes, timed, memory, strict=True)]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Returns b of the best fit `a size^b`, by least squares of logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def growth(config: Config, shape: DecoderConfig) -> tuple[list[Table], dict[str, Any]]:
    """Returns the tables of exponents and of what they were fitted to, and all figures."""
    moved = {"batch": config.batches, "length": config.lengths, "layers": config.layers, "tilts": config.tilts}
    found = {name: sweep(config, shape, name, values) for name, values in moved.items() if len(values) > 1}
    fitted, points = [], []
    for name, rows in found.items():
        values = [getattr(size, name) + (config.prompt_length if name == "length" else 0) for size, *_ in rows]
        seconds, memory = zip(*(row[1:] for row in rows), strict=True)
        fitted.append((name, f"{values[0]} to {values[-1]}", exponent(values, seconds), exponent(values, memory)))
        points += [(name, value, 1e3 * took, used / 2**20) for value, (_, took, used) in zip(values, rows, strict=True)]
    return [
        Table("Exponents of the bilevel update", ("moved", "range", "of time", "of memory"), fitted),
        Table("Fitted to", ("moved", "size", "ms", "MiB of temporaries"), points),
    ], found


def main(config: Config) -> pathlib.Path:
    """Prints and writes the tables; returns their folder."""
    use_all_cores()
    seen, shape = machine(), open_policy(config.policy).model.config
    table, compiling = compile_times(config, shape)
    tables, growing = growth(config, shape)
    size = Size(layers=shape.layers)
    notes = [
        f"Where not moved: {size.batch} prompts x {config.pairs} pairs, {config.prompt_length} + {size.length} tokens, "
        f"{size.layers} layers, {size.tilts} policies. Lengths are those of prompt and answer together."
    ]
    return report(config, "scaling", [table, *tables], {"compiling": compiling, "growing": growing}, seen, notes=notes)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
