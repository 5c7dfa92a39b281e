"""Preferences on control tasks with soft actor-critic: true return at equal labels and equal environment steps.

    python experiments/off_policy.py --tasks pendulum --methods oracle pebble
    python experiments/off_policy.py --environment-steps 300000

Every method is a configuration of `jaxrlhf.control`; all seeds train in one program. A run is saved as it goes, so that
a killed study goes on from the last save when the command is repeated, to the bit; finished runs with the same settings
are skipped. Updates that are not finite are undone, and counted.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from control_tables import publish_tables
from off_policy_tables import Method, banded, check_equal, table
from off_policy_tasks import TASKS, Task, parts_of

from jaxrlhf.algorithms.reward_learning import reward_learning
from jaxrlhf.base.algorithm import Algorithm
from jaxrlhf.base.problem import SKIPPED, Labelled
from jaxrlhf.control import ensembles, replay
from jaxrlhf.control.pebble import explore, learn_offline, nearest_states, pebble, policy_return, segment_problem
from jaxrlhf.control.soft_actor_critic import Relabel, relabelled, soft_actor_critic
from jaxrlhf.control.teachers import Teacher, teacher_annotator
from jaxrlhf.preferences import buffer
from jaxrlhf.training.checkpoint import Checkpoints
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.guard import guarded
from jaxrlhf.training.run_folder import plain

TaskName = Literal["inverted pendulum", "double pendulum", "reacher", "pendulum", "cartpole"]
MethodName = Literal["oracle", "pebble", "pebble, half the labels", "iterated", "offline"]
# Equal returns are called equal; B-Pref's oracle would prefer the second segment.
TEACHER = Teacher(equal=1e-3)
MEMBERS = 3


METHODS: dict[str, Method] = {
    "oracle": Method(labels="never"),
    "pebble": Method(criterion="disagreement"),
    "pebble, half the labels": Method(criterion="disagreement", share=0.5),
    "iterated": Method(),
    "offline": Method(labels="first"),
}
"""Methods by their name on the command line."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    tasks: tuple[TaskName, ...] = ("inverted pendulum", "double pendulum", "reacher", "pendulum", "cartpole")
    methods: tuple[MethodName, ...] = ("oracle", "pebble", "pebble, half the labels", "iterated", "offline")
    seeds: int = 5
    first_seed: int = 0
    environment_steps: int = 60_000
    """Steps of a run, of all its parallel environments together, exploration included."""
    environments: int = 4
    """Stepped in parallel; each such step is followed by one gradient step."""
    sessions: int = 10
    """In which labels are bought, with equal numbers of steps between them."""
    first_steps: int = 4_000
    """Environment steps before the first label."""
    width: int = 32
    batch_size: int = 64
    fit_size: int = 32
    """Pairs of a step of a reward's fit."""
    epochs: int = 5
    """Of 20 steps, at most, of a session's fit, which stops where 97% of the labels are predicted."""
    learning_rate: float = 1e-3
    """Of policy, critics and rewards."""
    save_seconds: float = 60.0
    """Seconds between saves."""
    output: pathlib.Path = pathlib.Path("runs/off_policy")

    @property
    def interval(self) -> int:
        """Steps of each environment in a session."""
        return (self.environment_steps - self.first_steps) // (self.environments * self.sessions)


class Programs(NamedTuple):
    """The compiled functions of a task, which its methods share; all are mapped over the seeds.

    Attributes:
        first: `key -> state` after the exploration.
        offline: `(key, state) -> state` with all labels bought and fitted.
        propose: by criterion, `(key, state) -> queries`.
        update: `(key, state, queries, bought) -> (state, Guarded)`; only the first `bought` queries are labelled. The
            diagnostics are a `Row`.
    """

    first: Any
    offline: Any
    propose: dict[str, Any]
    update: Any


class Row(NamedTuple):
    """What a session reports, scalars.

    Attributes:
        returns: mean true return of the last episode in each environment.
        steps: environment steps so far.
        labels: bought so far.
        predicted: fraction of new labels that were predicted before.
        correlation: between the learned and the true return of segments of the latest experience.
    """

    returns: jax.Array
    steps: jax.Array
    labels: jax.Array
    predicted: jax.Array
    correlation: jax.Array


