"""Online RLHF as one bilevel problem, on a model and preferences that people bring: `jaxrlhf align`."""

import dataclasses
import itertools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from jaxrlhf import bilevel
from jaxrlhf.annotation.once import once
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel import BilevelAlgorithm, BilevelProblem, bilevel_descent, tangent
from jaxrlhf.commands.comparison import LABELS, Judge, comparison_table, open_judge, policy_comparer
from jaxrlhf.commands.data import Format, open_records, told_of_bad
from jaxrlhf.commands.models import Model, open_model, reward_on, save_model
from jaxrlhf.commands.running import LoopSettings, Running, begin, finish, keeper_of, take_steps
from jaxrlhf.commands.stage import half_or_full
from jaxrlhf.data.fitted import described, fit_prompts
from jaxrlhf.data.pipelines import prompt_batches
from jaxrlhf.lm import lora
from jaxrlhf.lm.memory import MemoryPlan, plan_bilevel
from jaxrlhf.lm.problem import LanguageFrozen, Prompts, RolloutModel, language_problem
from jaxrlhf.lm.reward import RewardModel, reward_model
from jaxrlhf.lm.transformer.axes import decoder_names
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.preferences import objectives
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.guard import guarded
from jaxrlhf.training.processes import agreed, first, gathered
from jaxrlhf.training.progress import bytes_text, count_text, plan
from jaxrlhf.training.report import Samples
from jaxrlhf.training.sharding import make_mesh, parse_mesh, shardings
from jaxrlhf.training.step import check_batch, compile_algorithm, outer_step, place, split_by_batch
from jaxrlhf.training.tracking import tracker

Estimator = Literal["central", "forward", "five_point", "boltzmann", "decoupled"]


@dataclasses.dataclass(frozen=True)
class Align(Running):
    """Trains policy and reward together on labels asked for as it goes.

    Every step the policy answers prompts, an annotator compares its answers with the reference's, and reward and policy
    move: the reward knowing how the policy will answer it. With --estimator decoupled it is iterated RLHF.
    """

    policy: pathlib.Path
    """The model to align, and its reference: a Hugging Face directory, or a run's folder."""
    data: str
    """Prompts: a .jsonl or .jsonl.gz file, a folder of them, or hh-rlhf:NAME; of other records the prompts are taken."""
    annotator: str | None = None
    """Who compares two answers: `module:function` of (prompts, firsts, seconds), a reward model's directory, or a judge
    behind an OpenAI-style address, `http://HOST:PORT/v1#MODEL` (key in OPENAI_API_KEY; each verdict is paid for once)."""
    score: str | None = None
    """Instead of --annotator, `module:function` of (prompts, completions) to scores, which labels are drawn by."""
    reward: pathlib.Path | None = None
    """Reward model to start from; otherwise the policy's weights under a zero head."""
    format: Format = "auto"
    """How the data are written; see `jaxrlhf.data`."""
    skip_bad: bool = False
    """Skips lines that cannot be read, and lists them."""
    held_out: float = 0.1
    """Share of the prompts that the policies are compared on."""
    steps: int = 100
    batch_size: int = 16
    """Prompts a step, over all devices."""
    pairs: int = 4
    """Pairs of answers a prompt; each costs one label."""
    max_prompt: int = 128
    """Tokens of a prompt; longer ones are left out, or cut with --cut-prompts."""
    cut_prompts: bool = False
    """Takes tokens from the beginning of long prompts."""
    max_new_tokens: int = 48
    beta: float = 0.2
    """Weight of the KL to the reference, in the reward's units a nat."""
    estimator: Estimator = "central"
    """How the reward foresees the policy's answer."""
    relative_sigma: float = 0.2
    """Perturbation of a stencil, sigma / beta."""
    utility_weight: float = 1.0
    """Weight of the coupled utility beside the uncoupled likelihood."""
    kl_price: float = 0.05
    """Of the utility, a nat."""
    policy_learning_rate: float | None = None
    """Learning rate; 2e-4, or 1e-3 for adapters."""
    tangent_learning_rate: float | None = None
    """Of the policy's answer to the reward; a twentieth of the policy's."""
    reward_learning_rate: float | None = None
    """1e-3, or 2e-3 for adapters."""
    warmup: int = 10
    """Steps over which the three rates rise from 0. The first gradients are next to nothing, as the reward still is, and
    Adam makes full steps of them."""
    lora_rank: int = 0
    """Makes the policy's iterates and the reward adapters of this rank on the reference; they are merged at the end."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the reference's weights; bfloat16 needs --lora-rank."""
    rollout_dtype: Literal["float32", "bfloat16"] = "float32"
    """Answers are written in this precision; log-ratios are float32 whatever it is."""
    evaluations: int = 5
    evaluation_answers: int = 64
    """Answers to held-out prompts that the policies are compared on."""
    annotator_timeout: float = 1800.0
    """Seconds that an annotator may take for the pairs of a step; a judge behind an address has limits of its own."""


