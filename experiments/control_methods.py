"""The learners of `control.py`: one loop, in which every method is a choice of parts.

An outer step draws pairs of episodes by the policy and by a copy of it, asks for labels of some, fits the reward to all
labels so far, and moves the policy on the learned reward by a critic's advantages. Bilevel methods then move the reward
once more, by the hypergradient of the policy's wins.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from control_tasks import Task

from jaxrlhf import bilevel, objectives, preferences
from jaxrlhf.algorithms.actor_critic import actor_critic
from jaxrlhf.algorithms.reward_learning import RewardState, fit, reward_learning
from jaxrlhf.bilevel import HypergradientRule, Labelled, Sample
from jaxrlhf.mdp.exploration import state_entropy_bonus
from jaxrlhf.mdp.trajectories import FrozenPolicies, gold_score, trajectory_problem
from jaxrlhf.preferences import buffer as preference_buffer


class Method(NamedTuple):
    """What tells the learners apart.

    Attributes:
        reward: "learned" from labels as they come, "offline" from the reference's episodes before the policy moves, or
            "gold", the oracle's.
        rule: how the policy's answer is followed; the default is not to.
        objective: what the rule descends: "utility" or "brier".
        members: reward networks; the policy follows their mean.
        disagreement: whether labels are asked for where the members disagree, or at random.
        replay: the latest batches of episodes that the policy learns from, each with today's reward.
        exploration: outer steps of state entropy in place of reward, before anything is asked.
    """

    reward: str = "learned"
    rule: HypergradientRule = bilevel.decoupled()
    objective: str = "utility"
    members: int = 1
    disagreement: bool = False
    replay: int = 1
    exploration: int = 0


PEBBLE = Method(members=3, disagreement=True, replay=2, exploration=5)
METHODS = {
    "oracle": Method(reward="gold"),
    "oracle, replay": Method(reward="gold", replay=2),
    "offline": Method(reward="offline"),
    "iterated": Method(),
    "iterated, entropy first": Method(exploration=5),
    "iterated, ensemble": Method(members=3),
    "iterated, disagreement": Method(members=3, disagreement=True),
    "iterated, replay": Method(replay=2),
    "iterated, all of PEBBLE": PEBBLE,
    "bilevel central": Method(rule=bilevel.central(0.2)),
    "bilevel forward": Method(rule=bilevel.forward(0.2)),
    "bilevel Brier": Method(rule=bilevel.central(0.2), objective="brier"),
    "bilevel, entropy first": Method(rule=bilevel.central(0.2), exploration=5),
    "bilevel, all of PEBBLE": PEBBLE._replace(rule=bilevel.central(0.2)),
    "bilevel, disagreement": Method(rule=bilevel.central(0.2), members=3, disagreement=True),
}
"""By the name on the command line."""


class Budget(NamedTuple):
    """What every method may spend, and how.

    Attributes:
        pairs: of episodes, drawn an outer step.
        labels: asked for an outer step.
        first_steps: outer steps in which the policy stands still, and every pair is asked about.
        inner_steps: of the policy on each batch.
        fit_steps: of the reward, each on `fit_size` labels drawn from those kept.
        fit_size: see there.
        policy_learning_rate: of Adam.
        critic_learning_rate: of Adam.
        fit_learning_rate: of Adam.
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


class Curves(NamedTuple):
    """What a run reports, leaves `[outer_steps]`; before the first update of the step.

    Attributes:
        returns: true return of the policy's episodes, not discounted.
        steps: environment steps taken, from both episodes of all pairs.
        labels: bought.
        agreement: share of the drawn pairs that the learned reward orders as the true one does.
        kl: to the reference, in nats.
        ess_fraction: of the tilts.
        coupling_share: of the hypergradient.
    """

    returns: jax.Array
    steps: jax.Array
    labels: jax.Array
    agreement: jax.Array
    kl: jax.Array
    ess_fraction: jax.Array
    coupling_share: jax.Array


