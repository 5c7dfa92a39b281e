"""Online RLHF, by default as one bilevel problem, with the user's model and annotator: `jaxrlhf align`."""

import contextlib
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from jaxrlhf.base.algorithm import Algorithm
from jaxrlhf.base.types import Params
from jaxrlhf.commands.adapters import dtype_of
from jaxrlhf.commands.align_config import Align, check_config, measures_mistakes
from jaxrlhf.commands.align_inputs import (
    PromptSplits,
    annotator_of,
    column_multiple,
    counted,
    prompt_columns,
    read_prompts,
    reward_of,
    with_label_cache,
)
from jaxrlhf.commands.align_report import Recorder, method_notes, print_plan, write_align_report
from jaxrlhf.commands.align_setup import AlignSetup, build_setup, scale_notes, scale_of
from jaxrlhf.commands.annotators import (
    JUDGE_SETTINGS,
    ComparisonAnnotator,
)
from jaxrlhf.commands.comparison import policy_comparer
from jaxrlhf.commands.existing import Existing, begin_with, chunks_of, read_existing
from jaxrlhf.commands.experts import expert_load
from jaxrlhf.commands.methods import ask_about_some, label_chosen, rule_of
from jaxrlhf.commands.mixture import Units, measure_units, mixture_tables, scorer
from jaxrlhf.commands.models import Model, open_model, save_model, save_trained_adapter
from jaxrlhf.commands.page_annotator import STORE, with_board, with_forecasts
from jaxrlhf.commands.running import LoopResult, LoopSettings, open_checkpointer, open_folder, rehearse, run_loop
from jaxrlhf.commands.stage import try_saving
from jaxrlhf.commands.worries import worries
from jaxrlhf.data.pipelines import prompt_batches
from jaxrlhf.lm.hugging_face.families import Kind
from jaxrlhf.lm.memory import plan_bilevel
from jaxrlhf.lm.pairing import Prompts
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.lm.transformer.axes import decoder_names
from jaxrlhf.training.guard import guarded
from jaxrlhf.training.processes import gathered, is_first_process
from jaxrlhf.training.resume import RunCheckpointer
from jaxrlhf.training.run_folder import RunFolder
from jaxrlhf.training.sharding import make_mesh, parse_mesh, shardings
from jaxrlhf.training.step import (
    batch_sharding,
    check_batch,
    compile_algorithm,
    compile_annotator,
    make_outer_step,
    put_on_devices,
    within,
)
from jaxrlhf.training.tracking import Tracker, tracker


class Run(NamedTuple):
    """A run before its first step.

    Attributes:
        folder, tracker: where measurements go.
        policy: the model to align, which is also the reference.
        reward: configuration and tokenizer of the reward model; its parameters are in the state, if the method learns one.
        setup: the algorithm; its initial parameters are in `InitialParams`.
        annotator: labels the pairs.
        prompts: the data.
        mesh: of devices.
        frozen: placed on the mesh.
        state_where, frozen_where: shardings.
        units: of the scores of --rewards, once measured.
        existing: the pairs of --from-preferences.
    """

    folder: RunFolder
    tracker: Tracker
    policy: Model
    reward: Model
    setup: AlignSetup
    annotator: ComparisonAnnotator
    prompts: PromptSplits
    mesh: Mesh
    frozen: LanguageFrozen
    state_where: Any
    frozen_where: Any
    units: Units | None = None
    existing: Existing | None = None


class InitialParams(NamedTuple):
    """Parameters that a run starts from, apart from `Run` so that they can be freed once the state has copies.

    Attributes:
        models: and existing preferences, that identify the run, by their names in error messages.
        arguments: of the algorithm's `init`, placed on the mesh.
    """

    models: dict[str, Params]
    arguments: tuple