class Assembly(NamedTuple):
    """What a run trains.

    Attributes:
        algorithm: the bilevel algorithm.
        upper: the reward's trained parameters at first.
        lower: the policy's.
        frozen: the reference, and what a traced annotator needs.
        policy_of: `(state) -> ` the deployed policy's plain parameters.
        reward_of: `(state) -> ` the reward model's.
    """

    algorithm: BilevelAlgorithm
    upper: Params
    lower: Params
    frozen: LanguageFrozen
    policy_of: Callable[[Any], Params]
    reward_of: Callable[[Any], Params]


def assemble(config: Align, model: Model, start: Model, judge: Judge) -> Assembly:
    """Returns the algorithm: the same parts whether whole models are trained or adapters.

    Args:
        config: the run's.
        model: policy and reference.
        start: the reward model to begin with; not read with adapters.
        judge: who labels.

    Raises:
        ValueError: settings that do not go together.
    """
    # Whatever the weights are stored in: the reference must compute as the policy does, or rounding counts as KL.
    policy, reward = (decoder(each.config, dtype=jnp.float32, remat=config.remat) for each in (model, start))
    reward = reward_model(reward)
    if start.config.vocabulary_size != model.config.vocabulary_size:
        raise ValueError(
            f"The reward model reads {start.config.vocabulary_size} tokens and the policy writes "
            f"{model.config.vocabulary_size}; take models of one tokenizer."
        )
    base, frozen = model.params, LanguageFrozen(model.params, judge.params)
    keys = jax.random.split(jax.random.key(config.seed))
    if not config.lora_rank:
        algorithm = _algorithm(config, _problem(config, model, policy, reward), judge)
        return Assembly(algorithm, start.params, base, frozen, lambda state: state.policy, lambda state: state.upper)
    lower, adapter = (lora.init_adapter(key, base, rank=config.lora_rank) for key in keys)
    problem = _problem(
        config,
        model,
        policy,
        reward,
        policy_params=lora.policy_on_reference,
        reward_params=lora.reward_on_reference,
    )

    def reward_of(state):
        trunk = {name: part for name, part in base.items() if name not in lora.UNREAD}
        return {"trunk": lora.merge(trunk, state.upper["adapter"]), "head": state.upper["head"]}

    upper = {"adapter": adapter, "head": jnp.zeros(model.config.width, jnp.float32)}
    merged = lambda state: lora.merge(base, state.policy)  # noqa: E731
    return Assembly(_algorithm(config, problem, judge), upper, lower, frozen, merged, reward_of)


def _problem(config: Align, model: Model, policy: Any, reward: RewardModel, **params: Any) -> BilevelProblem:
    objective = objectives.add(
        objectives.likelihood(coupled=False),
        objectives.utility(weight=config.utility_weight, kl_price=config.kl_price),
    )
    return language_problem(
        policy,
        reward,
        objective,
        pairs=config.pairs,
        max_new_tokens=config.max_new_tokens,
        stop_ids=model.words.stop_ids,
        pad_id=model.words.pad_id,
        microbatches=config.microbatches,
        writer=_writer(config, model),
        **params,
    )


def _writer(config: Align, model: Model) -> RolloutModel | None:
    if config.rollout_dtype == "float32":
        return None
    dtype = jnp.dtype(config.rollout_dtype)
    return RolloutModel(decoder(model.config, dtype=dtype), lambda params: optax.tree.cast(params, dtype))


def _algorithm(config: Align, problem: BilevelProblem, judge: Judge) -> BilevelAlgorithm:
    rules = {
        "central": lambda: bilevel.central(relative_sigma=config.relative_sigma),
        "forward": lambda: bilevel.forward(config.relative_sigma),
        "five_point": lambda: bilevel.five_point(config.relative_sigma),
        "boltzmann": bilevel.boltzmann,
        "decoupled": bilevel.decoupled,
    }

    def adam(rate):
        return optax.adam(optax.linear_schedule(0.0, rate, config.warmup) if config.warmup else rate)

    policy_learning_rate = config.policy_learning_rate or (1e-3 if config.lora_rank else 2e-4)
    reward_learning_rate = config.reward_learning_rate or (2e-3 if config.lora_rank else 1e-3)
    solver = tangent(adam(policy_learning_rate), adam(config.tangent_learning_rate or policy_learning_rate / 20))
    rule, optimizer = rules[config.estimator](), adam(reward_learning_rate)
    # All at once only where a mesh splits them.
    sequential = parse_mesh(config.mesh).get("stencil", 1) == 1
    return bilevel_descent(
        problem, rule, solver, optimizer, beta=config.beta, annotate=judge.traced, sequential=sequential
    )