class Learner(NamedTuple):
    """Carried from one outer step to the next.

    Attributes:
        members: the fit's states, leaves `[members, ...]`.
        buffer: every label bought.
        descent: reward (the members again) and policy.
        recent: the latest batches of episodes, `[1, replay * pairs, ...]`.
    """

    members: RewardState
    buffer: preference_buffer.PreferenceBuffer
    descent: bilevel.BilevelState
    recent: Sample


def coupled_objective(name: str, beta: float, share: float) -> objectives.Objective:
    """Returns an upper objective for pairs of which only a share is labelled, unbiased."""
    whole = {"utility": objectives.utility(kl_price=beta / 4), "brier": objectives.brier()}[name]

    def pair_cost(returns, labels):
        return jax.tree.map(lambda part: part / share, whole.pair_cost(returns, labels))

    return whole._replace(pair_cost=pair_cost)


def slide(recent: Sample, latest: Sample) -> Sample:
    """Returns the recent pairs with the oldest gone and the latest behind, `[1, N, ...]`."""
    count, fresh = recent.measure.shape[1], latest.measure.shape[1]

    def push(old, new):
        return jnp.concatenate([old[:, fresh:], new], axis=1)

    moved = jax.tree.map(
        push, *(each._replace(prompts=None, from_policy=None, num_draws=None) for each in (recent, latest))
    )
    return moved._replace(
        prompts=latest.prompts,
        measure=jnp.full_like(recent.measure, 1.0 / count),
        from_policy=latest.from_policy,
        num_draws=jnp.full_like(latest.num_draws, count),
    )


def repeated(sample: Sample, times: int) -> Sample:
    """Returns the pairs several times over, to begin with."""
    pairs = sample._replace(prompts=None, from_policy=None, num_draws=None)
    many = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * times, axis=1), pairs)
    return many._replace(prompts=sample.prompts, from_policy=sample.from_policy, num_draws=sample.num_draws)


def held(state: bilevel.BilevelState) -> FrozenPolicies:
    """Returns the frozen policies of a step: the opponent is the policy itself."""
    return FrozenPolicies((), state.policy)


def collecting_steps(task: Task, method: Method, budget: Budget) -> int:
    """Returns the steps in which every pair is asked about, such that all methods buy equally many labels.

    Raises:
        ValueError: no number of steps does.
    """
    if method.reward == "gold":
        return 0
    every, some = budget.pairs, budget.labels
    total = budget.first_steps * every + (task.outer_steps - budget.first_steps) * some
    if method.reward == "offline":
        missing, a_step = total, every
    else:
        missing, a_step = budget.first_steps * (every - some) + method.exploration * some, every - some
    if a_step < 1 or missing % a_step:
        raise ValueError(f"{total} labels cannot be bought in whole steps; give half as many labels a step as pairs.")
    if missing // a_step + method.exploration >= task.outer_steps:
        raise ValueError(f"{task.outer_steps} outer steps leave none to learn in; take more, or fewer first steps.")
    return missing // a_step


def member_reward(task: Task):
    """Returns the reward of one member, as a problem's `reward`."""

    def reward(member, sample, frozen):
        del frozen
        return task.reward(member, sample.responses.observations, sample.responses.actions)

    return reward


def mean_reward(task: Task, method: Method):
    """Returns the reward that the policy follows: the members' mean, or the true one for the oracle."""
    one = member_reward(task)

    def reward(members, sample, frozen):
        if method.reward == "gold":
            return task.scale * sample.responses.gold
        return jnp.mean(jax.vmap(lambda member: one(member, sample, frozen))(members), axis=0)

    return reward


def entropy_reward(task: Task):
    """Returns the reward of going where few have been."""

    def reward(members, sample, frozen):
        del members, frozen
        return state_entropy_bonus(task.units * sample.responses.observations, sample.cumulative_discount > 0)

    return reward


def problem_of(task: Task, budget: Budget, objective: objectives.Objective, reward: Callable) -> bilevel.BilevelProblem:
    """Returns the task as a bilevel problem whose pairs are the policy's and its copy's."""
    problem = trajectory_problem(
        task.environment, task.actor, task.reward, objective, reference=task.reference, pairs=budget.pairs,
        steps=task.steps, gamma=task.gamma, segment=task.segment, against="opponent",
    )  # fmt: skip
    return problem._replace(reward=lambda *given: jnp.where(given[1].discount > 0, reward(*given), 0.0))


