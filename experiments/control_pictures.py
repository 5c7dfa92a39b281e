"""What a run of `off_policy.py` learned, to look at: episodes as GIFs, the learned reward, and whether it is calibrated.

    python experiments/control_pictures.py --task pendulum

One seed of PEBBLE. `before.gif` and `after.gif` are an episode by the first and by the last policy, drawn here from
the observations. `scatter.png` has the learned against the true reward of steps of the latest experience, at three
times. Where the task is the pendulum, `map.png` has both rewards over angle and speed, without torque.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from off_policy import METHODS, Config, begin, folded, programs_of
from off_policy_tasks import TASKS, Parts, Task, parts_of

from jaxrlhf.control import ensembles
from jaxrlhf.mdp.environments import Actor, roll_out

Lines = list[list[tuple[float, float]]]
"""Polylines, in a square from -1 to 1."""


def pendulum(observation: np.ndarray) -> Lines:
    """The rod; up is up."""
    cosine, sine = observation[:2]
    return [[(0.0, 0.0), (-0.8 * float(sine), 0.8 * float(cosine))]]


def inverted_pendulum(observation: np.ndarray) -> Lines:
    """The cart of brax with its pole."""
    place, angle = float(observation[0]), float(observation[1])
    return [_box(place), [(place, 0.0), (place + 0.8 * np.sin(angle), 0.8 * np.cos(angle))]]


def cartpole(observation: np.ndarray) -> Lines:
    """CartPole's cart with its pole; its track is 4.8 long."""
    place, angle = float(observation[0]) / 2.4, float(observation[2])
    return [_box(place), [(place, 0.0), (place + 0.8 * np.sin(angle), 0.8 * np.cos(angle))]]


def double_pendulum(observation: np.ndarray) -> Lines:
    """The cart of brax with two poles; the second angle is measured from the first pole."""
    place, (sines, cosines) = float(observation[0]), observation[1:5].reshape(2, 2)
    first = float(np.arctan2(sines[0], cosines[0]))
    second = first + float(np.arctan2(sines[1], cosines[1]))
    elbow = (place + 0.4 * np.sin(first), 0.4 * np.cos(first))
    return [_box(place), [(place, 0.0), elbow, (elbow[0] + 0.4 * np.sin(second), elbow[1] + 0.4 * np.cos(second))]]


def reacher(observation: np.ndarray) -> Lines:
    """The arm of brax with its target, seen from above; lengths times 4."""
    x, y = (float(each) for each in 4.0 * observation[4:6])
    elbow = (0.4 * float(observation[0]), 0.4 * float(observation[2]))
    tip = (x + 4.0 * float(observation[8]), y + 4.0 * float(observation[9]))
    return [
        [(0.0, 0.0), elbow, tip],
        [(x - 0.05, y), (x, y + 0.05), (x + 0.05, y), (x, y - 0.05), (x - 0.05, y)],
    ]


def _box(place: float) -> list[tuple[float, float]]:
    return [(place + x, y) for x, y in ((-0.15, -0.1), (-0.15, 0.0), (0.15, 0.0), (0.15, -0.1), (-0.15, -0.1))]


DRAWN: dict[str, Callable[[np.ndarray], Lines]] = {
    "pendulum": pendulum,
    "cartpole": cartpole,
    "inverted pendulum": inverted_pendulum,
    "double pendulum": double_pendulum,
    "reacher": reacher,
}
"""How an observation of a task is drawn."""


def write_gif(
    path: pathlib.Path, observations: np.ndarray, draw: Callable[[np.ndarray], Lines], *, size: int = 160
) -> None:
    """Writes a film of observations `[T, O]`, 25 frames a second; it is played again and again."""
    from PIL import Image, ImageDraw

    frames = []
    for observation in observations:
        image = Image.new("P", (size, size), 0)
        image.putpalette([255, 255, 255, 11, 110, 153, 217, 115, 13])
        for number, line in enumerate(draw(observation)):
            points = [((x + 1) / 2 * size, (1 - y) / 2 * size) for x, y in line]
            ImageDraw.Draw(image).line(points, fill=1 + number % 2, width=4)
        frames.append(image)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, loop=0, optimize=False)