def main(config: Align) -> pathlib.Path:
    """Trains, evaluates and reports; returns the run's folder, with the models in `policy` and, if there is one, `reward`.

    Raises:
        ValueError, DataError: a setting, a model or the data cannot be used; the message says what to change.
    """
    began = time.monotonic()
    run, initial = prepare(config)
    free = ["evaluations", "annotator_timeout", "host", "port", "repeats", *JUDGE_SETTINGS]
    # How the KL rises to its target depends on the number of steps.
    free += ["steps"] if config.target_kl is None else []
    with (
        contextlib.ExitStack() as stack,
        open_checkpointer(config, run.folder, initial.models, free=free) as checkpointer,
    ):
        state, restored = checkpointer.restore_or_init(run.setup.algorithm.init, initial.arguments, run.state_where)
        del initial
        people = run.annotator.people
        if people is not None:
            page = people.serve(run.folder.path / STORE, stop=checkpointer.stop, step=int(state.step))
            stack.enter_context(page)
        # Labels are requested only after the folder is known to belong to this run.
        recorder = _recorder(config, run)
        if run.setup.mixture is not None:
            run = run._replace(units=measure_units(run.setup.mixture, recorder.unchanged()["reference"], run.folder))
        _rehearse(config, run, recorder, state)
        if run.existing is not None and not restored:
            state = _begin_with_existing(config, run, run.existing, state)
        result = train(config, run, recorder, checkpointer, state, restored)
    run.tracker.close()
    comparisons = recorder.comparisons(result.state)
    save(run, result, save_model)
    if is_first_process():
        last = [*scale_notes(config, result.state), *method_notes(recorder.rows), *run.annotator.notes()]
        last += worries(recorder.rows) if config.method == "bilevel" else []
        for note in last:
            Console().print(note, markup=False, highlight=False)
        notes = [*run.prompts.notes, comparisons["aligned"].labels_note(), *last, *result.notes]
        tables = mixture_tables(run.setup.mixture, run.units, run.folder, result.state, recorder.rows)
        seconds = time.monotonic() - began
        write_align_report(run.folder, config, comparisons, recorder.rows, notes, seconds, tables)
    return run.folder.path


def _begin_with_existing(config: Align, run: Run, existing: Existing, state: Any) -> Any:
    assert run.setup.review is not None
    return begin_with(
        config,
        run.policy._replace(params={}),
        existing,
        state,
        run.frozen,
        run.setup.review,
        run.mesh,
        state_where=run.state_where,
    )


def prepare(config: Align) -> tuple[Run, InitialParams]:
    """Reads models and data, prints the plan and places parameters on the mesh."""
    check_config(config)
    axes, _ = parse_mesh(config.mesh), rule_of(config)
    policy = open_model(config.policy, "policy", dtype=dtype_of(config.dtype, config.lora_rank))
    reward, annotator = reward_of(config, policy), annotator_of(config, policy)
    prompts, existing = read_prompts(config, policy), read_existing(config, policy)
    if existing is not None:
        prompts = prompts._replace(notes=[*prompts.notes, existing.note])
    columns, rows = (
        prompt_columns(config, prompts, existing),
        chunks_of(existing, config.batch_size) * config.batch_size,
    )
    setup = build_setup(config, policy, reward, annotator, prompt_length=columns, existing_rows=rows)
    mesh = make_mesh(axes)
    check_batch(config.batch_size, mesh)
    arguments = jax.random.key(config.seed), setup.upper, setup.lower
    memory = plan_bilevel(setup.algorithm.init, *arguments, setup.frozen)
    folder = open_folder(config, "align")
    others = [] if config.reward is None else reward.remarks("Reward model")
    print_plan(Console(quiet=not is_first_process()), config, policy, memory, [*prompts.notes, *others])
    log = tracker(config.track if is_first_process() else None, folder.path, name=folder.path.name, config=config)
    log = log if annotator.people is None else with_board(log, annotator.people.board)

    state_where = shardings(jax.eval_shape(setup.algorithm.init, *arguments), mesh, decoder_names)
    trees = setup.frozen, setup.upper, setup.lower
    frozen_where, upper_where, lower_where = (shardings(tree, mesh, decoder_names) for tree in trees)
    run = Run(
        folder=folder,
        tracker=log,
        policy=policy,
        reward=reward._replace(params={}),
        setup=setup._replace(upper=(), lower=()),
        annotator=counted(with_label_cache(annotator, folder), config),
        prompts=prompts,
        mesh=mesh,
        frozen=put_on_devices(setup.frozen, frozen_where),
        state_where=state_where,
        frozen_where=frozen_where,
        existing=existing,
    )
    models = {"weights": policy.params} | ({} if config.reward is None else {"reward": reward.params})
    if existing is not None:
        models["from_preferences"] = existing.prompts, existing.responses, existing.labels
    return run, InitialParams(models, put_on_devices(arguments, (_everywhere(mesh), upper_where, lower_where)))


