"""What the coupling costs: each hypergradient rule beside iterated RLHF with the same inner work, on a language model.

    python -m benchmarks.bilevel_steps --policy DIR

Time of the whole step (rollout, traced labels, update) and of the update alone, products counted in the program, and
memory by the compiler's own account. All rules are called in turn. The implicit rule, Hessian-vector products in
conjugate gradients, is there for comparison. What is checked first: that the whole step is its parts, compiled apart.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro

from benchmarks.peers import Opened, open_policy, texts_of, without_padding
from benchmarks.programs import flops_of
from benchmarks.sides import Side, Timed, agree, alternate, machine, ratio, report, stepping, use_all_cores
from jaxrlhf import bilevel, objectives, preferences
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel import BilevelAlgorithm, HypergradientRule, Labelled, LowerSolver, Sample
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.problem import LanguageFrozen, Prompts, flat, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import LanguageModel
from jaxrlhf.training.report import Table


@dataclasses.dataclass(frozen=True)
class Config:
    """The step."""

    policy: pathlib.Path
    """A Hugging Face directory."""
    prompts: int = 16
    pairs: int = 4
    prompt_length: int = 16
    new_tokens: int = 48
    iterations: int = 10
    """Of the implicit rule's conjugate gradients."""
    only: tuple[str, ...] = ()
    """Rules whose names begin so, with what they are compared with; all by default."""
    rounds: int = 15
    output: pathlib.Path = pathlib.Path("runs")


class Case(NamedTuple):
    """A rule with its inner solver; the decoupled case with the same solver; how many times its time is hoped for."""

    name: str
    rule: HypergradientRule
    solver: LowerSolver
    baseline: str
    goal: float | None


class Program(NamedTuple):
    """A compiled step.

    Attributes:
        call: takes a step, and returns its `BilevelInfo`.
        flops: of its products.
        memory: bytes of arguments, results and temporaries together.
        temporaries: bytes beside arguments and results.
    """

    call: Callable[[], Any]
    flops: float
    memory: float
    temporaries: float


def cases(iterations: int) -> list[Case]:
    """Returns the rules, each with one inner step of the solver that its baseline has too."""
    free = bilevel.gradient(bilevel.shared_adam(1e-5))
    line = bilevel.tangent(optax.adam(1e-5), optax.adam(1e-6))
    rules = bilevel.central(relative_sigma=0.2), bilevel.central(relative_sigma=0.2, sampling="independent")
    return [
        Case("decoupled, free policies", bilevel.decoupled(), free, "", None),
        Case("boltzmann", bilevel.boltzmann(), free, "decoupled, free policies", 1.15),
        Case("central, three free policies, one sample", rules[0], free, "decoupled, free policies", 2.2),
        Case("central, three free policies, a sample each", rules[1], free, "decoupled, free policies", 3.2),
        Case("implicit", bilevel.implicit(iterations=iterations), free, "decoupled, free policies", None),
        Case("decoupled, tangent", bilevel.decoupled(), line, "", None),
        Case("central, tangent, one sample", rules[0], line, "decoupled, tangent", 2.2),
    ]


def chosen(config: Config) -> list[Case]:
    """Returns the cases asked for, and their baselines.

    Raises:
        ValueError: a name is none of them.
    """
    listed = cases(config.iterations)
    wanted = [case for case in listed if case.name.startswith(config.only or ("",))]
    if missing := [name for name in config.only if not any(case.name.startswith(name) for case in listed)]:
        raise ValueError(f"There is no rule {missing[0]!r}; there are {', '.join(case.name for case in listed)}.")
    names = {name for case in wanted for name in (case.name, case.baseline)}
    return [case for case in listed if case.name in names]


def score(sample: Sample, frozen: Any) -> jax.Array:
    """Returns what labels are drawn by, `[B, M, 2]`: how many tokens of an answer are multiples of 7."""
    del frozen
    tokens, mask = sample.responses
    return jnp.sum((tokens % 7 == 0) & mask, axis=-1).astype(jnp.float32)


ANNOTATE = preferences.gold_annotator(score)


