"""Times what the coupling costs on a language model: each hypergradient rule beside iterated RLHF with the same solver.

    python -m benchmarks.bilevel_steps --policy DIR

Measured are the time of the whole step (rollout, traced labels, update) and of the update alone, the FLOPs of the matrix
products in the program, and memory as the compiler reports it. All rules are called in rotation. The implicit rule
(Hessian-vector products in conjugate gradients) is included for comparison. Checked first: that the whole step equals its
halves compiled separately.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro

from benchmarks.batches import as_prompts
from benchmarks.devices import use_all_cores
from benchmarks.libraries import LoadedPolicy, generate_texts, open_policy
from benchmarks.programs import flops_of
from benchmarks.reporting import machine_info, write_results
from benchmarks.timing import Implementation, Timing, check_close, interleave, ratio, stateful
from jaxrlhf import bilevel, objectives, preferences
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel import Algorithm, BilevelProblem, HypergradientRule, Labelled, LowerSolver, Sample
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.pairing import Prompts, flatten_pairs
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import LanguageModel
from jaxrlhf.training.report import Table


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time."""

    policy: pathlib.Path
    """A Hugging Face directory."""
    prompts: int = 16
    pairs: int = 4
    prompt_length: int = 16
    new_tokens: int = 48
    iterations: int = 10
    """Iterations of conjugate gradients in the implicit rule."""
    only: tuple[str, ...] = ()
    """Prefixes of the rules to time, together with their baselines; all by default."""
    rounds: int = 15
    output: pathlib.Path = pathlib.Path("runs")


class Case(NamedTuple):
    """A rule with its inner solver.

    Attributes:
        name: for the tables.
        rule: of the hypergradient.
        solver: of the lower level.
        baseline: the decoupled case with the same solver; "" for that case itself.
        goal: the most that its time may be, as a multiple of the baseline's; None for no goal.
    """

    name: str
    rule: HypergradientRule
    solver: LowerSolver
    baseline: str
    goal: float | None


class Program(NamedTuple):
    """A compiled step.

    Attributes:
        call: takes a step and returns its `BilevelInfo`.
        flops: of its matrix products.
        memory: bytes of arguments, results and temporaries.
        temporaries: bytes beyond arguments and results.
    """

    call: Callable[[], Any]
    flops: float
    memory: float
    temporaries: float


def cases(iterations: int) -> list[Case]:
    """Returns the rules, each with one inner step of the same solver as its baseline."""
    separate = bilevel.gradient(bilevel.shared_adam(1e-5))
    tangent = bilevel.tangent(optax.adam(1e-5), optax.adam(1e-6))
    shared = bilevel.central(relative_sigma=0.2)
    independent = bilevel.central(relative_sigma=0.2, sampling="independent")
    return [
        Case("decoupled, free policies", bilevel.decoupled(), separate, "", None),
        Case("boltzmann", bilevel.boltzmann(), separate, "decoupled, free policies", 1.15),
        Case("central, three free policies, one sample", shared, separate, "decoupled, free policies", 2.2),
        Case("central, three free policies, a sample each", independent, separate, "decoupled, free policies", 3.2),
        Case("implicit", bilevel.implicit(iterations=iterations), separate, "decoupled, free policies", None),
        Case("decoupled, tangent", bilevel.decoupled(), tangent, "", None),
        Case("central, tangent, one sample", shared, tangent, "decoupled, tangent", 2.2),
    ]


def selected_cases(config: Config) -> list[Case]:
    """Returns the cases selected by `config.only` and their baselines.

    Raises:
        ValueError: a prefix matches no case.
    """
    available = cases(config.iterations)
    if missing := [name for name in config.only if not any(case.name.startswith(name) for case in available)]:
        raise ValueError(f"There is no rule {missing[0]!r}; there are {', '.join(case.name for case in available)}.")
    selected = [case for case in available if case.name.startswith(config.only or ("",))]
    names = {name for case in selected for name in (case.name, case.baseline)}
    return [case for case in available if case.name in names]


def score(sample: Sample, frozen: Any) -> jax.Array:
    """Returns the gold score of each completion, `[B, M, 2]`: how many of its tokens are multiples of 7."""
    del frozen
    tokens, mask = sample.responses
    return jnp.sum((tokens % 7 == 0) & mask, axis=-1).astype(jnp.float32)


ANNOTATE = preferences.gold_annotator(score)


def step_problem(policy: LanguageModel, *, pairs: int, new_tokens: int, **params_of: Any) -> BilevelProblem:
    """Returns the problem of `jaxrlhf align`, without stop tokens.

    Args:
        policy: the model of the policy and of the reward.
        pairs: M.
        new_tokens: L.
        params_of: `policy_params` and `reward_params` of `language_problem`, where adapters are trained.
    """
    objective = objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=0.05))
    generation = Generation(new_tokens, stop_ids=())
    return language_problem(policy, reward_model(policy), objective, pairs=pairs, generation=generation, **params_of)


