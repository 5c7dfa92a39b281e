"""Times learning from given texts: log-probabilities, and steps of DPO, reward modelling and supervised fine-tuning.

    python -m benchmarks.learning --policy DIR

All start from the same weights and use the same texts, learning rates and AdamW, in float32; rows have no padding. Ours is
compared with transformers, the steps of TRL's and Tunix's trainers, and a plain torch loop. Checked first:
log-probabilities, and the losses of the first steps, which agree only if gradients and optimisers do.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import trainers
from benchmarks.batches import as_demonstrations, as_pairs, as_prompts
from benchmarks.devices import batch_mesh, data_parallel, use_all_cores
from benchmarks.libraries import (
    LoadedPolicy,
    generate_texts,
    open_policy,
    torch_log_probs,
    torch_policy,
    torch_reward,
    tunix_log_probs,
    tunix_policy,
)
from benchmarks.reporting import check_notes, comparison_table, machine_info, write_results
from benchmarks.timing import Comparison, Implementation, check_close, if_installed, interleave, stateful, warm_up
from jaxrlhf.algorithms.direct_preference import direct_preference, dpo
from jaxrlhf.base.types import Batch, Params
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.learning import Loss, learning, preference_loss, supervised_loss
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.offline import offline_pairs
from jaxrlhf.lm.pairing import Responses
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.objectives import likelihood
from jaxrlhf.training.step import (
    batch_sharding,
    compile_algorithm,
    compile_update,
    labelled_shardings,
    put_on_devices,
    replicate,
)

TaskName = Literal["log_probs", "dpo", "reward", "supervised"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to learn from."""

    policy: pathlib.Path
    """A Llama in a Hugging Face directory."""
    rows: int = 64
    """Texts per batch; for preferences, half as many pairs."""
    length: int = 128
    """Tokens per text."""
    prompt_length: int = 16
    """Tokens of the prompt, which each text begins with."""
    learning_rate: float = 1e-4
    beta: float = 0.1
    rounds: int = 15
    only: tuple[TaskName, ...] = ("log_probs", "dpo", "reward", "supervised")
    output: pathlib.Path = pathlib.Path("runs")


class Texts(NamedTuple):
    """The batch.

    Attributes:
        rows: `[N, T]`.
        pairs: `[2, N / 2, T]`, the same rows as pairs with a common prompt, chosen texts first.
        prompt_length: tokens of each prompt.
    """

    rows: np.ndarray
    pairs: np.ndarray
    prompt_length: int


class Task(NamedTuple):
    """What to time.

    Attributes:
        name: for the table.
        goal: how many times faster ours should be.
        ours: our call.
        others: by name, a function that returns the other library's call.
        result: what the calls return.
    """

    name: str
    goal: float
    ours: Callable[[], Any]
    others: Mapping[str, Callable[[], Callable[[], Any]]]
    result: str = "losses of the first 4 steps"


def make_texts(config: Config, loaded: LoadedPolicy) -> Texts:
    """Returns a batch that the model generated."""
    rows = generate_texts(loaded, config.rows, config.length)
    pairs = np.stack(np.split(rows, 2))
    pairs[1, :, : config.prompt_length] = pairs[0, :, : config.prompt_length]
    return Texts(rows, pairs, config.prompt_length)


def log_probs(config: Config, loaded: LoadedPolicy, texts: Texts) -> Task:
    """The log-probabilities of the tokens after the prompts, forward pass only."""
    rows, prompt_length = texts.rows, texts.prompt_length
    prompts, completions = as_prompts(rows[:, :prompt_length]), as_prompts(rows[:, prompt_length:])
    ours = data_parallel(partial(completion_log_probs, loaded.policy), loaded.params, *prompts, *completions)

    def transformers():
        import torch

        model, tokens = torch_policy(config.policy), torch.from_numpy(rows).long()

        def call():
            with torch.inference_mode():
                return torch_log_probs(model, tokens, prompt_length).numpy()

        return call

    def tunix():
        return tunix_log_probs(tunix_policy(config.policy, loaded.model.config), rows, prompt_length)

    others = {"transformers": transformers, "Tunix": tunix}
    return Task("log-probabilities, forward", 2.0, ours, others, result="log-probabilities")


def dpo_step(config: Config, loaded: LoadedPolicy, texts: Texts) -> Task:
    """A DPO step with precomputed reference log-probabilities."""
    pairs, prompt_length, directory = texts.pairs, texts.prompt_length, config.policy
    call, reference = our_dpo(config, loaded, texts)
    settings = {"beta": config.beta, "learning_rate": config.learning_rate}

    def trl():
        return trainers.trl_dpo(torch_policy(directory), directory, pairs, prompt_length, reference, **settings)

    def tunix():
        return trainers.tunix_dpo(directory, loaded.model.config, pairs, prompt_length, **settings)

    def loop():
        loss = trainers.dpo_in_torch(pairs, prompt_length, reference, config.beta)
        return trainers.torch_loop(torch_policy(directory), loss, config.learning_rate)

    others = {"TRL DPOTrainer": trl, "Tunix DPOTrainer": tunix, "torch loop": loop}
    return Task(f"DPO step, {pairs.shape[1]} pairs", 1.5, call, others)


