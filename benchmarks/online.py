"""Times a whole online iteration, rollout, labels and update: ours beside TRL's online DPO and RLOO on the same task.

    python -m benchmarks.online --policy DIR

Both sample completions of the same prompts, have their texts scored by the same Python function, and take one AdamW step.
The losses are the same: online DPO on pairs whose chosen completion has the higher score; REINFORCE with leave-one-out
baselines on scores minus beta times the log-ratio. A third comparison times the whole bilevel iteration, which also trains
a reward model and the policy's tangent, on as many completions.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import trainers
from benchmarks.devices import batch_mesh, use_all_cores
from benchmarks.learning import adamw
from benchmarks.libraries import LoadedPolicy, generate_texts, open_policy, torch_policy
from benchmarks.reporting import check_notes, comparison_table, machine_info, write_results
from benchmarks.timing import Comparison, Implementation, check_close, if_installed, interleave, stateful, warm_up
from jaxrlhf import annotation, bilevel, objectives
from jaxrlhf.algorithms.direct_preference import direct_preference, dpo
from jaxrlhf.algorithms.policy_gradient import policy_algorithm
from jaxrlhf.annotation import functions
from jaxrlhf.bilevel import BilevelProblem, Labelled, Sample
from jaxrlhf.data.batches import padded_prompts
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.pairing import Prompts
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.training.step import batch_sharding, compile_algorithm, put_on_devices, replicate


@dataclasses.dataclass(frozen=True)
class Config:
    """The task."""

    policy: pathlib.Path
    """A Llama in a Hugging Face directory."""
    completions: int = 64
    """Per iteration."""
    group: int = 4
    """Completions per prompt of RLOO."""
    prompt_length: int = 16
    new_tokens: int = 48
    beta: float = 0.1
    learning_rate: float = 1e-5
    rounds: int = 9
    output: pathlib.Path = pathlib.Path("runs")


class Task(NamedTuple):
    """The prompts that every iteration starts from.

    Attributes:
        loaded: the model.
        texts: the prompts.
        prompts: the same as tokens, padded on the left.
    """

    loaded: LoadedPolicy
    texts: list[str]
    prompts: Prompts

    def first(self, count: int) -> "Task":
        """Returns the task with the first `count` prompts."""
        return Task(self.loaded, self.texts[:count], Prompts(*(array[:count] for array in self.prompts)))


def vowel_fraction(prompts: list[str], completions: list[str], **unused: Any) -> list[float]:
    """Returns the score of each completion: its fraction of vowels."""
    del prompts, unused
    return [sum(map(text.count, "aeiou")) / max(1, len(text)) for text in completions]


def make_task(config: Config) -> Task:
    """Returns prompts that the model generated, as texts and as tokens."""
    loaded = open_policy(config.policy)
    tokenizer = loaded.model.bundle.tokenizer
    texts = tokenizer.decode_batch(generate_texts(loaded, config.completions, config.prompt_length).tolist())
    tokens = [np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32) for text in texts]
    return Task(loaded, texts, Prompts(*map(jnp.asarray, padded_prompts(tokens, max(map(len, tokens))))))


def make_problem(config: Config, task: Task, objective: Any, **settings: Any) -> BilevelProblem:
    """Returns the task as a bilevel problem."""
    policy = task.loaded.policy
    generation = Generation(config.new_tokens, task.loaded.model.bundle.special.eos)
    return language_problem(policy, reward_model(policy), objective, generation=generation, **settings)


def iteration(algorithm: Any, upper: Any, task: Task, labels_of: Callable[[Sample], Any]) -> Callable[[], Any]:
    """Returns the call of our iteration: propose, label the texts in Python, update.

    Args:
        algorithm: has `init`, `propose` and `update`.
        upper: initial upper parameters.
        task: the prompts.
        labels_of: `(sample) -> labels [B, M, L]`.
    """
    mesh = batch_mesh(len(task.texts))
    frozen = replicate(LanguageFrozen(task.loaded.params), mesh)
    prompts = put_on_devices(task.prompts, batch_sharding(mesh))
    compiled = compile_algorithm(algorithm, mesh)

    def step(carry):
        key, state = carry
        key, sample_key, update_key = jax.random.split(key, 3)
        sample = compiled.propose(sample_key, state, prompts, frozen)
        state, info = compiled.update(update_key, state, Labelled(sample, labels_of(sample)), frozen)
        return (key, state), info

    state = replicate(algorithm.init(jax.random.key(0), upper, task.loaded.params), mesh)
    return stateful(step, (jax.random.key(0), state))


def scores_of(task: Task, sample: Sample) -> np.ndarray:
    """Returns the score of every completion, `[B, M, 2]`."""
    prompts, firsts, seconds = functions.texts_of(task.loaded.model.bundle.tokenizer, sample)
    scores = np.array([vowel_fraction(prompts, firsts), vowel_fraction(prompts, seconds)], np.float32)
    return np.moveaxis(scores.reshape(2, *sample.measure.shape), 0, -1)


def reinforce_leave_one_out(beta: float) -> Callable[..., jax.Array]:
    """Returns the RLOO loss (arXiv 2402.14740) for labels `[B, M, 2]` that hold the completions' scores."""

    def loss(log_prob, labelled, frozen):
        del frozen
        sample, scores = labelled.sample, labelled.labels
        log_prob, behaviour, reference = (
            jnp.sum(each, axis=-1) for each in (log_prob, sample.behaviour_log_prob, sample.reference_log_prob)
        )
        reward = scores - beta * (behaviour - reference)
        count = scores.shape[1] * 2
        baseline = (jnp.sum(reward, axis=(1, 2), keepdims=True) - reward) / (count - 1)
        return -jnp.mean((reward - baseline) * jnp.exp(log_prob - behaviour))

    return loss


