"""A whole online iteration, rollout, labels and update: ours beside TRL's online DPO and RLOO on the same task.

    python -m benchmarks.online --policy DIR

Both answer the same prompts, have the answers' texts scored by the same Python function, and take one AdamW step. The
losses are the same ones: online DPO on pairs whose chosen answer has the higher score; REINFORCE with leave-one-out
baselines on scores less beta times the log-ratio. The third line is the whole bilevel iteration, which trains a reward
model and the policy's answer to it besides, with as many answers.
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
from benchmarks.learning import adamw
from benchmarks.peers import Opened, open_policy, texts_of, torch_policy
from benchmarks.sides import (
    Compared,
    Side,
    agree,
    alternate,
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
from jaxrlhf import annotation, bilevel, objectives
from jaxrlhf.algorithms.direct_preference import direct_preference, dpo
from jaxrlhf.algorithms.policy_gradient import policy_algorithm
from jaxrlhf.annotation import functions
from jaxrlhf.bilevel import BilevelProblem, Labelled, Sample
from jaxrlhf.data.batches import padded_prompts
from jaxrlhf.lm.problem import LanguageFrozen, Prompts, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.training.step import compile_algorithm, place, replicate, split_by_batch


@dataclasses.dataclass(frozen=True)
class Config:
    """The task."""

    policy: pathlib.Path
    """A Llama in a Hugging Face directory."""
    answers: int = 64
    """Completions an iteration."""
    group: int = 4
    """Of RLOO, completions a prompt."""
    prompt_length: int = 16
    new_tokens: int = 48
    beta: float = 0.1
    rate: float = 1e-5
    rounds: int = 9
    output: pathlib.Path = pathlib.Path("runs")


class Task(NamedTuple):
    """What every iteration begins with.

    Attributes:
        opened: the model.
        texts: prompts.
        prompts: the same as tokens, padded on the left.
    """

    opened: Opened
    texts: list[str]
    prompts: Prompts

    def first(self, count: int) -> "Task":
        """Returns the task of the first prompts alone."""
        return Task(self.opened, self.texts[:count], Prompts(*(part[:count] for part in self.prompts)))


def vowels(prompts: list[str], completions: list[str], **unused: Any) -> list[float]:
    """Returns what the answers are scored by: the share of vowels."""
    del prompts, unused
    return [sum(map(text.count, "aeiou")) / max(1, len(text)) for text in completions]


def task_of(config: Config) -> Task:
    """Returns prompts that the model wrote, as texts and as tokens."""
    opened = open_policy(config.policy)
    tokenizer = opened.model.words.tokenizer
    rows = texts_of(opened, config.answers, config.prompt_length)
    texts = tokenizer.decode_batch(rows.tolist())
    tokens = [np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32) for text in texts]
    return Task(opened, texts, Prompts(*map(jnp.asarray, padded_prompts(tokens, max(map(len, tokens))))))


def problem_of(config: Config, task: Task, objective: Any, **settings: Any) -> BilevelProblem:
    """Returns the task as a problem."""
    policy = task.opened.policy
    stops = task.opened.model.words.special.eos
    return language_problem(
        policy, reward_model(policy), objective, max_new_tokens=config.new_tokens, stop_ids=stops, **settings
    )


def iteration(algorithm: Any, upper: Any, task: Task, labels_of: Callable[[Sample], Any]) -> Callable[[], Any]:
    """Returns the call of our iteration: propose, let Python label the texts, update.

    Args:
        algorithm: with `propose` and `update`.
        upper: what its `init` takes.
        task: the prompts.
        labels_of: `(sample) -> labels [B, M, L]`.
    """
    mesh = devices_of(len(task.texts))
    frozen, prompts = replicate(LanguageFrozen(task.opened.params), mesh), place(task.prompts, split_by_batch(mesh))
    compiled = compile_algorithm(algorithm, mesh)

    def step(carried):
        key, state = carried
        key, sample_key, update_key = jax.random.split(key, 3)
        sample = compiled.propose(sample_key, state, prompts, frozen)
        state, info = compiled.update(update_key, state, Labelled(sample, labels_of(sample)), frozen)
        return (key, state), info

    first = replicate(algorithm.init(jax.random.key(0), upper, task.opened.params), mesh)
    return stepping(step, (jax.random.key(0), first))


def scores_of(task: Task, sample: Sample) -> np.ndarray:
    """Returns the score of every answer, `[B, M, 2]`."""
    asked, firsts, seconds = functions.texts_of(task.opened.model.words.tokenizer, sample)
    scores = np.array([vowels(asked, firsts), vowels(asked, seconds)], np.float32)
    return np.moveaxis(scores.reshape(2, *sample.measure.shape), 0, -1)


def reinforce_leave_one_out(beta: float) -> Callable[..., jax.Array]:
    """Returns RLOO's loss for labels `[B, M, 2]` that are the answers' scores (arXiv 2402.14740)."""

    def loss(log_prob, labelled, frozen):
        del frozen
        sample, scores = labelled.sample, labelled.labels
        own = jnp.sum(log_prob, axis=-1)
        drawn, reference = (jnp.sum(part, axis=-1) for part in (sample.behaviour_log_prob, sample.reference_log_prob))
        reward = scores - beta * (drawn - reference)
        count = scores.shape[1] * 2
        others = (jnp.sum(reward, axis=(1, 2), keepdims=True) - reward) / (count - 1)
        return -jnp.mean((reward - others) * jnp.exp(own - drawn))

    return loss


def online_dpo(config: Config, task: Task) -> Compared:
    """Two answers a prompt; the better one is chosen."""
    task = task.first(config.answers // 2)
    problem = problem_of(config, task, objectives.likelihood(), pairs=1, against_reference=False)
    algorithm = direct_preference(problem, dpo(beta=config.beta), adamw(config.rate))

    def labels_of(sample):
        scores = scores_of(task, sample)
        return jnp.asarray(scores[..., :1] >= scores[..., 1:], jnp.float32)

    ours = iteration(algorithm, (), task, labels_of)
    sides = Side("ours", lambda: float(ours().loss)), side("TRL OnlineDPOTrainer", trl_online_dpo(config, task))
    warmed = warm_up(sides)
    losses = [seen.results[0] for seen in warmed if seen.results]
    agreed = agree("losses at the reference are log 2", losses, [math.log(2.0)] * len(losses), tolerance=1e-4)
    what = f"online DPO, {len(task.texts)} prompts x 2 answers of {config.new_tokens} tokens"
    return Compared(what, alternate(sides, rounds=config.rounds, warmed=warmed), agreed, goal=3.0)


def trl_online_dpo(config: Config, task: Task) -> Callable[[], Callable[[], Any]]:
    """Returns what makes the step of TRL's `OnlineDPOTrainer`."""

    def make():
        from datasets import Dataset  # pyright: ignore[reportMissingImports]
        from trl.experimental.online_dpo import (  # pyright: ignore[reportMissingImports]
            OnlineDPOConfig,
            OnlineDPOTrainer,
        )

        lengths = {"max_new_tokens": config.new_tokens, "max_length": 512, "temperature": 1.0}
        trainer = OnlineDPOTrainer(
            torch_policy(config.policy),
            reward_funcs=vowels,
            args=trainers.trl_settings(OnlineDPOConfig, config.rate, beta=config.beta, **lengths),
            train_dataset=Dataset.from_dict({"prompt": task.texts}),
            processing_class=trainers.trl_tokenizer(config.policy),
        )
        return trainers.trl_step(trainer, {"prompt": task.texts})

    return make