def algorithm_of(
    policy: LanguageModel, rule: HypergradientRule, solver: LowerSolver, *, pairs: int, new_tokens: int
) -> BilevelAlgorithm:
    """Returns the algorithm of `jaxrlhf align` with a rule and a solver, labels drawn by `score`."""
    problem = language_problem(
        policy,
        reward_model(policy),
        objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=0.05)),
        pairs=pairs,
        max_new_tokens=new_tokens,
        stop_ids=(),
    )
    return bilevel.bilevel_descent(
        problem, rule, solver, optax.adam(1e-4), beta=0.2, annotate=ANNOTATE, sequential=True
    )


def compiled(step: Callable, state: Any, *arguments: Any, turns: int = 1) -> Program:
    """Returns a step `(key, state, *arguments) -> (state, info)`, compiled, the state donated.

    Args:
        step: of an algorithm.
        state: the first.
        arguments: behind it.
        turns: of a loop whose number is not known before, for the count of products.
    """
    key = jax.random.key(1)
    program = jax.jit(step, donate_argnums=1).lower(key, state, *arguments).compile()
    flops = flops_of(jax.make_jaxpr(step)(key, state, *arguments), turns=turns)
    memory: Any = program.memory_analysis()
    temporaries = float(memory.temp_size_in_bytes)
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    call = stepping(lambda state: program(key, state, *arguments), state)
    return Program(call, flops, given + temporaries, temporaries)


def begin(policy: LanguageModel, params: Params, algorithm: BilevelAlgorithm) -> Any:
    """Returns a state that nothing else holds.

    The reward's head is drawn: under a zero one the policy's gradient is rounding, which Adam makes full steps of, and
    nothing would agree with anything.
    """
    upper = reward_model(policy).from_trunk(params)
    head = upper["head"] + 0.1 * jax.random.normal(jax.random.key(5), upper["head"].shape)
    return algorithm.init(jax.random.key(0), upper | {"head": head}, params)


def labelled_by(algorithm: BilevelAlgorithm, state: Any, prompts: Prompts, frozen: LanguageFrozen) -> Labelled:
    """Returns a sample with drawn labels."""
    sample = jax.jit(algorithm.propose)(jax.random.key(2), state, prompts, frozen)
    shape = (*sample.measure.shape, 1)
    return Labelled(sample, jax.random.bernoulli(jax.random.key(3), shape=shape).astype(jnp.float32))


CHECKED = ("decoupled, free policies", "central, tangent, one sample")
NAMES = ("upper_loss", "hypergradient_norm", "entropy")


def check(opened: Opened, algorithm: BilevelAlgorithm, prompts: Prompts) -> str:
    """Returns what agrees, of a rule with one sample: the sampler with the model, the whole step with its parts."""
    key, frozen = jax.random.key(4), LanguageFrozen(opened.params)
    _, info = jax.jit(algorithm.step)(key, begin(*opened[1:], algorithm), prompts, frozen)
    sample_key, label_key, update_key = jax.random.split(key, 3)
    state = begin(*opened[1:], algorithm)
    sample = jax.jit(algorithm.propose)(sample_key, state, prompts, frozen)
    labelled = Labelled(sample, ANNOTATE(label_key, sample, frozen))
    _, info_too = jax.jit(algorithm.update)(update_key, state, labelled, frozen)
    rows, (tokens, mask) = flat(prompts, sample.responses)
    again = jnp.sum(completion_log_probs(opened.policy, opened.params, *rows, tokens, mask), axis=-1)
    size = tokens.shape[-1]
    compared = [(getattr(info, name), getattr(info_too, name)) for name in NAMES]
    return ", ".join(
        [
            agree(
                "log-probabilities of answers, a token, are those without a cache",
                sample.behaviour_log_prob.ravel() / size,
                again / size,
                tolerance=1e-4,
            ),
            agree(
                "the step's upper loss, gradient's norm and entropy are those of its parts, relatively,",
                [one / other for one, other in compared],
                [1.0] * len(compared),
                tolerance=1e-2,
            ),
        ]
    )


