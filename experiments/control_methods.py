"""The methods of `control.py`, and the objective, reward and descent that each implies.

All methods run the same loop (`control_training.py`) and differ in the fields of `Method`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from control_tasks import Task

from jaxrlhf import bilevel, objectives
from jaxrlhf.algorithms.actor_critic import actor_critic
from jaxrlhf.bilevel import HypergradientRule
from jaxrlhf.control import ensembles
from jaxrlhf.control.pairs import Criterion, share_labelled
from jaxrlhf.mdp.trajectories import trajectory_problem


class Method(NamedTuple):
    """What distinguishes the learners.

    Attributes:
        reward: "learned" from labels collected online, "offline" from labels of the reference's episodes before the policy
            is trained, or "gold": the oracle trains on the true reward.
        rule: the hypergradient rule; the default, `decoupled`, ignores how the policy responds to the reward.
        objective: the upper objective that the rule descends: "utility" or "brier".
        members: size of the reward ensemble; the policy is trained on its mean.
        query: which pairs to label: "uniform" draws them, "disagreement" takes those on which the ensemble disagrees most.
        replay: number of recent batches of episodes that the policy trains on, each scored by the current reward.
        exploration: initial outer steps that maximise state entropy instead of reward; no labels are bought in them.
    """

    reward: str = "learned"
    rule: HypergradientRule = bilevel.decoupled()
    objective: str = "utility"
    members: int = 1
    query: Criterion = "uniform"
    replay: int = 1
    exploration: int = 0

    @property
    def labels_per_pair(self) -> int:
        """Labels that the objective needs for each pair."""
        return 2 if self.objective == "brier" else 1


PEBBLE = Method(members=3, query="disagreement", replay=2, exploration=5)
METHODS = {
    "oracle": Method(reward="gold"),
    "oracle, replay": Method(reward="gold", replay=2),
    "offline": Method(reward="offline"),
    "iterated": Method(),
    "iterated, entropy first": Method(exploration=5),
    "iterated, ensemble": Method(members=3),
    "iterated, disagreement": Method(members=3, query="disagreement"),
    "iterated, replay": Method(replay=2),
    "iterated, all of PEBBLE": PEBBLE,
    "bilevel central": Method(rule=bilevel.central(0.2)),
    "bilevel forward": Method(rule=bilevel.forward(0.2)),
    "bilevel Brier": Method(rule=bilevel.central(0.2), objective="brier"),
    "bilevel, entropy first": Method(rule=bilevel.central(0.2), exploration=5),
    "bilevel, all of PEBBLE": PEBBLE._replace(rule=bilevel.central(0.2)),
    "bilevel, disagreement": Method(rule=bilevel.central(0.2), members=3, query="disagreement"),
}
"""Methods by their name on the command line."""


class Budget(NamedTuple):
    """What every method may spend, and its learning rates.

    Attributes:
        pairs: pairs of episodes drawn per outer step.
        labels: labels bought per outer step.
        first_steps: initial outer steps in which every pair is labelled and the policy is not updated.
        inner_steps: policy steps on each batch.
        fit_steps: reward steps per outer step, each on `fit_size` labels drawn from the buffer.
        fit_size: batch size of a reward step.
        policy_learning_rate: of Adam.
        critic_learning_rate: of Adam.
        fit_learning_rate: of Adam, for the reward's fit.
        coupled_learning_rate: of Adam on the hypergradient.
        tangent_learning_rate: of Adam on the tangent.
    """

    pairs: int = 16
    labels: int = 8
    first_steps: int = 20
    inner_steps: int = 10
    fit_steps: int = 20
    fit_size: int = 32
    policy_learning_rate: float = 3e-3
    critic_learning_rate: float = 1e-2
    fit_learning_rate: float = 3e-3
    coupled_learning_rate: float = 3e-3
    tangent_learning_rate: float = 1e-3


def collecting_steps(task: Task, method: Method, budget: Budget) -> int:
    """Returns the number of steps that label every pair, chosen so that all methods buy equally many labels.

    Raises:
        ValueError: no whole number of steps gives that total.
    """
    if method.reward == "gold":
        return 0
    pairs, labels = budget.pairs, budget.labels
    total = budget.first_steps * pairs + (task.outer_steps - budget.first_steps) * labels
    if method.reward == "offline":
        missing, per_step = total, pairs
    else:
        missing, per_step = budget.first_steps * (pairs - labels) + method.exploration * labels, pairs - labels
    if per_step < 1 or missing % per_step:
        raise ValueError(f"{total} labels cannot be bought in whole steps; give half as many labels a step as pairs.")
    if missing // per_step + method.exploration >= task.outer_steps:
        raise ValueError(f"{task.outer_steps} outer steps leave none to learn in; take more, or fewer first steps.")
    return missing // per_step


def coupled_objective(name: str, beta: float, labelled_fraction: float) -> objectives.Objective:
    """Returns the upper objective, unbiased when only a fraction of the pairs is labelled."""
    objective = {"utility": objectives.utility(kl_price=beta / 4), "brier": objectives.brier()}[name]
    return share_labelled(objective, labelled_fraction)


def policy_reward(task: Task, method: Method) -> ensembles.SampleReward:
    """Returns the reward that the policy is trained on: the ensemble's mean, or the true one for the oracle."""
    if method.reward == "gold":
        return lambda members, sample, frozen: task.scale * sample.responses.gold
    return ensembles.mean_of(ensembles.of_samples(task.reward))


def problem_of(task: Task, budget: Budget, objective: objectives.Objective, reward: Callable) -> bilevel.BilevelProblem:
    """Returns the task as a bilevel problem on pairs of the policy and a frozen copy of it."""
    problem = trajectory_problem(
        task.environment, task.actor, task.reward, objective, reference=task.reference, pairs=budget.pairs,
        steps=task.steps, gamma=task.gamma, segment=task.segment, against="opponent",
    )  # fmt: skip

    def masked_reward(upper, sample, frozen):
        return jnp.where(sample.cumulative_discount > 0, reward(upper, sample, frozen), 0.0)

    return problem._replace(reward=masked_reward)


def descent_on(task: Task, method: Method, budget: Budget, reward: Callable, critic) -> bilevel.Algorithm:
    """Returns the algorithm that trains the policy on a reward by a critic's advantages, and the reward by the rule.

    Args:
        task, method, budget: what is run.
        reward: the policy's reward, as a problem's `reward`.
        critic: initial parameters of the critic.
    """
    labelled_fraction = budget.labels // method.labels_per_pair / (budget.pairs * method.replay)
    objective = coupled_objective(method.objective, task.beta, labelled_fraction)
    problem = problem_of(task, budget, objective, reward)
    policy_gradient = actor_critic(
        problem, lambda critic, sample, frozen: task.value(critic, sample.responses.observations), critic,
        optax.adam(budget.critic_learning_rate), beta=task.beta, every_response=True,
    )  # fmt: skip
    solver = bilevel.tangent(
        optax.adam(budget.policy_learning_rate),
        optax.adam(budget.tangent_learning_rate),
        steps=budget.inner_steps,
        policy_gradient=policy_gradient,
    )
    coupled = len(method.rule.stencil.offsets) > 1
    upper_optimizer = optax.adam(budget.coupled_learning_rate) if coupled else optax.set_to_zero()
    return bilevel.bilevel_descent(problem, method.rule, solver, upper_optimizer, beta=task.beta)
