"""Times a model of the size that people bring, SmolLM2-135M: its parts beside torch, and the cost of the coupling.

    python -m benchmarks.real_size --policy DIR --clock cpu

Two tables. Sampling, log-probabilities and their gradients, of all weights and of adapters, beside transformers and PEFT.
Then whole steps of `align --method bilevel` with adapters, each rule beside iterated RLHF (`decoupled`): a pair is two
completions of the policy, and every prompt has two unlabelled completions of the reference.

Checked first: that log-probabilities, gradients and the greedy tokens of both libraries are equal, and that all rules
report the same loss in their first step. `--clock cpu` counts CPU seconds, for machines that others use too.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.batches import as_prompts, random_tokens
from benchmarks.bilevel_steps import ANNOTATE, Program, compile_step
from benchmarks.devices import use_all_cores
from benchmarks.generation import greedy_shortfall, our_sampler, transformers_sampler
from benchmarks.libraries import LoadedPolicy, open_policy, torch_log_probs, torch_policy
from benchmarks.reporting import check_notes, comparison_table, machine_info, write_results
from benchmarks.timing import (
    Comparison,
    Implementation,
    check_close,
    cpu_seconds,
    if_installed,
    interleave,
    ratio,
    warm_up,
)
from jaxrlhf import bilevel
from jaxrlhf.algorithms.methods import Parts
from jaxrlhf.algorithms.methods import bilevel as bilevel_method
from jaxrlhf.base.algorithm import compose, label_by
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel import Algorithm
from jaxrlhf.lm import lora
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.report import Table

TaskName = Literal["sampling", "log_probs", "gradient", "adapter_gradient", "steps"]
CLOCKS = {"wall": time.perf_counter, "cpu": cpu_seconds}
TORCH_NAMES = {
    "query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_output": ("mlp.down_proj",),
}
"""The linear maps of transformers' Llama within ours."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time."""

    policy: pathlib.Path
    """A Llama in a Hugging Face directory."""
    rows: int = 8
    """Texts of sampling, log-probabilities and gradients."""
    length: int = 112
    """Tokens of a text."""
    prompt_length: int = 16
    new_tokens: int = 64
    """Tokens to sample for each text."""
    rank: int = 8
    """Of the adapters."""
    prompts: int = 4
    """Of a step."""
    pairs: int = 2
    """Of each prompt of a step."""
    step_tokens: int = 32
    """Tokens of a completion in a step."""
    base: Literal["float32", "bfloat16"] = "float32"
    """Data type of the frozen base in steps; everything is computed in float32."""
    clock: Literal["wall", "cpu"] = "wall"
    rounds: int = 5
    only: tuple[TaskName, ...] = ("sampling", "log_probs", "gradient", "adapter_gradient", "steps")
    output: pathlib.Path = pathlib.Path("runs")


class Task(NamedTuple):
    """What to time beside torch.

    Attributes:
        name: for the table.
        goal: how many times faster ours should be.
        result: what both calls return, which must agree.
        ours, theirs: return the calls.
    """

    name: str
    goal: float
    result: str
    ours: Callable[[], Callable[[], Any]]
    theirs: Callable[[], Callable[[], Any]]


def log_probs(config: Config, loaded: LoadedPolicy, tokens: np.ndarray) -> Task:
    """The log-probabilities of the tokens after the prompts."""
    read = _reader(config, loaded, tokens)

    def ours():
        compiled = jax.jit(read)
        return lambda: np.asarray(compiled(loaded.params))

    def theirs():
        import torch

        model, rows = torch_policy(config.policy), torch.from_numpy(tokens).long()

        def call():
            with torch.inference_mode():
                return torch_log_probs(model, rows, config.prompt_length).numpy()

        return call

    return Task("log-probabilities", 1.1, "log-probabilities", ours, theirs)


def gradient(config: Config, loaded: LoadedPolicy, tokens: np.ndarray) -> Task:
    """The value and the gradient of the mean log-probability in all weights."""
    read = _reader(config, loaded, tokens)

    def ours():
        compiled = jax.jit(jax.value_and_grad(lambda params: jnp.mean(read(params))))

        def call():
            value, slope = jax.block_until_ready(compiled(loaded.params))
            return np.array([value, 10 * jnp.linalg.norm(slope["embedding"])])

        return call

    def theirs():
        import torch

        model, rows = torch_policy(config.policy), torch.from_numpy(tokens).long()
        embedding = model.get_input_embeddings().weight

        def call():
            model.zero_grad(set_to_none=True)
            value = torch_log_probs(model, rows, config.prompt_length).mean()
            value.backward()
            return np.array([value.item(), 10 * embedding.grad.norm().item()])

        return call

    return Task("gradient, all weights", 1.1, "value and gradient's norm", ours, theirs)


