"""Learning from given texts: log-probabilities, and steps of DPO, of a reward model and of supervised fine-tuning.

    python -m benchmarks.learning --policy DIR

The same weights, texts, rates and AdamW everywhere, float32; rows have no padding. Beside ours: transformers, the steps
of TRL's and Tunix's trainers, and a plain torch loop. What is checked first: log-probabilities, and the losses of the
first steps, which agree only if gradients and optimiser do.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import trainers
from benchmarks.peers import (
    Opened,
    open_policy,
    texts_of,
    torch_log_probs,
    torch_policy,
    torch_reward,
    tunix_log_probs,
    tunix_policy,
    without_padding,
)
from benchmarks.sides import (
    Compared,
    Side,
    agree,
    alternate,
    by_rows,
    checks,
    devices_of,
    machine,
    report,
    side,
    stepping,
    table_of,
    use_all_cores,
    warm_up,
)
from jaxrlhf.algorithms.direct_preference import direct_preference, dpo
from jaxrlhf.base.types import Batch, Params
from jaxrlhf.data.batches import Demonstrations, Pairs
from jaxrlhf.lm.learning import LearningInfo, Loss, learning, preference_loss, supervised_loss
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.offline import offline_pairs
from jaxrlhf.lm.problem import LanguageFrozen, Responses, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.objectives import likelihood
from jaxrlhf.training.step import (
    compile_algorithm,
    compile_update,
    place,
    replicate,
    split_by_batch,
    where_labelled,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to learn from."""

    policy: pathlib.Path
    """A Llama in a Hugging Face directory."""
    rows: int = 64
    """Texts a batch; of preferences, half as many pairs."""
    length: int = 128
    """Tokens of a text."""
    prompt_length: int = 16
    """Tokens of it that are its prompt."""
    rate: float = 1e-4
    beta: float = 0.1
    rounds: int = 15
    only: tuple[Literal["log_probs", "dpo", "reward", "supervised"], ...] = (
        "log_probs",
        "dpo",
        "reward",
        "supervised",
    )
    output: pathlib.Path = pathlib.Path("runs")


class Texts(NamedTuple):
    """The batch: the same rows, and as pairs with one prompt, the chosen texts first.

    Attributes:
        rows: `[N, T]`.
        pairs: `[2, N / 2, T]`.
        prompt_length: of each.
    """

    rows: np.ndarray
    pairs: np.ndarray
    prompt_length: int


Task = tuple[str, float, Callable[[], object], Mapping[str, Callable[[], Callable[[], object]]]]
"""What is timed, its goal, our call, and what makes the others', by name."""


def texts(config: Config, opened: Opened) -> Texts:
    """Returns a batch that the model wrote."""
    rows = texts_of(opened, config.rows, config.length)
    pairs = np.stack(np.split(rows, 2))
    pairs[1, :, : config.prompt_length] = pairs[0, :, : config.prompt_length]
    return Texts(rows, pairs, config.prompt_length)


def log_probs(config: Config, opened: Opened, given: Texts) -> Task:
    """The log-probabilities of everything behind the prompts, forward only."""
    split = given.prompt_length
    prompts, completions = (without_padding(part) for part in (given.rows[:, :split], given.rows[:, split:]))
    ours = by_rows(partial(completion_log_probs, opened.policy), opened.params, *prompts, *completions)

    def transformers():
        import torch

        model, rows = torch_policy(config.policy), torch.from_numpy(given.rows).long()

        def call():
            with torch.inference_mode():
                return torch_log_probs(model, rows, split).numpy()

        return call

    def tunix():
        return tunix_log_probs(tunix_policy(config.policy, opened.model.config), given.rows, split)

    return "log-probabilities, forward", 2.0, ours, {"transformers": transformers, "Tunix": tunix}


def dpo_step(config: Config, opened: Opened, given: Texts) -> Task:
    """A step of DPO, the reference's log-probabilities known."""
    policy, split, pairs = opened.policy, given.prompt_length, given.pairs.shape[1]
    problem = language_problem(
        policy, reward_model(policy), likelihood(), pairs=1, max_new_tokens=1, stop_ids=(), against_reference=False
    )
    algorithm = direct_preference(problem, dpo(beta=config.beta), adamw(config.rate))
    mesh, key = devices_of(pairs), jax.random.key(0)
    frozen = replicate(LanguageFrozen(opened.params), mesh)
    completions = jnp.asarray(np.swapaxes(given.pairs[:, :, split:], 0, 1)[:, None])
    responses = Responses(completions, jnp.ones(completions.shape, bool))
    known = jax.jit(partial(offline_pairs, policy))(
        without_padding(given.pairs[0, :, :split]), responses, jnp.ones((pairs, 1)), frozen
    )
    reference = np.asarray(known.sample.reference_log_prob[:, 0, :, 0]).T.copy()
    update = compile_algorithm(algorithm, mesh).update  # pyright: ignore[reportArgumentType]: two of its functions
    first = replicate(algorithm.init(key, (), opened.params), mesh)
    placed = jax.device_put(known, where_labelled(mesh))
    ours = stepping(lambda state: update(key, state, placed, frozen), first)
    rate, beta, directory = config.rate, config.beta, config.policy

    def trl():
        model = torch_policy(directory)
        return trainers.trl_dpo(model, directory, given.pairs, split, reference, beta=beta, rate=rate)

    def tunix():
        return trainers.tunix_dpo(directory, opened.model.config, given.pairs, split, beta=beta, rate=rate)

    def loop():
        model = torch_policy(directory)
        return trainers.torch_loop(model, trainers.dpo_in_torch(given.pairs, split, reference, beta), rate)

    others = {"TRL DPOTrainer": trl, "Tunix DPOTrainer": tunix, "torch loop": loop}
    return f"DPO step, {pairs} pairs", 1.5, lambda: float(ours().loss), others