def compare_losses(
    task: str, ours: Callable[[], Any], other: Implementation, *, loss: float, name: str, rounds: int
) -> Comparison:
    """Checks the first losses against their value at the reference, and times both.

    Args:
        task: for the table.
        ours: our iteration, which returns an info with a `loss`.
        other: the other library's.
        loss: the loss at the reference.
        name: of that value.
        rounds: calls of each.
    """
    implementations = Implementation("ours", lambda: float(ours().loss)), other
    warm_ups = warm_up(implementations)
    losses = [each.results[0] for each in warm_ups if each.results]
    agreed = check_close(f"losses at the reference are {name}", losses, [loss] * len(losses), tolerance=1e-4)
    return Comparison(task, interleave(implementations, rounds=rounds, warm_ups=warm_ups), agreed, goal=3.0)


def online_dpo(config: Config, task: Task) -> Comparison:
    """Two completions per prompt, the one with the higher score chosen."""
    task = task.first(config.completions // 2)
    problem = make_problem(config, task, objectives.likelihood(), pairs=1, against="policy")
    algorithm = direct_preference(problem, dpo(beta=config.beta), adamw(config.learning_rate))

    def labels_of(sample):
        scores = scores_of(task, sample)
        return jnp.asarray(scores[..., :1] >= scores[..., 1:], jnp.float32)

    ours = iteration(algorithm, (), task, labels_of)
    trl = if_installed("TRL OnlineDPOTrainer", lambda: trl_online_dpo(config, task))
    name = f"online DPO, {len(task.texts)} prompts x 2 completions of {config.new_tokens} tokens"
    return compare_losses(name, ours, trl, loss=math.log(2.0), name="log 2", rounds=config.rounds)


def trl_online_dpo(config: Config, task: Task) -> trainers.Step:
    """Returns the step of TRL's `OnlineDPOTrainer`."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl.experimental.online_dpo import (  # pyright: ignore[reportMissingImports]
        OnlineDPOConfig,
        OnlineDPOTrainer,
    )

    lengths = {"max_new_tokens": config.new_tokens, "max_length": 512, "temperature": 1.0}
    trainer = OnlineDPOTrainer(
        torch_policy(config.policy),
        reward_funcs=vowel_fraction,
        args=trainers.trl_settings(OnlineDPOConfig, config.learning_rate, beta=config.beta, **lengths),
        train_dataset=Dataset.from_dict({"prompt": task.texts}),
        processing_class=trainers.trl_tokenizer(config.policy),
    )
    return trainers.trl_step(trainer, {"prompt": task.texts})


def rloo(config: Config, task: Task) -> Comparison:
    """A group of completions per prompt, each with the others of its group as its baseline."""
    task = task.first(config.completions // config.group)
    settings = {"pairs": config.group // 2, "against": "policy"}
    problem = make_problem(config, task, objectives.likelihood(), **settings)
    algorithm = policy_algorithm(problem, reinforce_leave_one_out(config.beta), adamw(config.learning_rate))
    ours = iteration(algorithm, (), task, lambda sample: jnp.asarray(scores_of(task, sample)))
    trl = if_installed("TRL RLOOTrainer", lambda: trl_rloo(config, task))
    name = f"RLOO, {len(task.texts)} prompts x {config.group} completions of {config.new_tokens} tokens"
    return compare_losses(name, ours, trl, loss=0.0, name="0", rounds=config.rounds)


def trl_rloo(config: Config, task: Task) -> trainers.Step:
    """Returns the step of TRL's `RLOOTrainer`."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import RLOOConfig, RLOOTrainer  # pyright: ignore[reportMissingImports]

    sizes = {"per_device_train_batch_size": config.completions, "num_generations": config.group}
    trainer = RLOOTrainer(
        torch_policy(config.policy),
        reward_funcs=vowel_fraction,
        args=trainers.trl_settings(
            RLOOConfig, config.learning_rate, beta=config.beta, max_completion_length=config.new_tokens, **sizes
        ),
        train_dataset=Dataset.from_dict({"prompt": task.texts}),
        processing_class=trainers.trl_tokenizer(config.policy),
    )
    return trainers.trl_step(trainer, [{"prompt": text} for text in task.texts for _ in range(config.group)])


def bilevel_iteration(config: Config, task: Task) -> Comparison:
    """The bilevel step of `jaxrlhf align`, each pair one completion of the policy and one of the reference."""
    pairs = 4
    our_task = task.first(config.completions // (2 * pairs))
    objective = objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=0.05))
    problem = make_problem(config, our_task, objective, pairs=pairs)
    solver = bilevel.tangent(optax.adam(2e-4), optax.adam(1e-5))
    algorithm = bilevel.bilevel_descent(problem, bilevel.central(), solver, optax.adam(1e-3), beta=0.2)
    annotate = annotation.host_scorer(task.loaded.model.bundle.tokenizer, vowel_fraction, "vowels")
    upper = reward_model(task.loaded.policy).from_trunk(task.loaded.params)
    ours = iteration(algorithm, upper, our_task, lambda sample: annotate(jax.random.key(2), sample))
    trl_task = task.first(config.completions // 2)
    trl = if_installed("TRL OnlineDPOTrainer", lambda: trl_online_dpo(config, trl_task))
    name = f"bilevel iteration with its reward model, {config.completions} completions of {config.new_tokens} tokens"
    return Comparison(name, interleave((Implementation("ours", ours), trl), rounds=config.rounds), goal=3.0)


def main(config: Config) -> pathlib.Path:
    """Prints and writes the table; returns its folder."""
    use_all_cores(device_per_core=True)
    machine, task = machine_info(), make_task(config)
    comparisons = [compare(config, task) for compare in (online_dpo, rloo, bilevel_iteration)]
    tables = [comparison_table("A whole online iteration", comparisons)]
    return write_results(config, "online", tables, comparisons, machine, notes=check_notes(comparisons))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