def step_algorithm(
    problem: BilevelProblem, rule: HypergradientRule, solver: LowerSolver, annotate: Any = ANNOTATE
) -> Algorithm:
    """Returns the algorithm of `jaxrlhf align` with a rule and a solver; labels are drawn from `score` by default."""
    return bilevel.bilevel_descent(
        problem, rule, solver, optax.adam(1e-4), beta=0.2, annotate=annotate, sequential=True
    )


def compile_step(step: Callable, state: Any, *arguments: Any, trip_count: int = 1) -> Program:
    """Compiles a step `(key, state, *arguments) -> (state, info)`, its state donated.

    Args:
        step: of an algorithm.
        state: the initial one.
        arguments: after the state.
        trip_count: of while loops, for the count of FLOPs.
    """
    key = jax.random.key(1)
    program = jax.jit(step, donate_argnums=1).lower(key, state, *arguments).compile()
    flops = flops_of(jax.make_jaxpr(step)(key, state, *arguments), trip_count=trip_count)
    memory: Any = program.memory_analysis()
    temporaries = float(memory.temp_size_in_bytes)
    buffers = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    call = stateful(lambda state: program(key, state, *arguments), state)
    return Program(call, flops, buffers + temporaries, temporaries)


def initial_state(policy: LanguageModel, params: Params, algorithm: Algorithm) -> Any:
    """Returns a new initial state, which may be donated.

    The reward's head is random. With a zero head the policy's gradient is rounding noise, which Adam scales to full steps,
    and no two runs would agree.
    """
    upper = reward_model(policy).from_trunk(params)
    head = upper["head"] + 0.1 * jax.random.normal(jax.random.key(5), upper["head"].shape)
    return algorithm.init(jax.random.key(0), upper | {"head": head}, params)


def random_labels(algorithm: Algorithm, state: Any, prompts: Prompts, frozen: LanguageFrozen) -> Labelled:
    """Returns a sample with random labels."""
    sample = jax.jit(algorithm.propose)(jax.random.key(2), state, prompts, frozen)
    shape = (*sample.measure.shape, 1)
    return Labelled(sample, jax.random.bernoulli(jax.random.key(3), shape=shape).astype(jnp.float32))


CHECKED = ("decoupled, free policies", "central, tangent, one sample")
COMPARED = ("upper_loss", "hypergradient_norm", "entropy")
"""Fields of `BilevelInfo`."""


def check(loaded: LoadedPolicy, algorithm: Algorithm, prompts: Prompts) -> str:
    """Checks the sampler against the model, and the whole step against its halves, for a rule with one shared sample."""
    key, frozen = jax.random.key(4), LanguageFrozen(loaded.params)
    _, whole = jax.jit(algorithm.step)(key, initial_state(loaded.policy, loaded.params, algorithm), prompts, frozen)
    sample_key, label_key, update_key = jax.random.split(key, 3)
    state = initial_state(loaded.policy, loaded.params, algorithm)
    sample = jax.jit(algorithm.propose)(sample_key, state, prompts, frozen)
    labelled = Labelled(sample, ANNOTATE(label_key, sample, frozen))
    _, halves = jax.jit(algorithm.update)(update_key, state, labelled, frozen)
    rows, (tokens, mask) = flatten_pairs(prompts, sample.responses)
    uncached = jnp.sum(completion_log_probs(loaded.policy, loaded.params, *rows, tokens, mask), axis=-1)
    length = tokens.shape[-1]
    sampler_agrees = check_close(
        "log-probabilities per token of completions are those without a cache",
        sample.behaviour_log_prob.ravel() / length,
        uncached / length,
        tolerance=1e-4,
    )
    halves_agree = check_close(
        "the step's upper loss, gradient norm and entropy are those of its halves, relatively,",
        [getattr(whole, name) / getattr(halves, name) for name in COMPARED],
        [1.0] * len(COMPARED),
        tolerance=1e-2,
    )
    return f"{sampler_agrees}, {halves_agree}"