def adapter_gradient(config: Config, loaded: LoadedPolicy, tokens: np.ndarray) -> Task:
    """The same in adapters of all linear maps."""
    read = _reader(config, loaded, tokens)
    adapter = lora.init_adapter(jax.random.key(0), loaded.params, rank=config.rank)

    def ours():
        compiled = jax.jit(jax.value_and_grad(lambda adapter, base: jnp.mean(read(lora.attach(base, adapter)))))

        def call():
            value, slope = jax.block_until_ready(compiled(adapter, loaded.params))
            return np.array([value, optax.tree.norm(slope)])

        return call

    def theirs():
        import torch

        model, rows = peft_policy(config, adapter), torch.from_numpy(tokens).long()
        trained = [weight for weight in model.parameters() if weight.requires_grad]

        def call():
            model.zero_grad(set_to_none=True)
            value = torch_log_probs(model, rows, config.prompt_length).mean()
            value.backward()
            return np.array([value.item(), torch.stack([weight.grad.norm() for weight in trained]).norm().item()])

        return call

    return Task(f"gradient, adapters of rank {config.rank}", 1.1, "value and gradient's norm", ours, theirs)


def _reader(config: Config, loaded: LoadedPolicy, tokens: np.ndarray) -> Callable[[Params], jax.Array]:
    prompts, completions = as_prompts(tokens[:, : config.prompt_length]), as_prompts(tokens[:, config.prompt_length :])
    return lambda params: completion_log_probs(loaded.policy, params, *prompts, *completions)


def peft_policy(config: Config, adapter: Params) -> Any:
    """Returns transformers' model with PEFT's adapters, which start as ours: maps that are fused in ours share `down`."""
    import peft
    import torch

    names = [name.rpartition(".")[2] for group in TORCH_NAMES.values() for name in group]
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=names)
    model = peft.get_peft_model(torch_policy(config.policy), settings)
    modules = dict(model.named_modules())
    for ours, theirs in TORCH_NAMES.items():
        found = [factors for path, factors in _factors(adapter["layers"]) if path[-1] == ours]
        for layer, down in enumerate(np.asarray(found[0]["down"])):
            for name in theirs:
                lora_a = modules[f"base_model.model.model.layers.{layer}.{name}"].lora_A["default"]
                with torch.no_grad():
                    lora_a.weight.copy_(torch.from_numpy(down.T.copy()))
    return model


def _factors(tree: Params, path: tuple[str, ...] = ()):
    """Yields the path and the factors of each adapted map."""
    if "down" in tree:
        yield path, tree
    else:
        for name, inner in tree.items():
            yield from _factors(inner, (*path, name))


def sampling(config: Config, loaded: LoadedPolicy, tokens: np.ndarray) -> Task:
    """Sampling, without stop tokens; what is compared is how far greedy tokens are from the most probable ones."""
    prompts = tokens[:, : config.prompt_length]

    def greedy(sample: Callable[[float], np.ndarray]) -> Callable[[], Any]:
        # What the first call returns; the others are timed, and return nothing.
        shortfalls = [greedy_shortfall(loaded, prompts, sample(0.0))]
        return lambda: shortfalls.pop() if shortfalls else sample(1.0)[:0]

    def ours():
        sample = our_sampler(loaded, prompts, config.new_tokens)
        return greedy(lambda temperature: np.asarray(sample(temperature).tokens))

    def theirs():
        return greedy(transformers_sampler(torch_policy(config.policy), prompts, config.new_tokens))

    return Task(f"sampling {config.new_tokens} tokens", 1.5, "greedy shortfalls", ours, theirs)


TASKS = {"sampling": sampling, "log_probs": log_probs, "gradient": gradient, "adapter_gradient": adapter_gradient}


def compare(config: Config, loaded: LoadedPolicy, name: str) -> Comparison:
    """Checks and times one task."""
    task = TASKS[name](config, loaded, random_tokens(loaded.model.config, config.rows, config.length))
    implementations = [Implementation("ours", task.ours()), if_installed("transformers", task.theirs)]
    warm_ups = warm_up(implementations)
    agreed = ""
    if implementations[1].call:
        ours, theirs = (each.results[0] for each in warm_ups)
        agreed = check_close(f"{task.result} are those of transformers", ours, theirs, tolerance=1e-3)
    timings = interleave(implementations, rounds=config.rounds, warm_ups=warm_ups, clock=CLOCKS[config.clock])
    return Comparison(f"{task.name}, {config.rows} x {config.length} tokens", timings, agreed, task.goal)


RULES = {
    "decoupled": (bilevel.decoupled, None),
    "boltzmann": (bilevel.boltzmann, 1.1),
    "central": (functools.partial(bilevel.central, relative_sigma=0.2), 1.25),
}
"""Rules, and the most that a step with one may take, as a multiple of the decoupled step."""