def train(
    config: Align, run: Run, recorder: Recorder, checkpointer: RunCheckpointer, state: Any, restored: dict[str, Any]
) -> LoopResult:
    """Takes the remaining steps.

    Args:
        config: of the run.
        run: of `prepare`.
        recorder: logs and evaluates.
        checkpointer, state, restored: of the run's checkpoints; the state is donated.
    """
    algorithm = run.setup.algorithm
    safe = algorithm._replace(**{name: guarded(getattr(algorithm, name), state=1) for name in ("step", "update")})
    compiled = compile_algorithm(safe, run.mesh, state=run.state_where, frozen=run.frozen_where)
    # Kept pairs are arrays of one shape.
    widest = prompt_columns(config, run.prompts, run.existing)
    batches = prompt_batches(
        run.prompts.training,
        batch_size=config.batch_size,
        seed=config.seed,
        multiple=widest if config.reuse else column_multiple(config),
        widest=widest,
    )
    loop = LoopSettings(
        name="align",
        unit="completions",
        steps=config.steps,
        step=_outer_step(config, run, compiled),
        batches=iter(batches),
        place_batch=lambda batch: Prompts(*put_on_devices(tuple(batch), batch_sharding(run.mesh))),
        frozen=run.frozen,
        key=jax.random.fold_in(jax.random.key(config.seed), 1),
        # Two completions for each pair.
        count=lambda batch: 2 * config.batch_size * config.pairs,
        log_step=recorder.log_step,
        evaluate=recorder.evaluate,
        evaluations=config.evaluations,
    )
    return run_loop(config, loop, run.folder, checkpointer, state, restored)


def _outer_step(config: Align, run: Run, compiled: Algorithm) -> Callable:
    mixture, annotate, choose = run.setup.mixture, run.annotator.host, run.setup.choose
    traced: Callable[..., jax.Array] | None = run.annotator.traced
    score = None
    if choose is not None:
        choose = jax.jit(within(run.mesh, choose), out_shardings=_everywhere(run.mesh))
        traced = None if traced is None else label_chosen(traced)
    if traced is not None:
        traced = compile_annotator(traced, run.mesh, frozen=run.frozen_where, further=int(choose is not None))
    if annotate is not None and config.labels_per_step is not None:
        annotate = ask_about_some(annotate, config.labels_per_step)
    if mixture is not None:
        assert run.units is not None
        score = scorer(mixture, run.units, run.policy, run.folder)
    people, forecast = run.annotator.people, run.setup.forecast
    if people is not None and forecast is not None:
        compiled_forecast = jax.jit(within(run.mesh, forecast), out_shardings=_everywhere(run.mesh))
        compiled = with_forecasts(compiled, compiled_forecast, people, run.policy.bundle.tokenizer)
    step = make_outer_step(compiled, annotate, traced=traced, score=score, choose=choose)
    if people is None or not measures_mistakes(config):
        return step
    where = run.frozen_where.annotator

    def step_at_rate(key, state, data, frozen):
        rate = put_on_devices(people.mistake_rate(), where)
        return step(key, state, data, frozen._replace(annotator=rate))

    return step_at_rate


def save(run: Run, result: LoopResult, write: Callable[[pathlib.Path, Model, Kind], Any]) -> None:
    """Saves the models of the last state with `write`, and those of the best evaluated one in `best` where kept."""
    for name, state in {"": result.state, "best": result.best}.items():
        on_host = gathered(state)
        if is_first_process() and state is not None:
            policy = run.policy._replace(params=run.setup.policy_of(on_host))
            write(run.folder.path / name / "policy", policy, "policy")
            reward = run.setup.reward_of(on_host)
            if reward is not None:
                write(run.folder.path / name / "reward", run.reward._replace(params=reward), "reward")
            for kind, adapter in run.setup.adapters_of(on_host).items():
                start = run.policy if kind == "policy" else run.reward
                save_trained_adapter(run.folder.path / name / kind, start, adapter, kind, scaling=run.setup.scaling)


def _rehearse(config: Align, run: Run, recorder: Recorder, state: Any) -> None:
    """Saves the models and writes the report once before the first step, into a folder that is removed again."""
    if jax.process_count() > 1:
        return
    comparisons = recorder.unchanged()

    def write(trial: RunFolder) -> None:
        save(run._replace(folder=trial), LoopResult(state, None, []), try_saving)
        tables = mixture_tables(run.setup.mixture, run.units, trial, state, [])
        write_align_report(trial, config, comparisons, [], run.prompts.notes, 0.0, tables)

    rehearse(run.folder, write)


def _recorder(config: Align, run: Run) -> Recorder:
    def policy_of(state: Any) -> Params:
        # Placed as the reference is, the policy is evaluated by the program that has evaluated the reference.
        return put_on_devices(run.setup.policy_of(state), run.frozen_where.reference)

    load = expert_load(run.policy.config, run.prompts.held_out)
    compare = policy_comparer(
        run.policy._replace(params=run.frozen.reference),
        run.prompts.held_out,
        run.annotator,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed + 1,
        everywhere=_everywhere(run.mesh),
    )
    return Recorder(
        run.folder,
        run.tracker,
        compare,
        reference=run.frozen.reference,
        policy_of=policy_of,
        kl_price=config.kl_price,
        rewards=config.rewards,
        further=lambda state: scale_of(config, state) | load(policy_of(state)),
    )


def _everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