def programs_of(task: Task, config: Config) -> Programs:
    """Returns the functions of a task; nothing is compiled yet.

    Raises:
        ValueError: the labels cannot be bought in equal sessions, or there is no step in a session.
    """
    if task.labels % config.sessions:
        raise ValueError(f"{task.labels} labels cannot be bought in {config.sessions} equal sessions.")
    if config.interval < 1:
        raise ValueError(f"{config.environment_steps} steps leave none for each of {config.sessions} sessions.")
    parts, segment = parts_of(task, width=config.width), task.segment
    # A member is a network and a flag, the same for all: above 0 the policy follows the true reward.
    reward = lambda member, observations, actions: parts.reward(member[0], observations, actions)  # noqa: E731
    fit = reward_learning(segment_problem(reward), optax.adam(config.learning_rate))
    learned = ensembles.mean_of(reward)
    first_steps = config.first_steps // config.environments

    def learner_on(reward: Relabel, random_steps: int) -> Algorithm:
        return soft_actor_critic(
            parts.environment, parts.soft, parts.first_critic, reward=reward,
            optimizer=optax.adam(config.learning_rate), gamma=task.gamma, target_rate=0.05,
            capacity=config.environment_steps, environments=config.environments, batch_size=config.batch_size,
            episode_steps=task.episode_steps, random_steps=random_steps,
        )  # fmt: skip

    def either(upper, batch, replay):
        return jnp.where(upper[1][0] > 0, task.scale * batch.reward, relabelled(learned)(upper, batch, replay))

    learner = learner_on(either, 0)
    explorer = learner_on(nearest_states(jnp.asarray(task.units)), first_steps // 4)
    algorithms = {
        criterion: pebble(
            learner, fit, reward, queries=task.labels // config.sessions, segment=segment,
            interval=config.interval, sessions=config.sessions, kept=task.labels, criterion=criterion,
            fit_size=config.fit_size, fit_steps=20, epochs=config.epochs,
        ) for criterion in ("uniform", "disagreement")
    }  # fmt: skip
    algorithm, annotate = algorithms["uniform"], teacher_annotator(TEACHER)

    def first(key):
        init_key, policy_key, member_key, explore_key = jax.random.split(key, 4)
        members = ensembles.first_members(member_key, lambda key: (parts.first_reward(key), jnp.zeros(())), MEMBERS)
        state = algorithm.init(init_key, members, parts.first_policy(policy_key))
        return explore(explore_key, explorer, learner, state, steps=first_steps)

    def offline(key, state):
        query_key, label_key, fit_key = jax.random.split(key, 3)
        rows = buffer.rows(replay.draw_segments(query_key, state.learner.replay, pairs=task.labels, steps=segment))
        labels = annotate(label_key, rows, policy_return(state, segment=segment))
        settings = {"size": config.fit_size, "epochs": config.epochs * config.sessions}
        return learn_offline(fit_key, fit, reward, state, Labelled(rows, labels), **settings)[0]

    def update(key, state, rows, bought):
        label_key, update_key, check_key = jax.random.split(key, 3)
        labels = annotate(label_key, rows, policy_return(state, segment=segment))
        asked = (jnp.arange(len(labels)) < bought)[:, None, None]
        state, info = algorithm.update(update_key, state, Labelled(rows, jnp.where(asked, labels, SKIPPED)), ())
        latest = replay.draw_segments(check_key, state.learner.replay, pairs=64, steps=segment)
        predicted = ensembles.segment_returns(ensembles.of_samples(learned), state.upper, latest)
        return state, Row(
            returns=info.learner.finished,
            steps=state.learner.step * config.environments,
            labels=jnp.sum(state.labels.pairs.labels >= 0),
            predicted=info.predicted,
            correlation=jnp.corrcoef(predicted.ravel(), jnp.sum(latest.responses.gold, axis=-1).ravel())[0, 1],
        )

    return Programs(
        first=jax.jit(jax.vmap(first)),
        offline=jax.jit(jax.vmap(offline)),
        propose={
            name: jax.jit(jax.vmap(lambda key, state, propose=each.propose: propose(key, state, None, ())))
            for name, each in algorithms.items()
        },
        update=jax.jit(jax.vmap(guarded(update, state=1), in_axes=(0, 0, 0, None))),
    )


def begin(programs: Programs, method: Method, keys: jax.Array) -> Any:
    """Returns the state before the first session."""
    state = programs.first(folded(keys, 0))
    if method.labels == "first":
        return programs.offline(folded(keys, 1), state)
    network, flag = state.members.upper
    upper = (network, flag + (method.labels == "never"))
    return state._replace(members=state.members._replace(upper=upper))


def folded(keys: jax.Array, number: int) -> jax.Array:
    """Returns a key of this number for every seed."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def train(programs: Programs, task: Task, method: Method, config: Config, folder: pathlib.Path, identity: dict) -> dict:
    """Runs all sessions, from the last save on; returns the curves, leaves `[seeds, sessions]`, and the seconds."""
    keys = jax.random.split(jax.random.key(config.first_seed), config.seeds)
    bought = int(task.labels // config.sessions * method.share) if method.labels == "online" else 0
    propose = programs.propose[method.criterion]
    shapes = jax.eval_shape(programs.first, keys)
    row = jax.eval_shape(programs.update, keys, shapes, jax.eval_shape(propose, keys, shapes), bought)[1]
    rows = jax.tree.map(lambda leaf: np.zeros((config.seeds, config.sessions), leaf.dtype), row)
    checkpoints = Checkpoints(folder, identity, every_seconds=config.save_seconds)
    began, count, restored = time.monotonic(), 0, checkpoints.restore(on_device(stored((shapes, rows))))
    if restored is None:
        state = begin(programs, method, keys)
    else:
        count, (state, rows) = restored.step, unstored(restored.arrays, (shapes, rows))
        print(f"  goes on after session {count}", flush=True)
    while count < config.sessions:
        propose_keys, update_keys = (folded(keys, 2 * count + number) for number in (2, 3))
        state, result = programs.update(update_keys, state, propose(propose_keys, state), bought)
        for whole, column in zip(jax.tree.leaves(rows), jax.tree.leaves(result), strict=True):
            whole[:, count] = column
        count += 1
        print(f"  session {count}: return {np.mean(rows.info.returns[:, count - 1]):.1f}", flush=True)
        if checkpoints.due(count):
            checkpoints.save(count, stored((state, rows)))
    checkpoints.close()
    other = {"seconds": time.monotonic() - began, "skipped": rows.skipped.sum(axis=1).tolist()}
    return {name: np.asarray(curve).tolist() for name, curve in rows.info._asdict().items()} | other


def stored(tree: Any) -> dict[str, Any]:
    """Returns the arrays of a tree, or their shapes, by number; those without elements are left out."""
    return {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(tree)) if leaf.size}


def on_device(arrays: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arrays' shapes on the first device, to restore them there."""
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), arrays)