def descent_on(task: Task, method: Method, budget: Budget, reward: Callable, critic) -> bilevel.BilevelAlgorithm:
    """Returns what moves the policy on a reward, by a critic's advantages, and the reward by the method's rule."""
    asked = budget.labels // labels_a_pair(method)
    share = asked / (budget.pairs * method.replay)
    problem = problem_of(task, budget, coupled_objective(method.objective, task.beta, share), reward)
    slope = actor_critic(
        problem, lambda critic, sample, frozen: task.value(critic, sample.responses.observations), critic,
        optax.adam(budget.critic_learning_rate), beta=task.beta, every_response=True,
    )  # fmt: skip
    solver = bilevel.tangent(
        optax.adam(budget.policy_learning_rate),
        optax.adam(budget.tangent_learning_rate),
        steps=budget.inner_steps,
        slope=slope,
    )
    follows = len(method.rule.stencil.offsets) > 1
    upper_optimizer = optax.adam(budget.coupled_learning_rate) if follows else optax.set_to_zero()
    return bilevel.bilevel_descent(problem, method.rule, solver, upper_optimizer, beta=task.beta)


def returns_of(reward: Callable, upper, sample: Sample) -> jax.Array:
    """Returns what both segments of each pair are worth, `[..., 2]`."""
    return jnp.sum(sample.responses.window * reward(upper, sample, ()), axis=-1)


def in_doubt(task: Task, members, sample: Sample, count: int) -> jax.Array:
    """Returns the pairs on whose order the members disagree most, `[count]`."""
    returns = jax.vmap(lambda member: returns_of(member_reward(task), member, sample))(members)
    doubt = jnp.std(jax.nn.sigmoid(returns[..., 0] - returns[..., 1]), axis=0)
    return jax.lax.top_k(doubt[0], count)[1]


def report(reward: Callable, upper, sample: Sample, info: bilevel.BilevelInfo, labels: int) -> Curves:
    """Returns a step's row of the curves."""
    gained, guessed = gold_score(sample, ()), returns_of(reward, upper, sample)
    differ = gained[..., 0] != gained[..., 1]
    same = (gained[..., 0] > gained[..., 1]) == (guessed[..., 0] > guessed[..., 1])
    return Curves(
        returns=jnp.mean(jnp.sum(sample.responses.gold[:, :, 0], axis=-1)),
        steps=jnp.sum(sample.cumulative_discount > 0),
        labels=jnp.asarray(labels),
        agreement=jnp.sum(same & differ) / jnp.sum(differ),
        kl=info.kl,
        ess_fraction=info.ess_fraction,
        coupling_share=info.coupling_share,
    )


def labels_a_pair(method: Method) -> int:
    """Returns how many labels its objective needs."""
    return 2 if method.objective == "brier" else 1