def main(config: Align) -> pathlib.Path:
    """Runs it; returns the run's folder, with the models in `policy` and `reward`.

    Raises:
        ValueError, DataError: what is given cannot be used; the message says what to change.
    """
    began, key = time.monotonic(), jax.random.key(config.seed)
    _check(config)
    model = open_model(config.policy, "policy", dtype=half_or_full(config.dtype, config.lora_rank))
    start, judge = _start(config, model), _judge(config, model)
    parts = assemble(config, model, start, judge)
    learned, held_out, notes = _prompts(config, model)
    mesh = make_mesh(parse_mesh(config.mesh))
    check_batch(config.batch_size, mesh)
    memory = plan_bilevel(parts.algorithm.init, key, parts.upper, parts.lower, parts.frozen)
    folder = begin(config, "align")
    print_plan(Console(quiet=not first()), config, model, memory, notes)
    log = tracker(config.track if first() else None, folder.path, name=folder.path.name, config=config)
    if judge.host is not None:
        path = folder.path / "labels.jsonl" if first() else None
        judge = judge._replace(host=once(judge.host, path, agreed=agreed if jax.process_count() > 1 else None))

    begins = key, parts.upper, parts.lower
    where = shardings(jax.eval_shape(parts.algorithm.init, *begins), mesh, decoder_names)
    frozen_where, *begin_where = (shardings(part, mesh, decoder_names) for part in (parts.frozen, *begins[1:]))
    everywhere = NamedSharding(mesh, PartitionSpec())
    frozen, models = place(parts.frozen, frozen_where), {"weights": model.params}
    if config.reward is not None:
        models["reward"] = start.params
    safe = parts.algorithm._replace(
        **{name: guarded(getattr(parts.algorithm, name), state=1) for name in ("step", "update")}
    )
    compare = policy_comparer(
        model._replace(params=frozen.reference),
        held_out,
        judge,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed + 1,
        everywhere=everywhere,
    )
    with keeper_of(config, folder, models, free=("steps", "evaluations", "annotator_timeout")) as keeper:
        state, kept = keeper.begin(parts.algorithm.init, place(begins, (everywhere, *begin_where)), where)
        # The state holds copies: what they were made of need not be kept.
        parts, start, begins = parts._replace(upper=(), lower=()), start._replace(params={}), None
        curves = [row for row in folder.metrics() if "upper_loss" in row]
        # Nobody is asked before the folder is known to be this run's.
        verdicts = [compare(frozen.reference)]

        def note(number, info):
            row = {name: math.nan if value is None else float(value) for name, value in info.items()}
            folder.append_metrics(step=number, **row)
            log.log(number, row)
            curves.append({"step": number} | row)
            return {"KL": row["kl"]}

        def measure(number, state):
            verdicts[1:] = [compare(parts.policy_of(state))]
            shown = verdicts[1].numbers()
            folder.append_metrics(step=number, **shown)
            log.log(number, {f"held_out/{name}": value for name, value in shown.items()})
            return shown["win_rate"] - config.kl_price * shown["kl"]

        course = LoopSettings(
            name="align",
            unit="answers",
            steps=config.steps,
            step=outer_step(compile_algorithm(safe, mesh, state=where, frozen=frozen_where), judge.host),
            batches=_batches(config, learned),
            ready=lambda batch: Prompts(*place(tuple(batch), split_by_batch(mesh))),
            frozen=frozen,
            key=jax.random.fold_in(key, 1),
            # Each answer is written once; the reference's beside it.
            units=lambda batch: 2 * config.batch_size * config.pairs,
            note=note,
            measure=measure,
        )
        taken = take_steps(config, config.evaluations, folder, keeper, course, state, kept)
    log.close()
    if len(verdicts) == 1:
        # The run had ended before.
        verdicts.append(compare(parts.policy_of(taken.state)))
    for place_of, state in {"": taken.state, "best": taken.best}.items():
        whole = gathered(state)
        if first() and state is not None:
            save_model(folder.path / place_of / "policy", model._replace(params=parts.policy_of(whole)), "policy")
            save_model(folder.path / place_of / "reward", start._replace(params=parts.reward_of(whole)), "reward")
    if first():
        _report(folder, config, verdicts, curves, notes + taken.notes, time.monotonic() - began)
    return folder.path


def _judge(config: Align, model: Model) -> Judge:
    # Each of several processes asks about its own share, and keeps its own verdicts.
    labels = LABELS if jax.process_count() == 1 else f"{jax.process_index()}-{LABELS}"
    return open_judge(
        config.annotator, config.score, model, journal=config.data_dir / labels, seconds=config.annotator_timeout
    )