def reward_step(config: Config, opened: Opened, given: Texts) -> Task:
    """A step of a reward model; Tunix has no trainer of one."""
    reward, pairs = reward_model(opened.policy), given.pairs.shape[1]
    head = 0.02 * np.random.default_rng(0).standard_normal(opened.model.config.width).astype(np.float32)
    params = reward.from_trunk(opened.params) | {"head": jnp.asarray(head)}
    tokens = np.swapaxes(given.pairs, 0, 1)
    mask, one = np.ones(tokens.shape, bool), np.ones(pairs, np.float32)
    ours = learned_from(preference_loss(reward), params, Pairs(tokens, mask, mask, one, 0 * one, one), config.rate)
    directory, rate = config.policy, config.rate

    def trl():
        return trainers.trl_reward(torch_reward(directory, head), directory, given.pairs, rate)

    def loop():
        return trainers.torch_loop(torch_reward(directory, head), trainers.reward_in_torch(given.pairs), rate)

    others = {"TRL RewardTrainer": trl, "torch loop": loop}
    return f"reward step, {pairs} pairs", 1.5, lambda: float(ours().loss), others


def supervised_step(config: Config, opened: Opened, given: Texts) -> Task:
    """A step of supervised fine-tuning on all tokens but the first."""
    learned = np.ones(given.rows.shape, bool)
    learned[:, 0] = False
    batch = Demonstrations(given.rows, np.ones(given.rows.shape, np.int32), learned)
    ours = learned_from(supervised_loss(opened.policy), opened.params, batch, config.rate)
    directory, rate = config.policy, config.rate

    def trl():
        return trainers.trl_supervised(torch_policy(directory), directory, given.rows, rate)

    def tunix():
        return trainers.tunix_supervised(tunix_policy(directory, opened.model.config), given.rows, rate)

    def loop():
        return trainers.torch_loop(torch_policy(directory), trainers.supervised_in_torch(given.rows), rate)

    others = {"TRL SFTTrainer": trl, "Tunix PeftTrainer": tunix, "torch loop": loop}
    return "supervised step", 1.5, lambda: float(ours().loss), others


def learned_from(loss: Loss, params: Params, batch: Batch, rate: float) -> Callable[[], LearningInfo]:
    """Returns the call of a step on one batch, its rows split over `devices_of`."""
    mesh = devices_of(len(batch[0]))
    algorithm, placed = learning(loss, adamw(rate)), place(batch, split_by_batch(mesh))
    update = compile_update(algorithm.update, mesh)
    return stepping(lambda state: update(state, placed, ()), replicate(algorithm.init(params), mesh))


def adamw(rate: float) -> optax.GradientTransformation:
    """Returns the optimiser of all sides: AdamW without decay."""
    return optax.adamw(rate, weight_decay=0.0)


TASKS = {"log_probs": log_probs, "dpo": dpo_step, "reward": reward_step, "supervised": supervised_step}


def compare(config: Config, opened: Opened, given: Texts, name: str) -> Compared:
    """Checks and times one task."""
    what, goal, ours, others = TASKS[name](config, opened, given)
    sides = [Side("ours", ours), *(side(peer, make) for peer, make in others.items())]
    warmed = warm_up(sides, calls=4)
    same = "log-probabilities" if name == "log_probs" else "losses of the first 4 steps"
    agreed = ", ".join(
        agree(f"{same} are those of {peer.name}", warmed[0].results, seen.results, tolerance=1e-4)
        for peer, seen in zip(sides[1:], warmed[1:], strict=True)
        if peer.call
    )
    shape = f"{what}, {config.rows} x {config.length} tokens"
    return Compared(shape, alternate(sides, rounds=config.rounds, warmed=warmed), agreed, goal)


def main(config: Config) -> pathlib.Path:
    """Prints and writes the table; returns its folder."""
    use_all_cores(devices=True)
    seen, opened = machine(), open_policy(config.policy)
    given = texts(config, opened)
    found = [compare(config, opened, given, name) for name in config.only]
    return report(config, "learning", [table_of("Learning", found)], found, seen, notes=checks(found))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