def trainer(task: Task, method: Method, budget: Budget, annotator: Callable[[int], preferences.Annotator]):
    """Returns `key -> Curves`, of one run; `annotator` makes one from the number of labels a pair."""
    twice, collecting = labels_a_pair(method), collecting_steps(task, method, budget)
    every, some = budget.pairs // twice, budget.labels // twice
    annotate, reward = annotator(twice), mean_reward(task, method)
    plain_fit = problem_of(task, budget, objectives.likelihood(coupled=False), member_reward(task))
    learning = reward_learning(plain_fit, optax.adam(budget.fit_learning_rate))
    fit_one = functools.partial(fit, frozen=(), size=budget.fit_size, steps=budget.fit_steps)

    def sample_of(key, learner):
        return plain_fit.sample(key, learner.descent.policy, None, held(learner.descent))

    def unlabelled(sample):
        return Labelled(sample, jnp.full((*sample.measure.shape, twice), bilevel.SKIPPED))

    def ask(key, learner, sample, indices):
        """Buys labels of some pairs: the learner who keeps them, and the answers `[N, twice]`."""
        rows = preference_buffer.take(preference_buffer.rows(sample), indices)
        answers = annotate(key, rows, ())
        buffer = preference_buffer.add(learner.buffer, Labelled(rows, answers))
        return learner._replace(buffer=buffer), answers[:, 0]

    def move(key, descent, learner, labelled):
        """Moves policy and reward; the learner, and what the step says of itself."""
        state, info = descent.update(key, learner.descent, labelled, held(learner.descent))
        return learner._replace(descent=state, recent=labelled.sample), info

    def train(key):
        first_key, key = jax.random.split(key)
        _, lower, critic = task.first(first_key)
        members = jax.vmap(lambda key: task.first(key)[0])(jax.random.split(first_key, method.members))
        descent = descent_on(task, method, budget, reward, critic)
        exploring = descent_on(task, method, budget, entropy_reward(task), critic)

        def explore(learner, key):
            """The policy learns to go everywhere."""
            sample = sample_of(key, learner)
            moved, info = move(key, exploring, learner, unlabelled(slide(learner.recent, sample)))
            kept = moved._replace(descent=moved.descent._replace(upper=learner.descent.upper))
            return kept, report(reward, learner.descent.upper, sample, info, 0)

        def collect(learner, key):
            """Every pair is asked about, and nothing is learned yet."""
            sample_key, label_key = jax.random.split(key)
            sample = sample_of(sample_key, learner)
            _, info = move(key, descent, learner, unlabelled(slide(learner.recent, sample)))
            learner, _ = ask(label_key, learner, sample, jnp.arange(every))
            return learner, report(reward, learner.descent.upper, sample, info, every * twice)

        def learn(learner, key):
            """Asks, fits the reward to all labels, moves the policy, and the reward again where it is coupled."""
            sample_key, choose_key, label_key, fit_key, update_key = jax.random.split(key, 5)
            sample, before, bought = sample_of(sample_key, learner), learner.descent.upper, 0
            labelled, fitted = unlabelled(slide(learner.recent, sample)), learner.members
            if method.reward == "learned":
                shuffled = jax.random.permutation(choose_key, budget.pairs)[:some]
                indices = in_doubt(task, before, sample, some) if method.disagreement else shuffled
                learner, answers = ask(label_key, learner, sample, indices)
                # The fresh pairs stand behind the older ones.
                labelled = labelled._replace(labels=labelled.labels.at[0, indices - budget.pairs].set(answers))
                bought = some * twice
            if method.reward != "gold":
                fitted, _ = jax.vmap(lambda key, member: fit_one(key, learning, member, learner.buffer))(
                    jax.random.split(fit_key, method.members), fitted
                )
            learner = learner._replace(descent=learner.descent._replace(upper=fitted.upper))
            learner, info = move(update_key, descent, learner, labelled)
            fitted = fitted._replace(upper=learner.descent.upper)
            return learner._replace(members=fitted), report(reward, before, sample, info, bought)

        start_key, explore_key, collect_key, learn_key = jax.random.split(key, 4)
        state = descent.init(key, members, lower)
        example = plain_fit.sample(start_key, lower, None, held(state))
        capacity = collecting * every + task.outer_steps * some
        learner = Learner(
            members=jax.vmap(learning.init)(members),
            buffer=preference_buffer.empty(preference_buffer.rows(example), labels=twice, capacity=capacity),
            descent=state,
            recent=repeated(example, method.replay),
        )
        left = task.outer_steps - method.exploration - collecting
        phases = (
            (explore, explore_key, method.exploration),
            (collect, collect_key, collecting),
            (learn, learn_key, left),
        )
        curves = []
        for step, phase_key, count in phases:
            if count:
                learner, seen = jax.lax.scan(step, learner, jax.random.split(phase_key, count))
                curves.append(seen)
            if step is explore:
                # What explored was the policy; its optimisers and critic start again.
                learner = learner._replace(descent=descent.init(key, members, learner.descent.policy))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *curves)

    return train