def rows_of(timings: dict[str, Timing], programs: dict[str, Program], listed: Sequence[Case]) -> list[tuple]:
    """Returns a row per case: time, FLOPs and memory, each also as a multiple of the baseline's."""
    rows = []
    for case in listed:
        timing, program, baseline = timings[case.name], programs[case.name], programs.get(case.baseline)
        relative_time = str(ratio(timing, timings[case.baseline])) if baseline else None
        goal = None if case.goal is None else f"<= {case.goal:g}"
        relative_flops, relative_memory = (
            (program.flops / baseline.flops, program.memory / baseline.memory) if baseline else (None, None)
        )
        milliseconds, gigaflop, mebibytes = 1e3 * timing.median, program.flops / 1e9, program.memory / 2**20
        row = (case.name, milliseconds, relative_time, goal, gigaflop, relative_flops, mebibytes, relative_memory)
        rows.append(row)
    return rows


def implicit_rows(timings: dict[str, Timing], programs: dict[str, Program], listed: Sequence[Case]) -> list[tuple]:
    """Returns a row per first-order rule with one shared sample: its speed-up and memory relative to the implicit rule."""
    implicit_time, implicit = timings["implicit"], programs["implicit"]
    return [
        (
            case.name,
            str(ratio(implicit_time, timings[case.name])),
            ">= 4",
            programs[case.name].memory / implicit.memory,
            programs[case.name].temporaries / implicit.temporaries,
            "< 0.5",
        )
        for case in listed
        if case.baseline and case.name != "implicit" and case.rule.sampling == "shared"
    ]


COLUMNS = ("rule", "ms", "x decoupled (quartiles)", "goal", "GFLOP", "x decoupled", "MiB", "x decoupled")
IMPLICIT_COLUMNS = ("rule", "times faster (quartiles)", "goal", "memory, ratio", "temporaries, ratio", "goal")


class Programs(NamedTuple):
    """The compiled programs of every case, by its name."""

    whole: dict[str, Program]
    update: dict[str, Program]


def compile_cases(
    config: Config,
    loaded: LoadedPolicy,
    algorithms: dict[str, Algorithm],
    listed: Sequence[Case],
    prompts: Prompts,
) -> Programs:
    """Compiles the whole step and the update alone of every case."""
    frozen, programs, labelled_by_sampling = LanguageFrozen(loaded.params), Programs({}, {}), {}
    for case in listed:
        algorithm = algorithms[case.name]
        step = compile_step(algorithm.step, initial_state(loaded.policy, loaded.params, algorithm), prompts, frozen)
        state = initial_state(loaded.policy, loaded.params, algorithm)
        propose = jax.make_jaxpr(algorithm.propose)(jax.random.key(1), state, prompts, frozen)
        # Rules with the same sampling share the same sample.
        if case.rule.sampling not in labelled_by_sampling:
            labelled_by_sampling[case.rule.sampling] = random_labels(algorithm, state, prompts, frozen)
        labelled = labelled_by_sampling[case.rule.sampling]
        # The while loop of an update is that of conjugate gradients, the sampler's that over tokens.
        update = compile_step(algorithm.update, state, labelled, frozen, trip_count=config.iterations)
        flops = update.flops + flops_of(propose, trip_count=config.new_tokens)
        programs.update[case.name], programs.whole[case.name] = update, step._replace(flops=flops)
    return programs


def time_programs(programs: dict[str, Program], rounds: int) -> dict[str, Timing]:
    """Returns the timings of all programs, called in rotation."""
    timings = interleave([Implementation(name, program.call) for name, program in programs.items()], rounds=rounds)
    return {timing.name: timing for timing in timings}


def main(config: Config) -> pathlib.Path:
    """Prints and writes the tables; returns their folder."""
    use_all_cores()
    machine, loaded, listed = machine_info(), open_policy(config.policy), selected_cases(config)
    prompts = as_prompts(generate_texts(loaded, config.prompts, config.prompt_length))
    problem = step_problem(loaded.policy, pairs=config.pairs, new_tokens=config.new_tokens)
    algorithms = {case.name: step_algorithm(problem, case.rule, case.solver) for case in listed}
    checked = [case.name for case in listed if case.name in CHECKED]
    agreed = [f"Checked before, {name}: {check(loaded, algorithms[name], prompts)}." for name in checked]
    compiled = compile_cases(config, loaded, algorithms, listed, prompts)
    tables, results = [], {}
    for title, programs in (("whole step", compiled.whole), ("update alone", compiled.update)):
        results[title] = timings = time_programs(programs, config.rounds)
        tables.append(Table(f"Rules, {title}", COLUMNS, rows_of(timings, programs, listed)))
        if "implicit" in programs:
            rows = implicit_rows(timings, programs, listed)
            tables.append(Table(f"Compared with implicit, {title}", IMPLICIT_COLUMNS, rows))
    completions = 2 * config.prompts * config.pairs
    size = f"{config.prompts} prompts x {config.pairs} pairs: {completions} completions of {config.new_tokens} tokens."
    return write_results(config, "bilevel_steps", tables, results, machine, notes=[size, *agreed])


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