def our_dpo(config: Config, loaded: LoadedPolicy, texts: Texts) -> tuple[Callable[[], float], np.ndarray]:
    """Returns the call of our DPO step, and the reference's log-probabilities of the completions, `[2, B]`."""
    policy, prompt_length, count = loaded.policy, texts.prompt_length, texts.pairs.shape[1]
    generation = Generation(max_new_tokens=1, stop_ids=())  # unused: the pairs are given
    problem = language_problem(
        policy, reward_model(policy), likelihood(), pairs=1, generation=generation, against="policy"
    )
    algorithm = direct_preference(problem, dpo(beta=config.beta), adamw(config.learning_rate))
    mesh, key = batch_mesh(count), jax.random.key(0)
    frozen = replicate(LanguageFrozen(loaded.params), mesh)
    completions = jnp.asarray(np.swapaxes(texts.pairs[:, :, prompt_length:], 0, 1)[:, None])
    responses = Responses(completions, jnp.ones(completions.shape, bool))
    prompts = as_prompts(texts.pairs[0, :, :prompt_length])
    labelled = jax.jit(partial(offline_pairs, policy))(prompts, responses, jnp.ones((count, 1)), frozen)
    reference = np.asarray(labelled.sample.reference_log_prob[:, 0, :, 0]).T.copy()
    update = compile_algorithm(algorithm, mesh).update  # pyright: ignore[reportArgumentType]: two of its functions
    state = replicate(algorithm.init(key, (), loaded.params), mesh)
    batch = jax.device_put(labelled, labelled_shardings(mesh))
    step = stateful(lambda state: update(key, state, batch, frozen), state)
    return lambda: float(step().loss), reference


def reward_step(config: Config, loaded: LoadedPolicy, texts: Texts) -> Task:
    """A step of a reward model with a random head; Tunix has no trainer for reward models."""
    reward, pairs, directory = reward_model(loaded.policy), texts.pairs, config.policy
    head = 0.02 * np.random.default_rng(0).standard_normal(loaded.model.config.width).astype(np.float32)
    params = reward.from_trunk(loaded.params) | {"head": jnp.asarray(head)}
    call = our_step(preference_loss(reward), params, as_pairs(np.swapaxes(pairs, 0, 1)), config.learning_rate)

    def trl():
        return trainers.trl_reward(torch_reward(directory, head), directory, pairs, config.learning_rate)

    def loop():
        loss = trainers.reward_in_torch(pairs)
        return trainers.torch_loop(torch_reward(directory, head), loss, config.learning_rate)

    return Task(f"reward step, {pairs.shape[1]} pairs", 1.5, call, {"TRL RewardTrainer": trl, "torch loop": loop})


def supervised_step(config: Config, loaded: LoadedPolicy, texts: Texts) -> Task:
    """A supervised fine-tuning step on every token but the first."""
    rows, directory = texts.rows, config.policy
    call = our_step(supervised_loss(loaded.policy), loaded.params, as_demonstrations(rows), config.learning_rate)

    def trl():
        return trainers.trl_supervised(torch_policy(directory), directory, rows, config.learning_rate)

    def tunix():
        return trainers.tunix_supervised(tunix_policy(directory, loaded.model.config), rows, config.learning_rate)

    def loop():
        return trainers.torch_loop(torch_policy(directory), trainers.supervised_in_torch(rows), config.learning_rate)

    others = {"TRL SFTTrainer": trl, "Tunix PeftTrainer": tunix, "torch loop": loop}
    return Task("supervised step", 1.5, call, others)


def our_step(loss: Loss, params: Params, batch: Batch, learning_rate: float) -> Callable[[], float]:
    """Returns the call of our step on one batch, its rows split over `batch_mesh`; it returns the loss."""
    mesh = batch_mesh(len(batch[0]))
    algorithm, batch = learning(loss, adamw(learning_rate)), put_on_devices(batch, batch_sharding(mesh))
    update = compile_update(algorithm.update, mesh)
    step = stateful(lambda state: update(state, batch, ()), replicate(algorithm.init(params), mesh))
    return lambda: float(step().loss)


def adamw(learning_rate: float) -> optax.GradientTransformation:
    """Returns the optimiser of all libraries: AdamW without weight decay."""
    return optax.adamw(learning_rate, weight_decay=0.0)


TASKS = {"log_probs": log_probs, "dpo": dpo_step, "reward": reward_step, "supervised": supervised_step}


def compare(config: Config, loaded: LoadedPolicy, texts: Texts, name: TaskName) -> Comparison:
    """Checks and times one task."""
    task = TASKS[name](config, loaded, texts)
    others = [if_installed(library, make) for library, make in task.others.items()]
    implementations = [Implementation("ours", task.ours), *others]
    ours, *theirs = warm_ups = warm_up(implementations, calls=4)
    agreed = ", ".join(
        check_close(f"{task.result} are those of {other.name}", ours.results, warmed.results, tolerance=1e-4)
        for other, warmed in zip(others, theirs, strict=True)
        if other.call
    )
    timings = interleave(implementations, rounds=config.rounds, warm_ups=warm_ups)
    return Comparison(f"{task.name}, {config.rows} x {config.length} tokens", timings, agreed, task.goal)


def main(config: Config) -> pathlib.Path:
    """Prints and writes the table; returns its folder."""
    use_all_cores(device_per_core=True)
    machine, loaded = machine_info(), open_policy(config.policy)
    texts = make_texts(config, loaded)
    comparisons = [compare(config, loaded, texts, name) for name in config.only]
    tables = [comparison_table("Learning", comparisons)]
    return write_results(config, "learning", tables, comparisons, machine, notes=check_notes(comparisons))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