def rloo(config: Config, task: Task) -> Compared:
    """A group of answers a prompt, each compared with the others of its group."""
    task = task.first(config.answers // config.group)
    settings = {"pairs": config.group // 2, "against_reference": False}
    problem = problem_of(config, task, objectives.likelihood(), **settings)
    algorithm = policy_algorithm(problem, reinforce_leave_one_out(config.beta), adamw(config.rate))
    ours = iteration(algorithm, (), task, lambda sample: jnp.asarray(scores_of(task, sample)))

    def trl():
        from datasets import Dataset  # pyright: ignore[reportMissingImports]
        from trl import RLOOConfig, RLOOTrainer  # pyright: ignore[reportMissingImports]

        sizes = {"per_device_train_batch_size": config.answers, "num_generations": config.group}
        trainer = RLOOTrainer(
            torch_policy(config.policy),
            reward_funcs=vowels,
            args=trainers.trl_settings(
                RLOOConfig, config.rate, beta=config.beta, max_completion_length=config.new_tokens, **sizes
            ),
            train_dataset=Dataset.from_dict({"prompt": task.texts}),
            processing_class=trainers.trl_tokenizer(config.policy),
        )
        return trainers.trl_step(trainer, [{"prompt": text} for text in task.texts for _ in range(config.group)])

    sides = Side("ours", lambda: float(ours().loss)), side("TRL RLOOTrainer", trl)
    warmed = warm_up(sides)
    losses = [seen.results[0] for seen in warmed if seen.results]
    agreed = agree("losses at the reference are 0", losses, [0.0] * len(losses), tolerance=1e-4)
    what = f"RLOO, {len(task.texts)} prompts x {config.group} answers of {config.new_tokens} tokens"
    return Compared(what, alternate(sides, rounds=config.rounds, warmed=warmed), agreed, goal=3.0)


def bilevel_iteration(config: Config, task: Task) -> Compared:
    """The bilevel step of `jaxrlhf align`, an answer of the policy and one of the reference a pair, beside online DPO."""
    pairs = 4
    asked = task.first(config.answers // (2 * pairs))
    objective = objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=0.05))
    problem = problem_of(config, asked, objective, pairs=pairs)
    solver = bilevel.tangent(optax.adam(2e-4), optax.adam(1e-5))
    algorithm = bilevel.bilevel_descent(problem, bilevel.central(), solver, optax.adam(1e-3), beta=0.2)
    annotate = annotation.host_scorer(asked.opened.model.words.tokenizer, vowels, "vowels")
    upper = reward_model(asked.opened.policy).from_trunk(asked.opened.params)
    ours = iteration(algorithm, upper, asked, lambda sample: annotate(jax.random.key(2), sample))
    peer = side("TRL OnlineDPOTrainer", trl_online_dpo(config, task.first(config.answers // 2)))
    what = f"bilevel iteration with its reward model, {config.answers} answers of {config.new_tokens} tokens"
    return Compared(what, alternate((Side("ours", ours), peer), rounds=config.rounds), goal=3.0)


def main(config: Config) -> pathlib.Path:
    """Prints and writes the table; returns its folder."""
    use_all_cores(devices=True)
    seen, task = machine(), task_of(config)
    found = [make(config, task) for make in (online_dpo, rloo, bilevel_iteration)]
    tables = [table_of("A whole online iteration", found)]
    return report(config, "online", tables, found, seen, notes=checks(found))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