def unstored(arrays: dict[str, Any], like: Any) -> Any:
    """Returns the tree of what `stored` returned; what is a numpy array in `like` can be written to."""
    return jax.tree.unflatten(jax.tree.structure(like), [
        np.array(arrays[str(number)]) if isinstance(leaf, np.ndarray)
        else arrays[str(number)] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)
        for number, leaf in enumerate(jax.tree.leaves(like))
    ])  # fmt: skip


def settings_of(task: str, method: str, config: Config) -> dict:
    """Returns everything that a run depends on, as JSON values."""
    chosen = {
        "task": TASKS[task]._replace(make=None), "method": METHODS[method], "teacher": TEACHER, "members": MEMBERS,
    } | {name: value for name, value in dataclasses.asdict(config).items()
         if name not in ("tasks", "methods", "output", "save_seconds")}  # fmt: skip
    return json.loads(json.dumps(plain({"name": task, "rule": method} | chosen)))


def report(config: Config) -> str:
    """Draws the figure and returns the tables of the folder's results that have these settings."""
    text, panels = [], {}
    for task in TASKS:
        results = {}
        for method in METHODS:
            path = path_of(task, method, config)
            if path.exists() and (stored := json.loads(path.read_text()))["settings"] == settings_of(
                task, method, config
            ):
                results[method] = stored["curves"]
        if results:
            check_equal(results, METHODS)
            text += ["", f"## {task[0].upper()}{task[1:]}", "", *table(results, METHODS)]
            panels[task] = ("environment steps", "true return", {name: banded(results[name]) for name in results})
    if panels:
        draw_curves(config.output / "returns.png", panels)
        text += ["", "![True return against environment steps](returns.png)"]
    return "\n".join(text)


def path_of(task: str, method: str, config: Config) -> pathlib.Path:
    """Returns where a run's curves are kept."""
    return config.output / "curves" / f"{task}-{method}.json".replace(" ", "_").replace(",", "")


def main(config: Config) -> None:
    """Runs what is missing, then reports every result in the folder that has these settings."""
    try:
        (config.output / "curves").mkdir(parents=True, exist_ok=True)
        (config.output / "tables.md").touch()
    except OSError as error:
        sys.exit(f"The output folder {config.output} cannot be written ({error.strerror}); give --output another.")
    for task in config.tasks:
        programs = None
        for method in config.methods:
            path, settings = path_of(task, method, config), settings_of(task, method, config)
            if path.exists() and json.loads(path.read_text())["settings"] == settings:
                continue
            print(f"{task}, {method}", flush=True)
            saves = config.output / "saves" / path.stem
            try:
                programs = programs_of(TASKS[task], config) if programs is None else programs
                curves = train(programs, TASKS[task], METHODS[method], config, saves, settings)
            except ValueError as error:
                sys.exit(f"off_policy: {task}, {method}: {error}")
            partial = path.with_suffix(".part")
            partial.write_text(json.dumps({"settings": settings, "curves": curves}))
            os.replace(partial, path)
            shutil.rmtree(saves, ignore_errors=True)
    publish_tables(
        config.output,
        report(config),
        title="Preferences on control tasks, off-policy",
        summary="True return, which no learner sees, at equal labels and environment steps.",
        config=config,
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