def rows_of(found: dict[str, Timed], programs: dict[str, Program], listed: Sequence[Case]) -> list[tuple]:
    """Returns a row a case: time, products and memory, each as often as the decoupled case's with the same solver."""
    rows = []
    for case in listed:
        took, program, base = found[case.name], programs[case.name], programs.get(case.baseline)
        slower = str(ratio(took, found[case.baseline])) if base else None
        goal = None if case.goal is None else f"<= {case.goal:g}"
        products, memory = (program.flops / base.flops, program.memory / base.memory) if base else (None, None)
        milliseconds, gigaflops, size = 1e3 * took.median, program.flops / 1e9, program.memory / 2**20
        rows.append((case.name, milliseconds, slower, goal, gigaflops, products, size, memory))
    return rows


def against_implicit(found: dict[str, Timed], programs: dict[str, Program], listed: Sequence[Case]) -> list[tuple]:
    """Returns a row a first-order rule with one sample: how much faster than the implicit rule, and its memory's share."""
    slow, large = found["implicit"], programs["implicit"]
    return [
        (
            case.name,
            str(ratio(slow, found[case.name])),
            ">= 4",
            programs[case.name].memory / large.memory,
            programs[case.name].temporaries / large.temporaries,
            "< 0.5",
        )
        for case in listed
        if case.baseline and case.name != "implicit" and case.rule.sampling == "shared"
    ]


COLUMNS = ("rule", "ms", "of decoupled (quartiles)", "goal", "GFLOP", "of decoupled", "MiB", "of decoupled")
AGAINST = ("rule", "times faster (quartiles)", "goal", "memory, share", "temporaries, share", "goal")


def measure(programs: dict[str, Program], rounds: int) -> dict[str, Timed]:
    """Returns the times of all programs, called in turn."""
    timed = alternate([Side(name, program.call) for name, program in programs.items()], rounds=rounds)
    return {each.name: each for each in timed}


def main(config: Config) -> pathlib.Path:
    """Prints and writes the tables; returns their folder."""
    use_all_cores()
    seen, opened, listed = machine(), open_policy(config.policy), chosen(config)
    policy, params = opened.policy, opened.params
    prompts = without_padding(texts_of(opened, config.prompts, config.prompt_length))
    sizes = {"pairs": config.pairs, "new_tokens": config.new_tokens}
    algorithms = {case.name: algorithm_of(policy, case.rule, case.solver, **sizes) for case in listed}
    checked = [case.name for case in listed if case.name in CHECKED]
    agreed = [f"Checked before, {name}: {check(opened, algorithms[name], prompts)}." for name in checked]
    frozen = LanguageFrozen(params)
    whole, update, drawn = {}, {}, {}
    for case in listed:
        algorithm = algorithms[case.name]
        step = compiled(algorithm.step, begin(policy, params, algorithm), prompts, frozen)
        state = begin(policy, params, algorithm)
        propose = jax.make_jaxpr(algorithm.propose)(jax.random.key(1), state, prompts, frozen)
        # Rules with one sample are given the same one.
        if case.rule.sampling not in drawn:
            drawn[case.rule.sampling] = labelled_by(algorithm, state, prompts, frozen)
        labelled = drawn[case.rule.sampling]
        # The loop of an update is that of conjugate gradients, the sampler's that of tokens.
        update[case.name] = half = compiled(algorithm.update, state, labelled, frozen, turns=config.iterations)
        whole[case.name] = step._replace(flops=half.flops + flops_of(propose, turns=config.new_tokens))
    tables, found = [], {}
    for title, programs in (("whole step", whole), ("update alone", update)):
        found[title] = timed = measure(programs, config.rounds)
        tables.append(Table(f"Rules, {title}", COLUMNS, rows_of(timed, programs, listed)))
        if "implicit" in programs:
            tables.append(Table(f"Against implicit, {title}", AGAINST, against_implicit(timed, programs, listed)))
    answers = 2 * config.prompts * config.pairs
    size = f"{config.prompts} prompts x {config.pairs} pairs: {answers} answers of {config.new_tokens} tokens."
    return report(config, "bilevel_steps", tables, found, seen, notes=[size, *agreed])


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