def episode(task: Task, parts: Parts, policy: Any) -> tuple[np.ndarray, float]:
    """Returns the observations `[T, O]` of an episode by a policy, up to its end, and its true return."""
    actor = Actor(
        lambda key, lower, observations: (parts.soft.act(key, lower, observations), jnp.zeros(observations.shape[:-1])),
        lambda lower, observations, actions: jnp.zeros(observations.shape[:-1]),
    )
    draw = jax.jit(lambda policy: roll_out(
        jax.random.key(7), actor, policy, parts.environment, episodes=1, steps=task.episode_steps
    ))  # fmt: skip
    rollouts = draw(policy)
    length = int(rollouts.alive.sum())
    return np.asarray(rollouts.observations[0, :length]), float(rollouts.reward.sum())


def draw_scatter(path: pathlib.Path, points: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draws learned against true rewards `[N]` of steps, one panel a time, with their correlation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(points), 3.2), layout="constrained")
    for number, (title, (true, learned)) in enumerate(points.items()):
        axes = figure.add_subplot(1, len(points), number + 1)
        axes.plot(true, learned, ".", markersize=2, color="#0b6e99", alpha=0.5)
        varies = np.std(true) > 0 and np.std(learned) > 0
        correlation = f", correlation {np.corrcoef(true, learned)[0, 1]:.2f}" if varies else ""
        axes.set(title=title + correlation, xlabel="true reward of a step", ylabel="learned reward")
        axes.title.set_fontsize(9)
    figure.savefig(path, dpi=110)


def draw_map(path: pathlib.Path, learned: Callable[[np.ndarray], np.ndarray]) -> None:
    """Draws the pendulum's learned and true rewards over angle and speed, without torque."""
    from matplotlib.figure import Figure

    angle, speed = np.meshgrid(np.linspace(-np.pi, np.pi, 61), np.linspace(-8, 8, 61))
    observations = np.stack([np.cos(angle), np.sin(angle), speed], axis=-1)
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    true = -(angle**2 + 0.1 * speed**2)
    for number, (title, values) in enumerate({"learned": learned(observations), "true": true}.items()):
        axes = figure.add_subplot(1, 2, number + 1)
        mesh = axes.pcolormesh(angle, speed, values, cmap="viridis", rasterized=True)
        axes.set(title=f"{title} reward", xlabel="angle from upright", ylabel="speed")
        figure.colorbar(mesh, ax=axes)
    figure.savefig(path, dpi=110)


def main(name: str, steps: int, sessions: int, output: pathlib.Path) -> None:
    """Runs PEBBLE and writes the pictures."""
    task, config = TASKS[name], Config(seeds=1, environment_steps=steps, sessions=sessions)
    parts, programs = parts_of(task, width=config.width), programs_of(task, config)
    output.mkdir(parents=True, exist_ok=True)
    keys, method, points = jax.random.split(jax.random.key(0), 1), METHODS["pebble"], {}
    mean = jax.jit(
        ensembles.mean_of(lambda member, observations, actions: parts.reward(member[0], observations, actions))
    )

    def film(title: str, policy: Any) -> None:
        observations, total = episode(task, parts, policy)
        write_gif(output / f"{title}.gif", observations, DRAWN[name])
        print(f"{title}: true return {total:.1f} in {len(observations)} steps", flush=True)

    state = begin(programs, method, keys)
    film("before", parts.first_policy(jax.random.key(0)))
    for number in range(sessions):
        queries = programs.propose[method.criterion](folded(keys, 2 * number + 2), state)
        state, result = programs.update(folded(keys, 2 * number + 3), state, queries, task.labels // sessions)
        print(f"session {number + 1}: return {float(result.info.returns[0]):.1f}", flush=True)
        if number in (0, sessions // 2, sessions - 1):
            one = jax.tree.map(lambda leaf: leaf[0], state)
            replay, latest = one.learner.replay, np.arange(400)
            rows = jax.tree.map(lambda leaf, at=(int(replay.added) - 1 - latest): leaf[at, 0], replay.steps)
            learned = mean(one.upper, rows.observations, rows.actions)
            points[f"{int(one.labels.filled)} labels"] = (np.asarray(rows.reward), np.asarray(learned))
    one = jax.tree.map(lambda leaf: leaf[0], state)
    film("after", one.policy)
    draw_scatter(output / "scatter.png", points)
    if name == "pendulum":
        draw_map(output / "map.png", lambda seen: np.asarray(mean(one.upper, seen, jnp.zeros((*seen.shape[:2], 1)))))
    print(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="pendulum")
    parser.add_argument("--environment-steps", type=int, default=Config.environment_steps, help="Of the run.")
    parser.add_argument("--sessions", type=int, default=Config.sessions, help="In which labels are bought.")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/control_pictures"))
    given = parser.parse_args()
    main(given.task, given.environment_steps, given.sessions, given.output)