def bilevel_algorithm(config: Config, loaded: LoadedPolicy, rule: bilevel.HypergradientRule) -> Algorithm:
    """Returns the algorithm of `align --method bilevel --lora-rank` with a rule, its labels drawn from a traced score."""
    policy = decoder(loaded.model.config, dtype=jnp.float32)
    generation = Generation(config.step_tokens, stop_ids=())

    def problem(objective, **keywords):
        return language_problem(
            policy,
            reward_model(policy),
            objective,
            pairs=config.pairs,
            generation=generation,
            policy_params=lora.policy_on_reference,
            reward_params=lora.reward_on_reference,
            **keywords,
        )

    parts = Parts(
        problem,
        policy_optimizer=optax.adam(1e-3),
        tangent_optimizer=optax.adam(5e-5),
        reward_optimizer=optax.adam(2e-3),
        kl_price=0.05,
        sequential=True,
    )
    algorithm = bilevel_method(parts, 0.2, rule=rule)
    return algorithm._replace(step=compose(algorithm.propose, label_by(ANNOTATE), algorithm.update))


class Step(NamedTuple):
    """A compiled step, the seconds of its compilation, and the loss that its first call reported."""

    program: Program
    compilation: float
    loss: float


def compiled_step(config: Config, loaded: LoadedPolicy, rule: str) -> Step:
    """Compiles a step and takes it once."""
    base = optax.tree.cast(loaded.params, jnp.dtype(config.base))
    algorithm = bilevel_algorithm(config, loaded, RULES[rule][0]())
    head = 0.1 * jax.random.normal(jax.random.key(5), (loaded.model.config.width,))
    keys = jax.random.split(jax.random.key(0))
    upper = {"adapter": lora.init_adapter(keys[0], base, rank=config.rank), "head": head}
    state = algorithm.init(keys[0], upper, lora.init_adapter(keys[1], base, rank=config.rank))
    prompts = as_prompts(random_tokens(loaded.model.config, config.prompts, config.prompt_length))
    start = time.perf_counter()
    program = compile_step(algorithm.step, state, prompts, LanguageFrozen(base), trip_count=config.step_tokens)
    seconds = time.perf_counter() - start
    return Step(program, seconds, float(program.call().upper_loss))


STEP_COLUMNS = ("rule", "s", "x decoupled (quartiles)", "goal", "GFLOP", "x decoupled", "MiB", "compilation, s")


def steps(config: Config, loaded: LoadedPolicy) -> tuple[Table, Any, str]:
    """Returns the table of the rules, their timings, and what was checked."""
    compiled = {rule: compiled_step(config, loaded, rule) for rule in RULES}
    losses = [step.loss for step in compiled.values()]
    agreed = check_close("first losses of the rules", losses, losses[:1] * len(losses), tolerance=1e-4)
    implementations = [Implementation(rule, step.program.call) for rule, step in compiled.items()]
    timings = interleave(implementations, rounds=config.rounds, clock=CLOCKS[config.clock])
    first, rows = compiled["decoupled"].program, []
    for timing in timings:
        (program, compilation, _), goal = compiled[timing.name], RULES[timing.name][1]
        figures = program.flops / 1e9, program.flops / first.flops, program.memory / 2**20, compilation
        relative = None if goal is None else str(ratio(timing, timings[0]))
        rows.append((timing.name, timing.median, relative, None if goal is None else f"<= {goal:g}", *figures))
    title = (
        f"A step with adapters: {config.prompts} prompts, {2 * config.prompts * config.pairs} completions of the policy "
        f"and {2 * config.prompts} of the reference, {config.prompt_length} + {config.step_tokens} tokens, {config.base}"
    )
    return Table(title, STEP_COLUMNS, rows), timings, agreed


def main(config: Config) -> pathlib.Path:
    """Prints and writes the tables; returns their folder."""
    use_all_cores()
    machine, loaded = machine_info(), open_policy(config.policy)
    loaded = loaded._replace(params=optax.tree.cast(loaded.params, jnp.float32))
    comparisons = [compare(config, loaded, name) for name in config.only if name != "steps"]
    tables = [comparison_table("Parts, beside torch", comparisons)] if comparisons else []
    results, notes = {"parts": comparisons}, check_notes(comparisons)
    if "steps" in config.only:
        table, results["steps"], agreed = steps(config, loaded)
        tables, notes = [*tables, table], [*notes, f"Checked before, steps: {agreed}."]
    notes.append(f"Seconds are those of the {'processor, all threads together' if config.clock == 'cpu' else 'clock'}.")
    return write_results(config, "real_size", tables, results, machine, notes=notes)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