def _start(config: Align, model: Model) -> Model:
    if config.lora_rank:
        # The reward is an adapter on the policy's own weights: no copy of them is made.
        return model
    return reward_on(model) if config.reward is None else open_model(config.reward, "reward")


def _check(config: Align) -> None:
    if config.warmup < 0:
        raise ValueError(f"--warmup must not be negative, got {config.warmup}.")
    if config.lora_rank and config.reward is not None:
        raise ValueError("With --lora-rank the reward is an adapter on the policy's weights; leave --reward out.")
    if config.microbatches < 1 or config.batch_size * config.pairs % config.microbatches:
        raise ValueError(
            f"--microbatches {config.microbatches} must divide the {config.batch_size * config.pairs} answers of a step, --batch-size "
            "times --pairs."
        )
    for name in ("steps", "batch_size", "pairs", "max_new_tokens", "evaluation_answers"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}.")


def _prompts(config: Align, model: Model):
    """Returns the rows of prompts to learn from and to compare on, and what was left out."""
    room = model.config.context_length - config.max_new_tokens
    if room < 2:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt: the model's context is "
            f"{model.config.context_length}."
        )
    longest = min(config.max_prompt, room)
    prepared = open_records(
        config.data, form=config.format, held_out=config.held_out, skip_bad=config.skip_bad, data_dir=config.data_dir
    )
    codec, notes, found = model.words.codec(), told_of_bad(prepared), {}
    for name, what in (("train", "Prompts"), ("test", "Held-out prompts")):
        # A few prompts make no held-out part; then the policies are compared on those that were learned from.
        source = prepared.splits.get(name)
        if source is None:
            source, what = next(iter(prepared.splits.values())), f"{what} (none is held out: the same)"
        found[name] = fit_prompts(codec, source, max_length=longest, cut_prompts=config.cut_prompts)
        notes.append(f"{what}: {described(found[name])}.")
    asked = itertools.islice(itertools.cycle(found["test"].rows), config.evaluation_answers)
    return found["train"].rows, list(asked), notes


def _batches(config: Align, rows: list[np.ndarray]):
    multiple = min(32, config.max_prompt)
    return iter(prompt_batches(rows, batch_size=config.batch_size, seed=config.seed, multiple=multiple))


def print_plan(console: Console, config: Align, model: Model, memory: MemoryPlan, notes: list[str]) -> None:
    """Prints what is about to happen, before its memory is taken."""
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    answers = 2 * config.batch_size * config.pairs
    held = ", ".join(f"{name} {bytes_text(size)}" for name, size in memory.parts.items() if size > 1000)
    rows = {
        "model": f"{model.config.family}, {count_text(count)} parameters, {config.policy}",
        "trained": f"adapters of rank {config.lora_rank}" if config.lora_rank else "all weights",
        "memory": f"{bytes_text(memory.total)}, {memory.of_base():.2f} times the base ({held})",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "a step": f"{answers} answers of at most {config.max_new_tokens} tokens, {answers // 2} labels",
        "in all": f"{config.steps} steps, {config.steps * answers // 2:,} labels",
    }
    plan(console, "Bilevel alignment", rows | {"prompts": "\n".join(notes)})


def _report(folder, config, compared, curves, notes, seconds) -> None:
    first, last = compared
    labels = sum(row["labels"] for row in curves)
    held_out = [{"step": 0, **first.numbers()}, *(row for row in folder.metrics() if "win_rate" in row)]
    table = comparison_table({"reference": first, "aligned": last}, labels={"reference": 0, "aligned": int(labels)})
    steps = [row["step"] for row in held_out]
    panels = {
        name: ("step", axis, {config.estimator: (steps, [row[field] for row in held_out])})
        for name, field, axis in (
            ("Win rate against the reference", "win_rate", "share"),
            ("KL to the reference", "kl", "nats"),
        )
    }
    ran = [row["step"] for row in curves]
    panels["Upper loss"] = ("step", "nats", {config.estimator: (ran, [row["upper_loss"] for row in curves])})
    panels["Coupling share"] = ("step", "share", {config.estimator: (ran, [row["coupling_share"] for row in curves])})
    draw_curves(folder.path / "curves.png", panels)
    results = {name: verdict.numbers() for name, verdict in (("reference", first), ("aligned", last))}
    folder.write_json("results.json", results | {"labels": labels, "seconds": seconds})
    finish(
        folder,
        config,
        table,
        title="Bilevel alignment",
        summary=f"{config.steps} steps and {labels:,.0f} labels in {seconds:.0f} s. The models are in policy and reward.",
        figures=["curves.png"],
        samples=[Samples("Answers to held-out prompts", ("reference", "aligned"), last.samples[:8])],
        notes=notes,
    )
